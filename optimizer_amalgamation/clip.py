"""Clipping of the meta-gradient relative to the weights (spec c4)."""

from optimizer_amalgamation.perturb import norms
from optimizer_amalgamation.rule import Weights

RATIO, FLOOR = 0.1, 1e-3


def clip_adaptive(
    gradient: Weights, weights: Weights, ratio: float = RATIO, floor: float = FLOOR, batched: bool = False
) -> Weights:
    """Each tensor's gradient with its norm cut to `ratio` max(||w||, `floor`); of each replicate where `batched`."""
    found = {}
    for name, g in gradient.items():
        most = ratio * norms(weights[name], batched).clamp_min(floor)
        found[name] = g * (most / norms(g, batched)).clamp_max(1.0)  # a zero gradient stays: min(inf, 1) is 1
    return found
