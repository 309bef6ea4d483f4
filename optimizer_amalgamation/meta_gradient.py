"""The exact gradient of an unroll with respect to the policy's weights, step by step backward (spec c4, h3, h5)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optimizer_amalgamation.problems import Problem, curvature
from optimizer_amalgamation.rule import State, Weights
from optimizer_amalgamation.unroll import EPSILON, Policy, Step, Unrolled, apart, at_step, by_replicate, call


def meta_gradient(
    problem: Problem,
    policy: Policy,
    weights: Weights,
    found: Unrolled,
    rows: Tensor,
    scale: Tensor,
    imitation_weight: Tensor | float = 0.0,
) -> Weights:
    """Gradient of meta + imitation_weight * imitation with respect to the weights, (R, *shape) each.

    Args:
        problem, policy, weights, rows, scale: as `unroll` had them.
        found: what it returned, with its steps.
        imitation_weight: one for all replicates, or (R,).
    """
    count = len(found.steps)
    ahead = torch.zeros_like(scale)  # gradient with respect to the parameters after the step
    states = {name: torch.zeros_like(value) for name, value in found.path.state.items()}
    total = {name: torch.zeros_like(value) for name, value in weights.items()}
    share = (
        torch.as_tensor(imitation_weight, dtype=scale.dtype, device=scale.device).expand(len(scale))[:, None] / count
    )
    behind: dict[int, State] = {}
    for number in reversed(range(count)):
        step = found.steps[number]
        if number not in behind:
            behind = _states(policy, weights, found.steps, number)
        some_stopped = not bool(step.alive.all())
        if step.pull is not None:
            ahead = ahead + share * _only(step.alive, step.pull, some_stopped)
        into = _only(step.alive, ahead, some_stopped)
        grads, before, of_weights = _pull_back(policy, weights, behind.pop(number), step.grad, number, -into, states)
        bend = curvature(problem, step.params * scale, problem.batch(rows[number]), grads * scale) * scale
        slope = step.grad / (step.losses + EPSILON)[:, None] / count
        ahead = ahead + _only(step.alive, bend + slope, some_stopped)
        if some_stopped:
            before = {key: torch.where(by_replicate(step.alive, new), new, states[key]) for key, new in before.items()}
            of_weights = {key: _only(step.alive, value, True) for key, value in of_weights.items()}
        states = before
        for name, value in of_weights.items():
            total[name] += value
    return total


def _states(policy: Policy, weights: Weights, steps: Sequence[Step], last: int) -> dict[int, State]:
    """States before the steps from the last that was kept up to number `last`."""
    first = last - last % apart(len(steps))
    state = steps[first].state
    assert state is not None
    found = {first: state}
    with torch.no_grad():
        for number in range(first, last):
            step = steps[number]
            _, state, _ = call(at_step(policy, weights, number), state, step.grad, step.alive)
            found[number + 1] = state
    return found


def _pull_back(
    policy: Policy, weights: Weights, state: State, grad: Tensor, number: int, of_update: Tensor, of_state: State
) -> tuple[Tensor, State, Weights]:
    """Gradients with respect to the gradient, the state and the weights of one call of the policy."""
    inputs = [grad, *state.values(), *weights.values()]
    leaves = [one.detach().requires_grad_() for one in inputs]
    grad, rest = leaves[0], iter(leaves[1:])
    state = {name: next(rest) for name in state}
    own = {name: next(rest) for name in weights}
    with torch.enable_grad():
        update, new = policy(own, state, grad, number)
        outputs = [(update, of_update), *((new[name], of_state[name]) for name in new)]
        outputs = [(value, cotangent) for value, cotangent in outputs if value.requires_grad]
        values, cotangents = zip(*outputs, strict=True)
        found = torch.autograd.grad(values, leaves, cotangents, allow_unused=True)
    filled = [torch.zeros_like(one) if part is None else part for one, part in zip(inputs, found, strict=True)]
    states, own_found = filled[1 : 1 + len(state)], filled[1 + len(state) :]
    return filled[0], dict(zip(state, states, strict=True)), dict(zip(own, own_found, strict=True))


def _only(alive: Tensor, value: Tensor, some_stopped: bool) -> Tensor:
    return torch.where(by_replicate(alive, value), value, torch.zeros_like(value)) if some_stopped else value
