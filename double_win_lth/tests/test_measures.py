"""Facts about the optional measures: corruptions and slices of the loss."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from common.data import DataConfig, ImageSet, load
from double_win_lth.corruptions import CORRUPTIONS, corrupted
from double_win_lth.slices import loss_slice
from double_win_lth.tests import nets
from double_win_lth.tickets import conv_weights


@pytest.fixture(scope="module")
def data() -> ImageSet:
    return load(DataConfig(val=0.0)).test.subset(torch.arange(30))


def test_corruptions_grow_with_severity_and_come_out_equal_every_time(data: ImageSet) -> None:
    clean = data.images.float()
    for name in CORRUPTIONS:
        changes = []
        for severity in (1, 3, 5):
            images = corrupted(data, name, severity)
            assert torch.equal(images.labels, data.labels) and images.images.dtype == torch.uint8
            assert torch.equal(images.images, corrupted(data, name, severity).images)
            changes.append((images.images.float() - clean).abs().mean().item())
        assert 0 < changes[0] < changes[1] < changes[2], name


def test_brightness_and_contrast_have_their_closed_forms() -> None:
    x = torch.tensor([[[[0.0, 0.2], [0.6, 1.0]]]])
    assert torch.allclose(CORRUPTIONS["brightness"](x, 2), torch.tensor([[[[0.2, 0.4], [0.8, 1.0]]]]))
    assert torch.allclose(CORRUPTIONS["contrast"](x, 4), 0.45 + 0.1 * (x - 0.45), atol=1e-6)
    flat = torch.full((1, 2, 9, 9), 0.3)
    assert torch.allclose(CORRUPTIONS["blur"](flat, 5), flat, atol=1e-6)


def test_an_unknown_corruption_is_refused(data: ImageSet) -> None:
    for name, severity in (("fog", 1), ("noise", 6), ("noise", 0)):
        with pytest.raises(ValueError, match=f"corruption must be one of noise.* got '{name}' at {severity}"):
            corrupted(data, name, severity)


def test_a_slice_goes_through_the_loss_itself_and_leaves_the_network_as_it_was() -> None:
    net = nets.small_net().train()
    net[0].weight.data[0] = 0  # a pruned filter
    before = copy.deepcopy(net.state_dict())
    x, y = nets.small_batch(40)
    losses = loss_slice(net, x, y, [-1.0, 0.0, 1e-3], torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert losses[1] == pytest.approx(F.cross_entropy(net.eval()(x), y).item(), abs=1e-6)
    assert 0 < abs(losses[2] - losses[1]) < abs(losses[0] - losses[1]) / 10
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_direction_has_the_norm_of_each_filter_and_spares_pruned_weights() -> None:
    net = nets.small_net().eval()
    kept = torch.rand(5, 2, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    net[0].weight.data.mul_(kept)
    seen = {}

    class Watch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    watched = torch.nn.Sequential(*net, Watch())
    original = {name: weight.clone() for name, weight in conv_weights(watched).items()}

    def look(module: torch.nn.Module, inputs: object, output: object) -> None:
        seen["weight"] = module.weight.clone()

    watched[0].register_forward_hook(look)
    loss_slice(watched, *nets.small_batch(4), [1.0], torch.Generator().manual_seed(0))
    moved = seen["weight"] - original["0.weight"]
    assert (moved[~kept] == 0).all() and (moved[kept] != 0).all()
    assert torch.allclose(moved.flatten(1).norm(dim=1), original["0.weight"].flatten(1).norm(dim=1), atol=1e-5)
