"""Facts about the selection of weights: exact counts, ties, nesting, and equality with a plain top-k."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.masks import keep_top
from double_win_lth import one_shot_tickets
from double_win_lth.selection import keep_largest


def random_weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 3, 3, 3), "b": (5, 7, 1, 1), "c": (40,)}
    return {name: torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_keeps_what_a_plain_ranking_of_magnitudes_keeps(data: st.DataObject) -> None:
    values = data.draw(
        st.lists(st.sampled_from([0.0, -0.0, 1e-40, 1.0, -1.0, 1.0000001, 2.0, -3e38]), min_size=9, max_size=9)
    )
    weights = {"a": torch.tensor(values[:4]).view(2, 2), "b": torch.tensor(values[4:])}
    within = {
        name: torch.tensor(data.draw(st.lists(st.booleans(), min_size=w.numel(), max_size=w.numel()))).view_as(w)
        for name, w in weights.items()
    }
    count = sum(int(mask.sum()) for mask in within.values())
    keep = data.draw(st.integers(0, count))
    ours = keep_largest(weights, keep, within)
    plain = keep_top({name: weight.abs() for name, weight in weights.items()}, keep, within)
    assert ours.kept == keep and all(torch.equal(ours[name], plain[name]) for name in weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_is_ranked_exactly(dtype: torch.dtype) -> None:
    weights = random_weights(dtype)
    total = sum(weight.numel() for weight in weights.values())
    for keep in (0, 1, 57, total - 1, total):
        plain = keep_top({name: weight.abs() for name, weight in weights.items()}, keep)
        ours = keep_largest(weights, keep)
        assert ours.kept == keep and all(torch.equal(ours[name], plain[name]) for name in weights)


def test_the_smallest_numbers_there_are_keep_their_order() -> None:
    assert keep_largest({"a": torch.tensor([1e-40, 0.0, 2e-40, -0.0, 1.0])}, 2)["a"].tolist() == [0, 0, 1, 0, 1]
    assert keep_largest({"a": torch.tensor([1e-40, 0.0, 2e-40, -0.0, 1.0])}, 3)["a"].tolist() == [1, 0, 1, 0, 1]
    assert keep_largest({"a": torch.tensor([0.0, 1e-40, 1.1e-40])}, 1)["a"].tolist() == [0, 0, 1]  # equal high halves


def test_equal_weights_go_in_their_order() -> None:
    mask = keep_largest({"a": torch.ones(10)}, 8)["a"]
    assert mask.tolist() == [False, False] + [True] * 8
    masks = keep_largest({"a": torch.ones(2, 2), "b": -torch.ones(3)}, 2)
    assert not masks["a"].any() and masks["b"].tolist() == [False, True, True]


def test_the_memory_format_changes_nothing() -> None:
    weights = {name: w.round(decimals=1) for name, w in random_weights().items()}  # many ties
    strided = {**weights, "a": weights["a"].to(memory_format=torch.channels_last)}
    assert all(torch.equal(keep_largest(weights, 99)[name], mask) for name, mask in keep_largest(strided, 99).items())


def test_one_threshold_rules_all_layers() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    draws = torch.Generator().manual_seed(0)
    for index, low in ((0, 0.0), (2, 10.0)):
        net[index].weight.data.copy_(low + torch.rand(net[index].weight.shape, generator=draws))
    book = one_shot_tickets(net, [net[2].weight.numel()])
    assert not book.mask(1)["0.weight"].any() and book.mask(1)["2.weight"].all()
    # A head with tiny weights and huge biases change nothing.
    grown = nn.Sequential(*net, nn.Flatten(), nn.Linear(2, 2))
    grown[4].weight.data.fill_(1e-9)
    for index in (0, 2):
        grown[index].bias.data.fill_(1e9)
    again = one_shot_tickets(grown, [net[2].weight.numel()])
    assert again.survived.keys() == {"0.weight", "2.weight"}
    assert all(torch.equal(mask, book.mask(1)[name]) for name, mask in again.mask(1).items())


def test_what_is_not_finite_is_counted_by_name_unless_it_is_pruned_already() -> None:
    weights = random_weights()
    weights["b"].view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    with pytest.raises(ValueError, match="b has 3 non-finite values"):
        keep_largest(weights, 10)
    within = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    within["b"].view(-1)[:3] = False
    assert keep_largest(weights, 10, within).kept == 10


@pytest.mark.parametrize(
    ("weights", "keep", "message"),
    [
        (random_weights(), 265, r"keep must be in \[0, 264\], got 265"),
        (random_weights(), -1, r"keep must be in \[0, 264\], got -1"),
        (
            {"a": torch.ones(2, dtype=torch.int64)},
            1,
            r"weights must be float tensors of one dtype, got \['torch.int64'\]",
        ),
        ({"a": torch.ones(2), "b": torch.ones(2).double()}, 1, "weights must be float tensors of one dtype"),
    ],
)
def test_impossible_requests_are_refused(weights: dict[str, Tensor], keep: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keep_largest(weights, keep)
