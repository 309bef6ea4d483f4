"""Which weights a lottery round prunes: a score for every prunable weight, the lowest go (spec c.6).

Only convolution weights are prunable, all convolutions, the first one included; masks are nested and counts exact.
"""

from typing import Literal

import torch
from torch import nn

from certified_pruning.errors import EmptyLayerError
from common.masks import Masks, keep_top, prunable_weights, random_scores

Criterion = Literal["magnitude", "random"]


def dense_masks(model: nn.Module) -> Masks:
    """Masks that keep every convolution weight of `model`."""
    return Masks.ones_like(prunable_weights(model, (nn.Conv2d,)))


def prune(model: nn.Module, masks: Masks, rate: float, criterion: Criterion, generator: torch.Generator) -> Masks:
    """The masks after one more round: round(rate * kept) of the kept weights go, over all layers together.

    Args:
        model: the trained network; its current weights are ranked.
        masks: of the round just trained.
        rate: share of the remaining weights to remove, in [0, 1).
        criterion: "magnitude" ranks |w| (IMP), "random" draws uniform scores.
        generator: CPU generator of the random scores.

    Raises:
        ValueError: rate outside [0, 1), or a criterion that is not known.
        EmptyLayerError: if a layer would lose its last weight.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), got {rate}")
    weights = prunable_weights(model, (nn.Conv2d,))
    if criterion == "magnitude":
        scores = {name: weight.detach().abs() for name, weight in weights.items()}
    elif criterion == "random":
        scores = random_scores(weights, generator)
    else:
        raise ValueError(f"criterion must be magnitude or random, got {criterion!r}")
    # round() is half to even, the count of torch.nn.utils.prune
    pruned = keep_top(scores, masks.kept - round(rate * masks.kept), within=masks)
    for name, mask in pruned.items():
        if not mask.any():
            raise EmptyLayerError(name)
    return pruned
