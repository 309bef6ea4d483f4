"""One truncated unroll and its exact meta-gradient (Sec. 3.1, 3.2; spec c4), without the graph of the whole unroll.

The student moves the stored parameters p of an optimizee whose effective parameters are p * s. Forward, only p, the
gradient and every sqrt(N)th state are kept. Backward (`meta_gradient.py`), step by step: the pull-back through one call
of the policy, a Hessian-vector product of the optimizee, and the two terms of the loss. It is the gradient that
autograd finds through the whole unroll, at a fraction of its memory, and teachers leave no more behind than one vector
a step, however many they are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from optimizer_amalgamation.problems import Problem, batch_losses, gradients
from optimizer_amalgamation.rule import State, Weights

Policy = Callable[[Weights, State, Tensor, int], tuple[Tensor, State]]
"""(weights, state, gradient (R, n), number of the step) -> update (R, n) and the next state: a rule with its context
and noise, the same whenever it is called with the same arguments."""
Reduce = Literal["max", "mean"]
EPSILON = 1e-10
TOGETHER = 2  # optimizees of the student and of teachers in one call: more are hardly faster


class Guide(Protocol):
    """A teacher: `pool.Teacher`, or a policy that is not being trained."""

    def zero_state(self, like: Tensor) -> State:
        """State before the first step of coordinates like `like` (R, n)."""
        ...

    def step(self, state: State, grad: Tensor) -> tuple[Tensor, State]:
        """Update (R, n) for a gradient (R, n), and the next state."""
        ...


@dataclass(frozen=True)
class Path:
    """Where R optimizees stand: what one unroll hands on to the next of its episode.

    Args:
        params: stored parameters (R, n) of the student's optimizees.
        state: of the student.
        taught: effective parameters (R, n) of each teacher's optimizees.
        teacher_states: of each teacher.
    """

    params: Tensor
    state: State
    taught: tuple[Tensor, ...] = ()
    teacher_states: tuple[State, ...] = ()


@dataclass(frozen=True)
class Step:
    """What is kept of one inner step."""

    params: Tensor
    state: State | None
    """of every so many steps only; those between are computed again from the gradients"""
    grad: Tensor
    losses: Tensor
    alive: Tensor
    pull: Tensor | None
    """gradient (R, n) of the imitation loss with respect to the parameters after the step"""


@dataclass(frozen=True)
class Unrolled:
    """What one unroll found.

    Args:
        meta: mean over the steps of log loss minus log loss of the unroll's start on the same minibatch (R,).
        imitation: mean log distance to the teachers (R,); 0 without any.
        nearest: share of the steps in which each of the k teachers is the nearest (R, k).
        path: where the optimizees stand now, detached.
        alive: which optimizees have not stopped (R,).
        steps: what `meta_gradient` needs; empty unless kept.
    """

    meta: Tensor
    imitation: Tensor
    nearest: Tensor
    path: Path
    alive: Tensor
    steps: list[Step]


@torch.no_grad()
def unroll(
    problem: Problem,
    policy: Policy,
    weights: Weights,
    path: Path,
    rows: Tensor,
    scale: Tensor,
    teachers: Sequence[Guide] = (),
    reduce: Reduce = "max",
    keep: bool = True,
) -> Unrolled:
    """N steps of the student, and of each teacher on its own optimizees.

    An optimizee whose loss, or whose update, is not finite stops where it is; what it has accumulated stays. A
    teacher's update that is not finite is left out.

    Args:
        problem: the optimizee.
        policy: of the student.
        weights: its weights, (R, *shape) each.
        path: where to start.
        rows: of the minibatches (N, R, B).
        scale: s (R, n), positive. Teachers do not see it.
        teachers: may be none.
        reduce: over the teachers' distances.
        keep: what `meta_gradient` needs.

    Raises:
        ValueError: for N < 1, or as many teachers as `path` was not made for.
    """
    if not len(rows):
        raise ValueError("unroll must be at least 1, got 0")
    if len(path.taught) != len(teachers):
        raise ValueError(f"teachers must be the {len(path.taught)} of the path, got {len(teachers)}")
    params, state, taught, taught_states = path.params, path.state, list(path.taught), list(path.teacher_states)
    copies, count = len(params), len(rows)
    start = (batch_losses(problem, params * scale, rows) + EPSILON).log()
    alive = everywhere = torch.ones(copies, dtype=torch.bool, device=params.device)
    meta, imitation = params.new_zeros(copies), params.new_zeros(copies)
    nearest = params.new_zeros(copies, len(teachers))
    steps: list[Step] = []
    for number in range(count):
        losses, true = _joint_gradients(problem, [params * scale, *taught], rows[number])
        grad = true[0] * scale
        alive = alive & losses.isfinite() & start[number].isfinite()
        update, new_state, alive = call(at_step(policy, weights, number), state, grad, alive)
        new_params = torch.where(alive[:, None], params - update, params)
        meta = torch.where(alive, meta + ((losses + EPSILON).log() - start[number]) / count, meta)
        pull = None
        if teachers:
            for index, teacher in enumerate(teachers):
                own = taught_states[index]
                moved, taught_states[index], fine = call(teacher.step, own, true[index + 1], everywhere)
                taught[index] = torch.where(fine[:, None], taught[index] - moved, taught[index])
            distance, pull, closest = imitate(new_params, [one / scale for one in taught], reduce)
            imitation = torch.where(alive, imitation + distance / count, imitation)
            nearest += torch.nn.functional.one_hot(closest, len(teachers)) / count
        if keep:
            steps.append(Step(params, state if number % apart(count) == 0 else None, grad, losses, alive, pull))
        params, state = new_params, new_state
    return Unrolled(meta, imitation, nearest, Path(params, state, tuple(taught), tuple(taught_states)), alive, steps)


def imitate(params: Tensor, taught: Sequence[Tensor], reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced log distance log(½‖p − p_T‖² + ε) − log n (R,), its gradient (R, n), and the nearest teacher (R,).

    Args:
        params: (R, n).
        taught: as `params`, one a teacher.
        reduce: max or mean over the teachers.
    """
    away = [params - one for one in taught]
    squares = torch.stack([0.5 * one.square().sum(1) + EPSILON for one in away])
    logs = squares.log() - math.log(params.shape[1])
    closest = logs.argmin(0)
    if reduce == "mean":
        pull = torch.stack([one / square[:, None] for one, square in zip(away, squares, strict=True)]).mean(0)
        return logs.mean(0), pull, closest
    distance, farthest = logs.max(0)
    pull = torch.zeros_like(params)
    for index, (one, square) in enumerate(zip(away, squares, strict=True)):
        pull = torch.where((farthest == index)[:, None], one / square[:, None], pull)
    return distance, pull, closest


def _joint_gradients(problem: Problem, points: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Losses (R,) at the first point and gradients at all, each (R, n), by as few calls as memory allows."""
    copies, found = len(rows), []
    for first in range(0, len(points), TOGETHER):
        some = points[first : first + TOGETHER]
        batch = problem.batch(rows.repeat(len(some), 1))
        losses, grads = gradients(problem, torch.cat(list(some)), batch)
        found.append((losses, grads.split(copies)))
    return found[0][0][:copies], [grad for _, grads in found for grad in grads]


def apart(count: int) -> int:
    """Every which step's state is kept of `count`: about 2 sqrt(count) are in memory at once."""
    return math.isqrt(count - 1) + 1


def at_step(policy: Policy, weights: Weights, number: int) -> Callable[[State, Tensor], tuple[Tensor, State]]:
    """The policy as one step of a rule."""
    return lambda state, grad: policy(weights, state, grad, number)


def call(
    step: Callable[[State, Tensor], tuple[Tensor, State]], state: State, grad: Tensor, alive: Tensor
) -> tuple[Tensor, State, Tensor]:
    """Update, next state, and which replicates (R,) go on: those alive with a finite update; others keep the state."""
    update, new = step(state, grad)
    alive = alive & update.isfinite().all(1)
    if not bool(alive.all()):
        new = {name: torch.where(by_replicate(alive, value), value, state[name]) for name, value in new.items()}
    return update, new, alive


def by_replicate(alive: Tensor, value: Tensor) -> Tensor:
    """alive (R,) with as many axes as `value` (R, ...)."""
    return alive.view(-1, *[1] * (value.ndim - 1))
