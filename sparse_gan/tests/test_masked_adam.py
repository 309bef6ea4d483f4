"""Facts about Adam with moments of active weights only: the trajectory of Adam under masks, and its memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.masks import Masks
from sparse_gan.masked_adam import MaskedAdam
from sparse_gan.pruning import sparse_masks


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 6, 3), nn.Tanh(), nn.Conv2d(6, 5, 1))


def masks_of(model: nn.Module, density: float = 0.3) -> Masks:
    return sparse_masks(model, density, "uniform", torch.Generator().manual_seed(1))


def loss(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(step))
    return (model(x) - 1).square().mean()


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.9, 0.999)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_trajectory_is_that_of_adam_with_weights_and_moments_masked_after_each_step(
    betas: tuple[float, float], weight_decay: float
) -> None:
    ours, plain = net(), net()
    masks = masks_of(ours)
    optimizer = MaskedAdam(ours, masks, 0.01, betas, weight_decay=weight_decay)
    oracle = torch.optim.Adam(plain.parameters(), 0.01, betas, weight_decay=weight_decay)
    masks.apply_(plain)
    for step in range(30):
        for model, each in ((ours, optimizer), (plain, oracle)):
            each.zero_grad()
            loss(model, step).backward()
            each.step()
        for name, mask in masks.items():
            weight = plain.get_parameter(name)
            for tensor in (weight, oracle.state[weight]["exp_avg"], oracle.state[weight]["exp_avg_sq"]):
                tensor.data.mul_(mask)
    for (name, mine), (_, theirs) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6), name
        if name in masks:
            assert (mine[~masks[name]] == 0).all() and (mine[masks[name]] != 0).all()


def test_without_gaps_the_trajectory_is_torchs_fused_adam_bit_for_bit() -> None:
    ours, plain = net(), net()
    optimizer = MaskedAdam(ours, Masks.ones_like(dict(ours.named_parameters())), 0.01, (0.5, 0.9))
    oracle = torch.optim.Adam(plain.parameters(), 0.01, (0.5, 0.9), fused=True)
    for step in range(5):
        for model, each in ((ours, optimizer), (plain, oracle)):
            each.zero_grad()
            loss(model, step).backward()
            each.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def test_moments_take_memory_in_proportion_to_the_density() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False))
    optimizer = MaskedAdam(model, masks_of(model, 0.05), 0.01)
    model(torch.randn(1, 64, 4, 4)).sum().backward()
    optimizer.step()
    weights = 64 * 64 * 9
    assert optimizer.state_bytes() == round(0.05 * weights) * (4 + 4 + 4)  # two moments and a position


def test_survivors_keep_weight_and_moments_and_grown_entries_start_from_zero() -> None:
    model = net()
    masks = masks_of(model)
    optimizer = MaskedAdam(model, masks, 0.01, (0.9, 0.9))
    stepped(model, optimizer, range(3))
    weight, mask = model.get_parameter("2.weight"), masks["2.weight"]
    before, moments = weight.detach().clone(), torch.zeros(mask.shape)
    moments[mask] = optimizer.state[weight]["exp_avg"]
    survivors = mask & (torch.rand(mask.shape) < 0.5)
    new = survivors | (torch.rand(mask.shape) < 0.2)
    optimizer.set_mask(weight, new, survivors)
    assert torch.equal(weight.detach(), before * survivors)
    assert torch.equal(optimizer.state[weight]["exp_avg"], (moments * survivors)[new])
    stepped(model, optimizer, range(3, 4))
    assert weight.grad is not None
    assert torch.equal(weight != 0, survivors | (new & (weight.grad != 0)))


def test_a_dense_weight_can_become_sparse_and_keeps_its_moments() -> None:
    model = net()
    optimizer = MaskedAdam(model, Masks.ones_like({"0.weight": model.get_parameter("0.weight")}), 0.01, (0.9, 0.9))
    stepped(model, optimizer, range(2))
    weight = model.get_parameter("0.weight")
    whole, mask = optimizer.state[weight]["exp_avg"].clone(), torch.rand(weight.shape) < 0.4
    optimizer.set_mask(weight, mask, mask)
    assert torch.equal(optimizer.state[weight]["exp_avg"], whole[mask])
    stepped(model, optimizer, range(2, 4))
    assert (weight[~mask] == 0).all()


def test_it_goes_on_from_its_state_dict_bit_for_bit() -> None:
    whole, parts = net(), net()
    masks = masks_of(whole)
    one, two = (MaskedAdam(model, masks, 0.01, (0.9, 0.9)) for model in (whole, parts))
    stepped(whole, one, range(6))
    stepped(parts, two, range(3))
    again = net()
    again.load_state_dict(parts.state_dict())
    three = MaskedAdam(again, masks, 0.5)
    three.load_state_dict(two.state_dict())
    stepped(again, three, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_positions_come_with_the_state_and_the_step_follows_its_parameter() -> None:
    model, fresh = net(), net().to("meta")
    optimizer = MaskedAdam(model, masks_of(model), 0.01)
    stepped(model, optimizer, range(1))
    elsewhere = MaskedAdam(fresh, Masks(), 0.01)
    elsewhere.load_state_dict(optimizer.state_dict())
    for parameter, state in elsewhere.state.items():
        assert parameter.device == state["step"].device == state["exp_avg"].device == torch.device("meta")
    assert elsewhere.state_bytes() == optimizer.state_bytes()
    with pytest.raises(ValueError, match="state_dict must be of a MaskedAdam, with active, got"):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())


def test_the_state_of_another_network_is_refused_by_name_and_changes_nothing() -> None:
    wide, narrow = nn.Linear(8, 4), nn.Linear(4, 4)
    states = []
    for model, masked in ((wide, True), (wide, False), (narrow, True)):
        masks = Masks({"weight": torch.arange(model.weight.numel()).view_as(model.weight) % 5 == 0} if masked else {})
        states.append(optimizer := MaskedAdam(model, masks, 0.01))
        model(torch.ones(2, model.in_features)).sum().backward()
        optimizer.step()
    before = {name: value.clone() for name, value in states[2].state[narrow.weight].items()}
    for other in states[:2]:
        with pytest.raises(ValueError, match=r"state_dict must fit parameter 0 of shape \(4, 4\)"):
            states[2].load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="state_dict must be of 2 parameters, got 1"):
        states[2].load_state_dict(MaskedAdam(nn.Linear(4, 4, bias=False), Masks(), 0.01).state_dict())
    assert all(torch.equal(value, before[name]) for name, value in states[2].state[narrow.weight].items())


def test_channels_last_modules_take_the_same_way() -> None:
    plain, last = net(), net().to(memory_format=torch.channels_last)
    masks = masks_of(plain)
    whole = Masks.ones_like(masks)
    for model in (plain, last):
        optimizer = MaskedAdam(model, masks, 0.01, (0.9, 0.9))
        stepped(model, optimizer, range(2))
        for name, mask in whole.items():
            optimizer.set_mask(model.get_parameter(name), mask, masks[name])
        stepped(model, optimizer, range(2, 4))
    for mine, theirs in zip(plain.parameters(), last.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_impossible_arguments_are_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match="lr must be at least 0, got -1"):
        MaskedAdam(model, Masks(), lr=-1)
    with pytest.raises(ValueError, match=r"betas must be in \[0, 1\), got \(0.5, 1.0\)"):
        MaskedAdam(model, Masks(), betas=(0.5, 1.0))
    with pytest.raises(ValueError, match="mask nothing must name a parameter"):
        MaskedAdam(model, Masks({"nothing": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"mask 0.weight must be \(8, 3, 3, 3\), got \(2,\)"):
        MaskedAdam(model, Masks({"0.weight": torch.ones(2)}))
