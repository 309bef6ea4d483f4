"""Facts about meta-training: replicates, noise, schedules, resuming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from optimizer_amalgamation import SMALL_CHOICE, ChoiceRule, StudentRule, Teacher
from optimizer_amalgamation.meta_training import MetaTraining, Replicate
from optimizer_amalgamation.schedules import ScheduleConfig
from optimizer_amalgamation.settings import MetaConfig, PerturbationConfig
from optimizer_amalgamation.tests.plain import doubled, tiny

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
    assert len(losses) == 8 and len({round(loss, 9) for loss in losses}) == 8
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
