"""Facts about compaction: the same logits and input gradients at every density (acceptance check 16)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_lth.compaction import Compacted, compact, compact_states
from backdoor_lth.models import build_model
from backdoor_lth.tests.nets import hash_filled, waves
from common.masks import keep_top, prunable_weights

DENSITIES = (1.0, 0.1, 0.01, 0.0005, 0.0)


@pytest.fixture(autouse=True)
def _channels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts about folded channels, also where few weights would become a program over pixels (test_pixels.py)."""
    monkeypatch.setattr("backdoor_lth.compaction.SPARSE", float("inf"))


def prune(model: nn.Module, density: float) -> nn.Module:
    weights = prunable_weights(model)
    count = round(density * sum(weight.numel() for weight in weights.values()))
    keep_top({name: weight.abs() for name, weight in weights.items()}, count).apply_(model)
    return model


def pruned(name: str, density: float) -> nn.Module:
    return prune(hash_filled(build_model(name, 3, 10)), density)


def both(model: nn.Module, x: Tensor, folded: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and input gradients of the model and of what compaction makes of it."""
    found = []
    for net in (model, folded or compact(model, x.shape[1:])):
        inputs = x.clone().requires_grad_()
        logits = net(inputs)
        (gradient,) = torch.autograd.grad(logits.square().sum(), inputs)
        found += [logits.detach(), gradient]
    return found[0], found[1], found[2], found[3]


def scaled_close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((one - other).abs().max() <= tolerance * one.abs().max().clamp_min(1e-12))


def folds(model: nn.Module, x: Tensor, tolerance: float = 1e-12) -> bool:
    """Whether the model is folded, and folded without error."""
    folded = compact(model, x.shape[1:])
    assert isinstance(folded, Compacted)
    logits, gradient, its_logits, its_gradient = both(model, x, folded)
    return scaled_close(logits, its_logits, tolerance) and scaled_close(gradient, its_gradient, tolerance)


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


@pytest.mark.parametrize(
    ("name", "densities"),
    [
        ("vgg16", DENSITIES),
        ("densenet100", (1.0, 0.1, 0.01, 0.0005)),
        ("resnet18", (0.01, 0.0005)),
        ("resnet18_224", (0.01, 0.0005)),
    ],
)
def test_the_large_networks_too(name: str, densities: Sequence[float]) -> None:
    model = pruned(name, 1.0).float()
    assert all(folds(prune(model, density), waves(1).float(), 1e-4) for density in densities)


def test_masks_after_which_branches_read_what_their_streams_drop() -> None:
    torch.manual_seed(3)
    model = build_model("resnet18", 3, 10).eval()
    for weight in prunable_weights(model).values():
        weight.data.mul_(torch.rand_like(weight) < 0.002)
    assert folds(model, waves(1).float(), 1e-4)
    assert folds(prune(build_model("densenet100", 3, 10).eval(), 0.1), waves(1).float(), 1e-4)


class Stream(nn.Module):
    """Its convolution reads channel 0 of a stream of which the head reads channel 1."""

    def __init__(self, act: nn.Module, first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.act, self.first = act, first
        self.stem, self.norm, self.conv = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1)
        self.head, self.fc = nn.Conv2d(2, 4, 1), nn.Linear(4, 5)
        self.double().eval()
        with torch.no_grad():
            self.norm.running_mean.normal_()  # type: ignore[union-attr]
            self.conv.weight[:, 1] = 0
            self.head.weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) if self.first else self.act(self.stem(x))
        x = x + self.conv(self.act(self.norm(x)) if self.first else x)
        return self.fc(self.act(self.head(self.act(x))).mean((2, 3)))


@pytest.mark.parametrize("act", [nn.SiLU(), nn.ReLU(), nn.ReLU(inplace=True)])
@pytest.mark.parametrize("first", [False, True])
def test_a_branch_may_read_channels_that_the_stream_drops(act: nn.Module, first: bool) -> None:
    assert folds(Stream(act, first), torch.randn(3, 3, 8, 8).double())


def test_readers_of_one_value_may_each_read_channels_of_their_own() -> None:
    class Readers(Stream):
        """Of two channels one reader needs the first, the others the second."""

        def __init__(self) -> None:
            super().__init__(nn.ReLU())
            self.alone, self.padded, self.joined = nn.Conv2d(2, 5, 3), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)
            self.flat = nn.Linear(128, 5)
            with torch.no_grad():
                self.alone.weight[:, 1] = 0
                self.padded.weight[:, :2] = 0
                self.joined.weight[:, ::2] = 0
                self.flat.weight[:, :64] = 0
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            found = self.alone(F.relu(x)).mean((2, 3)) + self.padded(F.pad(x, (0, 0, 0, 0, 1, 1))).mean((2, 3))
            return found + self.joined(torch.cat([x, torch.relu(x)], 1)).mean((2, 3)) + self.flat(x.flatten(1))

    assert folds(Readers(), torch.randn(3, 3, 8, 8).double())


@pytest.mark.parametrize("norms", [1, 2])
def test_a_module_that_is_called_twice_is_not_fused(norms: int) -> None:
    class Twice(Stream):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.norm(self.conv(x)))
            return (self.norm if norms == 1 else self.other)(self.conv(x)).mean((2, 3))

    model = Twice(nn.ReLU())
    model.other = nn.BatchNorm2d(2).double().eval()
    assert folds(model, torch.randn(3, 2, 8, 8).double())


def test_a_value_may_be_overwritten_once_all_have_read_it() -> None:
    class Adding(Stream):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x += self.conv(self.act(x))
            return self.fc(F.relu(self.head(F.relu(x, inplace=True))).mean((2, 3)))

    assert folds(Adding(nn.ReLU()), torch.randn(3, 3, 8, 8).double())


def test_what_is_left_of_a_sum_is_not_overwritten() -> None:
    """As of a residual block whose last scale is 0, before a ReLU in place."""

    class Zeroed(Stream):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.stem(x))
            out = self.norm(self.conv(x))
            out += x
            return self.act(out).mean((2, 3))

    model = Zeroed(nn.ReLU(inplace=True))
    nn.init.zeros_(model.norm.weight)
    assert folds(model, torch.randn(3, 3, 8, 8).double())


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


class Odd(nn.Module):
    """A convolution and then a function that compaction does not know."""

    def __init__(self, function: Callable[[Odd, Tensor], Tensor], groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.scale = function, nn.Parameter(torch.randn(4, 1, 1))
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
        self.point = nn.Conv2d(4, 4, 1)
        with torch.no_grad():
            self.conv.weight[2:] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.conv(x)).flatten(1)


@pytest.mark.parametrize(
    "model",
    [
        Odd(lambda net, x: x, groups=2),
        Odd(lambda net, x: x if x.sum() > 0 else -x),
        Odd(lambda net, x: x + net.scale),
        Odd(lambda net, x: F.pad(x, (0, 0, 0, 0, 1, 1), value=1.0)),
        Odd(lambda net, x: F.pad(x, (0, 0, 0, 0, 1, 1), "constant", 1.0)),
        Odd(lambda net, x: F.pad(x, (0, 0, 0, 0))),
        Odd(lambda net, x: F.pad(x, (0, 0, 0, 0, -1, 0))),
        Odd(lambda net, x: x + net.point(F.adaptive_avg_pool2d(x, 1))),
        Odd(lambda net, x: torch.add(x, net.point(x), alpha=2)),
        Odd(lambda net, x: torch.cat([x, x], 1)),
        Odd(lambda net, x: x.mean(1)),
        Odd(lambda net, x: F.adaptive_avg_pool2d(x, 1).mean(1)),
        Odd(lambda net, x: x.mean()[None, None]),
        Odd(lambda net, x: x + net.point(F.relu(x, inplace=True))),
    ],
    ids=range(14),
)
def test_what_is_not_known_comes_back_as_it_is_with_a_warning(model: Odd) -> None:
    with pytest.warns(UserWarning, match=r"not compacted: (call_|get_attr scale|symbolically)"):
        assert compact(model, (4, 4, 4)) is model


@pytest.mark.parametrize("what", ["logits", "input gradients"])
def test_what_answers_otherwise_than_the_model_is_not_used(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1.01 * model(x) if what == "logits" else model(0.98 * x.detach() + 0.02 * x)

    model = build_model("cnn", 3, 10).eval()
    monkeypatch.setattr("backdoor_lth.compaction._compacted", lambda *_: Wrong())
    with pytest.warns(UserWarning, match=f"not compacted: its {what} come out different"):
        assert compact(model, (3, 28, 28)) is model
    with pytest.warns(UserWarning, match=f"not compacted: its {what} come out different"):
        assert not any(isinstance(net, Wrong) for net in compact_states(model, (3, 28, 28), [model.state_dict()]))


def test_a_gradient_that_is_lost_in_the_rounding_of_the_logits_is_not_compared() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        model[0].weight.mul_(1e-8)  # type: ignore[operator]
        model[1].running_mean.normal_()  # type: ignore[union-attr, operator]
    _, gradient, _, its_gradient = both(model, torch.randn(2, 2, 8, 8))
    assert isinstance(compact(model, (2, 8, 8)), Compacted) and not scaled_close(gradient, its_gradient, 0.1)


def test_the_model_itself_is_not_changed() -> None:
    model = build_model("cnn", 3, 10).train()
    before = copy.deepcopy(model.state_dict())
    compact(model, (3, 28, 28))
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
