"""Facts about compaction: the same logits and input gradients at every density (acceptance check 16)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from backdoor_lth.compaction import Compacted, compact
from backdoor_lth.models import build_model
from backdoor_lth.tests.nets import hash_filled, waves
from common.masks import keep_top, prunable_weights

DENSITIES = (1.0, 0.1, 0.01, 0.0005, 0.0)


@pytest.fixture(autouse=True)
def _channels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts about folded channels, also where few weights would become a program over pixels (test_pixels.py)."""
    monkeypatch.setattr("backdoor_lth.compaction.SPARSE", float("inf"))


def pruned(name: str, density: float) -> nn.Module:
    model = hash_filled(build_model(name, 3, 10))
    weights = prunable_weights(model)
    keep_top(
        {key: w.abs() for key, w in weights.items()}, round(density * sum(w.numel() for w in weights.values()))
    ).apply_(model)
    return model


def both(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and input gradients of the model and of what compaction makes of it."""
    found = []
    for net in (model, compact(model, x.shape[1:])):
        inputs = x.clone().requires_grad_()
        logits = net(inputs)
        (gradient,) = torch.autograd.grad(logits.square().sum(), inputs)
        found += [logits.detach(), gradient]
    return found[0], found[1], found[2], found[3]


def scaled_close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((one - other).abs().max() <= tolerance * one.abs().max().clamp_min(1e-12))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("name", ["resnet20s", "cnn"])
def test_logits_and_gradients_are_the_networks_own(name: str, density: float) -> None:
    model = pruned(name, density)
    logits, gradient, folded, its_gradient = both(model, waves())
    assert scaled_close(logits, folded, 1e-9) and scaled_close(gradient, its_gradient, 1e-9)
    logits, _, folded, _ = both(copy.deepcopy(model).float(), waves().float())
    assert scaled_close(logits, folded)
    if density == 0:
        assert torch.equal(folded[0], folded[1]) and not its_gradient.any()
    elif density >= 0.1:
        assert its_gradient.any()


@pytest.mark.parametrize("name", ["vgg16", "densenet100", "resnet18"])
def test_the_large_networks_too(name: str) -> None:
    for density in (0.01, 0.0005):
        model = pruned(name, density).float()
        logits, gradient, folded, its_gradient = both(model, waves(1).float())
        assert isinstance(compact(model, (3, 32, 32)), Compacted)
        assert scaled_close(logits, folded) and scaled_close(gradient, its_gradient)


def test_a_constant_channel_is_a_map_with_borders_of_its_own() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)
    )
    with torch.no_grad():
        net[0].weight[1:] = 0
        net[0].bias.fill_(1.0)  # dead channels 1 and 2 are constantly 1, but 0 in the padding
    model = nn.Sequential(net, nn.Flatten(), nn.Linear(2 * 36, 5)).double().eval()
    x = torch.randn(3, 2, 6, 6).double()
    folded = compact(model, (2, 6, 6))
    assert isinstance(folded, Compacted)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert folded.widths["_0_1"] == 1


def test_only_live_channels_that_are_read_are_computed() -> None:
    model = pruned("cnn", 1.0)
    with torch.no_grad():
        model[0].weight[4:] = 0  # type: ignore[index, operator]
        model[3].weight[:, 2:] = 0  # type: ignore[index, operator]
        model[6].weight[:, 5:] = 0  # type: ignore[index, operator]
    folded = compact(model, (3, 32, 32))
    torch.testing.assert_close(folded(waves()), model(waves()), rtol=1e-9, atol=1e-10)
    assert [folded.widths[f"_{index}"] for index in (0, 3, 6)] == [2, 5, 32]  # type: ignore[index]


def test_an_input_channel_that_nothing_reads_may_be_there() -> None:
    model = pruned("cnn", 1.0)
    with torch.no_grad():
        model[0].weight[:, 1] = 0  # type: ignore[index, operator]
    torch.testing.assert_close(compact(model, (3, 32, 32))(waves()), model(waves()), rtol=1e-9, atol=1e-10)


def test_an_unread_batch_norm_before_a_sum_and_a_slice_are_folded() -> None:
    model = pruned("resnet20s", 0.0005)
    folded = compact(model, (3, 32, 32))
    assert isinstance(folded, Compacted) and max(folded.widths.values()) < 32
    assert not folded.training and folded.eval() is folded
    with pytest.raises(RuntimeError, match="must stay in eval mode"):
        folded.train()


def test_what_is_not_known_comes_back_as_it_is_with_a_warning() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3))

    class Branches(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) if x.sum() > 0 else super().forward(x)

    for model in (Odd(), Branches()):
        with pytest.warns(UserWarning, match="not compacted"):
            assert compact(model, (4, 8, 8)) is model


def test_the_model_itself_is_not_changed() -> None:
    model = build_model("cnn", 3, 10).train()
    before = copy.deepcopy(model.state_dict())
    compact(model, (3, 28, 28))
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
