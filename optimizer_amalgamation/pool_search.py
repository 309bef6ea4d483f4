"""The pool's members at their best rates, and the oracle among them (Sec. 5; spec c10, i): chosen on other starts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from optimizer_amalgamation.measures import best
from optimizer_amalgamation.pool import LARGE_TEACHERS, Teacher
from optimizer_amalgamation.problems import Problem
from optimizer_amalgamation.race import COPIES, Analytical, Curves, TrueAdam, Warmed, race
from optimizer_amalgamation.unroll import Guide

TRUE_ADAM = "true_adam"
"""Adam with bias correction: reported beside the pool, not in it."""
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Member:
    """A hand-made optimizer at its best rate."""

    name: str
    rate: float
    loss: float
    """mean log of the least held-out loss on the starts of the choice"""
    at_edge: bool
    """the best rate is the grid's smallest or largest"""


def named(name: str, rates: Sequence[float]) -> Guide:
    """The optimizer of a name, at a rate for every copy."""
    return TrueAdam(rates) if name == TRUE_ADAM else Analytical(Teacher(name, 1.0), rates)


def members() -> dict[str, float]:
    """Names, and the rates that the paper's authors found on their problem."""
    found = {teacher.name: teacher.lr for teacher in LARGE_TEACHERS.teachers}
    return {**found, TRUE_ADAM: found["adam"]}


def measure(
    problem: Problem,
    name: str,
    rates: Sequence[float],
    starts: Sequence[int],
    epochs: int,
    seed: int,
    warmup: tuple[int, float] = (0, 0.0),
) -> Curves:
    """Curves of one optimizer, a rate and a start for every copy; `COPIES` at once, SGD first: steps, rate."""
    parts = []
    step = COPIES if problem.samplewise else 1
    for first in range(0, len(starts), step):
        some = slice(first, first + step)
        optimizer = Warmed(named(name, rates[some]), *warmup)
        parts.append(race(problem, optimizer, starts[some], epochs, seed))
    return Curves(torch.cat([one.train for one in parts]), torch.cat([one.val for one in parts]))


def choose(problem: Problem, name: str, factors: Sequence[float], repeats: int, epochs: int, seed: int) -> Member:
    """The factor of the authors' rate with the least mean log held-out loss over `repeats` starts."""
    grid = [factor * members()[name] for factor in factors]
    rates = [rate for rate in grid for _ in range(repeats)]
    curves = measure(problem, name, rates, list(range(repeats)) * len(grid), epochs, seed)
    losses = best(curves.val.numpy()).reshape(len(grid), repeats).mean(1).tolist()
    at = losses.index(min(losses))
    return Member(name, grid[at], losses[at], grid[at] in (min(grid), max(grid)))


def oracle(found: Sequence[Member]) -> Member:
    """The best member of the pool."""
    return min((one for one in found if one.name != TRUE_ADAM), key=lambda one: one.loss)
