"""The start of an episode: a fresh optimizee, its coordinates' scales, and a warm-up by plain SGD (spec c5)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optimizer_amalgamation.problems import Problem, gradients
from optimizer_amalgamation.rule import Context, Rule, State, Weights
from optimizer_amalgamation.unroll import Guide, Path


class Trained:
    """A policy that is no longer trained, as a teacher.

    Args:
        rule: of the policy.
        weights: shared by all replicates, or (R, *shape) each.
        context: of the problem.
    """

    def __init__(self, rule: Rule, weights: Weights, context: Context) -> None:
        self.rule, self.weights, self.context = rule, weights, context

    def zero_state(self, like: Tensor) -> State:
        """See `Guide`."""
        return self.rule.zero_state(like, self.context)

    def warmup(self, state: State, grad: Tensor) -> State:
        """State after a step of SGD in the policy's stead."""
        return self.rule.warmup(state, grad)

    def step(self, state: State, grad: Tensor) -> tuple[Tensor, State]:
        """See `Guide`."""
        return self.rule.step(self.weights, state, grad, self.context)


def draw_scale(size: int, spread: float, generator: torch.Generator) -> Tensor:
    """s (size,) = exp(U(-spread, spread))."""
    return ((2 * torch.rand(size, generator=generator) - 1) * spread).exp()


@torch.no_grad()
def begin(
    problem: Problem,
    rule: Rule,
    context: Context,
    start: Tensor,
    scale: Tensor,
    teachers: Sequence[Guide] = (),
    rows: Tensor | None = None,
    rate: float = 0.05,
) -> Path:
    """Where all policies start, after a warm-up if `rows` are given.

    Warming up, p <- p - rate * gradient with respect to the stored p; every policy's analytical averages see the
    gradients (the student's those of the stored parameters, the teachers' the true ones), recurrent states stay 0.

    Args:
        problem: the optimizee.
        rule: the student's.
        context: of the problem.
        start: effective parameters (R, n).
        scale: s (R, n).
        teachers: may be none.
        rows: of the warm-up's minibatches (N, R, B).
        rate: of its SGD.
    """
    params, state = start / scale, rule.zero_state(start, context)
    teacher_states = [teacher.zero_state(start) for teacher in teachers]
    for some in rows if rows is not None else ():
        _, true = gradients(problem, params * scale, problem.batch(some))
        state = rule.warmup(state, true * scale)
        for index, teacher in enumerate(teachers):
            advance = teacher.warmup if isinstance(teacher, Trained) else lambda s, g, t=teacher: t.step(s, g)[1]
            teacher_states[index] = advance(teacher_states[index], true)
        params = params - rate * true * scale
    taught = tuple(params * scale for _ in teachers)
    return Path(params, state, taught, tuple(teacher_states))
