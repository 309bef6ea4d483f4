"""The rule as an unroll calls it: with its context and, in meta-training, with noise (Sec. 4; spec c8)."""

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from optimizer_amalgamation.perturb import gaussian, relative_gaussian, standard_normal
from optimizer_amalgamation.rule import Context, Rule, State, Weights
from optimizer_amalgamation.scale import ScaleRule
from optimizer_amalgamation.settings import PerturbationConfig
from optimizer_amalgamation.unroll import Policy

Shapes = Sequence[Sequence[int]]


def make_policy(
    rule: Rule,
    context: Context,
    shapes: Shapes,
    noise: PerturbationConfig,
    steps: int,
    rngs: Sequence[torch.Generator],
    like: Weights,
    training: bool = True,
) -> Policy:
    """The policy of one unroll; all that is random in it is drawn here, for every step.

    Weight noise is another one for every tensor of the optimizee, as in the released code, where
    `noise.each_tensor` says so: the tensors are then gone through one by one. Scale's tensors see each other, so that
    they always share one.

    Args:
        rule: whose.
        context: of all coordinates.
        shapes: of the optimizee's tensors.
        noise: on weights or inputs; adversarial kinds are none of the policy's.
        steps: N.
        rngs: one a replicate.
        like: the weights (R, *shape), for their shapes.
        training: a hard choice policy chooses by Gumbel noise.
    """
    kind, magnitude = noise.kind, noise.magnitude
    weighty, hard = kind in ("gaussian", "relative"), training and bool(getattr(rule, "hardness", 0))
    if not hard and not weighty and kind != "input":
        return lambda weights, state, grad, step: rule.step(weights, state, grad, context)
    sizes = [prod(shape) for shape in shapes]
    apart = weighty and noise.each_tensor and not isinstance(rule, ScaleRule) and len(sizes) > 1
    count = len(sizes) if apart else 1
    drawn = [[standard_normal(like, rngs) for _ in range(count)] for _ in range(steps if weighty else 0)]
    total, zeros = sum(sizes), torch.zeros_like(context.tensors)
    inputs = [_normal(rngs, (total,)).to(context.ranks) for _ in range(steps if kind == "input" else 0)]
    gumbel = [
        -(-_uniform(rngs, (total, len(rule.pool))).to(context.ranks).log()).log()  # type: ignore[attr-defined]
        for _ in range(steps if hard else 0)
    ]

    def noisy(weights: Weights, step: int, number: int) -> Weights:
        if not weighty:
            return weights
        own = drawn[step][number]
        if kind == "gaussian":
            return gaussian(weights, own, magnitude)
        return relative_gaussian(weights, own, magnitude, batched=True)

    def policy(weights: Weights, state: State, grad: Tensor, step: int) -> tuple[Tensor, State]:
        grad = grad + magnitude * inputs[step] if inputs else grad
        there = Context(context.ranks, context.tensors, gumbel[step]) if hard else context
        if not apart:
            return rule.step(noisy(weights, step, 0), state, grad, there)
        spread = [name for name, value in state.items() if value.shape[1] == total]  # all but a clock
        updates, states = [], []
        for number, (end, size) in enumerate(zip(accumulate(sizes), sizes, strict=True)):
            at = slice(end - size, end)
            own = {**state, **{name: state[name][:, at] for name in spread}}
            place = Context(there.ranks[at], zeros[at], there.gumbel[:, at] if there.gumbel is not None else None)
            update, new = rule.step(noisy(weights, step, number), own, grad[:, at], place)
            updates.append(update)
            states.append(new)
        joined = {name: _joined([new[name] for new in states]) for name in spread}
        return torch.cat(updates, 1), {**states[0], **joined}

    return policy


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """State (R, n) or (R, n, units) of tensors' parts; in memory coordinates come last."""
    return torch.cat(list(parts), 1) if parts[0].ndim == 2 else torch.cat([part.mT for part in parts], 2).mT


def _normal(rngs: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=rng) for rng in rngs])


def _uniform(rngs: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.rand(shape, generator=rng) for rng in rngs]).clamp_min(1e-20)
