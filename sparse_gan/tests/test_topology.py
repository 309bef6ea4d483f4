"""Facts about dropping and growing: the authors' vectors, hand-worked cases, exact counts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gan.topology import cosine_drop_fraction, drop_and_grow

REFERENCE = np.load(Path(__file__).parent / "reference" / "reference.npz")


def test_the_drop_fraction_is_the_authors_at_every_step() -> None:
    theirs = REFERENCE["drop_fraction_T200"]
    ours = [cosine_drop_fraction(step, 200) for step in range(201)]
    assert len(theirs) == 201 and np.abs(np.array(ours) - theirs).max() < 1e-6


def test_the_drop_fraction_at_start_middle_and_end() -> None:
    assert [cosine_drop_fraction(t, 100) for t in (0, 50, 100)] == pytest.approx([0.5, 0.2525, 0.005], abs=1e-12)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_move_is_the_authors(number: int) -> None:
    case = {key: REFERENCE[f"update{number}_{key}"] for key in ("weight", "mask", "grad", "drop_fraction")}
    weight, mask = torch.from_numpy(case["weight"]), torch.from_numpy(case["mask"]).bool()
    weight = weight * mask
    _, new = drop_and_grow(weight, mask, torch.from_numpy(case["grad"]).abs(), float(case["drop_fraction"]))
    assert torch.equal(new, torch.from_numpy(REFERENCE[f"update{number}_new_mask"]).bool())
    # theirs lets a weight that is dropped and grown at once keep its value: DynamicSparsity(regrown="keep")
    assert torch.equal(weight * (mask & new), torch.from_numpy(REFERENCE[f"update{number}_new_weight"]))
    assert int(new.sum()) == int(mask.sum()) and not torch.equal(new, mask)


def test_a_move_by_hand() -> None:
    weight, mask = torch.tensor([0.5, -0.1, 0.0, 0.0, 0.3]), torch.tensor([1, 1, 0, 0, 1]).bool()
    gradient = torch.tensor([0.0, 0.9, -2.0, 0.5, 0.0])
    survivors, new = drop_and_grow(weight, mask, gradient.abs(), 0.34)  # ceil(1.02) = 2
    assert survivors.tolist() == [True, False, False, False, False]
    assert new.tolist() == [True, True, True, False, False]
    assert (weight * survivors).tolist() == [0.5, 0, 0, 0, 0]  # the grown ones start from zero


def test_active_weights_that_are_exactly_zero_count_and_among_equals_the_first_is_dropped() -> None:
    weight, mask = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0]), torch.tensor([1, 1, 1, 1, 0]).bool()
    survivors, new = drop_and_grow(weight, mask, torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]), 0.25)
    assert survivors.tolist() == [False, True, True, True, False]
    assert new.tolist() == [False, True, True, True, True]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
def test_any_move_keeps_the_count_and_moves_exactly_the_smallest(
    size: int, seed: int, density: float, fraction: float
) -> None:
    draws = torch.Generator().manual_seed(seed)
    mask = torch.rand(size, generator=draws) < density
    weight, growth = torch.randn(size, generator=draws) * mask, torch.rand(size, generator=draws)
    survivors, new = drop_and_grow(weight, mask, growth, fraction)
    active, moving = int(mask.sum()), math.ceil(fraction * int(mask.sum()))
    assert int(new.sum()) == active and int(survivors.sum()) == active - moving
    assert not (survivors & ~mask).any() and not (survivors & ~new).any()
    dropped, grown = mask & ~survivors, new & ~survivors
    if dropped.any() and survivors.any():
        assert weight[dropped].abs().max() <= weight[survivors].abs().min()
    if grown.any() and not new.all():
        assert growth[grown].min() >= growth[~new].max()


def test_nan_shapes_and_fractions_that_cannot_be_are_refused() -> None:
    ones, mask = torch.ones(4), torch.ones(4).bool()
    with pytest.raises(ValueError, match="score growth must not hold NaN, got 4"):
        drop_and_grow(ones, mask, ones * torch.nan, 0.5)
    with pytest.raises(ValueError, match=r"must have one shape, got \(4,\), \(3,\), \(4,\)"):
        drop_and_grow(ones, mask[:3], ones, 0.5)
    with pytest.raises(ValueError, match=r"drop fraction must be in \[0, 1\], got 1.5"):
        drop_and_grow(ones, mask, ones, 1.5)
