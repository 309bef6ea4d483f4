"""Optimizees: R copies of a network at once, parameters flat (R, n), each with its own minibatch (spec c5, d, h7).

Losses of different copies never mix: a batch of copies equals separate runs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from common.config import require
from common.data import ImageSet, Splits, pixels
from optimizer_amalgamation.models import MODULES, RECIPES, chain, glorot, is_chain

Batch = tuple[Tensor, Tensor]
PROBLEMS = (*RECIPES, *MODULES)
SAMPLES = 1024  # at most so many at once where no gradient is needed


@dataclass(frozen=True)
class Problem:
    """What an optimizer minimises.

    Args:
        name: of the network.
        sample_losses: (parameters (R, n), (inputs (R, B, ...), labels (R, B))) -> losses (R, B) of every sample.
        init: generator -> fresh parameters (n,).
        shapes: of the n parameters' tensors, in order.
        inputs, labels: to train on, (N, ...) and (N,).
        held_out: inputs and labels of the validation loss.
        batch_size: B.
        samplewise: whether a sample's loss does not depend on the others of its batch.
        set_training: called with whether batch norm shall use its batch's statistics.
    """

    name: str
    sample_losses: Callable[[Tensor, Batch], Tensor]
    init: Callable[[torch.Generator], Tensor]
    shapes: tuple[torch.Size, ...]
    inputs: Tensor
    labels: Tensor
    held_out: Batch
    batch_size: int = 128
    samplewise: bool = True
    set_training: Callable[[bool], Any] = bool

    @property
    def sizes(self) -> list[int]:
        """Coordinates of each tensor; their sum is n."""
        return [shape.numel() for shape in self.shapes]

    @property
    def size(self) -> int:
        """n."""
        return sum(self.sizes)

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        """Mean loss (R,) of each copy on its minibatch."""
        return self.sample_losses(params, batch).mean(1)

    def batch(self, rows: Tensor) -> Batch:
        """The minibatches of rows (R, B)."""
        flat = rows.reshape(-1)
        inputs, labels = self.inputs.index_select(0, flat), self.labels.index_select(0, flat)
        return inputs.view(*rows.shape, *inputs.shape[1:]), labels.view(rows.shape)

    def draw(self, unroll: int, generator: torch.Generator) -> Tensor:
        """Rows (unroll, B): without repetition, or permutation after permutation where there are fewer samples."""
        count, wanted = len(self.inputs), unroll * self.batch_size
        orders = [torch.randperm(count, generator=generator) for _ in range(math.ceil(wanted / count))]
        return torch.cat(orders)[:wanted].view(unroll, self.batch_size)


def gradients(problem: Problem, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses (R,) and their gradients (R, n) at params (R, n); no graph is left."""
    leaf = params.detach().requires_grad_()
    with torch.enable_grad():
        losses = problem.losses(leaf, batch)
        (found,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), found


def curvature(problem: Problem, params: Tensor, batch: Batch, vectors: Tensor) -> Tensor:
    """Hessian of each copy's loss at params (R, n) times its vector (R, n)."""
    leaf = params.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(problem.losses(leaf, batch).sum(), leaf, create_graph=True)
        if not found.requires_grad:  # a linear loss
            return torch.zeros_like(vectors)
        (product,) = torch.autograd.grad(found, leaf, vectors, allow_unused=True)
    return torch.zeros_like(vectors) if product is None else product


@torch.no_grad()
def batch_losses(problem: Problem, params: Tensor, rows: Tensor) -> Tensor:
    """Losses (N, R) at params (R, n) on all minibatches of rows (N, R, B), by few forwards where that is exact."""
    if not problem.samplewise:
        return torch.stack([problem.losses(params, problem.batch(some)) for some in rows])
    _, copies, size = rows.shape
    found = []
    for some in rows.split(max(SAMPLES // (copies * size), 1)):
        joined = some.transpose(0, 1).reshape(copies, -1)
        losses = problem.sample_losses(params, problem.batch(joined))
        found.append(losses.view(copies, len(some), size).mean(2).t())
    return torch.cat(found)


@torch.no_grad()
def validation_losses(problem: Problem, params: Tensor) -> Tensor:
    """Mean loss (R,) of each copy on all held-out samples."""
    inputs, labels = problem.held_out
    problem.set_training(False)
    total = torch.zeros(len(params), dtype=torch.float64)
    size = max(SAMPLES // len(params), 1)
    for some, targets in zip(inputs.split(size), labels.split(size), strict=True):
        batch = (some.expand(len(params), *some.shape), targets.expand(len(params), -1))
        total += problem.sample_losses(params, batch).sum(1, dtype=torch.float64)
    problem.set_training(True)
    return total / len(labels)


def private_gradients(
    problem: Problem, params: Tensor, batch: Batch, generator: torch.Generator, clip: float = 1.0, noise: float = 1.1
) -> tuple[Tensor, Tensor]:
    """Losses and gradients of DP-SGD: each sample's gradient clipped to norm `clip`, then noise on the sum.

    N(0, (clip noise)²) a coordinate; over B (Abadi et al.; the problem MNIST-DP of Sec. 5). Arguments and result as
    `gradients`.
    """
    clipped, losses = per_sample_gradients(problem, params, batch, clip)
    drawn = torch.randn(params.shape, generator=generator).to(params)
    return losses, (clipped.sum(1) + clip * noise * drawn) / batch[1].shape[1]


def per_sample_gradients(
    problem: Problem, params: Tensor, batch: Batch, clip: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Each sample's gradient (R, B, n), its norm at most `clip`, and the mean losses (R,)."""

    def loss(one: Tensor, sample: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        found = problem.sample_losses(one[None], (sample[None, None], label[None, None]))[0, 0]
        return found, found

    every = vmap(grad(loss, has_aux=True), (None, 0, 0))
    parts = [every(one, inputs, labels) for one, inputs, labels in zip(params.detach(), *batch, strict=True)]
    found, losses = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
    return found * (clip / found.norm(dim=2, keepdim=True)).clamp(max=1), losses.mean(1)


# Networks


def batched_logits(layers: nn.Sequential, params: Tensor, inputs: Tensor) -> Tensor:
    """Logits (R, B, classes) of R copies of a chain: convolutions grouped by copy, dense layers as batched products.

    Args:
        layers: the chain; its own parameters are not used.
        params: (R, n), in the order of layers.parameters().
        inputs: (R, B, channels, h, w).
    """
    copies, size = inputs.shape[:2]
    own = [parameter.shape for parameter in layers.parameters()]
    parts = iter(zip(own, params.split([shape.numel() for shape in own], 1), strict=True))
    x = inputs.transpose(0, 1).flatten(1, 2)  # (B, R channels, h, w)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            (shape, kernel), (_, bias) = next(parts), next(parts)
            kernel = kernel.reshape(copies * shape[0], *shape[1:])
            x = F.conv2d(x, kernel, bias.reshape(-1), layer.stride, layer.padding, groups=copies)  # type: ignore[arg-type]
        elif isinstance(layer, nn.Linear):
            (shape, kernel), (_, bias) = next(parts), next(parts)
            x = torch.baddbmm(bias.unsqueeze(1), x, kernel.view(copies, *shape).transpose(1, 2))
        elif isinstance(layer, nn.Flatten):
            x = x.reshape(size, copies, -1).transpose(0, 1)
        else:
            x = layer(x)
    return x


def network_problem(
    name: str,
    module: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    held_out: Batch | None = None,
    batch_size: int = 128,
    init: Callable[[torch.Generator], Tensor] | None = None,
) -> Problem:
    """The problem of training any network by cross-entropy.

    Args:
        name: of the problem.
        module: chains of convolutions, dense layers, pools run all copies at once; others one after another. A network
            with batch norm keeps running statistics in `module`, so it is for one copy at a time (else ValueError).
        inputs, labels: training samples (N, ...) float and (N,).
        held_out: as the training samples; they themselves if None.
        batch_size: B, at most N.
        init: generator -> (n,); Glorot's if None.
    """
    require(1 <= batch_size <= len(inputs), "problem.batch_size", batch_size, f"in [1, {len(inputs)}], the images")
    named = {key: parameter.shape for key, parameter in module.named_parameters()}
    stateful = any(True for _ in module.buffers())

    def logits(params: Tensor, x: Tensor) -> Tensor:
        if is_chain(module):
            return batched_logits(module, params, x)  # type: ignore[arg-type]
        if stateful and len(params) > 1:
            raise ValueError(f"{name} keeps batch statistics and runs one copy at a time, got {len(params)}")
        sizes = [shape.numel() for shape in named.values()]
        rows = []
        for one, some in zip(params, x, strict=True):
            parts = zip(named.items(), one.split(sizes), strict=True)
            rows.append(functional_call(module, {key: part.view(shape) for (key, shape), part in parts}, (some,)))
        return torch.stack(rows)

    def sample_losses(params: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(logits(params, batch[0]).transpose(1, 2), batch[1], reduction="none")

    def fresh(generator: torch.Generator) -> Tensor:
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
        return glorot(module, generator).to(inputs.device)

    return Problem(
        name,
        sample_losses,
        init or fresh,
        tuple(named.values()),
        inputs,
        labels,
        held_out or (inputs, labels),
        batch_size,
        samplewise=not stateful,
        set_training=module.train,
    )


def image_problem(
    name: str, splits: Splits, batch_size: int = 128, shrink: bool = False, device: torch.device | None = None
) -> Problem:
    """A network of `PROBLEMS` on images in [0, 1]; its held-out samples are the test images, as in the paper.

    Args:
        name: of the network.
        splits: of `common.data.load`.
        batch_size: B.
        shrink: average 2x2 pixels.
        device: where all of it lies; the CPU if None.

    Raises:
        ConfigError: for an unknown name, or images that do not fit the network.
    """
    require(name in PROBLEMS, "problem.name", name, f"one of {', '.join(PROBLEMS)}")
    (inputs, labels), held_out = (_floats(side, shrink, device) for side in (splits.train, splits.test))
    _, channels, side, width = inputs.shape
    require(side == width, "data", (side, width), "square images")
    classes = splits.train.classes
    try:
        module = chain(RECIPES[name], channels, side, classes) if name in RECIPES else MODULES[name](channels, classes)
    except ValueError as error:
        require(False, "problem.name", name, f"a network for images of side {side} ({error})")
    return network_problem(name, module.to(device), inputs, labels, held_out, batch_size)


def _floats(data: ImageSet, shrink: bool, device: torch.device | None) -> Batch:
    require(isinstance(data.images, Tensor), "data.name", "imagefolder", "a set of images in memory")
    images = pixels(data.images)  # type: ignore[arg-type]
    return (F.avg_pool2d(images, 2) if shrink else images).to(device), data.labels.to(device)


# Functions without data


def quadratic(size: int, generator: torch.Generator) -> Problem:
    """½‖Ax − b‖² from x = 0, A and b standard normal."""
    a, b = torch.randn(size, size, generator=generator), torch.randn(size, generator=generator)
    return _analytic("quadratic", size, lambda x: 0.5 * (x @ a.to(x).t() - b.to(x)).square().sum(1))


def rastrigin(size: int, generator: torch.Generator) -> Problem:
    """‖Ax − b‖² − 10 Σ c cos(2πx) + 10 n from x = 0; A, b, c standard normal."""
    a, b = torch.randn(size, size, generator=generator), torch.randn(size, generator=generator)
    c = torch.randn(size, generator=generator)

    def value(x: Tensor) -> Tensor:
        waves = 10 * (c.to(x) * torch.cos(2 * math.pi * x)).sum(1)
        return (x @ a.to(x).t() - b.to(x)).square().sum(1) - waves + 10 * size

    return _analytic("rastrigin", size, value)


def _analytic(name: str, size: int, value: Callable[[Tensor], Tensor]) -> Problem:
    nothing = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)

    def sample_losses(params: Tensor, batch: Batch) -> Tensor:
        return value(params)[:, None].expand(-1, batch[1].shape[1])

    return Problem(name, sample_losses, lambda _: torch.zeros(size), (torch.Size([size]),), *nothing, nothing, 1)
