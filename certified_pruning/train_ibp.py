"""Interval bound propagation for training: bounds of every ReLU input, differentiable in the weights.

An interval is carried as centre and radius through affine layers (centre: A c; radius: |A| r) and as lower and upper
bound through ReLUs (spec section c.2). Chains of layers only: (nested) nn.Sequential.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certified_pruning.errors import UnsupportedLayerError

BatchStats = Mapping[str, tuple[Tensor, Tensor]]
"""Name of a batch norm -> (mean, biased variance) that it normalises with, each (channels,)."""


@dataclass(frozen=True)
class ReluBounds:
    """Bounds of the inputs of one ReLU layer.

    Attributes:
        name: name of the ReLU inside the model.
        lower, upper: (batch, channels, height, width) after convolutions, (batch, features) after linear layers.
        bn: name of the batch norm directly before this ReLU; None if there is none.
        gamma: that batch norm's scale, (channels,), attached to the graph; None without batch norm or without scale.
    """

    name: str
    lower: Tensor
    upper: Tensor
    bn: str | None = None
    gamma: Tensor | None = None


@dataclass(frozen=True)
class IbpBounds:
    """All bounds of one IBP pass: every ReLU input in order, and the output (batch, classes)."""

    relus: list[ReluBounds]
    out_lb: Tensor
    out_ub: Tensor


def pixel_box(raw: Tensor, eps: float, normalize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The L-infinity box around an image, clipped to [0, 1] and then normalised (spec c.1).

    Args:
        raw: images in [0, 1], (batch, channels, height, width).
        eps: radius in pixel units, >= 0.
        normalize: increasing per-channel map from pixels to network inputs, such as (raw - mean) / std.

    Returns:
        Lower and upper corner, each of raw's shape.

    Raises:
        ValueError: eps negative or not finite; raw not finite or outside [0, 1].
    """
    check_pixels(raw)
    check_eps(eps)
    return normalize((raw - eps).clamp(0, 1)), normalize((raw + eps).clamp(0, 1))


def ibp(
    model: nn.Module,
    x_lb: Tensor,
    x_ub: Tensor,
    bn_eps: float | None = None,
    batch_stats: BatchStats | None = None,
) -> IbpBounds:
    """Interval bounds of every ReLU input and of the output.

    Args:
        model: chain of Conv2d, Linear, BatchNorm2d, ReLU, Flatten, AvgPool2d, Identity.
        x_lb, x_ub: corners of the input box in the network's (normalised) units, (batch, ...).
        bn_eps: added to the variance in batch norm; each module's own eps if None. The released FGSM path uses 1e-8.
        batch_stats: statistics for batch norm, from `clean_forward`; the running ones if None, in train mode too.

    Raises:
        ValueError: x_lb > x_ub somewhere, NaN or infinite, shapes differ; a batch norm without statistics.
        UnsupportedLayerError: a module whose exact interval is not known here, or a model that is no chain.
    """
    check_box(x_lb, x_ub)
    interval, relus = _propagate(sequential_leaves(model), x_lb, x_ub, bn_eps, batch_stats)
    centre, radius = interval
    return IbpBounds(relus, centre - radius, centre + radius)


def relu_bounds(
    model: nn.Module,
    x_lb: Tensor,
    x_ub: Tensor,
    bn_eps: float | None = None,
    batch_stats: BatchStats | None = None,
) -> list[ReluBounds]:
    """As `ibp`, but only the ReLU inputs: the layers after the last ReLU are checked and not computed."""
    check_box(x_lb, x_ub)
    leaves = sequential_leaves(model)
    last_relu = max((i for i, (_, leaf) in enumerate(leaves) if isinstance(leaf, nn.ReLU)), default=-1)
    return _propagate(leaves[: last_relu + 1], x_lb, x_ub, bn_eps, batch_stats)[1]


def clean_forward(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The model's output, and the statistics its batch norms used: batch mean and biased variance in train mode.

    CROWN-IBP training bounds the network with the statistics of the clean batch, gradient included (spec c.4); only
    this forward updates the running statistics.

    Args:
        model: chain as in `ibp`.
        x: network inputs, (batch, ...).

    Returns:
        (output, statistics of each batch norm by name).
    """
    stats: dict[str, tuple[Tensor, Tensor]] = {}
    for name, leaf in sequential_leaves(model):
        if isinstance(leaf, nn.BatchNorm2d):
            if leaf.training or leaf.running_mean is None or leaf.running_var is None:
                variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
                stats[name] = mean, variance
            else:
                stats[name] = leaf.running_mean, leaf.running_var
        x = leaf(x)
    return x, stats


def sequential_leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers of a (nested) nn.Sequential in order of execution, with their dotted names.

    Raises:
        UnsupportedLayerError: a layer of a type that `ibp` does not know, a model that is not a chain of layers, a
            convolution whose padding is not by zeros, or a partial Flatten.
    """
    leaves: list[tuple[str, nn.Module]] = []

    def visit(name: str, module: nn.Module) -> None:
        # A subclass with its own forward need not run its children in order, so it is no chain to us.
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            for child_name, child in module._modules.items():  # named_children would skip a layer used twice
                assert child is not None
                visit(f"{name}.{child_name}" if name else child_name, child)
        elif isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            raise UnsupportedLayerError(name, module, f"padding_mode is {module.padding_mode!r}, must be 'zeros'")
        elif isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
            raise UnsupportedLayerError(name, module, "it must flatten dimensions 1 to -1")
        elif isinstance(module, _LEAF_TYPES):
            leaves.append((name, module))
        else:
            raise UnsupportedLayerError(name, module)

    visit("", model)
    return leaves


def check_eps(eps: float) -> None:
    """Raise ValueError unless 0 <= eps < inf."""
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and >= 0, got {eps}")


def check_pixels(raw: Tensor) -> None:
    """Raise ValueError unless every pixel is in [0, 1]."""
    low, high = (bound.item() for bound in raw.aminmax()) if raw.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):  # false for NaN too
        raise ValueError(f"raw must hold pixels in [0, 1], got values in [{low}, {high}]")


def check_box(x_lb: Tensor, x_ub: Tensor) -> None:
    """Raise ValueError unless both corners have one shape, are finite, and x_lb <= x_ub everywhere."""
    if x_lb.shape != x_ub.shape:
        raise ValueError(f"x_lb and x_ub must have the same shape, got {tuple(x_lb.shape)} and {tuple(x_ub.shape)}")
    width = x_ub.detach() - x_lb.detach()
    if not bool(((width >= 0) & (width < math.inf)).all()):
        wrong = int(((width < 0).sum()).item())
        raise ValueError(f"x_lb must be <= x_ub and both finite; x_lb > x_ub in {wrong} places, others NaN or infinite")


_LEAF_TYPES = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, nn.Flatten, nn.AvgPool2d, nn.Identity)

Interval = tuple[Tensor, Tensor]  # centre, radius


def _propagate(
    leaves: list[tuple[str, nn.Module]],
    x_lb: Tensor,
    x_ub: Tensor,
    bn_eps: float | None,
    batch_stats: BatchStats | None,
) -> tuple[Interval, list[ReluBounds]]:
    centre, radius = (x_lb + x_ub) / 2, (x_ub - x_lb) / 2
    relus: list[ReluBounds] = []
    scale_name: str | None = None  # batch norm directly before the current layer
    scale: Tensor | None = None
    for name, leaf in leaves:
        if isinstance(leaf, nn.Identity):
            continue
        if isinstance(leaf, nn.ReLU):
            lower, upper = centre - radius, centre + radius
            relus.append(ReluBounds(name, lower, upper, scale_name, scale))
            lower, upper = F.relu(lower), F.relu(upper)
            centre, radius = (lower + upper) / 2, (upper - lower) / 2
        elif isinstance(leaf, nn.Conv2d):
            centre, radius = leaf(centre), _conv_radius(leaf, radius)
        elif isinstance(leaf, nn.Linear):
            centre, radius = leaf(centre), F.linear(radius, leaf.weight.abs())
        elif isinstance(leaf, nn.BatchNorm2d):
            slope, intercept = bn_affine(name, leaf, bn_eps, batch_stats)
            centre = torch.addcmul(intercept[:, None, None], centre, slope[:, None, None])
            radius = radius * slope.abs()[:, None, None]
        else:  # Flatten and AvgPool2d have non-negative coefficients and no bias
            centre, radius = leaf(centre), leaf(radius)
        scale_name, scale = (name, leaf.weight) if isinstance(leaf, nn.BatchNorm2d) else (None, None)
    return (centre, radius), relus


def _conv_radius(conv: nn.Conv2d, radius: Tensor) -> Tensor:
    return F.conv2d(radius, conv.weight.abs(), None, conv.stride, conv.padding, conv.dilation, conv.groups)


def bn_affine(
    name: str, bn: nn.BatchNorm2d, bn_eps: float | None, batch_stats: BatchStats | None
) -> tuple[Tensor, Tensor]:
    """Slope and intercept, (channels,) each, of a batch norm as an affine map; arguments as in `ibp`."""
    if batch_stats is None:
        mean, variance = bn.running_mean, bn.running_var
        if mean is None or variance is None:
            raise ValueError(f"model: batch norm {name!r} has no running statistics and batch_stats was not given")
        mean = mean.clone()  # a forward in train mode before the backward pass would change it in place
    elif name in batch_stats:
        mean, variance = batch_stats[name]
    else:
        raise ValueError(f"batch_stats must name every batch norm of the model; {name!r} is missing")
    slope = torch.rsqrt(variance + (bn.eps if bn_eps is None else bn_eps))
    if bn.weight is not None:
        slope = slope * bn.weight
    intercept = -slope * mean
    return slope, intercept if bn.bias is None else intercept + bn.bias
