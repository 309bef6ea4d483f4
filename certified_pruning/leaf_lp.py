"""The exact answer where branching has decided every ReLU: a linear program (spec c.8.9).

The solver's word is not taken: its dual solution is turned into a bound by weak duality in float64, which holds
whatever the dual is, and its primal solution is only a candidate counterexample.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from certified_pruning.chain import ChainNet
from certified_pruning.rows import Relaxation, RowBatch, Splits, layers

try:
    from scipy.optimize import linprog  # type: ignore[import-untyped]
except ImportError:
    linprog = None


class Leaf(NamedTuple):
    """`lb`: proven lower bound, +inf if the splits are proven infeasible; `x`: (n,) the LP's minimiser, if any."""

    lb: float
    x: Tensor | None


def available() -> bool:
    """Whether scipy is installed."""
    return linprog is not None


def solve_leaf(
    net: ChainNet, C: Tensor, x_lb: Tensor, x_ub: Tensor, lower: Tensor, upper: Tensor, splits: Splits
) -> Leaf:
    """Minimum of C . logits over the box and the splits, all float64.

    Args:
        C: (out,); x_lb, x_ub: (n,); lower, upper: (N,) root bounds of the ReLU inputs.
        splits: one row; every neuron unstable at the root must be in it.
    """
    relaxation = Relaxation.of(lower[None], upper[None])
    decided, empty = relaxation.split(splits)
    if bool(empty[0]):
        return Leaf(float("inf"), None)
    if bool(decided.unstable.any()):
        raise ValueError("splits must decide every unstable neuron of a leaf")
    objective, const = _linear(net, C[None], x_lb, x_ub, decided)
    # sign (a x + c) >= 0 as -sign a x <= sign c.
    real = splits.sign[0] != 0
    neuron, sign = splits.neuron[0][real], splits.sign[0][real].to(C.dtype)
    rows, offsets = [], []
    for k, (start, end) in enumerate(layers(net)):
        here = (neuron >= start) & (neuron < end)
        eye = torch.zeros(int(here.sum()), end - start, dtype=C.dtype)
        eye[torch.arange(len(eye)), neuron[here] - start] = -sign[here]
        before = Relaxation(*(t[:, :start] for t in (decided.upper, decided.intercept, decided.turn)))
        a, c = _linear(net.head(k), eye, x_lb, x_ub, before)
        rows.append(a)
        offsets.append(-c)
    A, b = torch.cat([*rows, x_lb.new_zeros(0, len(x_lb))]), torch.cat([*offsets, x_lb.new_zeros(0)])
    result = _solve(objective[0], A, b, x_lb, x_ub)
    if result.status == 0:
        multiplier = torch.from_numpy(-result.ineqlin.marginals).clamp_min(0)
        lb = const[0] + _dual_value(objective[0], A, b, x_lb, x_ub, multiplier)
        return Leaf(float(lb), torch.from_numpy(result.x).clamp(x_lb, x_ub))
    # Infeasible: minimise the largest violation t, whose multipliers are the proof if its minimum is above 0.
    n = len(x_lb)
    slack = torch.cat([A, -torch.ones(len(A), 1, dtype=A.dtype)], 1)
    zero, one = A.new_zeros(1), A.new_ones(1)
    result = _solve(torch.cat([A.new_zeros(n), one]), slack, b, torch.cat([x_lb, zero]), torch.cat([x_ub, one / zero]))
    if result.status == 0:
        multiplier = torch.from_numpy(-result.ineqlin.marginals).clamp_min(0)
        if _dual_value(A.new_zeros(n), A, b, x_lb, x_ub, multiplier) > 1e-12:
            return Leaf(float("inf"), None)
    return Leaf(-float("inf"), None)


def _linear(net: ChainNet, C: Tensor, x_lb: Tensor, x_ub: Tensor, decided: Relaxation) -> tuple[Tensor, Tensor]:
    """C . net(x) = coef . x + const where every ReLU is decided."""
    image = torch.zeros(len(C), dtype=torch.long)
    batch = RowBatch.make(net, C, x_lb[None], x_ub[None], decided, image)
    b = batch.backward(decided.upper[image])
    return b.coef, batch.constant(b)


def _solve(objective: Tensor, A: Tensor, b: Tensor, lb: Tensor, ub: Tensor) -> Any:
    bounds = torch.stack([lb, ub], 1).numpy()
    return linprog(objective.numpy(), A_ub=A.numpy(), b_ub=b.numpy(), bounds=bounds, method="highs")


def _dual_value(objective: Tensor, A: Tensor, b: Tensor, lb: Tensor, ub: Tensor, multiplier: Tensor) -> Tensor:
    reduced = objective + multiplier @ A
    return torch.where(reduced >= 0, reduced * lb, reduced * ub).sum() - multiplier @ b
