"""Which terms a method adds to the loss of its regime, on which box, with which weight."""

from __future__ import annotations

from math import tanh

import pytest
import torch
from torch import Tensor, nn

from certified_pruning.certified_loss import crown_ibp_loss
from certified_pruning.nrs import nrs_from_bounds
from certified_pruning.objective import robust_loss
from certified_pruning.settings import Config, Method, PruneConfig, Regime, TrainConfig
from certified_pruning.train_ibp import pixel_box

torch.set_num_threads(1)
EPS = 0.1


def value(
    model: nn.Module,
    raw: Tensor,
    eps: float,
    regime: Regime,
    method: Method = "imp",
    nrs: float = 1.0,
    lam: float = 0.0,
) -> float:
    config = Config(train=TrainConfig(regime=regime, eps=EPS, nrs=nrs, gradalign=lam), prune=PruneConfig(method=method))
    draws = torch.Generator().manual_seed(3)
    return robust_loss(config, model, raw, torch.arange(len(raw)) % 2, eps, draws)[0].item()


def test_the_stability_regulariser_takes_the_full_box_while_eps_still_rises() -> None:
    """One ReLU with input x - .5 at pixel .5: bounds -.1 and .1 whatever the radius of the attack."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    model[1].weight.data.fill_(1.0)
    model[1].bias.data.fill_(-0.5)
    raw = torch.full((2, 1, 1, 1), 0.5)
    for regime in ("standard", "fgsm"):
        for eps in (0.0, 0.05, EPS):
            added = value(model, raw, eps, regime, "imp+nrs", nrs=0.5) - value(model, raw, eps, regime)
            assert added == pytest.approx(-0.5 * tanh(1 - EPS**2), abs=1e-6)


def test_gradient_alignment_adds_its_weight_times_one_minus_the_cosine() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 20), nn.Tanh(), nn.Linear(20, 2))
    raw = torch.rand(4, 1, 3, 3) * 0.4 + 0.3
    off, on, strong = (value(model, raw, EPS, "fgsm_gradalign", lam=lam) for lam in (0.0, 0.5, 1.0))

    x = raw.clone().requires_grad_()
    start = EPS * (torch.rand(raw.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1)
    y = torch.arange(4) % 2
    clean, moved = (
        torch.autograd.grad(nn.functional.cross_entropy(model(at), y), x)[0].flatten(1) for at in (x, x + start)
    )
    apart = 1 - nn.functional.cosine_similarity(clean, moved).mean().item()
    assert apart > 1e-5
    assert strong - off == pytest.approx(apart, rel=0.02) and on - off == pytest.approx(apart / 2, rel=0.02)


def test_under_certified_training_the_regulariser_is_a_mean_over_the_channels_of_normed_convolutions() -> None:
    """The linear layer's ReLU, stable and so far below, has no part in it."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(2, 2))
    model[4].bias.data.fill_(50.0)
    raw = torch.rand(4, 1, 3, 3)
    box = pixel_box(raw, EPS, lambda x: x)
    bounds = crown_ibp_loss(model, *box, raw, torch.arange(4) % 2, 1.0)[2].relus
    expected, other = (nrs_from_bounds(bounds, reduction=by)[0].item() for by in ("channel", "neuron"))
    assert abs(expected - other) > 0.01
    added = value(model, raw, EPS, "crown_ibp", "imp+nrs", nrs=0.5) - value(model, raw, EPS, "crown_ibp")
    assert added == pytest.approx(0.5 * expected, abs=1e-5)
