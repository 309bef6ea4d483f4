"""Facts about densities along the stream (acceptance checks 1, 2, 16)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app_progressive import delta_schedule
from app_progressive.cost import stream_macs, training_images
from app_progressive.schedules import cubic_schedule, density_schedule, open_delta
from app_progressive.tests.nets import facts
from app_progressive.threshold import pruned_count


@pytest.mark.parametrize("case", [case for case in facts("schedule")["schedule"] if case["S"] > 1])
def test_schedules_are_the_authors(case: dict) -> None:  # 1
    states, tau = case["S"], case["tau"]
    assert delta_schedule(states, tau) == pytest.approx(case["delta"], rel=1e-12)
    assert density_schedule(states, tau) == pytest.approx(case["density"], rel=1e-12)
    assert math.prod(density_schedule(states, tau)) == pytest.approx(case["product_of_densities"], rel=1e-12)


def test_the_short_stream_of_the_paper_has_the_specified_densities() -> None:  # 1
    wanted = [0.8, 0.715541752799933, 0.64, 0.572433402240, 0.512, 0.457946721792, 0.4096, 0.366357377434]
    assert density_schedule(8, 4.5) == pytest.approx(wanted, abs=1e-9)
    assert density_schedule(1, 4.5) == pytest.approx([0.366357], abs=1e-6)
    assert math.prod(density_schedule(100, 4.5)) == pytest.approx(2.237e-27, rel=1e-3)


def test_a_stream_of_one_state_has_the_last_density_at_once() -> None:  # 1: the released code would give .8
    assert delta_schedule(1, 4.5) == [4.5] and density_schedule(1, 4.5) == [0.8**4.5]


@given(st.integers(2, 200), st.floats(1.001, 50), st.floats(0.01, 0.99))
def test_densities_fall_strictly_from_base_to_its_power(states: int, tau: float, base: float) -> None:  # 1
    for schedule in (density_schedule, cubic_schedule):
        densities = schedule(states, tau, base)
        assert all(a > b for a, b in pairwise(densities)) or densities[-1] < 1e-12
        assert densities[-1] == base**tau
    assert density_schedule(states, tau, base)[0] == base
    assert density_schedule(states, 1.0, base) == pytest.approx([base] * states)


def test_the_cubic_schedule_prunes_most_at_first() -> None:
    assert cubic_schedule(2, 2.0, 0.5) == pytest.approx([1 - 0.75 * 0.875, 0.25])


def test_a_stream_of_unknown_length_grows_its_exponent_until_tau() -> None:
    assert [open_delta(state, 2.2, 0.5) for state in (1, 2, 3, 4, 99)] == [1, 1.5, 2, 2.2, 2.2]


def test_counts_follow_double_precision() -> None:  # 2
    assert pruned_count(0.8, 100) == 19
    for net, known in facts("models").items():
        counts = [pruned_count(density, known["prunable_conv_weights"]) for density in density_schedule(8, 4.5)]
        assert counts == known["k_S8_tau4p5"], net


def test_compute_of_the_papers_short_stream() -> None:  # 16
    sizes = [5625 * state for state in range(1, 9)]
    assert training_images(sizes, 50) == 10_125_000
    full, none = (stream_macs(each, 50, [1.0] * 8) for each in (sizes, [5625] * 8))
    assert full / none == pytest.approx(4.5)
    assert stream_macs([10, 20], 2, [100.0, 50.0]) == 3 * 2 * (10 * 100 + 20 * 50)  # a backward is two forwards
    assert stream_macs(sizes, 50, density_schedule(8, 4.5)) / full == pytest.approx(0.4874, abs=5e-5)


@pytest.mark.parametrize(
    ("states", "tau", "base", "message"),
    [
        (0, 4.5, 0.8, "n_states must be at least 1, got 0"),
        (8, 0.0, 0.8, r"tau must be a finite number, at least 1, got 0\.0"),
        (8, math.nan, 0.8, "tau must be .* got nan"),
        (8, math.inf, 0.8, "tau must be .* got inf"),
        (8, 4.5, 1.0, r"base must be in \(0, 1\), got 1\.0"),
    ],
)
def test_impossible_schedules_are_refused(states: int, tau: float, base: float, message: str) -> None:  # 19
    for schedule in (density_schedule, cubic_schedule):
        with pytest.raises(ValueError, match=message):
            schedule(states, tau, base)
    with pytest.raises(ValueError, match="growth must be positive, got 0"):
        open_delta(1, 2, 0)
