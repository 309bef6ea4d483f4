"""Facts about masks from scores: the authors' masks, exact counts, nesting (acceptance checks 3, 4, 19)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from app_progressive import threshold
from app_progressive.tests.nets import arrays, convs, facts
from app_progressive.threshold import STRIDE, kth_smallest, pruned_count


def pair(seed: int = 0, values: int = 0) -> dict[str, Tensor]:
    """Two tensors of 60 and 40 scores; with `values` many of them are equal."""
    draws = torch.Generator().manual_seed(seed)
    found = {"a": torch.randn(6, 10, generator=draws), "b": torch.randn(40, generator=draws)}
    return {name: (score * values).round() if values else score for name, score in found.items()}


def kept(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


CASES = [case for case in facts("threshold") if case["density"] > 0]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_masks_with_released_ties_are_the_authors(case: dict) -> None:  # 2, 4
    values, name = arrays("threshold"), case["name"]
    given_scores = {key: values[f"{name}/{key}"] for key in "ab"}
    masks = threshold(given_scores, case["density"], case["scope"], ties="threshold")
    for key, mask in masks.items():
        assert torch.equal(mask, values[f"{name}/mask_{key}"].bool())
    assert kept(masks) == case["kept"]
    if case["scope"] == "global":
        assert kept(threshold(given_scores, case["density"])) == case["N"] - case["k"]


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("name", ["snip", "snip_prev", "taylor", "taylor_prev", "mag", "grasp"])
def test_masks_of_the_authors_scores_are_theirs(name: str, scope: str) -> None:
    values = arrays("scores")
    for density in values["densities"].tolist():
        masks = threshold(convs(values, f"score/{name}"), density, scope, ties="threshold")
        wanted = convs(values, f"mask/{name}/{scope}/{density:.6f}")
        assert all(torch.equal(masks[key], wanted[key].bool()) for key in masks)


def plain(values: dict[str, Tensor], density: float, alive: dict[str, Tensor]) -> dict[str, Tensor]:
    """By sorting: dead weights first, then the lowest scores, equal ones by index."""
    score = torch.cat([torch.where(alive[name], values[name], -torch.inf).flatten() for name in values]).double()
    k = pruned_count(density, len(score))
    if k <= int((~torch.cat([alive[name].flatten() for name in values])).sum()):
        return alive
    keep = torch.ones(len(score), dtype=torch.bool)
    keep[score.argsort(stable=True)[:k]] = False
    return {name: part.view(values[name].shape) for name, part in zip("ab", keep.split([60, 40]), strict=True)}


@given(st.integers(0, 10**6), st.sampled_from([0, 1, 3]), st.floats(0.01, 1), st.floats(0.01, 1))
def test_masks_are_those_of_a_stable_sort(seed: int, values: int, first: float, second: float) -> None:  # 3
    once = threshold(pair(seed, values), first)
    everything = {name: torch.ones_like(mask) for name, mask in once.items()}
    assert all(torch.equal(once[k], v) for k, v in plain(pair(seed, values), first, everything).items())
    assert kept(once) == 100 - pruned_count(first, 100)
    again = threshold(pair(seed + 1, values), second, prev=once)
    assert all(torch.equal(again[k], v) for k, v in plain(pair(seed + 1, values), second, once).items())
    assert all((again[name] <= once[name]).all() for name in again)
    assert kept(again) == min(kept(once), 100 - pruned_count(second, 100))


@given(st.integers(0, 10**6), st.floats(0.01, 1))
def test_local_masks_have_the_density_in_every_tensor(seed: int, density: float) -> None:
    masks = threshold(pair(seed), density, "local")
    assert [int(mask.sum()) for mask in masks.values()] == [n - pruned_count(density, n) for n in (60, 40)]


def test_released_ties_drop_all_that_equal_the_threshold() -> None:  # 4
    zeros = {"a": torch.cat([torch.zeros(54), torch.arange(1.0, 19.0)])}
    assert kept(threshold(zeros, 0.75, ties="threshold")) == 18 and kept(threshold(zeros, 0.75)) == 54


def test_where_nothing_is_to_go_the_masks_stay() -> None:  # 3, 4
    sparse = threshold(pair(), 0.3)
    for density in (1.0, 0.999, 0.5):
        assert all(torch.equal(m, sparse[n]) for n, m in threshold(pair(1), density, prev=sparse).items())
    assert kept(threshold(pair(), 1.0)) == 100


@pytest.mark.parametrize("total", [1, 10, 10**4, 10**8])
def test_the_smallest_density_leaves_a_weight(total: int) -> None:  # 4
    assert total - pruned_count(1e-9, total) >= 1


def test_the_updates_are_what_they_are_called() -> None:  # 10
    previous, values = threshold(pair(), 0.5), pair(1)
    new = threshold(values, 0.6, prev=previous, update="replace")
    both = threshold(values, 0.6, prev=previous, update="intersect")
    assert all(torch.equal(new[name], mask) for name, mask in threshold(values, 0.6).items())
    assert all(torch.equal(both[name], new[name] & previous[name]) for name in new)
    assert kept(both) < 50 and kept(threshold(values, 0.6, prev=previous)) == 50


@pytest.mark.parametrize("kind", ["normal", "ties", "sorted", "mostly zero", "infinite", "one value"])
def test_the_order_statistic_is_exact_among_many(kind: str) -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        values = (3 * values).round()
    elif kind == "sorted":
        values = values.sort().values
    elif kind == "mostly zero":
        values = values * (torch.rand(200_000, generator=torch.Generator().manual_seed(1)) < 0.01)
    elif kind == "infinite":
        values[::3] = -torch.inf
    elif kind == "one value":
        values = torch.ones(200_000)
    for k in (1, 2, 100, 66_667, 100_000, 199_999, 200_000):
        for parts in ([values], values.split([3, 70_000, 1, 129_996])):
            assert kth_smallest(parts, k) == values.kthvalue(k).values.item()


def test_a_sample_that_misleads_changes_nothing() -> None:
    values = torch.rand(1 << 18, generator=torch.Generator().manual_seed(0))
    values[::STRIDE] += 5  # all that is sampled lies above the rest
    for k in (1, 1000, 200_000):
        assert kth_smallest([values], k) == values.kthvalue(k).values.item()


def test_the_value_next_to_a_bracket_is_not_taken_for_one_in_it() -> None:
    values = torch.full((1 << 17,), 2.0)
    values[::STRIDE] = 1  # the whole sample, so that the bracket holds nothing else
    sampled, below = len(values[::STRIDE]), 1000
    values[(values == 2).nonzero().squeeze(1)[:below]] = 0
    for k, expected in ((below, 0), (below + 1, 1), (below + sampled, 1), (below + sampled + 1, 2)):
        assert kth_smallest([values], k) == expected


def test_large_tensors_with_ties_and_dead_weights_are_those_of_a_stable_sort() -> None:
    scores = torch.rand(200_000, generator=torch.Generator().manual_seed(0)).mul(50).round()
    alive = torch.rand(200_000, generator=torch.Generator().manual_seed(1)) < 0.7
    rank = torch.where(alive, scores, -1.0).sort(stable=True).indices
    expected = torch.ones(200_000, dtype=torch.bool).index_fill(0, rank[: pruned_count(0.4, 200_000)], False)
    sizes = [7, 150_000, 0, 49_993]
    masks = threshold(
        {str(i): part for i, part in enumerate(scores.split(sizes))},
        0.4,
        prev={str(i): part for i, part in enumerate(alive.split(sizes))},
    )
    assert torch.equal(torch.cat(list(masks.values())), expected)


def test_scores_of_several_types_are_ranked_in_the_widest() -> None:
    half = torch.tensor([1.0078125, 0.5], dtype=torch.bfloat16)  # the former is what 1.005 rounds to in this type
    masks = threshold({"half": half, "single": torch.tensor([1.005, 2.0, 0.1])}, 0.4)
    assert torch.cat(list(masks.values())).tolist() == [True, False, False, True, False]


def test_all_zero_scores_warn_and_count_right() -> None:  # 19
    with pytest.warns(UserWarning, match="all scores are zero"):
        masks = threshold({"a": torch.zeros(10)}, 0.7)
    assert masks["a"].tolist() == [False] * 3 + [True] * 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0"),
        ({"density": 1.3}, r"density must be in \(0, 1\], got 1\.3"),
        ({"scope": "l"}, "scope must be one of global, local, got 'l'"),  # f.8
        ({"ties": "drop"}, "ties must be one of rank, threshold, got 'drop'"),
        ({"update": "union"}, "update must be one of nested, intersect, replace, got 'union'"),
        ({"scores": {}}, "scores must hold at least one tensor"),
        ({"scores": {"a": torch.tensor([1.0, torch.nan])}}, "scores must be finite"),
        ({"scores": {"a": torch.tensor([1.0, torch.inf])}}, "scores must be finite"),
        ({"prev": {"a": torch.ones(6, 10)}}, "prev must name the scores' tensors"),
        ({"prev": {"a": torch.ones(60), "b": torch.ones(40)}}, r"prev a must be \(6, 10\), got \(60,\)"),
        ({"prev": {"a": torch.full((6, 10), 0.5), "b": torch.ones(40)}}, "prev a must hold only 0 and 1"),
    ],
)
def test_impossible_masks_are_refused(options: dict, message: str) -> None:  # 19
    with pytest.raises(ValueError, match=message):
        threshold(**{"scores": pair(), "density": 0.5, **options})
