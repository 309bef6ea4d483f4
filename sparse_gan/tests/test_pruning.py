"""Facts about masks: the authors' ERK densities, exact counts, SNIP, magnitude, and the gradual schedule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from common.masks import Masks
from sparse_gan.models import build_discriminator, build_generator
from sparse_gan.pruning import gradual_density, magnitude_masks, snip_masks, sparse_masks

ERK = json.loads((Path(__file__).parent / "reference" / "erk.json").read_text())["erk"]


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def convolutions(shapes: list[list[int]]) -> nn.Module:
    with torch.device("meta"):
        return nn.ModuleList(nn.Conv2d(i, o, (h, w), bias=False) for o, i, h, w in shapes)


@pytest.mark.parametrize("case", ERK, ids=lambda case: f"{len(case['shapes'])}-{case['density']}")
def test_layers_have_the_authors_erk_densities_to_the_nearest_entry(case: dict) -> None:
    net = convolutions(case["shapes"]).to_empty(device="cpu")
    masks = sparse_masks(net, case["density"], "erk", draws())
    for mask, density in zip(masks.values(), case["layer_densities"], strict=True):
        assert int(mask.sum()) == round(density * mask.numel())


def test_erk_by_hand() -> None:
    net = convolutions([[64, 3, 3, 3], [64, 64, 3, 3], [10, 64, 1, 1]]).to_empty(device="cpu")
    masks = sparse_masks(net, 0.1, "erk", draws())
    assert [int(mask.sum()) for mask in masks.values()] == [1158, 2125, 640]


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_the_budget_is_met_to_rounding_by_every_network(distribution: str) -> None:
    for net in (build_generator("biggan", 12, 16), build_discriminator("sngan", 12)):
        masks = sparse_masks(net, 0.1, distribution, draws())  # type: ignore[arg-type]
        assert masks.kept == pytest.approx(0.1 * masks.total, abs=len(masks))
        assert set(masks) == {name for name, weight in net.named_parameters() if weight.ndim == 4}
        if distribution == "uniform":
            assert all(int(m.sum()) == max(round(0.1 * m.numel()), 1) for m in masks.values())


def test_the_seed_draws_the_masks() -> None:
    net = nn.Conv2d(8, 8, 3)
    one, two, other = (sparse_masks(net, 0.5, "erk", draws(seed))["weight"] for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("density", [0, 1.2, float("nan"), -0.1])
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_an_impossible_density_is_refused(density: float, distribution: str) -> None:
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got"):
        sparse_masks(nn.Conv2d(2, 2, 3), density, distribution, draws())  # type: ignore[arg-type]


def test_an_unknown_distribution_and_a_module_without_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="distribution must be erk or uniform, got 'normal'"):
        sparse_masks(nn.Conv2d(2, 2, 3), 0.5, "normal", draws())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must have a weight to prune in"):
        sparse_masks(nn.Linear(2, 2), 0.5, "erk", draws())


def test_transposed_convolutions_are_under_masks_too() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(8, 4, 4, stride=2), nn.Conv2d(4, 2, 3))
    everywhere = (
        sparse_masks(net, 0.25, "erk", draws()),
        magnitude_masks(net, 0.25, "global"),
        snip_masks(net, 0.25, lambda: net(torch.ones(1, 8, 2, 2)).square().sum()),
    )
    for masks in everywhere:
        assert set(masks) == {"0.weight", "1.weight"} and masks.kept == round(0.25 * (512 + 72))


def test_snip_keeps_what_the_loss_would_miss_most() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3))
    x = torch.randn(2, 2, 6, 6)
    before = [p.clone() for p in net.parameters()]
    masks = snip_masks(net, 0.25, lambda: net(x).square().mean())
    net(x).square().mean().backward()
    scores = {name: (net.get_parameter(name) * net.get_parameter(name).grad).abs() for name in masks}
    assert masks.kept == round(0.25 * 108)
    least = min(float(scores[name][mask].min()) for name, mask in masks.items())
    assert least > max(float(scores[name][~mask].max()) for name, mask in masks.items())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_snip_scores_by_the_mean_gradient_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Conv2d(1, 2, 1, bias=False)
    net.weight.data.flatten()[:] = torch.tensor([1.0, 2.0])

    def average_(tensors: list[torch.Tensor]) -> None:
        tensors[0] = torch.tensor([9.0, 1.0]).view(2, 1, 1, 1)

    assert snip_masks(net, 0.5, lambda: net.weight.sum())["weight"].flatten().tolist() == [False, True]
    monkeypatch.setattr("common.distributed.average_", average_)
    assert snip_masks(net, 0.5, lambda: net.weight.sum())["weight"].flatten().tolist() == [True, False]


def test_magnitude_prunes_globally_or_by_layer_and_within_masks() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 1, 1, bias=False))
    net[0].weight.data.flatten()[:] = torch.tensor([1.0, -2, 3, -4])
    net[1].weight.data.flatten()[:] = torch.tensor([0.1, 0.2, -0.3, 0.4])

    def kept(masks: Masks) -> list[list[bool]]:
        return [mask.flatten().tolist() for mask in masks.values()]

    no, yes = False, True
    assert kept(magnitude_masks(net, 0.5, "global")) == [[yes] * 4, [no] * 4]
    assert kept(magnitude_masks(net, 0.5, "uniform")) == [[no, no, yes, yes]] * 2
    within = Masks({"0.weight": torch.zeros(4, 1, 1, 1), "1.weight": torch.ones(1, 4, 1, 1)})
    assert kept(magnitude_masks(net, 0.25, "global", within)) == [[no] * 4, [no, no, yes, yes]]
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 0"):
        magnitude_masks(net, 0, "global")


def test_the_gradual_schedule_falls_along_a_cubic_between_a_tenth_and_four_fifths() -> None:
    densities = [gradual_density(step, 100, 0.2) for step in (0, 10, 45, 80, 100)]
    assert densities == pytest.approx([1, 1, 1 - 0.8 * 0.875, 0.2, 0.2])
