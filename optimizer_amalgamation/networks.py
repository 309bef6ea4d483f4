"""Networks as problems: of any module, and those of the paper on images, by name (Sec. 5; spec d, h7)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from common.config import require
from common.data import ImageSet, Splits, pixels
from optimizer_amalgamation.chains import Chain
from optimizer_amalgamation.models import MODULES, RECIPES, chain, glorot, is_chain
from optimizer_amalgamation.problems import Batch, Problem

PROBLEMS = (*RECIPES, *MODULES)


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

    def losses(params: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(logits(params, batch[0]).transpose(1, 2), batch[1], reduction="none")

    def fresh(generator: torch.Generator) -> Tensor:
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                layer.reset_running_stats()
        return glorot(module, generator).to(inputs.device)

    return Problem(
        name,
        losses,
        init or fresh,
        tuple(named.values()),
        inputs,
        labels,
        held_out or (inputs, labels),
        batch_size,
        samplewise=not stateful,
        set_training=module.train,
        chain=Chain.of(module, inputs.shape[1:]),
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
