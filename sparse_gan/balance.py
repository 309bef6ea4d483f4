"""How evenly the two players are matched, and the discriminator density that follows from it.

The balance ratio is the share of the gap the discriminator sees between real and generated images that one generator
step closes: small where the discriminator is too strong. Its density falls then, and rises where it is too weak
(Wang et al., "Balanced Training for Sparse GANs", NeurIPS 2023: the rule of ADAPT-relax in their code).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.masks import Masks, keep_top

LOW, HIGH = 0.45, 0.55  # their range for SNGAN on CIFAR-10
EVERY = 10  # generator steps between two measurements


def balance_ratio(real: float, before: float, after: float) -> float:
    """(after - before) / (real - before), 0 where there is no gap.

    Args:
        real: mean score of real images.
        before, after: mean scores of images generated from the same noise, before and after the generator's step.
    """
    return (after - before) / (real - before) if real != before else 0.0


def density_change(ratios: Sequence[float], change: float) -> float:
    """What to add to the density: -change, 0 or change, as the mean ratio is below, in or above its range."""
    if not ratios:
        return 0.0
    mean = sum(ratios) / len(ratios)
    return change * ((mean > HIGH) - (mean < LOW))


@torch.no_grad()
def changed_masks(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], masks: Masks, change: float) -> Masks:
    """`masks` with round(|change| * all) entries more, of the largest |gradient|, or fewer, of the smallest |weight|.

    Over all layers together; a density of |change| stays, and no more are grown than there are gaps.
    """
    active = sum(int(mask.sum()) for mask in masks.values())
    count = round(abs(change) * masks.total)
    if change <= 0:
        return keep_top({name: weights[name].abs() for name in masks}, max(active - count, min(active, count)), masks)
    gaps = {name: ~mask for name, mask in masks.items()}
    grown = keep_top({name: gradients[name].abs() for name in masks}, min(count, masks.total - active), gaps)
    return Masks({name: mask | grown[name] for name, mask in masks.items()})
