"""Which weights a lottery round prunes: a score for every convolution weight, the lowest go (spec c.6).

    magnitude    |w|                IMP, and IMP+NRS, whose training is regularised
    saliency     |w dL/dw|          SNIP and Taylor: dL/dmask = w dL/dw, so the two are one criterion
    random       uniform            `common.masks.random_scores`
    HYDRA        learned            hydra.py

Masks are nested, counts exact. The first convolution is pruned, linear layers if `kinds` says so (they are not in the
paper), biases and batch norms never.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from certified_pruning.errors import EmptyLayerError
from common import distributed
from common.masks import Masks, keep_top, keep_top_per_layer, prunable_weights, saliency_scores

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv2d,)
KINDS = {"conv": CONVOLUTIONS, "conv+linear": (nn.Conv2d, nn.Linear)}
"""What prune.prunable stands for."""

Keep = int | Mapping[str, int]
"""Entries to keep: in all layers together, or by layer."""


def dense_masks(model: nn.Module, kinds: tuple[type[nn.Module], ...] = CONVOLUTIONS) -> Masks:
    """Masks that keep every weight of the layers of `model` that are of these kinds."""
    return Masks.ones_like(prunable_weights(model, kinds))


def keep_of_rate(masks: Masks, rate: float, per_layer: bool = False) -> Keep:
    """What is kept when `rate` of the kept weights go: round(rate * kept), half to even, as torch.nn.utils.prune.

    Raises:
        ValueError: rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), got {rate}")
    if per_layer:
        return {name: int(mask.sum()) - round(rate * int(mask.sum())) for name, mask in masks.items()}
    return masks.kept - round(rate * masks.kept)


def keep_of_remain(sizes: Mapping[str, int], remain: float, per_layer: bool = False) -> Keep:
    """What is kept when the share `remain` of all entries stays: int((1 - remain) * entries) go.

    Args:
        sizes: entries of each layer.
        remain: in (0, 1].

    Raises:
        ValueError: remain outside (0, 1].
    """
    if not 0 < remain <= 1:
        raise ValueError(f"remain must be in (0, 1], got {remain}")
    if per_layer:
        return {name: size - int((1 - remain) * size) for name, size in sizes.items()}
    total = sum(sizes.values())
    return total - int((1 - remain) * total)


def prune_weights(scores: Mapping[str, Tensor], masks: Masks, keep: Keep) -> Masks:
    """Nested masks that keep the highest scores: `keep` over all layers together, or keep[name] of each layer.

    Args:
        scores: of every entry, by parameter name.
        masks: of the round just trained; what they prune stays pruned.
        keep: see `keep_of_rate` and `keep_of_remain`.

    Raises:
        EmptyLayerError: if a layer would lose its last weight.
        ValueError: NaN in a score, or more to keep than there is.
    """
    pruned = keep_top(scores, keep, masks) if isinstance(keep, int) else keep_top_per_layer(scores, keep, masks)
    for name, mask in pruned.items():
        if not mask.any():
            raise EmptyLayerError(name)
    return pruned


def magnitude(model: nn.Module, kinds: tuple[type[nn.Module], ...] = CONVOLUTIONS) -> dict[str, Tensor]:
    """|w| of every weight of these kinds of layers."""
    return {name: weight.detach().abs() for name, weight in prunable_weights(model, kinds).items()}


def saliency(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], kinds: tuple[type[nn.Module], ...] = CONVOLUTIONS
) -> dict[str, Tensor]:
    """|w dL/dw| of every weight of these kinds of layers, on one batch with batch norm in train mode (SNIP, Taylor).

    Args:
        model: not changed; masked weights are 0, so they score 0.
        loss: of a network on this rank's share of the batch; gradients are averaged over the ranks.
    """
    probe = copy.deepcopy(model).train()
    weights = prunable_weights(probe, kinds)
    gradients = list(torch.autograd.grad(loss(probe), list(weights.values())))
    distributed.average_(gradients)
    return saliency_scores(weights, gradients)
