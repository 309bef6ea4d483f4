"""Facts about matching, double wins and the likeness of masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.masks import Masks
from double_win_lth import double_win, iou
from double_win_lth.similarity import chance_iou, layerwise_chance_iou

DENSE = {"sa_std": [90.0, 92.0, 91.0], "sa_adv": [80.0, 80.0, 80.0], "ra_adv": [50.0, 51.0, 52.0]}


def ticket(*means: float) -> dict[str, list[float]]:
    return dict(zip(DENSE, ([mean] * 3 for mean in means), strict=True))


TICKETS = {0.5: ticket(90, 80, 50), 0.8: ticket(91, 79.9, 51), 0.9: ticket(93, 81, 53)}


def test_the_worked_example_comes_out_and_ties_count() -> None:
    found = double_win(DENSE, TICKETS)
    assert [all(m.matching for m in found.levels[s].values()) for s in (0.5, 0.8, 0.9)] == [True, False, True]
    assert [match.tol for match in found.levels[0.5].values()] == [1.0, 0.0, 1.0]
    assert found.levels[0.8]["sa_adv"].difference == pytest.approx(-0.1)
    assert [name for name, match in found.levels[0.8].items() if not match.matching] == ["sa_adv"]
    assert found.extreme_sparsity == 0.9


def test_a_tolerance_in_points_replaces_the_deviation_and_levels_need_not_be_contiguous() -> None:
    found = double_win(DENSE, TICKETS, tol=0.5)
    assert all(match.matching for match in found.levels[0.8].values())
    assert not found.levels[0.5]["sa_std"].matching and found.extreme_sparsity == 0.9
    assert double_win(DENSE, {0.5: ticket(80, 80, 50)}).extreme_sparsity is None
    assert double_win(DENSE, {}).extreme_sparsity is None
    assert double_win({"ra_adv": [50.0]}, {0.5: {"ra_adv": [50.0]}}, metrics=["ra_adv"], tol=0).extreme_sparsity == 0.5


@pytest.mark.parametrize(
    ("tickets", "options", "message"),
    [
        ({0.5: {**ticket(90, 80, 50), "ra_adv": [50.0]}}, {}, "ticket 0.5 ra_adv must have 3 seeds, got 1"),
        ({0.5: ticket(90, 80, 101)}, {}, r"ticket 0.5 ra_adv must be in \[0, 100\] percent, got 101"),
        ({0.5: ticket(90, 80, float("nan"))}, {}, r"ticket 0.5 ra_adv must be in \[0, 100\] percent, got nan"),
        ({1.0: ticket(90, 80, 50)}, {}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({0.5: {"sa_std": [1.0] * 3}}, {}, r"ticket 0.5 must have sa_adv, got \['sa_std'\]"),
        (TICKETS, {"tol": -1}, "tol must be 'std' or a number of points of at least 0, got -1"),
        (TICKETS, {"tol": "sd"}, "tol must be 'std' or a number of points of at least 0, got 'sd'"),
        (TICKETS, {"metrics": ()}, "metrics must name at least one, got none"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(tickets: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        double_win(DENSE, tickets, **options)


def test_one_seed_has_no_deviation_and_dense_values_are_looked_at_too() -> None:
    with pytest.raises(ValueError, match="tol 'std' must have at least two seeds of sa_std, got 1"):
        double_win({m: [50.0] for m in DENSE}, {})
    with pytest.raises(ValueError, match="dense sa_adv must have 3 seeds, got 2"):
        double_win({**DENSE, "sa_adv": [80.0, 80.0]}, {})
    with pytest.raises(ValueError, match=r"dense sa_adv must be in \[0, 100\] percent, got -1"):
        double_win({**DENSE, "sa_adv": [80.0, -1.0, 80.0]}, {})


def masks(density: float, seed: int, size: int = 20_000) -> Masks:
    draws = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return Masks({"a": draws[: size // 2] < density, "b": draws[size // 2 :] < density})


def test_a_mask_is_like_itself_unlike_its_complement_and_by_chance_like_another() -> None:
    mask = masks(0.3, 0)
    assert iou(mask, mask) == 1 and iou(mask, Masks({name: ~value for name, value in mask.items()})) == 0
    for density in (0.1, 0.3, 0.7):
        found = [iou(masks(density, 2 * seed), masks(density, 2 * seed + 1)) for seed in range(1, 9)]
        spread = torch.tensor(found).std().item()
        assert sum(found) / 8 == pytest.approx(chance_iou(density), abs=3 * spread / 8**0.5 + 1e-4)
    assert chance_iou(0.2) == pytest.approx(0.2 / 1.8)


def test_chance_with_the_layers_densities_counts_layers_by_their_size() -> None:
    one = Masks({"a": torch.tensor([1.0] * 4), "b": torch.tensor([1, 0, 0, 0, 0, 0, 0, 0.0])})
    other = Masks({"a": torch.tensor([1, 1, 0, 0.0]), "b": torch.tensor([0, 1, 0, 0, 0, 0, 0, 1.0])})
    both, union = 4 * 0.5 + 8 * (1 / 8) * (1 / 4), 4 * 1.0 + 8 * (1 / 8 + 1 / 4 - 1 / 32)
    assert layerwise_chance_iou(one, other) == pytest.approx(both / union)


def test_masks_that_cannot_be_compared_are_refused() -> None:
    empty = Masks({"a": torch.zeros(3)})
    with pytest.raises(ValueError, match="masks must not both be empty"):
        iou(empty, empty)
    with pytest.raises(ValueError, match="masks must not both be empty"):
        layerwise_chance_iou(empty, empty)
    for other in (Masks({"a": torch.ones(4)}), Masks({"b": torch.ones(3)})):
        with pytest.raises(ValueError, match="masks must have equal names and shapes, a differs"):
            iou(empty, other)
