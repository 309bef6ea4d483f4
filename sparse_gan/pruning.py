"""Masks: at random before training (ERK, uniform), by SNIP, by magnitude after or during training (spec c).

Sparsity counts over the convolution weights of one network; linear layers, embeddings, norms and biases stay dense.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from common import distributed
from common.masks import (
    Masks,
    erk_densities,
    keep_top,
    keep_top_per_layer,
    prunable_weights,
    random_scores,
    saliency_scores,
)

Distribution = Literal["erk", "uniform"]


def convolution_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that masks cover, by name: those of 2-D convolutions, transposed ones included."""
    return prunable_weights(module, (nn.Conv2d, nn.ConvTranspose2d))


def sparse_masks(module: nn.Module, density: float, distribution: Distribution, generator: torch.Generator) -> Masks:
    """Random masks over the convolutions of `module`, exactly round(density_l * N_l) entries in layer l, at least one.

    Args:
        density: of all convolution weights together, in (0, 1], else ValueError.
        distribution: "erk", or "uniform" with the same density in every layer.
        generator: CPU generator of the draws.
    """
    weights = convolution_weights(module)
    if distribution == "erk":
        densities = erk_densities({name: tuple(weight.shape) for name, weight in weights.items()}, density)
    elif distribution == "uniform":
        densities = dict.fromkeys(weights, _checked(density))
    else:
        raise ValueError(f"distribution must be erk or uniform, got {distribution!r}")
    keep = {name: max(round(densities[name] * weight.numel()), 1) for name, weight in weights.items()}
    return keep_top_per_layer(random_scores(weights, generator), keep)


def snip_masks(module: nn.Module, density: float, loss: Callable[[], Tensor]) -> Masks:
    """SNIP: the largest |w * dL/dw| over all convolutions together (Lee et al. 2019), gradients averaged over ranks.

    Weights stay; whatever else the forward of `loss` moves (running statistics, singular vectors) has moved.
    """
    weights = convolution_weights(module)
    gradients = list(torch.autograd.grad(loss(), list(weights.values())))
    distributed.average_(gradients)
    return keep_top(saliency_scores(weights, gradients), _count(weights, density))


def magnitude_masks(
    module: nn.Module, density: float, scope: Literal["global", "uniform"], within: Masks | None = None
) -> Masks:
    """The largest |w| over all convolutions together, or in each layer by the same density; among `within` only."""
    weights = convolution_weights(module)
    scores = {name: weight.detach().abs() for name, weight in weights.items()}
    if scope == "global":
        return keep_top(scores, _count(weights, density), within)
    keep = {name: max(round(_checked(density) * weight.numel()), 1) for name, weight in weights.items()}
    return keep_top_per_layer(scores, keep, within)


def gradual_density(step: int, total_steps: int, density: float, start: float = 0.1, stop: float = 0.8) -> float:
    """Gradual pruning: 1 - (1 - density) (1 - (1 - p)^3) at `step`, p rising from 0 at `start` to 1 at `stop`."""
    progress = min(max((step / total_steps - start) / (stop - start), 0), 1)
    return 1 - (1 - density) * (1 - (1 - progress) ** 3)


def _checked(density: float) -> float:
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    return density


def _count(weights: dict[str, nn.Parameter], density: float) -> int:
    return max(round(_checked(density) * sum(weight.numel() for weight in weights.values())), 1)
