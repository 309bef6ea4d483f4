"""Rows: what a linear bound through a ReLU chain is computed from, and the backward pass that computes it.

A *row* is one bound to compute: coefficients on the outputs of a chain, the box it holds on, a relaxation of every
ReLU, and possibly split ReLUs (Zhang et al. 2018, Wang et al. 2021; spec c.8.5). Rows are independent. Shapes: R rows,
N neurons of all ReLU layers side by side, n inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from certified_pruning.chain import ChainNet
from certified_pruning.ibp import PreBounds, check_box

CACHED = 1 << 19
"""Elements of the largest tensor that `rows_at_once` allows: 2 MB in float32, a dozen of which fit in a CPU's cache."""


@dataclass(frozen=True)
class Splits:
    """ReLUs fixed by branching, per row, padded.

    Attributes:
        neuron: (R, D) long, number of the neuron through all ReLU layers; anything where `sign` is 0.
        sign: (R, D) +1 for z >= 0, -1 for z <= 0, 0 for padding.
    """

    neuron: Tensor
    sign: Tensor

    def select(self, rows: Tensor) -> Splits:
        return Splits(self.neuron[rows], self.sign[rows])


@dataclass(frozen=True)
class Relaxation:
    """Triangle relaxation of every ReLU: alpha z <= relu(z) <= upper z + intercept for 0 <= alpha <= 1. All (R, N).

    An unstable neuron has upper = u / (u - l), intercept = -l u / (u - l) and turn 0: where its coefficient is below
    `turn` the upper line bounds it, else the lower one. A stable neuron has upper = 1 (on) or 0 (off), intercept 0 and
    turn +inf: always its upper line, which is exact. Its alpha has no effect.
    """

    upper: Tensor
    intercept: Tensor
    turn: Tensor

    @staticmethod
    def of(lower: Tensor, upper: Tensor) -> Relaxation:
        """From bounds l <= u of the ReLU inputs, (R, N) each."""
        on, off = lower >= 0, upper <= 0
        unstable = ~(on | off)
        slope = torch.where(unstable, upper / (upper - lower).where(unstable, torch.ones_like(upper)), on.to(upper))
        # An exactly zero interval is both on and off; on wins.
        turn = torch.zeros_like(upper).masked_fill_(~unstable, float("inf"))
        return Relaxation(slope, torch.where(unstable, -lower * slope, 0.0), turn)

    @property
    def unstable(self) -> Tensor:
        """(R, N) bool."""
        return self.turn == 0

    def free(self) -> Tensor:
        """`unstable` as 1 or 0: arithmetic is several times as fast as bool masks."""
        return torch.eq(self.turn, 0, out=torch.empty_like(self.turn))

    def adaptive(self) -> Tensor:
        """Lower slopes that CROWN starts from: 1 if upper > 0.5 else 0."""
        return torch.gt(self.upper, 0.5, out=torch.empty_like(self.upper))

    def select(self, rows: Tensor) -> Relaxation:
        return Relaxation(*(t.index_select(0, rows) for t in (self.upper, self.intercept, self.turn)))

    def split(self, splits: Splits) -> tuple[Relaxation, Tensor]:
        """With split neurons linear, and (R,) bool: rows whose splits contradict the bounds. Works in place."""
        empty = torch.zeros(len(self.upper), dtype=torch.bool, device=self.upper.device)
        for sign, value in ((1, 1.0), (-1, 0.0)):
            rows, slots = (splits.sign == sign).nonzero(as_tuple=True)
            at = rows, splits.neuron[rows, slots]
            wrong = (self.turn[at] > 0) & (self.upper[at] != value)
            empty[rows[wrong]] = True
            self.upper[at], self.intercept[at], self.turn[at] = value, 0.0, float("inf")
        return self, empty


class Backward(NamedTuple):
    """Result of one backward pass: a row is at least `RowBatch.constant` + coef . x on the box."""

    coef: Tensor  # (R, n), on the input
    corner: Tensor  # (R, n), where in the box coef . x is smallest
    relu_coef: list[Tensor]  # H_k, on the output of ReLU layer k, (R, N_k)
    pre_coef: list[Tensor]  # on the input of ReLU layer k, (R, N_k)
    slope: list[Tensor]  # of the line that replaced each ReLU, (R, N_k)
    below: list[Tensor]  # 1 where that is the upper line, else 0, (R, N_k)


@dataclass(frozen=True)
class RowBatch:
    """R rows with all they depend on except the slopes alpha and the multipliers beta."""

    net: ChainNet
    C: Tensor  # (R, out)
    x_lb: Tensor  # (R, n)
    x_ub: Tensor
    relaxation: Relaxation  # (R, N)
    splits: Splits | None = None
    empty: Tensor | None = None  # (R,) bool: contradictory splits, any bound holds

    @staticmethod
    def make(
        net: ChainNet,
        C: Tensor,
        x_lb: Tensor,
        x_ub: Tensor,
        relaxation: Relaxation,
        image: Tensor,
        splits: Splits | None = None,
    ) -> RowBatch:
        """Rows C (R, out) of images `image` (R,) long, which index box (B, n) and relaxation (B, N)."""
        rows, empty = relaxation.select(image), None
        if splits is not None:
            rows, empty = rows.split(splits)
        return RowBatch(net, C, x_lb.index_select(0, image), x_ub.index_select(0, image), rows, splits, empty)

    def select(self, rows: Tensor) -> RowBatch:
        splits = None if self.splits is None else self.splits.select(rows)
        empty = None if self.empty is None else self.empty[rows]
        r = self.relaxation.select(rows)
        C, x_lb, x_ub = (t.index_select(0, rows) for t in (self.C, self.x_lb, self.x_ub))
        return RowBatch(self.net, C, x_lb, x_ub, r, splits, empty)

    def split_positions(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each ReLU layer the splits in it: row, slot, and neuron within the layer."""
        if self.splits is None:
            return []
        rows, slots = self.splits.sign.nonzero(as_tuple=True)
        neuron = self.splits.neuron[rows, slots]
        positions = []
        for start, end in layers(self.net):
            here = (neuron >= start) & (neuron < end)
            positions.append((rows[here], slots[here], neuron[here] - start))
        return positions

    def backward(
        self,
        alpha: Tensor,
        beta: Tensor | None = None,
        positions: list[tuple[Tensor, Tensor, Tensor]] | None = None,
    ) -> Backward:
        """One CROWN pass (spec c.8.5).

        Args:
            alpha: lower slopes (R, N) in [0, 1]; not checked.
            beta: multipliers (R, D) >= 0 of the splits; none means 0.
            positions: `split_positions()`, if already known.
        """
        if beta is not None and positions is None:
            positions = self.split_positions()
        r, coef = self.relaxation, self.C
        found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for k, (start, end) in reversed(list(enumerate(layers(self.net)))):
            h = self.net.affines[k + 1].transposed(coef)
            below = is_below(h, r.turn[:, start:end])
            slope = torch.lerp(alpha[:, start:end], r.upper[:, start:end], below)
            coef = h * slope
            if beta is not None and positions:
                rows, slots, local = positions[k]
                assert self.splits is not None
                change = -beta[rows, slots] * self.splits.sign[rows, slots]
                coef.index_put_((rows, local), change, accumulate=True)
            found.insert(0, (h, coef, slope, below))
        coef = self.net.affines[0].transposed(coef)
        corner = torch.lerp(self.x_lb, self.x_ub, is_below(coef, 0.0))
        return Backward(coef, corner, *([layer[i] for layer in found] for i in range(4)))

    def constant(self, b: Backward) -> Tensor:
        """(R,) what the biases and the intercepts of the lines add to coef . x."""
        const = self.C @ self.net.affines[-1].bias
        for k, (start, end) in enumerate(layers(self.net)):
            const = const + b.pre_coef[k] @ self.net.affines[k].bias
            const = const + (b.below[k] * self.relaxation.intercept[:, start:end] * b.relu_coef[k]).sum(1)
        return const

    def concretize(self, b: Backward) -> Tensor:
        """Minimum over the box, (R,); +inf where the splits contradict the bounds."""
        return self.or_empty(self.constant(b) + (b.coef * b.corner).sum(1))

    def or_empty(self, lb: Tensor) -> Tensor:
        """Bounds (R,), with +inf where the splits contradict the bounds."""
        return lb if self.empty is None else lb.masked_fill(self.empty, float("inf"))

    def bound(self, alpha: Tensor, beta: Tensor | None = None) -> Tensor:
        """Lower bound of every row, (R,); alpha in [0, 1] and beta >= 0 are not checked."""
        return self.concretize(self.backward(alpha, beta))


def is_below(t: Tensor, limit: Tensor | float) -> Tensor:
    """1 where t < limit, else 0. With it `lerp` is an exact `torch.where`, 10 times as fast on the CPU (measured)."""
    t = t.detach()
    return torch.lt(t, limit, out=torch.empty_like(t))


def rows_at_once(net: ChainNet) -> int:
    """How many rows to work on together: on the CPU as many as leave the tensors of a step in its caches."""
    return max(16, CACHED // max(1, net.n_neurons)) if net.device.type == "cpu" else 1 << 20


def layers(net: ChainNet) -> Iterator[tuple[int, int]]:
    """First neuron and end of each ReLU layer."""
    return pairwise(net.offsets)


def join(pre: PreBounds, like: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of all ReLU layers side by side, (B, N) each. ValueError where l > u or NaN."""
    if not pre:
        return like.new_zeros(len(like), 0), like.new_zeros(len(like), 0)
    lower, upper = (torch.cat([b[i].flatten(1) for b in pre], 1) for i in (0, 1))
    if not bool((lower <= upper).all()):
        raise ValueError("pre must have lower <= upper everywhere (and no NaN)")
    return lower, upper


def row_batch(
    net: ChainNet,
    C: Tensor,
    x_lb: Tensor,
    x_ub: Tensor,
    pre: PreBounds,
    splits: Splits | None,
    image: Tensor | None,
) -> tuple[RowBatch, tuple[int, ...]]:
    """Checked `RowBatch` of the public functions, and the shape that lb is to have."""
    x_lb, x_ub = check_box(net, x_lb, x_ub)
    if C.shape[-1] != net.n_out or C.dim() not in (2, 3):
        raise ValueError(f"C must have shape (batch, S, {net.n_out}) or (rows, {net.n_out}), got {tuple(C.shape)}")
    lead = tuple(C.shape[:-1])
    if image is None:
        if C.shape[0] != len(x_lb):
            raise ValueError(f"C must have {len(x_lb)} images as x_lb, got {C.shape[0]}")
        image = torch.arange(len(x_lb), device=C.device)
        if C.dim() == 3:
            image = image.repeat_interleave(C.shape[1])
    lower, upper = join(pre, x_lb)
    if lower.shape != (len(x_lb), net.n_neurons):
        raise ValueError(f"pre must bound ({len(x_lb)}, {net.n_neurons}) ReLU inputs, got {tuple(lower.shape)}")
    C = C.flatten(0, -2)
    if splits is not None:
        real = splits.sign != 0
        if splits.neuron.shape != splits.sign.shape or splits.neuron.shape[:-1].numel() != len(C):
            raise ValueError(f"splits must have {len(C)} rows, got {tuple(splits.neuron.shape)}")
        if bool(((splits.neuron < 0) | (splits.neuron >= net.n_neurons))[real].any()):
            raise ValueError(f"splits.neuron must be in [0, {net.n_neurons})")
        splits = Splits(splits.neuron.flatten(0, -2), splits.sign.flatten(0, -2).to(C.dtype))
    return RowBatch.make(net, C, x_lb, x_ub, Relaxation.of(lower, upper), image, splits), lead
