"""Drop and grow: how one layer's sparse topology moves while its number of weights stays (spec c).

The smallest active weights leave, and as many inactive entries enter where the loss' dense gradient is largest.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from common.masks import keep_top


class Move(NamedTuple):
    """`survivors`: active before and not dropped; `mask`: survivors and grown entries, as many as before. Both bool."""

    survivors: Tensor
    mask: Tensor


def cosine_drop_fraction(step: int, total_steps: int, start: float = 0.5, end: float = 0.005) -> float:
    """zeta(t) = end + (start - end) (1 + cos(pi t / T)) / 2, the share of active weights to drop at step t of T."""
    return end + (start - end) * (1 + math.cos(math.pi * step / total_steps)) / 2


def drop_and_grow(weight: Tensor, mask: Tensor, growth: Tensor, fraction: float) -> Move:
    """Move k = ceil(fraction * active) entries of one layer.

    Drop: exactly the k active entries of smallest |weight|, among equal ones the lower index first. Grow: exactly the k
    entries of largest `growth` among all that are inactive then, the just dropped ones included.

    Args:
        weight: of any shape.
        mask: bool, of that shape.
        growth: scores of that shape, e.g. |gradient|, or uniform noise for random growth. NaN raises ValueError.
        fraction: in [0, 1], else ValueError.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"drop fraction must be in [0, 1], got {fraction}")
    if not weight.shape == mask.shape == growth.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (weight, mask, growth))
        raise ValueError(f"weight, mask and growth must have one shape, got {shapes}")
    active = int(mask.sum())
    moving = math.ceil(fraction * active)
    survivors = keep_top({"weight": weight.abs()}, active - moving, {"weight": mask})["weight"]
    grown = keep_top({"growth": growth}, moving, {"growth": ~survivors})["growth"]
    return Move(survivors, torch.logical_or(survivors, grown))
