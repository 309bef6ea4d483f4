"""The attack: sign-Adam steps of the reference, box, targets, restarts, and the clamp trap."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from certified_pruning import attack
from certified_pruning.attack import SignAdam, pgd_attack
from certified_pruning.chain import ChainNet
from certified_pruning.ibp import input_box
from certified_pruning.tests.nets import images, load, odd_net, reference

torch.set_num_threads(1)
ODD = (2, 9, 7)


def test_sign_adam_traces_the_reference_positions() -> None:
    data = reference("pgd")
    adam, x = SignAdam(0.025, 0.99), torch.zeros(2, 3)
    for grad, expected in zip(data["adam_grads"], data["adam_trace"], strict=True):
        x = adam.step(x, grad, torch.tensor(-0.1), torch.tensor(0.1))
        assert torch.allclose(x, expected, atol=1e-6)


def test_attack_is_as_strong_as_the_reference() -> None:
    data = reference("pgd")
    layers = [nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 4, 2, 1), nn.BatchNorm2d(5)]
    model = load(nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(80, 10)), data)
    x, y = data["x"], data["y"]
    box = x - 0.05, x + 0.05
    clean = pgd_attack(model, x, y, *box, 0.0125, restarts=0)
    assert torch.allclose(clean.margin, data["margin_clean"], atol=1e-5)
    found = pgd_attack(model, x, y, *box, 0.0125, steps=20, random_start=False, early_stop=False)
    assert bool((found.margin <= data["margin_adv"] + 1e-3).all())


def test_reported_margins_belong_to_the_points_and_the_points_to_the_box() -> None:
    model = odd_net()
    x_lb, x_ub = input_box(images(ODD, 6), 0.1)
    y = model(images(ODD, 6)).argmax(1)
    found = pgd_attack(model, images(ODD, 6), y, x_lb, x_ub, 0.025, steps=10, restarts=2)
    assert bool((found.x_adv >= x_lb).all()) and bool((found.x_adv <= x_ub).all())
    logits = model(found.x_adv).detach()
    true = logits.gather(1, y[:, None]).squeeze(1)
    other = logits.scatter(1, y[:, None], -float("inf")).amax(1)
    assert torch.allclose(found.margin, true - other, atol=1e-5)


def test_black_and_white_pixels_are_attacked() -> None:
    """The gradient of a clamp is 0 at its bounds: an attack that differentiates through it leaves them alone."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    model[1].weight.data.copy_(torch.tensor([[-1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))
    model[1].bias.data.copy_(torch.tensor([0.3, 0.0]))
    x = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    x_lb, x_ub = input_box(x, 0.1)
    found = pgd_attack(model, x, torch.tensor([0]), x_lb, x_ub, 0.025, steps=1, random_start=False)
    assert torch.allclose(found.x_adv, torch.tensor([[0.1, 0.1, 0.9, 0.9]]))
    assert found.margin.item() == pytest.approx(1.9, abs=1e-5)


def test_early_stop_finds_the_same_victims_and_keeps_their_first_success() -> None:
    net = ChainNet.from_module(odd_net(1), ODD)
    x = images(ODD, 12)
    y = net.forward(x).argmax(1)
    box = input_box(x, 0.15)
    long = pgd_attack(net, x, y, *box, 0.0125, steps=15, restarts=2, early_stop=False)
    short = pgd_attack(net, x, y, *box, 0.0125, steps=15, restarts=2)
    assert torch.equal(long.margin < 0, short.margin < 0)
    assert (long.margin < 0).any() and (long.margin > 0).any()
    assert bool((long.margin <= short.margin).all())


def test_results_do_not_depend_on_the_other_images_or_the_chunks() -> None:
    net = ChainNet.from_module(odd_net(), ODD)
    x = images(ODD, 5)
    y = net.forward(x).argmax(1)
    lb, ub = input_box(x, 0.05)
    together = pgd_attack(net, x, y, lb, ub, 0.0125, steps=8, restarts=2, seed=3)
    chunked = pgd_attack(net, x, y, lb, ub, 0.0125, steps=8, restarts=2, seed=3, max_rows=4)
    assert torch.allclose(together.margin, chunked.margin, atol=1e-5)
    for i in range(5):
        one = slice(i, i + 1)
        alone = pgd_attack(net, x[one], y[one], lb[one], ub[one], 0.0125, steps=8, restarts=2, seed=3)
        assert torch.allclose(alone.margin, together.margin[one], atol=1e-5)
    again = pgd_attack(net, x, y, lb, ub, 0.0125, steps=8, restarts=2, seed=3)
    assert torch.equal(again.x_adv, together.x_adv)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gradient_of_a_chain_equals_that_of_autograd(seed: int) -> None:
    net = ChainNet.from_module(odd_net(seed), ODD, torch.float64)
    x = images(ODD, 6, seed).double()
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits, grad = attack._value_and_gradient(net, x, rows)
    expected_logits, expected = attack._value_and_gradient(lambda x: net.forward(x), x, rows)
    assert grad.shape == x.shape and expected.abs().max() > 1e-3
    assert torch.allclose(logits, expected_logits, atol=1e-12) and torch.allclose(grad, expected, atol=1e-12)


def test_no_images_give_no_margins() -> None:
    x = torch.zeros(0, *ODD)
    found = pgd_attack(odd_net(), x, torch.zeros(0, dtype=torch.long), x, x, 0.1)
    assert found.margin.shape == (0,)


def test_bad_arguments_are_refused() -> None:
    model, x = odd_net(), images(ODD, 2)
    with pytest.raises(ValueError, match=r"y must be in \[0, 4\)"):
        pgd_attack(model, x, torch.tensor([0, 4]), x, x, 0.1)
    with pytest.raises(ValueError, match="must have one shape"):
        pgd_attack(model, x, torch.tensor([0, 1]), x[:1], x, 0.1)
    with pytest.raises(ValueError, match="steps must be >= 0, got -1"):
        pgd_attack(model, x, torch.tensor([0, 1]), x, x, 0.1, steps=-1)
