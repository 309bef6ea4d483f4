"""Facts about meta-training: replicates, noise, schedules, resuming."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from common.runs import generator
from optimizer_amalgamation import SMALL_CHOICE, ChoiceRule, Context, StudentRule, Teacher, meta_training
from optimizer_amalgamation.meta_training import MetaTraining
from optimizer_amalgamation.noisy_policy import make_policy
from optimizer_amalgamation.replicate import Replicate
from optimizer_amalgamation.schedules import ScheduleConfig
from optimizer_amalgamation.settings import MetaConfig, PerturbationConfig
from optimizer_amalgamation.tests.plain import doubled, tiny
from optimizer_amalgamation.unroll import unroll

TEACHERS = [Teacher("adam", 0.01), Teacher("rmsprop", 0.005)]
SHORT = ScheduleConfig(
    depths=[1, 2], imitation=[0.5, 0.1], episodes=2, periods=1, chances=0, validation_depths=[1], validation_episodes=1
)
ONE = ScheduleConfig(kind="repeat", depths=[1], imitation=[0.5], episodes=3, periods=1, validation_episodes=1)


def training(
    numbers: list[int], schedule: ScheduleConfig = ONE, rule: Any = None, dtype: Any = torch.float64, **options: Any
) -> MetaTraining:
    problem = doubled(tiny()) if dtype == torch.float64 else tiny()
    meta = MetaConfig(replicates=numbers, unroll=4, spread=1.0)
    kwargs = {"teaching": lambda _: TEACHERS, **options}
    if kwargs["teaching"] is None:
        del kwargs["teaching"]
    return MetaTraining(problem, rule or StudentRule(), meta, schedule, 5, **kwargs)


def finished(one: MetaTraining) -> MetaTraining:
    while not one.finished:
        one.episode()
    return one


def weights_of(one: MetaTraining, index: int = 0) -> torch.Tensor:
    return torch.cat([value[index].flatten() for value in one.weights().values()])


def test_replicates_together_are_replicates_alone() -> None:
    together = finished(training([0, 3, 7], SHORT))
    for index, number in enumerate([0, 3, 7]):
        alone = finished(training([number], SHORT))
        assert (weights_of(together, index) - weights_of(alone)).abs().max() < 1e-9
        assert together.replicates[index].best == pytest.approx(alone.replicates[0].best, abs=1e-9)
        assert together.replicates[index].meta_steps == alone.replicates[0].meta_steps
    assert (weights_of(together, 0) - weights_of(together, 1)).abs().max() > 1e-3


def test_meta_training_is_the_same_bit_for_bit_again_and_after_a_break() -> None:
    whole = training([0, 1], SHORT, dtype=torch.float32)
    broken, snapshots = training([0, 1], SHORT, dtype=torch.float32), []
    while not whole.finished:
        snapshots.append(copy.deepcopy(whole.state_dict()))
        whole.episode()
    middle = snapshots[len(snapshots) // 2]
    broken.load_state_dict(middle)
    assert torch.equal(weights_of(finished(broken)), weights_of(whole))
    assert torch.equal(weights_of(finished(training([0, 1], SHORT, dtype=torch.float32))), weights_of(whole))


@pytest.mark.parametrize("other", ["rule", "count", "part", "kept"])
def test_a_snapshot_of_another_training_is_refused_and_changes_nothing(other: str) -> None:
    one = training([0, 1], SHORT)
    before, saved = weights_of(one, 1), finished(training([0, 1], SHORT)).state_dict()
    message = "a snapshot of replicate 1 must have"
    if other == "rule":
        saved["replicates"][1] = training([1], SHORT, ChoiceRule(SMALL_CHOICE)).state_dict()["replicates"][0]
        message += r" lstm0_kernel of shape \(2, 80\), got \(6, 80\)"
    elif other == "count":
        saved["replicates"].append(saved["replicates"][0])
        message = "a snapshot must have 2 replicates, got 3"
    elif other == "part":
        del saved["replicates"][1]["history"]
        message += " history, got none"
    else:
        saved["replicates"][1]["kept"] = {"stage_0": {"weights": {}, "moments": {"m": {}, "v": {}, "t": 0}}}
        message += r" lstm0_kernel of shape \(2, 80\), got none"
    with pytest.raises(ValueError, match=message):
        one.load_state_dict(saved)
    assert torch.equal(weights_of(one, 1), before) and one.replicates[0].meta_steps == 0


def test_meta_training_leaves_the_global_generator_alone() -> None:
    one, before = training([0]), torch.random.get_rng_state()
    one.episode()
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_first_meta_step_is_adams() -> None:
    one = training([0])
    before = {name: value.clone() for name, value in one.replicates[0].weights.items()}
    one.episode()
    after = one.replicates[0].weights
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert float(moved.abs().max()) == pytest.approx(1e-3, rel=1e-3) and float(moved.abs().median()) > 5e-4


def test_a_meta_gradient_that_is_not_finite_is_left_out_and_counted() -> None:
    one = Replicate(0, {"w": torch.ones(2)}, ONE)
    one.descend({"w": torch.tensor([float("nan"), 1.0])}, 0.1)
    assert (one.skipped, one.meta_steps, one.moments["t"]) == (1, 0, 0) and one.weights["w"].tolist() == [1, 1]
    one.descend({"w": torch.tensor([1.0, -1.0])}, 0.1)
    assert one.weights["w"].tolist() == pytest.approx([0.9, 1.1], abs=1e-5)
    one.descend({"w": torch.tensor([1.0, -1.0])}, 0.1)
    assert one.weights["w"].tolist() == pytest.approx([0.8, 1.2], abs=1e-2) and one.meta_steps == 2


def test_the_meta_optimizer_is_adam_with_the_released_settings() -> None:
    p = torch.nn.Parameter(torch.full((3,), 50.0, dtype=torch.float64))
    one, adam = Replicate(0, {"w": p.detach().clone()}, ONE), torch.optim.Adam([p], 0.1, (0.9, 0.999), 1e-7)
    for step in range(6):
        p.grad = torch.tensor([1.0, 1e-6, -1e-7], dtype=torch.float64) * (1 + step % 3)
        adam.step()
        one.descend({"w": p.grad}, 0.1)
    assert torch.allclose(one.weights["w"], p.detach(), rtol=0, atol=1e-12)


def test_the_meta_optimizer_sees_the_clipped_gradient() -> None:
    one = Replicate(0, {"w": torch.tensor([3.0, 4.0])}, ONE)
    one.descend({"w": torch.tensor([30.0, -40.0])}, 0.1)
    assert one.moments["m"]["w"].tolist() == pytest.approx([0.1 * 0.3, -0.1 * 0.4])


def test_no_two_episodes_of_training_are_the_same() -> None:
    schedule = ScheduleConfig(kind="repeat", depths=[1], imitation=[0.0], episodes=2, periods=2, validation_episodes=1)
    problem = doubled(tiny())
    meta = MetaConfig(replicates=[0, 1], unroll=4, spread=1.0, lr=1e-12)
    one = finished(MetaTraining(problem, StudentRule(), meta, schedule, 5))
    losses = [history[0] for replicate in one.replicates for history in replicate.history]
    assert len(losses) >= 8 and len({round(loss, 9) for loss in losses}) == len(losses)  # periods may be repeated
    assert len({torch.rand(1, generator=one._generator(replicate)).item() for replicate in one.replicates}) == 2


def test_a_stage_ends_with_the_weights_of_its_best_validation() -> None:
    one = finished(training([0], SHORT))
    replicate = one.replicates[0]
    name, value = replicate.schedule.reference  # type: ignore[misc]
    assert name.startswith("stage_1.") and replicate.best == value
    assert all(not one.schedule.validations[0] for one in one.replicates)


def test_validations_see_the_same_draws_every_time() -> None:
    one = training([0], SHORT)
    replicate, found = one.replicates[0], []
    for _ in range(2):
        replicate.validating, replicate.episode, replicate.losses = True, 0, []
        found.append(one.episode()["meta_loss"])
        replicate.episodes += 5
    assert found[0] == found[1]


def test_imitation_of_a_weight_of_zero_is_meta_training_without_teachers() -> None:
    schedule = ScheduleConfig(kind="repeat", depths=[2], imitation=[0.0], episodes=2, periods=1, validation_episodes=1)
    taught, untaught = finished(training([0], schedule)), finished(training([0], schedule, teaching=None))
    assert (weights_of(taught) - weights_of(untaught)).abs().max() < 1e-12
    other = finished(training([0]))
    assert (weights_of(other) - weights_of(finished(training([0], teaching=None)))).abs().max() > 1e-5


def noisy(**options: Any) -> torch.Tensor:
    return weights_of(finished(training([0], perturbation=PerturbationConfig(**options))))


@pytest.mark.parametrize("kind", ["gaussian", "relative", "input", "fgsm", "pgd", "cgd"])
def test_noise_of_magnitude_zero_changes_nothing_and_other_noise_does(kind: str) -> None:
    plain = weights_of(finished(training([0])))
    assert (noisy(kind=kind, magnitude=0.0) - plain).abs().max() < 1e-12
    assert (noisy(kind=kind, magnitude=0.05) - plain).abs().max() > 1e-6


def test_adversarial_noise_climbs_as_often_as_asked() -> None:
    once, twice = (noisy(kind="fgsm", magnitude=0.02, steps=steps) for steps in (1, 2))
    assert (once - twice).abs().max() > 1e-6


@pytest.mark.parametrize(("kind", "magnitude"), [("fgsm", 1e-4), ("pgd", 0.02), ("cgd", 0.02)])
def test_adversarial_noise_raises_the_loss_and_begins_at_the_weights_in_every_meta_step(
    kind: Any, magnitude: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def spy(problem: Any, policy: Any, at: Any, *rest: Any, **options: Any) -> Any:
        unrolled = unroll(problem, policy, at, *rest, **options)
        loss = unrolled.meta + 0.5 * unrolled.imitation  # the first stage's weight of imitation
        found.append((float(loss), torch.cat([value[0].flatten() for value in at.values()])))
        return unrolled

    one = training([0], perturbation=PerturbationConfig(kind, magnitude, steps=3, lr=0.01))
    monkeypatch.setattr(meta_training, "unroll", spy)
    for _ in range(2):
        before = weights_of(one)
        found.clear()
        one.episode()
        losses, places = zip(*found, strict=True)
        assert len(losses) == 4 and torch.equal(places[0], before)
        assert list(losses) == sorted(losses) and losses[0] < losses[3]
        assert not torch.equal(weights_of(one), before)


def test_scales_of_parameters_are_log_uniform_and_each_replicates_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(
        problem: Any, policy: Any, at: Any, path: Any, rows: Any, scale: torch.Tensor, *rest: Any, **rest_: Any
    ) -> Any:
        seen.append(scale)
        return unroll(problem, policy, at, path, rows, scale, *rest, **rest_)

    monkeypatch.setattr(meta_training, "unroll", spy)
    for validating in (False, True):
        one = training([0, 1])
        for replicate in one.replicates:
            replicate.validating = validating
        one.episode()
    for scale in seen:
        logs = scale.log()  # spread 1
        assert 0.95 < float(logs.abs().max()) <= 1 and abs(float(logs.mean())) < 0.1
        assert float(logs.std()) == pytest.approx(3**-0.5, rel=0.1) and not torch.equal(logs[0], logs[1])


def test_validations_have_a_depth_of_their_own() -> None:
    one = training([0], dataclasses.replace(ONE, validation_depths=[3]))
    assert one.episode()["depth"] == 1
    one.replicates[0].validating = True
    assert one.episode()["depth"] == 3


def test_no_two_unrolls_have_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def spy(rule: Any, context: Any, shapes: Any, noise: Any, steps: Any, rngs: Any, *rest: Any) -> Any:
        seeds.extend(rng.initial_seed() for rng in rngs)
        return make_policy(rule, context, shapes, noise, steps, rngs, *rest)

    monkeypatch.setattr(meta_training, "make_policy", spy)
    schedule = ScheduleConfig(
        kind="repeat", depths=[2], episodes=2, periods=2, validation_depths=[2], validation_episodes=2, threshold=1e9
    )
    finished(training([0, 1], schedule, perturbation=PerturbationConfig("gaussian", 1e-3, perturb_validation=True)))
    assert len(seeds) == 2 * 2 * (2 + 2) * 2 and len(set(seeds)) == len(seeds)


class Echo:
    """A rule whose update is what it sees: the gradient, or the noise of a choice."""

    pool = range(3)

    def __init__(self, hardness: float) -> None:
        self.hardness = hardness

    def step(self, weights: Any, state: Any, grad: torch.Tensor, context: Context) -> Any:
        return context.gumbel if self.hardness else grad + weights["w"], state


def echoed(kind: Any, magnitude: float, hardness: float = 0.0, steps: int = 2) -> torch.Tensor:
    """Of every step, (steps, 1, n) or (steps, 1, n, 3)."""
    weights, grad, shape = {"w": torch.full((1, 1), 2.0)}, torch.full((1, 4000), 3.0), [(4000,)]
    noise, rngs = PerturbationConfig(kind, magnitude), [generator(7)]
    policy = make_policy(Echo(hardness), Context.of(shape), shape, noise, steps, rngs, weights)  # type: ignore[arg-type]
    return torch.stack([policy(weights, {}, grad, step)[0] for step in range(steps)])


@pytest.mark.parametrize("kind", ["gaussian", "relative", "input"])
def test_noise_is_drawn_anew_for_every_inner_step(kind: str) -> None:
    first, second = echoed(kind, 0.1)
    assert not torch.equal(first, second)


def test_noise_on_inputs_has_its_deviation() -> None:
    noise = echoed("input", 0.02) - 5
    assert float(noise.std()) == pytest.approx(0.02, rel=0.05) and abs(float(noise.mean())) < 0.002


def test_noise_of_a_hard_choice_is_gumbels() -> None:
    noise = echoed("none", 0.0, hardness=1.0)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.05)
    assert float(noise.std()) == pytest.approx(torch.pi / 6**0.5, rel=0.05)


def test_validations_are_not_perturbed_unless_asked() -> None:
    losses = []
    for options in ({}, {"kind": "relative", "magnitude": 0.5}, {"kind": "fgsm", "magnitude": 0.5}):
        one = training([0], perturbation=PerturbationConfig(**options))
        one.replicates[0].validating = True
        losses.append(one.episode()["meta_loss"])
    one = training([0], perturbation=PerturbationConfig("relative", 0.5, perturb_validation=True))
    one.replicates[0].validating = True
    assert losses[0] == losses[1] == losses[2] != one.episode()["meta_loss"]


def test_a_hard_choice_policy_is_trained_with_noise_and_validated_without() -> None:
    schedule = ScheduleConfig(kind="repeat", depths=[1], imitation=[0.0], episodes=2, periods=1, validation_episodes=1)
    hard = finished(training([0], schedule, ChoiceRule(SMALL_CHOICE, hardness=5.0), teaching=None))
    soft = finished(training([0], schedule, ChoiceRule(SMALL_CHOICE), teaching=None))
    assert torch.isfinite(weights_of(hard)).all() and not torch.equal(weights_of(hard), weights_of(soft))


def test_what_each_episode_found_is_kept() -> None:
    one = training([0, 1], SHORT)
    logged = one.episode()
    assert logged["depth"] == 1 and logged["replicates"] == 2
    assert logged["nearest_0"] + logged["nearest_1"] == pytest.approx(1)
    mean = sum(replicate.history[0][0] for replicate in one.replicates) / 2
    assert logged["meta_loss"] == pytest.approx(mean)


def test_a_period_that_is_repeated_begins_with_the_weights_and_the_moments_of_its_reference() -> None:
    schedule = ScheduleConfig(kind="repeat", episodes=1, periods=2, validation_episodes=1, threshold=0.5)
    one = Replicate(0, {"w": torch.ones(2)}, schedule)
    one.descend({"w": torch.tensor([1.0, -1.0])}, 0.1)
    good, moments = one.weights["w"], one.moments["m"]["w"]
    one.losses = [-1.0]
    one.finish_period()
    one.descend({"w": torch.tensor([1.0, 1.0])}, 0.1)
    assert not torch.equal(one.weights["w"], good) and one.schedule.period == 1
    one.losses = [2.0]
    one.finish_period()
    assert (one.schedule.period, one.schedule.repeat) == (1, 1)
    assert torch.equal(one.weights["w"], good)
    assert torch.equal(one.moments["m"]["w"], moments) and one.moments["t"] == 1 and one.meta_steps == 2


@pytest.mark.parametrize("validating", [False, True])
def test_an_episode_begins_with_sgd_of_the_warm_ups_rate(validating: bool) -> None:
    found = []
    for warmup, rate in ((1, 0.05), (1, 0.0), (0, 0.05)):
        schedule = dataclasses.replace(ONE, warmups=[warmup])
        meta = MetaConfig(replicates=[0], unroll=4, spread=1.0, warmup_rate=rate)
        one = MetaTraining(doubled(tiny()), StudentRule(), meta, schedule, 5)
        one.replicates[0].validating = validating
        found.append(one.episode()["meta_loss"])
    assert found[0] != found[1] and (found[2] == found[0]) == validating  # validations always have one


def test_validations_begin_at_one_place_and_training_episodes_at_others() -> None:
    problem, starts = doubled(tiny()), []

    def spy(rng: torch.Generator) -> torch.Tensor:
        starts.append(problem.init(rng))
        return starts[-1]

    meta = MetaConfig(replicates=[0, 1], unroll=4, spread=1.0)
    for validating in (True, False):
        one = MetaTraining(dataclasses.replace(problem, init=spy), StudentRule(), meta, ONE, 5)
        for replicate in one.replicates:
            replicate.validating = validating
        one.episode()
    fixed = problem.init(generator(12345))
    assert [torch.equal(start, fixed) for start in starts] == [True, True, False, False]
    assert not torch.equal(starts[2], starts[3])


def test_replicates_of_different_stages_have_their_own_weight_of_imitation() -> None:
    schedule = dataclasses.replace(SHORT, depths=[1, 1], imitation=[0.5, 0.0], validation_depths=[1, 1])
    together, alone = training([0, 1], schedule), training([1], schedule)
    for replicate in (together.replicates[1], alone.replicates[0]):
        replicate.schedule.stage = 1
    assert together.episode()["replicates"] == 2
    alone.episode()
    assert (weights_of(together, 1) - weights_of(alone)).abs().max() < 1e-9
    taught = training([1], schedule)
    taught.episode()
    assert (weights_of(taught) - weights_of(alone)).abs().max() > 1e-5


@pytest.mark.parametrize("rule", [StudentRule(), ChoiceRule(SMALL_CHOICE)])
@pytest.mark.parametrize("kind", ["gaussian", "relative"])
def test_noise_is_drawn_for_every_tensor_and_the_same_weights_everywhere_are_one_draw(rule: Any, kind: str) -> None:
    problem = doubled(tiny())
    context = Context.of(problem.shapes, problem.inputs)
    weights = doubled(rule.init(generator(1), 2))
    grad = torch.randn(2, problem.size, generator=generator(2), dtype=torch.float64)
    state = rule.step(weights, rule.zero_state(grad, context), grad, context)[1]

    def call(magnitude: float, each: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        noise = PerturbationConfig(kind, magnitude, each_tensor=each)  # type: ignore[arg-type]
        rngs = [generator(3, number) for number in range(2)]
        return make_policy(rule, context, problem.shapes, noise, 1, rngs, weights)(weights, state, grad, 0)

    (still, plain), (same, unmoved) = call(0.0, True), call(0.0, False)
    assert torch.allclose(still, same, atol=1e-12)
    assert all(torch.allclose(plain[name], value, atol=1e-12) for name, value in unmoved.items())
    (each, new), (all_alike, _) = call(0.5, True), call(0.5, False)
    first, rest = each.split([problem.sizes[0], problem.size - problem.sizes[0]], 1)
    wanted = all_alike.split([problem.sizes[0], problem.size - problem.sizes[0]], 1)
    assert torch.allclose(first, wanted[0], atol=1e-12)  # the first tensor has the first draw
    assert float((rest - wanted[1]).abs().max()) > 1e-4
    assert {name: value.shape for name, value in new.items()} == {name: value.shape for name, value in plain.items()}
