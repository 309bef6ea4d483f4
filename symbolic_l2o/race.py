"""Races: several starts of one problem at once, every optimiser on the same starts and batches (spec c.10, c.11)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.runs import generator
from symbolic_l2o.baselines import Make, baseline, cosine
from symbolic_l2o.inner import LOSSES_AT_END
from symbolic_l2o.problems import Problem

WORST = 1e3  # what a loss counts that is not finite


@dataclass(frozen=True)
class Result:
    """Of R starts."""

    curve: Tensor
    """minibatch losses, mean over the starts (steps,)"""
    end: Tensor
    """mean minibatch loss of the last 20 steps (R,)"""
    x: Tensor
    """(R, P)"""


def race(
    problem: Problem, make: Make, lr: float, starts: int, steps: int, keys: tuple[int, ...], decays: bool = False
) -> Result:
    """Train `starts` replicas of the problem at once.

    Args:
        problem: without running statistics.
        make: (parameters, lr) -> optimiser that moves each coordinate on its own.
        lr: learning rate.
        starts: R.
        steps: of each.
        keys: of the starts and batches: the same keys, the same race.
        decays: lr falls along half a cosine; else it is constant.
    """
    x = torch.stack([problem.init(generator(*keys, 0, number)) for number in range(starts)])
    leaf = torch.nn.Parameter(x)
    optimizer = make([leaf], lr)
    losses = []
    for step in range(steps):
        found = [problem.batch(*keys, 1, number, step) for number in range(starts)]
        batch = (torch.stack([inputs for inputs, _ in found]), torch.stack([labels for _, labels in found]))
        loss, leaf.grad = problem.gradients(leaf.detach(), batch)
        for group in optimizer.param_groups:
            group["lr"] = lr * (cosine(step, steps) if decays else 1.0)
        optimizer.step()
        losses.append(loss)
    curves = torch.stack(losses).nan_to_num(WORST, WORST, WORST).clamp(max=WORST)
    return Result(curves.mean(1), curves[-LOSSES_AT_END:].mean(0), leaf.detach())


def final_losses(problem: Problem, x: Tensor) -> Tensor:
    """Loss on all the problem's images at each x (R, P); 1e3 where it is not finite."""
    found = torch.tensor([problem.full(row, problem.images, problem.labels)[0] for row in x], dtype=torch.float64)
    return found.nan_to_num(WORST, WORST, WORST).clamp(max=WORST)


@dataclass(frozen=True)
class Choice:
    """A baseline's best learning rate and schedule."""

    lr: float
    decays: bool
    loss: float
    at_edge: bool
    """the best learning rate is the smallest or largest of the grid"""


def choose(problem: Problem, name: str, grid: list[float], starts: int, steps: int, keys: tuple[int, ...]) -> Choice:
    """The learning rate of `grid` and the schedule with the least mean final loss, on starts of their own."""

    def make(params: object, lr: float) -> torch.optim.Optimizer:
        return baseline(name, params, lr)

    best = Choice(grid[0], False, float("inf"), True)
    for lr in grid:
        for decays in (False, True):
            loss = float(final_losses(problem, race(problem, make, lr, starts, steps, keys, decays).x).mean())
            if loss < best.loss:
                best = Choice(lr, decays, loss, lr in (min(grid), max(grid)))
    return best
