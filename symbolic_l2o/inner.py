"""The inner loop: a learner moves an optimizee through one window, and all is kept that the meta-gradient needs."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from symbolic_l2o.features import GradFeatures
from symbolic_l2o.features import State as FeatureState
from symbolic_l2o.problems import Problem

State = list[Tensor]
LOSSES_AT_END = 20  # the evaluation loss is the mean over the last 20 steps


class Learner(Protocol):
    """What moves an optimizee: an LSTM teacher, a rule, or a rule being tuned."""

    features: GradFeatures

    def init_state(self, like: Tensor) -> State:
        """State before the first step, coordinates first."""
        ...

    def step(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        """Raw update (P,) for features (P, F), and the next state."""
        ...


@dataclass
class Path:
    """Where an optimizee stands: x (P,), the moments of its gradients, the learner's state, the number of steps."""

    x: Tensor
    moments: FeatureState
    state: State
    steps: int = 0


@dataclass(frozen=True)
class Window:
    """What one window left behind."""

    gradients: Tensor
    """(U + 1, P): g_0 to g_U"""
    features: Tensor
    """(U, P, F)"""
    start: State
    """of the learner, before the window"""
    losses: Tensor
    """(U + 1,)"""
    stale_tail: Tensor | None = None
    """(P,): gradient of the last batch at x_{U-1}, where it was asked for"""


def begin(learner: Learner, problem: Problem, rng: torch.Generator, scale: Tensor | None = None) -> Path:
    """A fresh start; with `scale` r at x / r."""
    x = problem.init(rng)
    x = x if scale is None else x / scale
    return Path(x, learner.features.init(x), learner.init_state(x))


def scaled_gradient(problem: Problem, x: Tensor, keys: tuple[int, ...], scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss and gradient of f(r x) on the batch of `keys`."""
    if scale is None:
        return problem.gradient(x, problem.batch(*keys))
    loss, g = problem.gradient(scale * x, problem.batch(*keys))
    return loss, scale * g


@torch.no_grad()
def run_window(
    learner: Learner,
    problem: Problem,
    path: Path,
    unroll: int,
    keys: tuple[int, ...],
    *,
    eta: float = 0.01,
    scale: Tensor | None = None,
    stale_tail: bool = False,
) -> Window:
    """Move `path` on by `unroll` steps, in place.

    Args:
        learner: without graph here.
        problem: the optimizee.
        path: x, moments and state carry over from window to window, gradients do not.
        unroll: U.
        keys: of the batches; the step's number and 0 are appended, 1 for the extra loss at the end.
        eta: step of x.
        scale: random scaling r (P,).
        stale_tail: also the gradient of the last batch where the released code takes it.
    """
    start, gradients, features, losses = list(path.state), [], [], []
    before = path.x
    for _ in range(unroll):
        loss, g = scaled_gradient(problem, path.x, (*keys, path.steps, 0), scale)
        z = learner.features(g, path.moments)
        out, path.state = learner.step(z, path.state)
        before = path.x
        path.x = path.x + eta * out
        path.steps += 1
        gradients.append(g)
        features.append(z)
        losses.append(loss)
    loss, g = scaled_gradient(problem, path.x, (*keys, path.steps, 1), scale)
    tail = scaled_gradient(problem, before, (*keys, path.steps, 1), scale)[1] if stale_tail else None
    return Window(
        torch.stack([*gradients, g]), torch.stack(features), start, torch.stack([*losses, loss]), stale_tail=tail
    )


@torch.no_grad()
def run(
    learner: Learner, problem: Problem, steps: int, rng: torch.Generator, keys: tuple[int, ...], eta: float = 0.01
) -> tuple[Path, list[float]]:
    """One whole run: where it ends, and the minibatch loss of every step."""
    path, losses = begin(learner, problem, rng), []
    for _ in range(steps):
        loss, g = scaled_gradient(problem, path.x, (*keys, path.steps, 0), None)
        out, path.state = learner.step(learner.features(g, path.moments), path.state)
        path.x = path.x + eta * out
        path.steps += 1
        losses.append(float(loss))
    return path, losses


def end_loss(losses: list[float]) -> float:
    """Mean over the last 20 steps; a loss that is not finite counts as 1e6."""
    tail = torch.tensor(losses[-LOSSES_AT_END:], dtype=torch.float64)
    return float(tail.mean().nan_to_num(1e6, 1e6, 1e6).clamp(max=1e6))
