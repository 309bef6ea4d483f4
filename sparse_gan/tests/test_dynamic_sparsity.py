"""Facts about training whose topology moves: budgets, exact zeros, what a grown weight starts from, resumption."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from common.masks import Masks
from sparse_gan.dynamic_sparsity import DynamicSparsity
from sparse_gan.masked_adam import MaskedAdam
from sparse_gan.pruning import sparse_masks
from sparse_gan.sparse_ema import SparseEMA

Build = Callable[[nn.Module, Masks], torch.optim.Optimizer]
OPTIMISERS: dict[str, Build] = {
    "masked adam": lambda model, masks: MaskedAdam(model, masks, 0.01, (0.9, 0.99), weight_decay=0.1),
    "adam": lambda model, _: torch.optim.Adam(model.parameters(), 0.01, (0.9, 0.99), weight_decay=0.1),
    "sgd": lambda model, _: torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.1),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 1, 1))


class Training:
    """A small network under moving masks, with its sparse average."""

    def __init__(self, optimizer: str = "masked adam", density: float = 0.3, **options: Any) -> None:
        self.model = net()
        self.masks = sparse_masks(self.model, density, "erk", torch.Generator().manual_seed(1))
        self.optimizer = OPTIMISERS[optimizer](self.model, self.masks)
        arguments: dict[str, Any] = {"update_every": 4, "total_steps": 100, **options}
        self.dynamic = DynamicSparsity(self.model, self.optimizer, self.masks, **arguments)
        self.average = SparseEMA(self.model, self.masks, 0.9)
        self.moved: list[int] = []

    def run(self, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            (self.model(x) - x[:, :1, 2:5, 2:5]).square().mean().backward()
            self.optimizer.step()
            if self.dynamic.step():
                self.moved.append(step + 1)
            self.average.update()


@pytest.mark.parametrize("optimizer", OPTIMISERS)
@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_counts_stay_and_all_that_is_inactive_is_exactly_zero(optimizer: str, growth: str) -> None:
    training = Training(optimizer, growth=growth)
    counts = {name: int(mask.sum()) for name, mask in training.masks.items()}
    first = {name: mask.clone() for name, mask in training.masks.items()}
    training.run(range(100))
    assert {name: int(mask.sum()) for name, mask in training.masks.items()} == counts
    assert training.moved == list(range(4, 100, 4)) and training.dynamic.moves == 24
    for name, mask in training.masks.items():
        weight = training.model.get_parameter(name)
        assert (weight[~mask] == 0).all() and (training.average.module.get_parameter(name)[~mask] == 0).all()
        assert torch.equal(mask, first[name]) == bool(mask.all())
        for key, state in training.optimizer.state[weight].items():
            if key != "step" and state.shape == weight.shape:
                assert (state[~mask] == 0).all()


def test_both_forms_of_adam_take_the_same_way() -> None:
    one, two = Training("masked adam"), Training("adam")
    for training in (one, two):
        training.run(range(40))
    assert all(torch.equal(one.masks[name], two.masks[name]) for name in one.masks)
    for mine, theirs in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_grown_weights_start_from_zero_with_zero_moments() -> None:
    training = Training("adam")
    training.run(range(3))
    before = {name: mask.clone() for name, mask in training.masks.items()}
    training.run(range(3, 4))
    grown = 0
    for name, mask in training.masks.items():
        weight, fresh = training.model.get_parameter(name), mask & ~before[name]
        grown += int(fresh.sum())
        assert (weight[fresh] == 0).all() and (training.optimizer.state[weight]["exp_avg_sq"][fresh] == 0).all()
    assert grown > 10


def test_growth_goes_where_the_dense_gradient_is_largest() -> None:
    training = Training("adam", update_every=1, drop_fraction=0.9)
    name = "2.weight"
    before = training.masks[name].clone()
    training.run(range(1))
    gradient, after = training.model.get_parameter(name).grad, training.masks[name]
    assert gradient is not None and (gradient[~before] != 0).any()
    grown = after & ~before
    assert (gradient[grown] < 0).any() and (gradient[grown] > 0).any()
    assert gradient[grown].abs().min() >= gradient[~after].abs().max()


@pytest.mark.parametrize("optimizer", ["adam", "masked adam"])
@pytest.mark.parametrize("regrown", ["zero", "keep"])
def test_a_weight_dropped_and_grown_at_once_starts_from_zero_or_keeps_its_value(optimizer: str, regrown: str) -> None:
    training = Training(optimizer, density=0.9, drop_fraction=0.5, update_every=1, regrown=regrown)
    name, before = "2.weight", training.masks["2.weight"].clone()
    training.run(range(1))
    weight, stayed = training.model.get_parameter(name), before & training.masks[name]
    assert int(stayed.sum()) > 0.8 * int(before.sum())
    zeros = int((weight[stayed] == 0).sum())
    assert zeros == 0 if regrown == "keep" else zeros > 0.3 * int(before.sum())


def test_dense_moments_follow_the_dense_gradient_and_weights_do_not() -> None:
    training = Training("adam", moments="dense")
    training.run(range(10))
    weight, mask = training.model.get_parameter("2.weight"), training.masks["2.weight"]
    assert (weight[~mask] == 0).all() and (training.optimizer.state[weight]["exp_avg"][~mask] != 0).any()


def test_random_growth_depends_on_the_seed_and_not_on_the_gradient() -> None:
    masks = []
    for seed in (1, 1, 2):
        training = Training(growth="random", seed=seed)
        training.run(range(4))
        masks.append(training.masks["2.weight"])
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_weights_explored_are_all_that_were_ever_active() -> None:
    training = Training()
    ever = {name: mask.clone() for name, mask in training.masks.items()}
    assert training.dynamic.explored_fraction() == training.masks.density
    for step in range(60):
        training.run(range(step, step + 1))
        for name, mask in training.masks.items():
            ever[name] |= mask
    share = sum(int(mask.sum()) for mask in ever.values()) / training.masks.total
    assert training.dynamic.explored_fraction() == share > training.masks.density


def test_the_topology_stands_still_at_the_end_and_where_nothing_is_due() -> None:
    training = Training(update_every=50, total_steps=100)
    training.run(range(100))
    assert training.moved == [50]
    still = Training(update_every=100, total_steps=100)
    first = copy.deepcopy(still.masks)
    still.run(range(100))
    assert all(torch.equal(first[name], still.masks[name]) for name in first) and still.moved == []


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_a_resumed_training_is_the_undisturbed_one_bit_for_bit(optimizer: str) -> None:
    whole, part = Training(optimizer), Training(optimizer)
    whole.run(range(30))
    part.run(range(14))
    again, names = Training(optimizer), ("model", "optimizer", "dynamic", "average")
    for name in names:
        getattr(again, name).load_state_dict(copy.deepcopy(getattr(part, name).state_dict()))
    again.run(range(14, 30))
    for one, two in ((whole.model, again.model), (whole.average.module, again.average.module)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert all(torch.equal(whole.masks[name], again.masks[name]) for name in whole.masks)
    assert whole.dynamic.explored_fraction() == again.dynamic.explored_fraction()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_every": 0}, "update_every must be at least 1, got 0"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"growth": "magic"}, "growth must be gradient or random, got 'magic'"),
        ({"regrown": "half"}, "regrown must be zero or keep, got 'half'"),
        ({"moments": "none"}, "moments must be sparse or dense, got 'none'"),
        ({"drop_fraction": 1.5}, r"drop_end <= drop_fraction must be in \[0, 1\], got 0.005 and 1.5"),
        ({"moments": "dense"}, "moments must be sparse with a MaskedAdam"),
    ],
)
def test_impossible_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(**options)


def test_masks_of_another_shape_and_missing_gradients_are_refused() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="masks must hold at least one mask, got none"):
        DynamicSparsity(model, optimizer, Masks(), update_every=1, total_steps=2)
    with pytest.raises(ValueError, match=r"mask 0.weight must be \(8, 3, 3, 3\), got \(2, 2\)"):
        DynamicSparsity(model, optimizer, Masks({"0.weight": torch.ones(2, 2)}), update_every=1, total_steps=2)
    masks = Masks({"0.weight": torch.rand(8, 3, 3, 3) < 0.5})
    with pytest.raises(ValueError, match=r"0\.weight must have a gradient when step"):
        DynamicSparsity(model, optimizer, masks, update_every=1, total_steps=2).step()
