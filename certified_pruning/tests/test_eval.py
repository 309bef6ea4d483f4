"""What one network's metrics are: worked out by hand on networks of a few neurons."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from certified_pruning.eval import evaluate_network, ibp_verified, stability
from certified_pruning.settings import Config, EvalConfig, TrainConfig
from certified_pruning.verdicts import VerifyConfig
from common.data import ImageSet

torch.set_num_threads(1)
CONFIG = Config(
    train=TrainConfig(eps=0.1), eval=EvalConfig(images=4), verify=VerifyConfig(pgd_steps=2, pgd_restarts=1, max_nodes=4)
)


def net(*layers: tuple[list[list[float]], list[float]]) -> nn.Sequential:
    """Flatten, then linear layers of these weights and biases with ReLUs between them."""
    parts: list[nn.Module] = [nn.Flatten()]
    for weight, bias in layers:
        linear = nn.Linear(len(weight[0]), len(weight))
        linear.weight.data.copy_(torch.tensor(weight))
        linear.bias.data.copy_(torch.tensor(bias))
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1]).eval()


def grey(levels: list[int], labels: list[int], classes: int) -> ImageSet:
    """Images of one pixel."""
    return ImageSet(torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels), classes)


def test_what_a_level_is_chosen_by_comes_from_validation_and_what_it_is_worth_from_test() -> None:
    model = net(([[1.0]], [0.0]), ([[1.0], [0.0]], [0.0, 0.5]))  # class 0 where the pixel is above one half
    val, test = grey([255, 255, 255, 255], [0, 0, 0, 1], 2), grey([0, 0, 255, 0], [0, 0, 0, 1], 2)
    found = evaluate_network(model, val, test, CONFIG, lambda fraction: None)
    of_val = [found[name] for name in ("val_accuracy", "val_verified", "val_ibp_verified")]
    of_test = [found[name] for name in ("test_accuracy", "verified", "ibp_verified")]
    assert of_val == [75, 75, 75] and of_test == [50, 50, 50]


def test_an_image_is_verified_by_intervals_if_every_other_class_is_ruled_out() -> None:
    # At pixel 1, box [.9, 1]: logits x, .5, .95: the margin over class 1 is .4 at least, over class 2 -.05.
    model = net(([[1.0]], [0.0]), ([[1.0], [0.0], [0.0]], [0.0, 0.5, 0.95]))
    assert ibp_verified(model, grey([255], [0], 3), CONFIG) == 0
    model[3].bias.data[2] = 0.8
    assert ibp_verified(model, grey([255], [0], 3), CONFIG) == 100


def test_intervals_are_summed_in_float64() -> None:
    """Class 1 is ahead by 1e-6; a float32 sum of 1.5 and 3,071 terms of 2^-24 is too small by ten times as much."""
    small = [1.5] + [2.0**-24] * 3071
    model = net(([[1.0]] * 3072, [0.0] * 3072), ([[0.0] * 3072, small], [sum(small) - 1e-6, 0.0]))
    assert ibp_verified(model, grey([255], [0], 2), Config(train=TrainConfig(eps=0.0))) == 0


@pytest.mark.parametrize(("unstable", "bias"), [(0.25, [0.0, 1.0, 1.0, -2.0]), (0.75, [0.0, 0.05, -0.05, -2.0])])
def test_the_unstable_share_is_of_neurons_that_may_have_either_sign(unstable: float, bias: list[float]) -> None:
    """Pixel .5, eps .1, weights 1, inputs x - .5 + bias in bias + [-.1, .1]."""
    model = net(([[1.0]] * 4, [b - 0.5 for b in bias]), ([[1.0] * 4] * 2, [0.0, 0.0]))
    found = stability(model, torch.full((1, 1, 1, 1), 0.5), CONFIG)
    gaps = [max(0.0, (b + 0.1) * (0.1 - b) / 0.2) for b in bias]
    assert found["unstable"] == unstable
    assert found["gap_1"] == pytest.approx(sum(gaps) / 4, abs=1e-6)
