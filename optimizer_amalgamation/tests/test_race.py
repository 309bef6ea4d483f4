"""Facts about races: equal conditions, warm-up, the oracle's choice, measures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from common.runs import generator
from optimizer_amalgamation import Context, StudentRule, Teacher
from optimizer_amalgamation.measures import best, instability
from optimizer_amalgamation.pool_search import Member, choose, measure, members, named, oracle
from optimizer_amalgamation.private import private_gradients
from optimizer_amalgamation.problems import gradients, validation_losses
from optimizer_amalgamation.race import WORST, Analytical, Curves, Learnt, TrueAdam, Warmed, outcome, race, race_learnt
from optimizer_amalgamation.settings import EvaluationConfig
from optimizer_amalgamation.tests.plain import tiny


class Recorder:
    """SGD that remembers every gradient."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def zero_state(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def step(self, state: Any, grad: torch.Tensor) -> Any:
        self.seen.append(grad)
        return 0.1 * grad, state


def test_a_race_is_ordinary_training() -> None:
    problem = tiny(batch_size=6, samples=40)
    curves = race(problem, Recorder(), [3], 2, seed=9)
    params, train, val = problem.init(generator(9, 0, 3))[None], [], []
    for epoch in range(2):
        order = torch.randperm(40, generator=generator(9, 1, 3, epoch))
        losses = []
        for batch in order[:36].split(6):
            loss, grad = gradients(problem, params, problem.batch(batch[None]))
            params = params - 0.1 * grad
            losses.append(float(loss))
        train.append(sum(losses) / 6)
        val.append(float(validation_losses(problem, params)))
    assert curves.train[0].tolist() == pytest.approx(train, rel=1e-5)
    assert curves.val[0].tolist() == pytest.approx(val, rel=1e-5)


def test_all_optimizers_see_the_same_starts_and_minibatches_of_a_seed() -> None:
    one, two, other = Recorder(), Recorder(), Recorder()
    problem = tiny()
    race(problem, one, [0, 1], 1, 0)
    race(problem, two, [1], 1, 0)
    race(problem, other, [1], 1, 1)
    assert (one.seen[0][1] - two.seen[0][0]).abs().max() < 1e-6
    assert (one.seen[0][0] - two.seen[0][0]).abs().max() > 1e-3
    assert (two.seen[0] - other.seen[0]).abs().max() > 1e-3


def test_a_private_race_has_the_gradients_of_dp_sgd() -> None:
    problem, private, plain = tiny(batch_size=6, samples=40), Recorder(), Recorder()
    race(problem, private, [3], 1, 9, private=True)
    race(problem, plain, [3], 1, 9)
    params = problem.init(generator(9, 0, 3))[None]
    batch = problem.batch(torch.randperm(40, generator=generator(9, 1, 3, 0))[None, :6])
    _, wanted = private_gradients(problem, params, batch, generator(9, 2, 0, 3))
    assert torch.allclose(private.seen[0], wanted, atol=1e-6)
    assert float((private.seen[0] - plain.seen[0]).abs().max()) > 0.1


def test_a_copy_that_overflows_counts_as_the_worst_and_harms_no_other() -> None:
    problem = tiny()
    both = race(problem, Analytical(Teacher("sgd", 1.0), [0.1, 1e30]), [0, 1], 2, 0)
    alone = race(problem, Analytical(Teacher("sgd", 1.0), [0.1]), [0], 2, 0)
    assert both.val[0].tolist() == pytest.approx(alone.val[0].tolist(), rel=1e-5)
    assert both.val[1].tolist() == [WORST, WORST]


def test_a_learnt_optimizer_begins_with_sgd_while_its_averages_advance() -> None:
    rule, context = StudentRule(), Context.of([torch.Size([4])])
    weights = rule.init(generator(0), 2)
    learnt, grad = Learnt(rule, weights, context, warmup=2, rate=0.05), torch.randn(2, 4, generator=generator(1))
    state = learnt.zero_state(grad)
    for _ in range(2):
        update, state = learnt.step(state, grad)
        assert torch.equal(update, 0.05 * grad) and not state["h0"].any() and bool(state["m"].any())
    update, _ = learnt.step(state, grad)
    assert torch.equal(update, rule.step(weights, state, grad, context)[0])
    learnt.zero_state(grad)
    assert torch.equal(learnt.step(rule.zero_state(grad), grad)[0], 0.05 * grad)


def test_true_adam_is_torchs() -> None:
    p = torch.nn.Parameter(torch.zeros(5))
    torchs, ours = torch.optim.Adam([p], lr=0.01, eps=1e-7), TrueAdam([0.01])
    x, state = torch.zeros(1, 5), ours.zero_state(torch.zeros(1, 5))
    for step in range(30):
        p.grad = torch.randn(5, generator=generator(step))
        torchs.step()
        update, state = ours.step(state, p.grad[None])
        x = x - update
    assert (x[0] - p.detach()).abs().max() < 2e-6  # 1 - .999 is off by up to 6e-5 of itself in float32


def test_rates_by_copy_are_teachers_of_those_rates() -> None:
    grads = torch.randn(6, 2, 3, generator=generator(0))
    for name in ("sgd", "momentum", "rmsprop", "adam", "powersign", "addsign"):
        both = Analytical(Teacher(name, 7.0), [0.1, 0.3])
        ones = [Teacher(name, rate) for rate in (0.1, 0.3)]
        state, states = both.zero_state(grads[0]), [one.zero_state(grads[0, :1]) for one in ones]
        for grad in grads:
            update, state = both.step(state, grad)
            for copy, one in enumerate(ones):
                wanted, states[copy] = one.step(states[copy], grad[copy : copy + 1])
                assert torch.allclose(update[copy : copy + 1], wanted, rtol=1e-5)


def test_a_members_rate_is_the_best_of_its_grid_on_other_starts() -> None:
    problem = tiny()
    found = choose(problem, "sgd", [1e-4, 1.0, 100.0], 2, 3, seed=5)
    assert found.rate == pytest.approx(0.2) and not found.at_edge
    losses = best(measure(problem, "sgd", [0.2, 0.2], [0, 1], 3, 5).val.numpy())
    assert found.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert choose(problem, "sgd", [1e-4, 1.0], 2, 3, seed=5).at_edge


def test_the_oracle_is_the_best_of_the_pool() -> None:
    found = [Member("sgd", 0.2, -1.0, False), Member("adam", 0.01, -1.5, False), Member("true_adam", 0.1, -2.0, False)]
    assert oracle(found).name == "adam"
    assert list(members()) == ["sgd", "momentum", "rmsprop", "adam", "powersign", "addsign", "true_adam"]
    assert isinstance(named("true_adam", [0.1]), TrueAdam)


def test_replicates_race_each_from_starts_of_its_own() -> None:
    problem, rule = tiny(), StudentRule()
    weights = rule.init(generator(0), 2)
    options = EvaluationConfig(problems=["tiny14"], epochs=2, repeats=3, warmup=2, seed=4)
    curves = race_learnt(problem, rule, weights, options)
    second = {name: value[1:].expand(3, *value.shape[1:]) for name, value in weights.items()}
    alone = race(problem, Learnt(rule, second, Context.of(problem.shapes), 2), [3, 4, 5], 2, 4)
    assert torch.allclose(curves.val[3:], alone.val, rtol=1e-4)
    found = outcome(curves, 3)
    assert np.allclose(found["val_best"], curves.val.min(1).values.log().view(2, 3))
    assert np.allclose(found["val_meta"], curves.val.log().mean(1).view(2, 3))
    assert np.allclose(found["train_last"], curves.train[:, -1].log().view(2, 3))
    assert np.allclose(found["curve"], curves.val.log().mean(0))


def test_measures_leave_no_trace_of_shape() -> None:
    val = torch.tensor([[3.0, 2.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    found = outcome(Curves(val, val), 1)
    assert found["val_best"] == [[0.0], [0.0]] and found["instability"][1] == [0.0]
    assert found["instability"][0][0] == pytest.approx(float(instability(val[0].numpy())))
    assert found["train_best"] == [[0.0], [0.0]] and found["train_last"][0][0] == pytest.approx(math.log(2))


class Faulty(Recorder):
    """Its third update is no number for the second copy; the state counts the steps of each copy and of all."""

    def zero_state(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"own": torch.zeros(len(like), 1), "clock": torch.zeros(())}

    def step(self, state: Any, grad: torch.Tensor) -> Any:
        update, _ = super().step(state, grad)
        self.state = {name: value + 1 for name, value in state.items()}
        if len(self.seen) == 3:
            update[1, 0] = float("nan")
        return update, self.state


def test_an_update_that_is_no_number_is_left_out_for_its_copy_alone() -> None:
    problem = tiny(batch_size=6, samples=40)
    faulty, plain = Faulty(), Recorder()
    found, wanted = race(problem, faulty, [0, 1], 2, 0), race(problem, plain, [0, 1], 2, 0)
    assert torch.equal(found.val[0], wanted.val[0]) and float(found.val[1].max()) < WORST
    assert not torch.equal(found.val[1], wanted.val[1])
    assert faulty.state["own"].flatten().tolist() == [12, 11] and float(faulty.state["clock"]) == 12


def test_any_optimizer_can_begin_with_sgd() -> None:
    grads = torch.randn(4, 1, 3, generator=generator(0))
    plain, warmed = TrueAdam([0.1]), Warmed(TrueAdam([0.1]), 2, 0.05)
    for _ in range(2):  # the warm-up begins anew
        state, its = plain.zero_state(grads[0]), warmed.zero_state(grads[0])
        for number, grad in enumerate(grads):
            wanted, state = plain.step(state, grad)
            update, its = warmed.step(its, grad)
            assert torch.equal(update, wanted if number >= 2 else 0.05 * grad)


def test_replicates_can_race_from_the_same_starts() -> None:
    problem, rule = tiny(), StudentRule()
    weights = {name: value.expand(2, *value.shape[1:]) for name, value in rule.init(generator(0), 1).items()}
    options = EvaluationConfig(problems=["tiny14"], epochs=1, repeats=2, warmup=2, seed=4)
    alike, apart = (race_learnt(problem, rule, weights, options, alike=alike).val for alike in (True, False))
    assert torch.allclose(alike[:2], alike[2:]) and not torch.allclose(apart[:2], apart[2:])
    assert torch.allclose(alike[:2], apart[:2])
