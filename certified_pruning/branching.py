"""Which ReLU to split: BaBSR scores, and kFSB, which tries the best few (Bunel et al. 2020; De Palma et al. 2021).

For an unstable neuron with coefficient H on its output, upper slope s, intercept i = -l s and bias b (spec c.8.8):
    score     = |min(H, 0) i + red(b H (s - 1), b H s)|,    red = min (default) or max
    intercept = min(H, 0) i
R rows, N neurons of all ReLU layers side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from certified_pruning.rows import Relaxation

Reduce = Literal["min", "max"]
BRANCHINGS = ("kfsb", "babsr")

BABSR_SCORE, BABSR_INTERCEPT = 1e-3, -1e-4  # released code: below these a score or intercept tells nothing
KFSB_THRESHOLD = 1e-4
INVALID = -999999.0


def scores(relu_coef: Tensor, relaxation: Relaxation, bias: Tensor, reduce: Reduce = "min") -> tuple[Tensor, Tensor]:
    """BaBSR score and intercept of every neuron, (R, N) each; 0 on stable neurons.

    Args:
        relu_coef: H, (R, N).
        bias: (N,) bias of the affine map that feeds each ReLU.
    """
    unstable = relaxation.free()
    intercept = relu_coef.clamp(max=0) * relaxation.intercept
    up, down = bias * relu_coef * (relaxation.upper - 1), bias * relu_coef * relaxation.upper
    score = (intercept + _reduce(up, down, reduce)).abs()
    return score * unstable, intercept * unstable


def babsr(
    relu_coef: Tensor, relaxation: Relaxation, bias: Tensor, offsets: list[int], reduce: Reduce = "min"
) -> Tensor:
    """The neuron to split in each row, (R,) long; -1 where all are stable.

    Largest score if > 1e-3; else the most negative intercept of the latest layer that has one < -1e-4; else the first
    unstable neuron.

    Args:
        offsets: first neuron of each ReLU layer, then N (`ChainNet.offsets`).
    """
    score, intercept = scores(relu_coef, relaxation, bias, reduce)
    unstable = relaxation.unstable
    chosen = torch.where(unstable.any(1), unstable.to(torch.int8).argmax(1), -1)
    for start, end in pairwise(offsets):
        value, at = intercept[:, start:end].min(1)
        chosen = torch.where(value < BABSR_INTERCEPT, at + start, chosen)
    value, at = score.max(1)
    return torch.where(value > BABSR_SCORE, at, chosen)


def kfsb_candidates(
    relu_coef: Tensor, relaxation: Relaxation, bias: Tensor, k: int = 3, reduce: Reduce = "min"
) -> Tensor:
    """Neurons for `kfsb` to try, (R, 2k + 1) long: k best scores, k smallest intercepts, one to fall back on.

    Invalid ones (score <= 1e-4, intercept >= -1e-4) are -1. The last is the unstable neuron with the largest -l u
    (-1 where all are stable); it is chosen without trying when the others are invalid.
    """
    score, intercept = scores(relu_coef, relaxation, bias, reduce)
    n = min(k, score.shape[1])
    value, by_score = score.topk(n, 1)
    by_score = by_score.where(value > KFSB_THRESHOLD, -1)
    value, by_intercept = intercept.topk(n, 1, largest=False)
    by_intercept = by_intercept.where(value < -KFSB_THRESHOLD, -1)
    stable, s = 1 - relaxation.free(), relaxation.upper
    # i = -l s and s = u / (u - l) give -l u = i^2 / (s (1 - s)); -1 on stable neurons, where i = s (1 - s) = 0.
    area = relaxation.intercept.square() / (s * (1 - s) + stable) - stable
    value, widest = area.max(1, keepdim=True)
    widest = widest.where(value >= 0, -1)
    pad = widest.new_full((len(score), k - n), -1)
    return torch.cat([by_score, pad, by_intercept, pad, widest], 1)


def kfsb(
    candidates: Tensor, evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], reduce: Reduce = "min"
) -> Tensor:
    """The candidate whose worse child has the best bound, (R,) long; -1 where all neurons are stable.

    Args:
        candidates: from `kfsb_candidates`.
        evaluate: bounds of the active and the inactive child, (M,) each, for rows (M,) and neurons (M,).
    """
    tried = candidates[:, :-1]
    rows, slots = (tried >= 0).nonzero(as_tuple=True)
    value = torch.full(tried.shape, INVALID, device=tried.device)
    if len(rows):
        # A neuron may be candidate by score and by intercept: bound it once.
        pairs, back = torch.unique(torch.stack([rows, tried[rows, slots]]), dim=1, return_inverse=True)
        value = value.to((bounds := _reduce(*evaluate(pairs[0], pairs[1]), reduce)).dtype)
        value[rows, slots] = bounds[back]
    # At equality the intercept candidates win over the scores, and the better ranked among equals of a kind.
    k = tried.shape[1] // 2
    order = torch.cat([torch.arange(k, 2 * k), torch.arange(k)]).to(tried.device)
    at = order[_first_max(value[:, order])]
    chosen = tried.gather(1, at[:, None]).squeeze(1)
    return torch.where((tried >= 0).any(1), chosen, candidates[:, -1])


def _first_max(value: Tensor) -> Tensor:
    return (value == value.amax(1, keepdim=True)).to(torch.int8).argmax(1)


def _reduce(a: Tensor, b: Tensor, reduce: Reduce) -> Tensor:
    if reduce not in ("min", "max"):
        raise ValueError(f"reduce must be 'min' or 'max', got {reduce!r}")
    return torch.minimum(a, b) if reduce == "min" else torch.maximum(a, b)
