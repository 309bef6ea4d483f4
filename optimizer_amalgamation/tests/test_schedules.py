"""Facts about the schedules of meta-training."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from common.config import ConfigError
from optimizer_amalgamation.schedules import Schedule, ScheduleConfig
from optimizer_amalgamation.tests.plain import REFERENCE

TRACES = json.loads((REFERENCE / "schedule_traces.json").read_text())
CURRICULUM = ScheduleConfig(strict_release=True)
REPEAT = ScheduleConfig(
    kind="repeat",
    depths=[1, 2, 5],
    imitation=[0.0],
    warmups=[0, 1],
    validation_depths=[10],
    validation_episodes=1,
    threshold=0.9,
    strict_release=True,
)


def played(options: ScheduleConfig, values: list[list[float]]) -> tuple[Schedule, list[Any], list[Any], list[Any]]:
    """The schedule after `values`, with its rows, events and plans."""
    schedule, rows, events, plans = Schedule(options), [], [], []
    for training, validation in values:
        if schedule.finished:
            break
        place = [schedule.stage] if options.kind == "curriculum" else []
        rows.append([*place, schedule.period, schedule.repeat])
        plans.append(schedule.plan)
        events += [list(event) for event in schedule.record(training, validation)]
    return schedule, rows, events, plans


@pytest.mark.parametrize("trace", TRACES["scenarios"], ids=lambda trace: trace["name"])
def test_the_released_traces_come_out(trace: Any) -> None:
    options = CURRICULUM if trace["kind"] == "curriculum" else REPEAT
    schedule, rows, events, plans = played(options, trace["values"][: trace["consumed"]])
    assert rows == trace["rows"] and events == trace["events"] and schedule.finished == trace["finished"]
    for plan, wanted in zip(plans, trace["train_args"], strict=True):
        assert (plan.depth, plan.imitation, plan.warmup) == (wanted["depth"], wanted["p_teacher"], wanted["warmup"])


def test_a_period_is_repeated_at_most_four_times() -> None:
    (explosions,) = [trace for trace in TRACES["scenarios"] if trace["name"] == "explosions"]
    rows = played(ScheduleConfig(), explosions["values"])[1]
    assert max(row[2] for row in rows) == 4 and [1, 4, 4] in rows and [1, 5, 0] in rows
    assert max(row[2] for row in played(CURRICULUM, explosions["values"])[1]) == 6


def test_a_validation_looks_further_than_training() -> None:
    plan = Schedule(ScheduleConfig()).plan
    assert (plan.depth, plan.validation_depth) == (1, 2)
    assert Schedule(REPEAT).plan.validation_depth == 10


def test_without_chances_a_stage_has_a_fixed_number_of_periods_and_ends_with_its_best() -> None:
    options = ScheduleConfig(depths=[1, 2], periods=2, chances=0)
    schedule, rows, events, _ = played(options, [[0, -1.0], [0, -3.0], [0, -2.0]] * 2)
    assert rows == [[0, 0, 0], [0, 1, 0], [0, 2, 0], [1, 0, 0], [1, 0, 1], [1, 0, 2]]
    assert ["load", "stage_0.1.0"] in events and not schedule.finished
    values = [[-1.0, -1.0], [-3.0, -3.0], [-2.0, -2.0], [-3.0, -3.0], [-2.9, -2.9], [-3.5, -3.5]]
    schedule, rows, events, _ = played(options, values)
    assert len(rows) == 6 and schedule.finished and events[-1] == ["load", "stage_1.2.0"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 5.0])
def test_a_loss_that_is_no_number_is_a_reason_to_repeat(bad: float) -> None:
    schedule, rows, events, _ = played(ScheduleConfig(), [[-1, -1], [bad, bad]])
    assert rows == [[0, 0, 0], [0, 1, 0]] and events[-1] == ["load", "stage_0.0.0"] and schedule.repeat == 1


def test_what_may_be_loaded_is_kept() -> None:
    for trace in TRACES["scenarios"]:
        options = CURRICULUM if trace["kind"] == "curriculum" else REPEAT
        schedule, kept = Schedule(options), set()
        for training, validation in trace["values"][: trace["consumed"]]:
            for kind, name in schedule.record(training, validation):
                assert kind == "save" or name in kept
                kept.add(name)
            kept &= schedule.loadable
        assert len(kept) < 20 or trace["name"] == "monotone_first40"


def test_a_schedule_goes_on_from_its_state() -> None:
    values = TRACES["scenarios"][2]["values"]
    whole, part = Schedule(CURRICULUM), Schedule(CURRICULUM)
    for index, (training, validation) in enumerate(values[:20]):
        fresh = Schedule(CURRICULUM)
        fresh.load_state_dict(json.loads(json.dumps(part.state_dict())))
        part = fresh
        assert whole.record(training, validation) == part.record(training, validation), index


def test_the_least_number_of_episodes_is_counted() -> None:
    assert ScheduleConfig().least_episodes() == 4 * 6 * 20 and REPEAT.least_episodes() == 5 * 11
    schedule, rows, _, _ = played(ScheduleConfig(), [[-1.0, -1.0]] * 100)
    assert schedule.finished and len(rows) * 20 == ScheduleConfig().least_episodes()


def test_the_fraction_counts_unrolls_and_reaches_one() -> None:
    options = ScheduleConfig(
        depths=[1, 3], validation_depths=[2, 6], episodes=2, validation_episodes=1, periods=1, chances=1
    )
    schedule, found = Schedule(options), [0.0]  # a period of 4 and one of 12 unrolls, two of each at least
    for _ in range(4):
        schedule.record(-1.0, -1.0)
        found.append(schedule.fraction)
    assert found == [0, 2 / 16, 4 / 16, 10 / 16, 1]
    schedule = Schedule(options)
    schedule.record(-1.0, -1.0)
    schedule.record(-1.0, -2.0)  # better: the stage has a third period
    assert schedule.stage == 0 and schedule.fraction == pytest.approx(4 / 16 * 2 / 3)
    schedule, found = Schedule(REPEAT), []
    while not schedule.finished:
        found.append(schedule.fraction)
        schedule.record(-1.0, -1.0)
    costs = [10 * depth + 1 * 10 for depth in (1, 2, 5, 5, 5)]
    assert found == pytest.approx([sum(costs[:place]) / sum(costs) for place in range(5)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depths": []}, "schedule.depths must be numbers of at least 1, one or more, got"),
        ({"depths": [0]}, "schedule.depths"),
        ({"imitation": [-1.0]}, "schedule.imitation must be numbers of at least 0"),
        ({"warmups": [2]}, "schedule.warmups must be 0 or 1 each"),
        ({"episodes": 0}, "schedule.episodes must be at least 1, got 0"),
        ({"max_repeat": -1}, "schedule.max_repeat must be at least 0, got -1"),
    ],
)
def test_impossible_schedules_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**wrong)
