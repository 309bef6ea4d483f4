"""Facts about the schedules of eps, against the released code's values."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from certified_pruning.eps_schedule import LinearEps, SmoothedEps

REFERENCE = Path(__file__).parent / "reference"


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_the_smoothed_schedule_equals_the_released_one_in_every_batch(case: str) -> None:
    with np.load(REFERENCE / "eps_schedule.npz", allow_pickle=False) as arrays:
        config, expected = json.loads(str(arrays[f"{case}_cfg"])), arrays[f"{case}_eps_f64"]
    options = {key: float(value) for key, value in (item.split("=") for item in config["opts"].split(","))}
    schedule = SmoothedEps(
        config["max_eps"], int(options["start"]), int(options["length"]), options["mid"], options.get("beta", 4.0),
        config["batches"],
    )  # fmt: skip
    assert len(expected) == config["epochs"] * config["batches"]
    np.testing.assert_allclose([schedule(step) for step in range(len(expected))], expected, rtol=0, atol=1e-12)


smoothed = st.builds(
    SmoothedEps, st.floats(0, 1), st.integers(1, 5), st.integers(1, 8), st.floats(0, 0.95), st.floats(1, 6),
    st.integers(1, 9),
)  # fmt: skip


@given(smoothed)
def test_the_smoothed_schedule_rises_from_0_at_its_start_to_max_eps_at_its_end(schedule: SmoothedEps) -> None:
    batches = schedule.batches_per_epoch
    first, last = (schedule.start - 1) * batches, (schedule.start + schedule.length - 1) * batches
    values = [schedule(step) for step in range(last + 2)]
    assert all(before <= after for before, after in itertools.pairwise(values))
    assert set(values[: first + 1]) == {0.0}
    assert values[last] == values[last + 1] == schedule.max_eps


def test_the_polynomial_and_the_line_meet_with_the_same_slope() -> None:
    schedule = SmoothedEps(0.1, start=1, length=10, mid=0.5, beta=4, batches_per_epoch=1000)
    middle = 5000
    before, after = schedule(middle) - schedule(middle - 1), schedule(middle + 1) - schedule(middle)
    assert before == pytest.approx(after, rel=1e-3)


def test_the_batches_per_epoch_cannot_change_during_training() -> None:
    schedule = SmoothedEps(0.1, 1, 10, 0.4, 4, 100)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.batches_per_epoch = 50  # type: ignore[misc]


def test_the_linear_ramp_rises_over_its_share_of_the_steps() -> None:
    schedule = LinearEps(0.1, total_steps=100, ramp=0.3)
    assert [schedule(step) for step in (0, 15, 30, 99)] == [0.0, pytest.approx(0.05), 0.1, 0.1]
    assert schedule(29) < 0.1


def test_a_ramp_of_0_starts_at_max_eps() -> None:
    assert LinearEps(0.1, total_steps=10, ramp=0)(0) == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_eps": -0.1}, "eps must be finite and >= 0, got -0.1"),
        ({"max_eps": float("nan")}, "eps must be finite"),
        ({"start": 0}, "start must be at least 1, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"mid": 1.0}, r"mid must be in \[0, 1\), got 1.0"),
        ({"mid": float("nan")}, r"mid must be in \[0, 1\)"),
        ({"beta": 0.5}, "beta must be >= 1, got 0.5"),
        ({"batches_per_epoch": 0}, "batches_per_epoch must be at least 1, got 0"),
    ],
)
def test_impossible_smoothed_schedules_are_refused_by_name(change: dict[str, float], message: str) -> None:
    good = SmoothedEps(0.1, 11, 81, 0.4, 4, 10)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_eps": -0.1}, "eps must be finite and >= 0"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"ramp": 1.5}, r"ramp must be in \[0, 1\], got 1.5"),
    ],
)
def test_impossible_linear_schedules_are_refused_by_name(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LinearEps(0.1, 10, 0.3), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", [SmoothedEps(0.1, 1, 2, 0.4, 4, 10), LinearEps(0.1, 10)])
def test_a_negative_step_is_refused(schedule: SmoothedEps | LinearEps) -> None:
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        schedule(-1)
