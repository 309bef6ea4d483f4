"""Facts about pixel programs: exact, and nothing computed that no answer needs (acceptance check 16)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_lth.compaction import Compacted, compact, compact_states
from backdoor_lth.lazy_pixels import Pixels, csr
from backdoor_lth.models import build_model
from backdoor_lth.pixel_program import PixelProgram, pixel_program
from backdoor_lth.tests.nets import waves
from backdoor_lth.tests.test_compaction import both, pruned, scaled_close
from backdoor_lth.traced import Traced, UnsupportedError


def program(model: nn.Module, shape: tuple[int, ...] = (3, 32, 32)) -> PixelProgram:
    with torch.no_grad():
        return pixel_program(Traced(model), shape)


def same(model: nn.Module, x: Tensor, tolerance: float = 1e-9, to: Callable[..., nn.Module] = program) -> bool:
    """Logits and input gradients of the model and of its program."""
    found = []
    for net in (model, to(model, tuple(x.shape[1:]))):
        inputs = x.clone().requires_grad_()
        logits = net(inputs)
        found.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), inputs)))
    assert found[0][0].dtype == found[1][0].dtype and found[0][0].shape == found[1][0].shape
    return all(scaled_close(one, other, tolerance) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("density", [0.02, 0.01, 0.0005, 0.0])
@pytest.mark.parametrize("name", ["resnet20s", "cnn"])
def test_a_program_is_the_network_at_every_density(name: str, density: float) -> None:
    model = pruned(name, density)
    assert same(model, waves())
    assert same(copy.deepcopy(model).float(), waves().float(), 1e-4)


def test_a_norm_before_a_relu_and_concatenations_are_known() -> None:
    assert same(pruned("densenet100", 0.0005), waves(1))
    assert same(pruned("resnet18", 0.0005), waves(1))


class Shortcuts(nn.Module):
    """As in a residual network, where most convolutions are constant: floors pile up on one value."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))
        self.fc = nn.Linear(4, 5)
        with torch.no_grad():
            for conv in self.convs:
                conv.weight[torch.rand(conv.weight.shape) < 0.9] = 0  # type: ignore[operator, index]
                conv.bias.normal_()  # type: ignore[operator, union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for conv in self.convs:
            x = F.relu(x + conv(F.relu(x)))
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 1))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("seed", range(8))
def test_floors_that_pile_up_on_a_shortcut_are_exact(seed: int) -> None:
    assert same(Shortcuts(seed).double(), torch.randn(3, 2, 6, 6).double(), 1e-12)


class Piece(nn.Module):
    """An operation on inputs of two channels, between a sparse convolution and a head."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.function = nn.Conv2d(2, 3, 3, padding=1), function
        with torch.no_grad():
            self.conv.weight[torch.rand(self.conv.weight.shape) < 0.7] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(x) + F.relu(x),
        lambda x: F.relu(x) + x,
        lambda x: x + F.relu(x),
        lambda x: torch.cat([F.relu(x), x, F.relu(x)], 1),
        lambda x: F.avg_pool2d(F.relu(x), 2),
        lambda x: F.pad(F.relu(x)[:, :, 1::2, ::3], (0, 0, 0, 0, 2, 1)),
        lambda x: F.relu(F.relu(x) + F.relu(F.relu(x))),
        lambda x: F.adaptive_avg_pool2d(x, 2),
    ],
)
def test_every_operation_on_rectified_values(function: Callable[[Tensor], Tensor]) -> None:
    assert same(Piece(function).double(), torch.randn(3, 2, 6, 6).double(), 1e-12)


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"dilation": 2, "padding": 2}, {"padding": "same"}, {"bias": False}]
)
def test_convolutions_of_every_kind(options: dict[str, object]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, **options), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).double()  # type: ignore[arg-type]
    model(torch.zeros(1, 2, 6, 5).double())
    assert same(model, torch.randn(3, 2, 6, 5).double(), 1e-12)


def test_only_pixels_that_an_answer_needs_are_computed() -> None:
    class Quarter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.conv(x))[:, :, ::2, ::2].mean((2, 3)))

    model = Quarter().double().eval()
    with torch.no_grad():
        model.conv.weight[2:] = 0
        model.fc.weight[:, 1] = 0
    made = program(model, (1, 8, 8))
    assert made.rows == 16 + 3  # one channel that is live and read, every other pixel, and the logits
    assert same(model, torch.randn(2, 1, 8, 8).double(), 1e-12)


def test_what_leads_to_no_answer_is_no_step_and_no_row() -> None:
    layers = [nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3)).double().eval()
    with torch.no_grad():
        for conv in (layers[2], layers[4]):
            conv.weight.copy_(-torch.eye(2)[:, :, None, None])  # type: ignore[union-attr, operator]
        model[7].weight[:, 16:] = 0  # type: ignore[index, operator]
    made = program(model, (1, 4, 4))
    assert made.rows == 3 * 16 + 3 and [step.first for step in made.steps[1:]] == [16, 32, 48]
    with torch.no_grad():
        model[7].weight.zero_()  # type: ignore[operator, union-attr]
    assert len(program(model, (1, 4, 4)).steps) == 1


def test_a_rectified_value_is_not_rectified_again() -> None:
    pixels = Pixels((2,))
    once = pixels.relu(pixels.linear(pixels.input, (2,), csr(np.array([[1.0, -2.0], [0.0, 3.0]]))))
    pixels.linear(once, (1,), csr(np.array([[1.0, 2.0]])))  # reads both: they are computed
    shifted = pixels.linear(once, (2,), csr(np.eye(2)), np.array([0.5, -0.5]))
    again = pixels.relu(shifted)
    assert len(pixels.steps) == 1 and again.floor.tolist() == [-np.inf, 0.0]


def test_terms_that_cancel_leave_a_constant() -> None:
    pixels = Pixels((1,))
    twice = pixels.linear(pixels.input, (2,), csr(np.ones((2, 1))))
    assert pixels.linear(twice, (1,), csr(np.array([[1.0, -1.0]])), 3.0).matrix.nnz == 0


def test_a_floor_moves_with_the_value_it_bounds() -> None:
    pixels = Pixels((2,))
    rectified = pixels.relu(pixels.linear(pixels.input, (2,), csr(np.array([[1.0, 0.0], [1.0, 1.0]]))))
    moved = pixels.linear(rectified, (2,), csr(np.eye(2)[::-1]), np.array([0.5, -0.5]))
    assert moved.floor.tolist() == [0.5, -0.5] and not pixels.steps  # nothing has to be computed for it


def test_what_the_rows_cannot_do_is_left_to_the_channels() -> None:
    x = torch.randn(3, 2, 6, 6).double()
    for function in (lambda x: F.max_pool2d(x, 2), torch.nn.SiLU()):
        model = Piece(function).double()
        with pytest.raises(UnsupportedError):
            program(model, (2, 6, 6))
        with torch.no_grad():
            model.conv.weight[:, :, 1:] = 0
            model.conv.weight[:, :, :, 1:] = 0
        assert isinstance(compact(model, (2, 6, 6)), Compacted) and same(model, x, 1e-12, compact)


def test_the_form_is_chosen_by_how_many_weights_are_left() -> None:
    kinds = [type(compact(pruned("resnet20s", density), (3, 32, 32))) for density in (0.1, 0.0005, 0.0)]
    assert kinds == [Compacted, PixelProgram, Compacted]
    made = compact(pruned("resnet20s", 0.0005), (3, 32, 32))
    assert made.eval() is made and not made.training
    with pytest.raises(RuntimeError, match="must stay in eval mode"):
        made.train()


def test_too_many_entries_are_left_to_the_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Shortcuts(0).double()
    for most, first in ((100, "1944"), (2000, "")):  # less than the stem's convolution, and than all layers together
        monkeypatch.setattr("backdoor_lth.lazy_pixels.MOST_ENTRIES", most)
        with pytest.raises(UnsupportedError, match=f"^{first}.*entries of matrices, where {most} are the most"):
            program(model, (2, 6, 6))
        monkeypatch.setattr("backdoor_lth.compaction.SPARSE", 0)
        assert isinstance(compact(model, (2, 6, 6)), Compacted)


def test_pictures_of_many_pixels_are_left_to_the_channels() -> None:
    model = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(1024, 2))
    with pytest.raises(UnsupportedError, match="4225 pixels at once"):
        program(model, (1, 65, 65))


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(1, 2, 6, 6).double().requires_grad_()
    logits = program(Shortcuts(0).double(), (2, 6, 6))(x)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_states_share_one_graph_and_are_each_exact() -> None:
    model, other = (pruned("resnet20s", density) for density in (0.01, 0.0005))
    states = [copy.deepcopy(net.state_dict()) for net in (model, other, model)]
    before = copy.deepcopy(model.state_dict())
    for state, net in zip(states, compact_states(model, (3, 32, 32), states), strict=True):
        plain = copy.deepcopy(model)
        plain.load_state_dict(state)
        assert scaled_close(plain(waves()), net(waves()), 1e-9)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_states_of_what_cannot_be_compacted_are_copies_of_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(144, 2))
    state = {name: value + 1 for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="not compacted"):
        (net,) = compact_states(model, (4, 8, 8), [state])
    assert net is not model and all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_no_warning_of_torch_reaches_the_user() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program(pruned("cnn", 0.01))(waves())
        assert both(build_model("cnn", 3, 10).eval(), waves().float())
