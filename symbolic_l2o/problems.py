"""Optimizees as functions of one flat vector, with seeded minibatches (spec c.1, d, g)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from common import distributed
from common.data import ImageSet, pixels
from common.runs import generator
from symbolic_l2o.models import mlp, resnet, small_conv

Batch = tuple[Tensor, Tensor]
Init = float | str  # standard deviation of every weight and bias, or "default": torch's own


class Problem:
    """A network's loss as a function of all its trainable parameters in one flat vector x (P,).

    Running statistics of batch norm live in the module and move at every loss.

    Args:
        module: of the optimizee, in training mode.
        images: inputs (n, ...), float.
        labels: (n,).
        init: see `Init`.
        batch_size: over all ranks together.
        loss_fn: (output, labels) -> scalar.
    """

    def __init__(
        self,
        module: nn.Module,
        images: Tensor,
        labels: Tensor,
        init: Init = "default",
        batch_size: int = 128,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        if not any(p.requires_grad for p in module.parameters()):
            raise ValueError("module must have trainable parameters, got none")
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"batch_size must be in [1, {len(images)}], the images, got {batch_size}")
        self.module, self.images, self.labels = module.train(), images, labels
        self.spread, self.batch_size, self.loss_fn = init, batch_size, loss_fn
        self.shapes = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
        self.size = sum(shape.numel() for shape in self.shapes.values())
        self._buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def init(self, rng: torch.Generator) -> Tensor:
        """A fresh x (P,); running statistics start anew."""
        for name, buffer in self.module.named_buffers():
            buffer.copy_(self._buffers[name])
        if not isinstance(self.spread, str):
            return self.spread * torch.randn(self.size, generator=rng).to(self.images)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=rng)))
            for part in self.module.modules():
                if callable(reset := getattr(part, "reset_parameters", None)) and not list(part.buffers(False)):
                    reset()
        found = [p.detach().flatten() for p in self.module.parameters() if p.requires_grad]
        return torch.cat(found).clone()

    def unflatten(self, x: Tensor) -> dict[str, Tensor]:
        """Parameters by name, views of x (P,)."""
        parts = x.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def loss(self, x: Tensor, batch: Batch) -> Tensor:
        """Mean loss of a minibatch (inputs, labels) at x (P,)."""
        return self.loss_fn(functional_call(self.module, self.unflatten(x), (batch[0],)), batch[1])

    def batch(self, *keys: int) -> Batch:
        """This rank's part of the minibatch that belongs to `keys`, drawn without replacement."""
        rows = torch.randperm(len(self.images), generator=generator(*keys))[: self.batch_size]
        rows = distributed.shard(rows).to(self.images.device)
        return self.images[rows], self.labels[rows]

    def gradient(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and gradient (P,) at x, means over the ranks; no graph is left behind."""
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.loss(leaf, batch)
            (g,) = torch.autograd.grad(loss, leaf)
        found = [loss.detach().reshape(1), g]
        distributed.average_(found)
        return found[0][0], g

    def gradients(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses (R,) and gradients (R, P) of replicas x (R, P) on batches (R, batch, ...), in one call.

        The module must keep no running statistics.
        """
        found, losses = vmap(grad_and_value(self.loss))(x, batch)
        return losses, found

    @torch.no_grad()
    def full(self, x: Tensor, images: Tensor, labels: Tensor, size: int = 1000) -> tuple[float, float]:
        """Mean loss and accuracy in percent on all of `images`."""
        loss, right = 0.0, 0
        for inputs, targets in zip(images.split(size), labels.split(size), strict=True):
            out = functional_call(self.module, self.unflatten(x), (inputs,))
            loss += float(self.loss_fn(out, targets)) * len(targets)
            right += int((out.argmax(1) == targets).sum())
        return loss / len(labels), 100 * right / len(labels)

    def tensor_of(self) -> Tensor:
        """The number of the parameter tensor that each coordinate belongs to, (P,)."""
        sizes = torch.tensor([shape.numel() for shape in self.shapes.values()])
        return torch.arange(len(sizes)).repeat_interleave(sizes)


@dataclass(frozen=True)
class Recipe:
    """How a named problem is built from the shape of an image and the number of classes."""

    build: Callable[[int, int, int], nn.Module]
    init: Init


def _mlp(hidden: list[int], activation: Callable[[], nn.Module]) -> Callable[[int, int, int], nn.Module]:
    return lambda channels, side, classes: mlp([channels * side * side, *hidden, classes], activation)


RECIPES: Mapping[str, Recipe] = {
    "sig": Recipe(_mlp([20], nn.Sigmoid), 0.01),
    "relu01": Recipe(_mlp([20], nn.ReLU), 0.1),
    "relu3": Recipe(_mlp([30, 20], nn.ReLU), 0.1),
    "tanh": Recipe(_mlp([40], nn.Tanh), 0.05),
    "conv": Recipe(small_conv, "default"),
    "mlp_mnist": Recipe(_mlp([30, 20], nn.ReLU), 0.01),  # the paper's optimizee of meta-training
    "mlp_mnist2": Recipe(_mlp([50, 20, 20, 12], nn.ReLU), 0.01),
    "resnet20": Recipe(lambda channels, side, classes: resnet(channels, classes), "default"),
}


def half_size(images: Tensor) -> Tensor:
    """uint8 images (n, c, h, w) as floats in [-0.5, 0.5], averaged over 2x2 pixels."""
    return F.avg_pool2d(pixels(images) - 0.5, 2)


def make_problem(name: str, data: ImageSet, batch_size: int = 128, shrink: bool = True) -> Problem:
    """The problem of RECIPES on these images. Raises ValueError for an unknown name, or images that do not fit."""
    if name not in RECIPES:
        raise ValueError(f"problem must be one of {', '.join(RECIPES)}, got {name!r}")
    raw = data.images
    if not isinstance(raw, Tensor) or raw.shape[2] != raw.shape[3]:
        raise ValueError("images must be square and in memory")
    images = half_size(raw) if shrink else pixels(raw) - 0.5
    module = RECIPES[name].build(images.shape[1], images.shape[2], data.classes)
    return Problem(module, images, data.labels, RECIPES[name].init, batch_size)


def random_scale(size: int, bound: float, rng: torch.Generator) -> Tensor:
    """r (P,) with ln r uniform in [-bound, bound]: minimising f(r x) from x / r rescales every gradient by r."""
    return torch.exp((2 * torch.rand(size, generator=rng) - 1) * bound)
