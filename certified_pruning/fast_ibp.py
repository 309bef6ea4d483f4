"""Fast IBP training: initial weights and a regulariser that keep intervals from exploding (Shi et al. 2021; spec c.4).

Used with the IBP loss, `crown_ibp_loss(..., eps_frac=1)`; it needs a much shorter ramp of eps than CROWN-IBP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certified_pruning.train_ibp import ReluBounds

TOLERANCE = 0.5


@torch.no_grad()
def fast_ibp_init_(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw every weight of more than one axis, but the last, from N(0, (sqrt(2 pi) / fan_in)^2), in place.

    With it the mean radius of an interval stays the same from layer to layer.

    Args:
        model: any network; parameters in the order of execution.
        generator: CPU generator of the draws; torch's global one if None.
    """
    weights = [weight for weight in model.parameters() if weight.dim() > 1]
    for weight in weights[:-1]:
        draw = torch.randn(weight.shape, generator=generator)
        weight.copy_(draw * (math.sqrt(2 * math.pi) / weight[0].numel()))


def fast_ibp_regulariser(relus: Sequence[ReluBounds], x_lb: Tensor, x_ub: Tensor, eps_frac: float) -> Tensor:
    """0.5 * (1 - eps_frac) * the mean over ReLU layers of (tightness + balance), 0-dim.

    Tightness asks that the mean radius t of the layer's input be at most twice the input's t0: relu(.5 - t0/t) / .5.
    Balance asks that active neurons (l > 0) and inactive ones (u < 0) carry similar weight, in the mean of their
    centres and in their variance: (relu(.5 - m) + relu(.5 - v)) / .5, with m and v the ratios, turned to be <= 1.
    A layer where a ratio is not finite, as where nothing is inactive, has no balance term.

    Args:
        relus: IBP bounds of every ReLU input.
        x_lb, x_ub: corners of the input box.
        eps_frac: eps / eps_max, in [0, 1]; the regulariser fades as eps grows.

    Raises:
        ValueError: eps_frac outside [0, 1], or no ReLU.
    """
    if not 0 <= eps_frac <= 1:
        raise ValueError(f"eps_frac must be in [0, 1], got {eps_frac}")
    if not relus:
        raise ValueError("model must have at least one ReLU, found none")
    radius = (x_ub - x_lb).mean() / 2
    terms = [_tightness(relu, radius) + _balance(relu) for relu in relus]
    return 0.5 * (1 - eps_frac) * torch.stack(terms).mean()


def _tightness(relu: ReluBounds, input_radius: Tensor) -> Tensor:
    radius = (relu.upper - relu.lower).mean() / 2
    if radius == 0:  # eps is 0
        return radius.new_zeros(())
    return F.relu(TOLERANCE - input_radius / radius) / TOLERANCE


def _balance(relu: ReluBounds) -> Tensor:
    centre, active, inactive = (relu.lower + relu.upper) / 2, relu.lower > 0, relu.upper < 0
    deviation = (centre - centre.mean()).square()
    means = (centre * active).mean() / -(centre * inactive).mean()
    variances = (deviation * active).sum() / (deviation * inactive).sum()
    ratios = torch.stack([means, variances])
    if not ratios.isfinite().all():
        return ratios.new_zeros(())
    ratios = torch.minimum(ratios, 1 / ratios.clamp(min=1e-12))
    return F.relu(TOLERANCE - ratios).sum() / TOLERANCE
