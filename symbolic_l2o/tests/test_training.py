"""Facts about meta-training: imitation, curriculum, random scaling, tuning, and what carries over between windows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from common.config import ConfigError
from common.runs import generator
from symbolic_l2o import meta_train, meta_tune, presets
from symbolic_l2o.curriculum import HORIZONS, Curriculum
from symbolic_l2o.imitation import AdamLabels, demonstrate, imitation_loss
from symbolic_l2o.inner import begin, end_loss, run, run_window, scaled_gradient
from symbolic_l2o.meta_training import BATCH, INIT, TRICK, MetaTraining
from symbolic_l2o.models import mlp, small_conv
from symbolic_l2o.presets import power_rule
from symbolic_l2o.problems import Problem, random_scale
from symbolic_l2o.race import choose, final_losses, race
from symbolic_l2o.rule import fir_rule
from symbolic_l2o.settings import MetaConfig
from symbolic_l2o.teachers import LSTMTeacher
from symbolic_l2o.tests.vectors import relative, tiny_problem
from symbolic_l2o.tuning import TunedRule

QUICK = MetaConfig(epochs=4, horizon=12, unroll=4, lr=0.01, evaluate_every=2, evaluation_horizon=12)


def teacher(kind: str = "rp_s") -> LSTMTeacher:
    torch.manual_seed(3)
    return LSTMTeacher(kind)


# Problems


def test_a_problem_is_its_network_as_a_function_of_one_vector() -> None:
    problem = tiny_problem()
    x, (images, labels) = problem.init(generator(1)), problem.batch(5)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    nn.utils.vector_to_parameters(x, net.parameters())
    loss = F.cross_entropy(net(images), labels)
    loss.backward()
    found, g = problem.gradient(x, (images, labels))
    assert torch.allclose(found, loss) and problem.size == 53
    assert torch.allclose(g, torch.cat([p.grad.flatten() for p in net.parameters()]), atol=1e-7)  # type: ignore[union-attr]
    batch = (torch.stack([images, images]), torch.stack([labels, labels]))
    losses, many = problem.gradients(torch.stack([x, 2 * x]), batch)
    assert torch.allclose(many[0], g, atol=1e-6) and torch.allclose(losses[0], loss) and losses[1] != losses[0]


def test_batches_depend_on_their_keys_alone() -> None:
    problem = tiny_problem()
    assert torch.equal(problem.batch(1, 2)[0], problem.batch(1, 2)[0])
    assert not torch.equal(problem.batch(1, 2)[0], problem.batch(1, 3)[0])


def test_running_statistics_stay_finite_and_start_anew() -> None:  # acceptance 25
    rng = torch.Generator().manual_seed(0)
    net = small_conv(1, 8, 3, track=True)
    problem = Problem(net, torch.randn(40, 1, 8, 8, generator=rng), torch.arange(40) % 3, batch_size=8)
    learner = teacher()
    path = begin(learner, problem, generator(0))
    for window in range(3):
        run_window(learner, problem, path, 3, (window,))
        for name, buffer in net.named_buffers():
            assert buffer.isfinite().all() and ("var" not in name or (buffer >= 0).all())
    assert net[1].running_var.ne(1).all() and net[1].num_batches_tracked == 12
    begin(learner, problem, generator(0))
    assert net[1].running_var.eq(1).all() and net[1].num_batches_tracked == 0


def test_wrong_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be in"):
        Problem(mlp([4, 2], nn.ReLU), torch.zeros(3, 4), torch.zeros(3).long(), batch_size=4)
    with pytest.raises(ValueError, match="module must have trainable parameters"):
        Problem(nn.ReLU(), torch.zeros(3, 4), torch.zeros(3).long(), batch_size=1)


# Windows


def test_state_carries_over_from_window_to_window_and_credit_does_not() -> None:  # acceptance 11
    learner, problem = teacher(), tiny_problem()
    whole = begin(learner, problem, generator(0))
    run_window(learner, problem, whole, 8, (7,))
    parts = begin(learner, problem, generator(0))
    first = run_window(learner, problem, parts, 4, (7,))
    second = run_window(learner, problem, parts, 4, (7,))
    assert torch.equal(whole.x, parts.x) and whole.steps == parts.steps == 8
    assert all(torch.equal(a, b) for a, b in zip(whole.state, parts.state, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.start, second.start, strict=True))
    assert not any(tensor.requires_grad for tensor in second.start)


def test_random_scaling_keeps_the_value_and_scales_the_gradient() -> None:  # acceptance 24
    problem = tiny_problem()
    r = random_scale(problem.size, 3.0, generator(4))
    assert float(r.min()) > math.exp(-3) and float(r.max()) < math.exp(3) and float(r.log().std()) > 1
    plain, scaled = begin(teacher(), problem, generator(0)), begin(teacher(), problem, generator(0), r)
    assert torch.allclose(r * scaled.x, plain.x, rtol=1e-6)
    (loss, g), (same, its) = (
        scaled_gradient(problem, plain.x, (1,), None),
        scaled_gradient(problem, scaled.x, (1,), r),
    )
    assert torch.allclose(loss, same) and torch.allclose(its, r * g, rtol=1e-3, atol=1e-6)


# Imitation


def test_the_labels_are_adams_steps() -> None:  # acceptance 23
    x = torch.nn.Parameter(torch.randn(30, generator=torch.Generator().manual_seed(0)))
    theirs, ours = torch.optim.Adam([x], lr=0.01), AdamLabels(x)
    for step in range(20):
        g = torch.randn(30, generator=torch.Generator().manual_seed(step))
        before, x.grad = x.detach().clone(), g
        theirs.step()
        label = ours(g)
        assert torch.allclose(label, x.detach() - before, atol=1e-6)
        if step == 0:
            assert torch.allclose(label, -0.01 * g.sign(), atol=1e-4)


def test_the_imitation_loss_is_half_the_squared_distance() -> None:
    learner, problem = teacher(), tiny_problem()
    features, labels = demonstrate(learner, problem, 3, generator(0), (1,))
    with torch.no_grad():
        loss, _ = imitation_loss(learner, features, labels, learner.init_state(labels[0]), 0.01)
        state, wanted = learner.init_state(labels[0]), 0.0
        for z, label in zip(features, labels, strict=True):
            out, state = learner.step(z, state)
            wanted += float(((label - 0.01 * out) ** 2).sum()) / (2 * len(label))
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


def test_a_teacher_learns_to_imitate() -> None:
    options = MetaConfig(epochs=25, horizon=12, unroll=4, lr=0.01, imitation=[1.0], evaluate_every=25)
    training = MetaTraining(teacher(), tiny_problem(), options, 0)
    found = [training.epoch()["imitation_loss"] for _ in range(25)]
    assert found[-1] < 0.5 * found[0]


# Curriculum


@given(st.lists(st.one_of(st.floats(0, 10), st.just(float("nan"))), max_size=60))
@settings(max_examples=60, deadline=None)
def test_a_curriculum_never_leaves_its_stages(metrics: list[float]) -> None:  # acceptance 26
    there = Curriculum()
    there.baseline(5.0)
    for metric in metrics:
        if there.stopped:
            break
        if there.record(metric) == "advance":
            there.baseline(5.0)
        assert 0 <= there.index <= 7 and there.horizon in HORIZONS and there.evaluation_horizon >= there.horizon


def test_a_curriculum_stops_after_three_evaluations_in_vain_and_else_advances() -> None:  # acceptance 26
    there = Curriculum()
    there.baseline(1.0)
    assert [there.record(metric) for metric in (1.0, 2.0, float("nan"))] == ["wait", "wait", "stop"] and there.stopped
    there = Curriculum()
    there.baseline(1.0)
    assert [there.record(metric) for metric in (0.9, 0.8, 0.7, 0.75)] == ["save", "save", "save", "advance"]
    assert (there.horizon, there.evaluation_horizon) == (200, 500)
    there.baseline(3.0)
    assert there.record(2.9) == "save"
    for _ in range(9):  # improves once a stage, and stays in the last
        there.baseline(3.0)
        assert [there.record(metric) for metric in (2.0, 3.0, 3.0)][-1] == "advance"
    assert (there.index, there.horizon, there.evaluation_horizon) == (7, 3000, 3000)
    with pytest.raises(ValueError, match="horizons must be rising and positive"):
        Curriculum([100, 50])


def test_meta_training_follows_its_curriculum() -> None:
    options = MetaConfig(epochs=200, horizon=4, unroll=4, lr=0.02, horizons=[4, 8, 12], evaluate_every=1)
    training = MetaTraining(teacher(), tiny_problem(), options, 0)
    while not training.finished:
        training.epoch()
    assert training.curriculum is not None and (training.curriculum.index > 0 or training.curriculum.stopped)


# Meta-training


def test_a_trained_teacher_beats_its_start_and_the_best_is_kept() -> None:
    options = MetaConfig(epochs=30, horizon=20, unroll=5, lr=0.02, evaluate_every=5, evaluation_horizon=20)
    problem, learner = tiny_problem(), teacher()
    history = meta_train(learner, problem, options, seed=1)
    assert len(history) == 7 and min(history) < history[0] - 0.03
    best = MetaTraining(learner, problem, options, 1).evaluation_loss(20)
    assert best == pytest.approx(min(history), abs=1e-6)


@pytest.mark.parametrize(("epochs", "evaluations"), [(2, 2), (4, 3)])
def test_the_last_epochs_are_evaluated_too(epochs: int, evaluations: int) -> None:
    options = MetaConfig(epochs=epochs, horizon=8, unroll=4, evaluate_every=3, evaluation_horizon=8)
    assert len(meta_train(teacher(), tiny_problem(), options)) == evaluations


def test_the_same_seed_trains_the_same_teacher() -> None:  # acceptance 27
    found = []
    for seed in (0, 0, 1):
        learner = teacher()
        torch.rand(seed + 3)  # global random state has no part in it
        meta_train(learner, tiny_problem(), QUICK, seed)
        found.append(nn.utils.parameters_to_vector(learner.parameters()).detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "options",
    [
        QUICK,
        MetaConfig(epochs=4, horizon=12, unroll=4, coords=9, random_scale=1.0, imitation=[0.5], evaluate_every=1),
        MetaConfig(epochs=4, horizon=4, unroll=4, horizons=[4, 8], evaluate_every=1),
    ],
)
def test_training_restored_from_a_snapshot_goes_on_bit_for_bit(options: MetaConfig) -> None:
    whole = MetaTraining(teacher(), tiny_problem(), options, 0)
    for _ in range(2):
        whole.epoch()
    rest = MetaTraining(teacher(), tiny_problem(), options, 0)
    rest.load_state_dict({name: value for name, value in _copy(whole.state_dict()).items()})
    for training in (whole, rest):
        while not training.finished:
            training.epoch()
    one, other = (nn.utils.parameters_to_vector(t.learner.parameters()) for t in (whole, rest))
    assert torch.equal(one, other) and whole.history == rest.history and whole.best == rest.best


def _copy(state: dict[str, object]) -> dict[str, object]:
    import copy

    return copy.deepcopy(state)


@pytest.mark.parametrize(("unroll", "horizon"), [(0, 10), (3, 10), (20, 10)])
def test_windows_that_do_not_fill_a_run_are_refused(unroll: int, horizon: int) -> None:  # acceptance 28
    with pytest.raises(ConfigError, match=r"meta\.(unroll|horizon) must be"):
        MetaConfig(unroll=unroll, horizon=horizon)


def first_step(**changes: object) -> tuple[MetaTraining, list[torch.Tensor]]:
    """A training after one epoch of one window, and the meta-gradient with which it moved."""
    options = MetaConfig(**{"epochs": 2, "horizon": 4, "unroll": 4, "evaluate_every": 9, **changes})  # type: ignore[arg-type]
    training = MetaTraining(TunedRule(presets("rp_pole_mnist5k")), tiny_problem(), options, 0)
    training.epoch()
    return training, [p.grad.clone() for p in training.parameters]  # type: ignore[union-attr]


def by_hand(scale: torch.Tensor | None = None, stale_tail: bool = False) -> list[torch.Tensor]:
    """What `first_step` should have moved with, by autograd through the unrolled steps."""
    learner, problem = TunedRule(presets("rp_pole_mnist5k")), tiny_problem()
    path = begin(learner, problem, generator(0, INIT, 0))
    factor = torch.ones(problem.size) if scale is None else scale
    x, state, total = path.x / factor, path.state, torch.zeros(())
    before = x
    for step in range(5):
        batch = problem.batch(0, BATCH, 0, step, int(step == 4))
        at = before if stale_tail and step == 4 else x
        g = factor * problem.gradient(factor * at.detach(), batch)[1]
        total = total + (g * at).sum()
        if step < 4:
            before, (out, state) = x, learner.step(learner.features(g, path.moments), state)
            x = x + 0.01 * out
    return list(torch.autograd.grad(total, list(learner.parameters())))


@pytest.mark.parametrize("mode", ["suffix", "forward"])
def test_random_scaling_holds_in_every_step_of_a_run(mode: str) -> None:  # acceptance 24
    problem = tiny_problem()
    r = random_scale(problem.size, 2.0, generator(0, TRICK, 0, 1))
    (found,), (wanted,), (plain,) = first_step(random_scale=2.0, mode=mode)[1], by_hand(r), by_hand()
    assert relative(found, wanted) < 1e-4 < 0.1 < relative(plain, wanted)
    assert relative(first_step(mode=mode)[1][0], plain) < 1e-4


def test_the_stale_tail_is_taken_where_it_was_asked_for() -> None:
    (fresh,), (stale,) = by_hand(), by_hand(stale_tail=True)
    assert relative(first_step(stale_tail=True)[1][0], stale) < 1e-4 < 1e-2 < relative(fresh, stale)


@pytest.mark.parametrize("imitation", [[0.0], [1.0]])
def test_a_meta_gradient_is_clipped_to_its_largest_norm(imitation: list[float]) -> None:
    free, clipped = (first_step(clip=clip, imitation=imitation)[1][0] for clip in (0.0, 1e-5))
    assert float(free.norm()) > 1e-4 and float(clipped.norm()) == pytest.approx(1e-5, rel=0.15)  # torch adds 1e-6
    assert torch.allclose(clipped / clipped.norm(), free / free.norm(), atol=1e-5)


def test_a_stage_of_the_curriculum_ends_with_its_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    options = MetaConfig(epochs=9, horizon=4, unroll=4, lr=0.1, horizons=[4, 8], evaluate_every=1)
    training = MetaTraining(teacher(), tiny_problem(), options, 0)
    metrics = iter([1.0, 0.5, 0.6, 0.7, 0.9])  # the start, better, worse, worse; then the best at the new horizon
    monkeypatch.setattr(training, "evaluation_loss", lambda horizon: next(metrics))
    weights = []
    for _ in range(3):
        training.epoch()
        weights.append(nn.utils.parameters_to_vector(training.learner.parameters()).detach().clone())
    assert training.curriculum is not None and training.curriculum.index == 1 and training.best == 0.9
    assert torch.equal(weights[2], weights[0]) and not torch.equal(weights[1], weights[0])


# Tuning


@pytest.mark.parametrize("rule", [presets("rp_pole_mnist5k"), power_rule(), fir_rule(["mt"], torch.ones(3, 1), [0.3])])
def test_tuning_starts_at_the_rule_itself(rule) -> None:  # type: ignore[no-untyped-def]
    for form in ("log", "raw"):
        learner = TunedRule(rule, form)
        start = learner.tuned()
        for name, value in rule.coefficients.items():
            assert start.coefficients[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_taps_of_a_feature_share_a_gain_and_a_decay() -> None:
    learner = TunedRule(fir_rule(["mt"], torch.tensor([[2.0], [1.0], [4.0]]), [0.3]))
    assert learner.names == ["gamma_mt", "gain_mt", "decay_mt"]
    with torch.no_grad():
        learner.theta.copy_(torch.tensor([0.0, math.log(2), math.log(3)]))
    found = learner.tuned().coefficients
    for tap, value in enumerate((4, 2 / 3, 8 / 9)):
        assert found[f"W_mt_{tap}"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("mode", ["suffix", "forward"])
def test_tuning_mends_a_rule_that_is_too_small_and_never_returns_worse(mode: str) -> None:
    rule = presets("rp_pole_mnist5k")
    small = rule.with_coefficients({n: 0.05 * v for n, v in rule.coefficients.items() if n[0] in "wa"})
    options = MetaConfig(
        epochs=12,
        horizon=20,
        unroll=5,
        lr=0.2,
        mode=mode,
        evaluate_every=1,
        evaluation_horizon=20,  # type: ignore[arg-type]
    )
    tuned, history = meta_tune(small, tiny_problem(), options)
    assert min(history) < 0.8 * history[0] and tuned.coefficients != small.coefficients
    wild = MetaConfig(epochs=2, horizon=10, unroll=5, lr=50.0, evaluate_every=1, evaluation_horizon=20)
    same, history = meta_tune(small, tiny_problem(), wild)
    loss = MetaTraining(TunedRule(same), tiny_problem(), wild, 0).evaluation_loss(20)
    assert loss <= history[0] + 1e-6 and history[0] <= max(history)


def test_free_coefficients_stay_where_a_rule_may_be() -> None:
    learner = TunedRule(presets("rp_pole_mnist5k"), "raw")
    for value in (-9.0, 9.0):
        with torch.no_grad():
            learner.theta.fill_(value)
        found = learner.tuned().coefficients  # which refuses a decay of 1 and a gamma of 0
        assert all(0 <= found[name] <= 0.9999 for name in learner.decays)
        assert found["w_mt"] == pytest.approx(learner.rule.coefficients["w_mt"] + value, rel=1e-5)


def test_both_modes_of_tuning_are_the_same() -> None:
    found = []
    for mode in ("suffix", "forward"):
        options = MetaConfig(epochs=2, horizon=12, unroll=4, lr=0.05, mode=mode, evaluate_every=1)  # type: ignore[arg-type]
        tuned, _ = meta_tune(presets("rp_pole_mnist5k"), tiny_problem(), options)
        found.append(torch.tensor(list(tuned.coefficients.values())))
    assert torch.allclose(*found, rtol=1e-3)


def test_a_rule_without_coefficients_cannot_be_tuned() -> None:
    with pytest.raises(ValueError, match="a rule must have coefficients to be tuned"):
        TunedRule(presets("adam"))


# Races


def test_replicas_of_a_race_are_runs_of_their_own() -> None:
    problem, learner = tiny_problem(), TunedRule(presets("rp_pole_mnist5k"))
    from symbolic_l2o.optimizer import SymbolicOptimizer

    found = race(problem, lambda p, lr: SymbolicOptimizer(p, learner.rule, lr), 0.01, 3, 12, (5,))
    alone = problem.init(generator(5, 0, 1))
    moments, state = learner.features.init(alone), learner.init_state(alone)
    for step in range(12):
        _, g = problem.gradient(alone, problem.batch(5, 1, 1, step))
        out, state = learner.step(learner.features(g, moments), state)
        alone = alone + 0.01 * out.detach()
    assert torch.allclose(found.x[1], alone, atol=1e-5)
    assert float(final_losses(problem, found.x)[1]) == pytest.approx(
        problem.full(alone, problem.images, problem.labels)[0], rel=1e-4
    )


def test_a_baseline_gets_the_best_of_its_grid() -> None:
    problem = tiny_problem()
    chosen = choose(problem, "sgdm", [1e-5, 0.3, 1e4], 2, 20, (1,))
    assert (chosen.lr, chosen.at_edge) == (0.3, False)
    assert choose(problem, "adam", [1e-5, 1e-4], 2, 5, (1,)).at_edge


def test_a_run_that_blows_up_counts_as_bad_and_not_as_nothing() -> None:
    problem = tiny_problem()
    assert final_losses(problem, torch.full((1, problem.size), float("nan")))[0] == 1e3
    assert end_loss([1.0, float("nan")]) > 1e3 and end_loss([2.0] * 30) == 2
    _, losses = run(teacher(), problem, 5, generator(0), (1,))
    assert len(losses) == 5 and losses[0] == pytest.approx(1.2, abs=0.4)
