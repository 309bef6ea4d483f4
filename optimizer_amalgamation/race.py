"""Whole trainings of many copies of a problem at once, by any optimizer; their measures (Sec. 5; spec c9, c11)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.runs import generator
from optimizer_amalgamation.measures import best, instability, meta
from optimizer_amalgamation.pool import Teacher
from optimizer_amalgamation.private import private_gradients
from optimizer_amalgamation.problems import Problem, gradients, validation_losses
from optimizer_amalgamation.rule import Context, Rule, State, Weights
from optimizer_amalgamation.unroll import Guide

INIT, EPOCH, PRIVACY = range(3)  # second key of what is drawn
WORST = 1e3  # what a loss counts that is not finite
COPIES = 12  # at once
LATE = 3  # epochs that the second measure of stability leaves out
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Curves:
    """Of Q trainings.

    Args:
        train: mean minibatch loss of each epoch (Q, E).
        val: held-out loss after each epoch (Q, E).
    """

    train: Tensor
    val: Tensor


class Analytical:
    """A teacher at a rate of its own for every copy.

    Args:
        teacher: its rate is not used.
        rates: (Q,).
    """

    def __init__(self, teacher: Teacher, rates: Sequence[float]) -> None:
        self.teacher = Teacher(teacher.name, 1.0, teacher.epsilon, teacher.beta1, teacher.beta2, teacher.rho)
        self.rates = torch.tensor(rates)[:, None]

    def zero_state(self, like: Tensor) -> State:
        """See `Guide`."""
        return self.teacher.zero_state(like)

    def step(self, state: State, grad: Tensor) -> tuple[Tensor, State]:
        """See `Guide`."""
        update, state = self.teacher.step(state, grad)
        return self.rates.to(grad) * update, state


class TrueAdam:
    """Adam with bias correction by 1 - beta^t and epsilon 1e-7 outside the root, as users run it; rates (Q,)."""

    def __init__(self, rates: Sequence[float]) -> None:
        self.rates = torch.tensor(rates)[:, None]

    def zero_state(self, like: Tensor) -> State:
        """See `Guide`."""
        return {"m": torch.zeros_like(like), "v": torch.zeros_like(like), "t": torch.zeros(())}

    def step(self, state: State, grad: Tensor) -> tuple[Tensor, State]:
        """See `Guide`."""
        m, v = 0.9 * state["m"] + 0.1 * grad, 0.999 * state["v"] + 0.001 * grad.square()
        t = state["t"] + 1
        update = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-7)
        return self.rates.to(grad) * update, {"m": m, "v": v, "t": t}


class Warmed:
    """Any optimizer, which SGD goes before for the first `warmup` steps while its averages advance."""

    def __init__(self, optimizer: Guide, warmup: int, rate: float) -> None:
        self.optimizer, self.warmup, self.rate, self.steps = optimizer, warmup, rate, 0

    def zero_state(self, like: Tensor) -> State:
        """See `Guide`; the warm-up begins anew."""
        self.steps = 0
        return self.optimizer.zero_state(like)

    def step(self, state: State, grad: Tensor) -> tuple[Tensor, State]:
        """See `Guide`."""
        self.steps += 1
        update, state = self.optimizer.step(state, grad)
        return (self.rate * grad if self.steps <= self.warmup else update), state


class Learnt:
    """A rule with weights (Q, *shape), which SGD goes before for the first `warmup` steps."""

    def __init__(self, rule: Rule, weights: Weights, context: Context, warmup: int = 100, rate: float = 0.05) -> None:
        self.rule, self.weights, self.context, self.warmup, self.rate = rule, weights, context, warmup, rate
        self.steps = 0

    def zero_state(self, like: Tensor) -> State:
        """See `Guide`; the warm-up begins anew."""
        self.steps = 0
        return self.rule.zero_state(like, self.context)

    def step(self, state: State, grad: Tensor) -> tuple[Tensor, State]:
        """See `Guide`."""
        self.steps += 1
        if self.steps <= self.warmup:
            return self.rate * grad, self.rule.warmup(state, grad)
        return self.rule.step(self.weights, state, grad, self.context)


@torch.no_grad()
def race(
    problem: Problem, optimizer: Guide, starts: Sequence[int], epochs: int, seed: int, private: bool = False
) -> Curves:
    """Train one copy from each start: equal starts and seeds give equal parameters and minibatches to any optimizer.

    An optimizer's update that is not finite is left out, for that copy and step.

    Args:
        problem: keeps batch statistics for one copy only.
        optimizer: fit for as many copies as there are starts.
        starts: numbers of the starts.
        epochs: E, each a permutation of the training samples without the incomplete last minibatch.
        seed: of starts and minibatches.
        private: with the gradients of DP-SGD.
    """
    params = torch.stack([problem.init(generator(seed, INIT, start)) for start in starts]).to(problem.inputs)
    state = optimizer.zero_state(params)
    count, size = len(problem.inputs), problem.batch_size
    train, val = [], []
    for epoch in range(epochs):
        orders = [torch.randperm(count, generator=generator(seed, EPOCH, start, epoch)) for start in starts]
        rows = torch.stack([order[: count // size * size].view(-1, size) for order in orders], 1)
        noise = generator(seed, PRIVACY, epoch, *starts)
        total = params.new_zeros(len(starts))
        for some in rows.to(problem.labels.device):
            batch = problem.batch(some)
            if private:
                losses, grad = private_gradients(problem, params, batch, noise)
            else:
                losses, grad = gradients(problem, params, batch)
            update, new = optimizer.step(state, grad)
            fine = update.isfinite().all(1)
            if bool(fine.all()):
                params, state = params - update, new
            else:
                params = torch.where(fine[:, None], params - update, params)
                state = {key: _where(fine, value, state[key]) for key, value in new.items()}
            total += losses
        train.append((total / len(rows)).double())
        val.append(validation_losses(problem, params))
    return Curves(_finite(train), _finite(val))


def _where(fine: Tensor, new: Tensor, old: Tensor) -> Tensor:
    if new.ndim == 0 or len(new) != len(fine):  # a clock that all copies share
        return new
    return torch.where(fine.view(-1, *[1] * (new.ndim - 1)), new, old)


def _finite(epochs: list[Tensor]) -> Tensor:
    return torch.stack(epochs, 1).nan_to_num(WORST, WORST, WORST).clamp(1e-12, WORST).cpu()


def race_learnt(
    problem: Problem,
    rule: Rule,
    weights: Weights,
    options: Any,
    private: bool = False,
    progress: Progress | None = None,
    alike: bool = False,
) -> Curves:
    """R replicates, `options.repeats` trainings each, the replicate's trainings one behind the other (R J, E).

    Args:
        problem: to train.
        rule: of the learnt optimizer.
        weights: (R, *shape) each.
        options: an `EvaluationConfig`.
        private: see `race`.
        progress: called with the finished fraction.
        alike: all replicates from the same J starts, instead of each from the next J.
    """
    replicates = len(next(iter(weights.values())))
    context, found = Context.of(problem.shapes, problem.inputs), []
    starts = torch.arange(replicates * options.repeats)
    for some in starts.split(COPIES if problem.samplewise else 1):
        own = {name: value[some // options.repeats].to(problem.inputs) for name, value in weights.items()}
        optimizer = Learnt(rule, own, context, options.warmup, options.warmup_rate)
        own_starts = (some % options.repeats if alike else some).tolist()
        found.append(race(problem, optimizer, own_starts, options.epochs, options.seed, private))
        if progress is not None:
            progress((int(some[-1]) + 1) / len(starts))
    return Curves(torch.cat([one.train for one in found]), torch.cat([one.val for one in found]))


def outcome(curves: Curves, repeats: int) -> dict[str, Any]:
    """Measures as plain data, each a list of R lists of J numbers; `curve` is the mean log held-out loss by epoch."""

    def table(values: Any) -> list[list[float]]:
        return torch.as_tensor(values).view(-1, repeats).tolist()  # type: ignore[no-any-return]

    val, train = curves.val.numpy(), curves.train.numpy()
    return {
        "val_best": table(best(val)),
        "train_best": table(best(train)),
        "train_last": table(curves.train[:, -1].log()),
        "val_meta": table(meta(val)),
        "instability": table(instability(val)),
        "instability_late": table(instability(val, min(LATE, val.shape[1] - 1))),
        "curve": curves.val.log().mean(0).tolist(),
    }
