"""Schedules of the perturbation radius: functions of the global batch index, without state to save or resume."""

from __future__ import annotations

import math
from dataclasses import dataclass

from certified_pruning.train_ibp import check_eps


@dataclass(frozen=True)
class SmoothedEps:
    """The smoothed schedule of certified training: 0, then a polynomial, then linear, then max_eps (spec c.4).

    With E batches per epoch the ramp runs from batch i0 = (start-1)*E to i1 = (start+length-1)*E. Its first part, up to
    im = i0 + int((i1-i0)*mid), grows like (batch-i0)^beta; the rest is the straight line that continues it smoothly to
    max_eps. Every lottery round starts again from batch 0.

    Args:
        max_eps: final radius, pixel units, >= 0.
        start: first epoch of the ramp, counted from 1.
        length: epochs of the ramp, >= 1.
        mid: share of the ramp that is polynomial, in [0, 1).
        beta: degree of the polynomial, >= 1. The released default is 4.
        batches_per_epoch: E. Fixed: the ramp would jump if it changed during training.
    """

    max_eps: float
    start: int
    length: int
    mid: float
    beta: float
    batches_per_epoch: int

    def __post_init__(self) -> None:
        check_eps(self.max_eps)
        for name in ("start", "length", "batches_per_epoch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.mid < 1:
            raise ValueError(f"mid must be in [0, 1), got {self.mid}")
        if not self.beta >= 1:
            raise ValueError(f"beta must be >= 1, got {self.beta}")

    def __call__(self, step: int) -> float:
        """Radius for the batch of global index `step`, counted from 0.

        Raises:
            ValueError: step < 0.
        """
        _check_step(step)
        first = (self.start - 1) * self.batches_per_epoch
        last = (self.start + self.length - 1) * self.batches_per_epoch
        middle = first + int((last - first) * self.mid)
        if step <= first:
            return 0.0
        if step >= last:
            return self.max_eps
        tangent = math.pow(middle - first, self.beta - 1)
        scale = self.max_eps / ((last - middle) * self.beta * tangent + (middle - first) * tangent) if tangent else 0.0
        if step < middle:
            return scale * math.pow(step - first, self.beta)
        at_middle = scale * math.pow(middle - first, self.beta)
        return min(at_middle + (self.max_eps - at_middle) * (step - middle) / (last - middle), self.max_eps)


@dataclass(frozen=True)
class LinearEps:
    """A straight ramp from 0 to max_eps over the first share of training, then max_eps (the demo's schedule, spec i).

    Args:
        max_eps: final radius, pixel units, >= 0.
        total_steps: batches of the whole training, >= 1.
        ramp: share of them that ramps, in [0, 1]; 0 starts at max_eps.
    """

    max_eps: float
    total_steps: int
    ramp: float = 0.3

    def __post_init__(self) -> None:
        check_eps(self.max_eps)
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp must be in [0, 1], got {self.ramp}")

    def __call__(self, step: int) -> float:
        """Radius for the batch of index `step`, counted from 0.

        Raises:
            ValueError: step < 0.
        """
        _check_step(step)
        ramp_steps = self.ramp * self.total_steps
        return self.max_eps if step >= ramp_steps else self.max_eps * step / ramp_steps


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")
