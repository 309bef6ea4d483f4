"""Facts about the one-step adversarial losses, against the released code's values and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certified_pruning.fgsm import _misalignment, fgsm_gradalign_loss, fgsm_random_start_loss, standard_loss

REFERENCE = Path(__file__).parent / "reference"


def identity(raw: Tensor) -> Tensor:
    return raw


def cifar(raw: Tensor) -> Tensor:
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    return (raw - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def load(name: str) -> dict[str, Tensor]:
    with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


def small_net() -> Any:  # as Any, mypy does not ask which of its layers have weights
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 4, 2, 1), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Flatten(), nn.Linear(80, 10),
    )  # fmt: skip


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 8, 8, generator=draw), torch.randint(0, 10, (count,), generator=draw)


def linear_classifier(*weight: float) -> nn.Sequential:
    """Two classes on grey rows of pixels; the logit of class 1 is weight.x, that of class 0 is 0."""
    linear = nn.Linear(len(weight), 2, bias=False)
    linear.load_state_dict({"weight": torch.tensor([[0.0] * len(weight), list(weight)])})
    return nn.Sequential(linear)


def recorded(model: nn.Module) -> list[Tensor]:
    """Every input the model gets from now on."""
    inputs: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    return inputs


# ---- against the released code ----


@pytest.mark.parametrize("version", ["fixed", "legacy"])
@pytest.mark.parametrize("lam", [0.0, 0.2])
def test_loss_logits_and_second_order_gradients_equal_the_released_ones(version: str, lam: float) -> None:
    reference = load("fgsm_gradalign")
    net = small_net()
    net.load_state_dict({k[3:]: v for k, v in reference.items() if k.startswith("sd.")}, strict=False)
    net.eval()
    loss, logits = fgsm_gradalign_loss(
        net, reference["raw"], reference["y"], reference["eps"].item(), cifar, lam,
        uniform_start=reference["uniform_delta"], legacy_double_input=version == "legacy",
    )  # fmt: skip
    loss.backward()
    prefix = f"{version}_lam{lam}"
    assert loss.item() == pytest.approx(reference[f"{prefix}_loss"].item(), abs=1e-5)
    torch.testing.assert_close(logits, reference[f"{prefix}_logits"], rtol=0, atol=1e-5)
    for name in ("0.weight", "3.weight", "7.weight"):
        gradient, expected = net.get_parameter(name).grad, reference[f"{prefix}_grad.{name}"]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "svhn", "FashionMNIST"])
def test_the_adversarial_input_is_the_released_projection_of_the_perturbed_image(data: str) -> None:
    reference = load("transform")
    scales = {
        "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        "cifar100": ([0.5071, 0.4866, 0.4409], [0.2673, 0.2564, 0.2762]),
        "svhn": ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
        "FashionMNIST": ([0.286], [0.315]),
    }
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in scales[data])
    raw = (reference[f"{data}.x"] * std + mean).clamp(0, 1)
    perturbed = (raw + reference[f"{data}.delta"]).clamp(0, 1)
    torch.testing.assert_close((perturbed - mean) / std, reference[f"{data}.perturbed"], rtol=0, atol=2e-6)

    # The random start is placed by the same projection: it is the first input the network sees.
    eps = reference[f"{data}.delta"].abs().max().item()
    net = nn.Sequential(nn.Flatten(), nn.Linear(raw[0].numel(), 2))
    inputs = recorded(net)
    fgsm_random_start_loss(
        net, raw, torch.zeros(2, dtype=torch.int64), eps, lambda r: (r - mean) / std,
        uniform_start=reference[f"{data}.delta"],
    )  # fmt: skip
    torch.testing.assert_close(inputs[0], reference[f"{data}.perturbed"], rtol=0, atol=2e-6)


# ---- the attack ----


def test_pixels_at_0_and_1_are_attacked() -> None:
    net, raw = linear_classifier(3.0, -3.0, 3.0, -3.0), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    inputs = recorded(net)
    fgsm_gradalign_loss(net, raw, torch.tensor([0]), 0.25, identity, lam=0)
    assert inputs[-1].tolist() == [[0.25, 0.0, 1.0, 0.75]]


@pytest.mark.parametrize("step", [0.5, 1.0, 1.25, 3.0])
def test_fgsm_from_the_image_moves_every_pixel_by_step_times_eps_but_at_most_eps(step: float) -> None:
    net, raw = linear_classifier(1.0, -1.0), torch.tensor([[0.5, 0.5]])
    inputs = recorded(net)
    fgsm_gradalign_loss(net, raw, torch.tensor([0]), 0.125, identity, lam=0, step=step)
    moved = 0.125 * min(step, 1)
    assert inputs[-1].tolist() == [[0.5 + moved, 0.5 - moved]]


def test_fgsm_of_a_linear_classifier_is_the_worst_point_of_the_box() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(12, generator=draw)
    net, raw, eps = linear_classifier(*weight.tolist()), torch.rand(5, 12, generator=draw), 0.1
    y = torch.zeros(5, dtype=torch.int64)
    worst = torch.where(weight > 0, (raw + eps).clamp(max=1), (raw - eps).clamp(min=0))
    expected = F.cross_entropy(net(worst), y).item()
    assert fgsm_gradalign_loss(net, raw, y, eps, identity, lam=0)[0].item() == pytest.approx(expected, abs=1e-6)
    # From a random start a step of 2 eps reaches the same corner; 1.25 eps need not.
    start = eps * (2 * torch.rand(5, 12, generator=draw) - 1)
    from_start = fgsm_random_start_loss(net, raw, y, eps, identity, step=2, uniform_start=start)[0].item()
    assert from_start == pytest.approx(expected, abs=1e-6)


def test_the_random_start_attack_steps_from_the_clipped_start_and_is_projected_onto_the_box() -> None:
    net, raw = linear_classifier(1.0, 1.0, 1.0, -1.0), torch.tensor([[0.5, 0.5, 0.0, 1.0]])
    inputs = recorded(net)
    start = torch.tensor([[-0.25, 0.125, -0.25, -0.125]])
    fgsm_random_start_loss(net, raw, torch.tensor([0]), 0.25, identity, step=1.25, uniform_start=start)
    assert inputs[0].tolist() == [[0.25, 0.625, 0.0, 0.875]]
    assert inputs[1].tolist() == [[0.5625, 0.75, 0.25, 0.75]]


@pytest.mark.parametrize("loss_of", [fgsm_gradalign_loss, fgsm_random_start_loss])
def test_adversarial_images_stay_in_the_box_and_in_the_range_of_pixels(loss_of: Callable[..., object]) -> None:
    net, (raw, y) = small_net(), batch()
    inputs = recorded(net)
    loss_of(net, raw, y, 0.1, identity, generator=torch.Generator().manual_seed(0))
    for image in inputs:
        assert (image - raw).abs().max().item() <= 0.1 + 1e-6
        assert 0 <= image.min().item() <= image.max().item() <= 1


@pytest.mark.parametrize("loss_of", [fgsm_gradalign_loss, fgsm_random_start_loss])
def test_at_eps_0_the_loss_is_the_standard_one(loss_of: Callable[..., tuple[Tensor, Tensor]]) -> None:
    net, (raw, y) = small_net().eval(), batch()
    expected, expected_logits = standard_loss(net, raw, y, cifar)
    loss, logits = loss_of(net, raw, y, 0.0, cifar)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.equal(logits, expected_logits)


def test_the_standard_loss_is_the_cross_entropy_of_normalised_images() -> None:
    net, (raw, y) = small_net().eval(), batch()
    assert standard_loss(net, raw, y, cifar)[0].item() == F.cross_entropy(net(cifar(raw)), y).item()


# ---- GradAlign ----


def test_a_linear_classifier_of_two_classes_is_perfectly_aligned() -> None:
    net, raw = linear_classifier(1.0, -2.0, 0.5), torch.full((4, 3), 0.5)
    y = torch.tensor([0, 1, 0, 1])
    without = fgsm_gradalign_loss(net, raw, y, 0.1, identity, lam=0)[0]
    assert fgsm_gradalign_loss(net, raw, y, 0.1, identity, lam=100)[0].item() == pytest.approx(without.item(), abs=1e-4)


@pytest.mark.parametrize(
    ("first_pixel", "start", "misalignment"),
    [
        (0.25, -0.25, 0.0),  # lands on 0: gradients (3, 4) and (3, 4)
        (0.75, 0.25, 0.0),  # lands on 1
        (0.125, -0.25, 1 - 4 / 5),  # leaves the range: gradients (3, 4) and (0, 4)
        (0.875, 0.25, 1 - 4 / 5),
    ],
)
def test_gradalign_ignores_pixels_that_the_start_moved_out_of_range_but_not_those_that_land_on_a_bound(
    first_pixel: float, start: float, misalignment: float
) -> None:
    net, raw, y = linear_classifier(3.0, 4.0), torch.tensor([[first_pixel, 0.5]]), torch.tensor([0])
    plain = fgsm_gradalign_loss(net, raw, y, 0.25, identity, lam=0)[0].item()
    aligned = fgsm_gradalign_loss(net, raw, y, 0.25, identity, lam=1, uniform_start=torch.tensor([[start, 0.0]]))[0]
    assert aligned.item() - plain == pytest.approx(misalignment, abs=1e-6)


def test_samples_without_a_gradient_do_not_count_and_none_at_all_give_zero() -> None:
    gradient = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [3.0, 0.0]])
    other = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [4.0, 0.0]])
    assert _misalignment(gradient, other).item() == 0.5  # cosines 0 and 1
    assert _misalignment(gradient[1:3], other[1:3]).item() == 0


def test_a_constant_network_has_finite_loss_and_gradients() -> None:
    net, (raw, y) = small_net(), batch()
    nn.init.zeros_(net[7].weight)
    loss = fgsm_gradalign_loss(net, raw, y, 0.1, cifar)[0]
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


def test_the_cosine_of_tiny_gradients_does_not_underflow() -> None:
    tiny = torch.tensor([[1e-18, 2e-18]])
    assert _misalignment(tiny, -tiny).item() == pytest.approx(2, abs=1e-5)


def test_gradalign_differentiates_the_second_gradient_only() -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 3)).double()
    raw, y = torch.rand(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    start = 0.1 * (2 * torch.rand(3, 4, dtype=torch.float64) - 1)

    def input_gradient(image: Tensor) -> Tensor:
        image = image.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(net(image), y), image)[0]

    def penalty(first: Tensor) -> float:
        inside = (raw + start >= 0) & (raw + start <= 1)
        second = input_gradient((raw + start).clamp(0, 1)) * inside
        return 1 - F.cosine_similarity(first, second, dim=1).mean().item()

    def gradient(lam: float) -> Tensor:
        net.zero_grad()
        fgsm_gradalign_loss(net, raw, y, 0.1, identity, lam, uniform_start=start)[0].backward()
        assert net[0].weight.grad is not None
        return net[0].weight.grad[0].clone()

    first = input_gradient(raw)
    for column in range(4):
        values = []
        for shift in (1e-6, -1e-6):
            with torch.no_grad():
                net[0].weight[0, column] += shift
            values.append(penalty(first))
            with torch.no_grad():
                net[0].weight[0, column] -= shift
        numeric = (values[0] - values[1]) / 2e-6
        assert (gradient(1.0) - gradient(0.0))[column].item() == pytest.approx(numeric, rel=1e-5, abs=1e-9)


# ---- batch norm, randomness, cost ----


@pytest.mark.parametrize(
    ("loss_of", "options", "forwards"),
    [
        (fgsm_gradalign_loss, {"lam": 0.2}, 3),
        (fgsm_gradalign_loss, {"lam": 0.0}, 2),
        (fgsm_random_start_loss, {}, 2),
    ],
)
def test_each_loss_runs_the_model_as_often_as_stated_and_updates_batch_norm_each_time(
    loss_of: Callable[..., object], options: dict[str, float], forwards: int
) -> None:
    net, (raw, y) = small_net().train(), batch()
    inputs = recorded(net)
    loss_of(net, raw, y, 0.1, cifar, **options)
    assert len(inputs) == forwards
    assert net[1].num_batches_tracked.item() == forwards


def test_the_image_has_no_leftover_gradient_and_parameters_get_none_before_backward() -> None:
    net, (raw, y) = small_net(), batch()
    fgsm_gradalign_loss(net, raw, y, 0.1, cifar)
    assert raw.grad is None
    assert not raw.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_the_drawn_start_fills_the_interval_from_minus_eps_to_eps() -> None:
    raw = torch.full((1, 10_000), 0.5)
    net = nn.Sequential(nn.Linear(10_000, 2))
    inputs = recorded(net)
    draw = torch.Generator().manual_seed(0)
    fgsm_random_start_loss(net, raw, torch.tensor([0]), 0.25, identity, generator=draw)
    start = inputs[0] - raw
    assert -0.25 <= start.min().item() < -0.249
    assert 0.249 < start.max().item() <= 0.25
    assert start.mean().item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("loss_of", [fgsm_gradalign_loss, fgsm_random_start_loss])
def test_the_same_generator_seed_gives_the_same_loss(loss_of: Callable[..., tuple[Tensor, Tensor]]) -> None:
    net, (raw, y) = small_net().eval(), batch()
    losses = [
        loss_of(net, raw, y, 0.1, cifar, generator=torch.Generator().manual_seed(seed))[0].item() for seed in (3, 3, 4)
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("loss_of", [fgsm_gradalign_loss, fgsm_random_start_loss])
def test_the_mean_over_slices_of_one_global_start_is_the_loss_of_the_whole_batch(
    loss_of: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    net, (raw, y) = small_net().eval(), batch(6)
    start = 0.1 * (2 * torch.rand(raw.shape, generator=torch.Generator().manual_seed(0)) - 1)
    whole = loss_of(net, raw, y, 0.1, cifar, uniform_start=start)[0]
    parts = [
        loss_of(net, raw[rows], y[rows], 0.1, cifar, uniform_start=start[rows])[0]
        for rows in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-5, atol=1e-6)


# ---- bad input ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": -0.1}, "eps must be finite and >= 0, got -0.1"),
        ({"eps": float("nan")}, "eps must be finite and >= 0, got nan"),
        ({"step": 0.0}, "step must be > 0"),
        ({"step": float("nan")}, "step must be > 0"),
        ({"raw": torch.full((6, 3, 8, 8), 1.5)}, r"raw must hold pixels in \[0, 1\]"),
        ({"raw": torch.full((6, 3, 8, 8), float("nan"))}, r"raw must hold pixels in \[0, 1\]"),
        ({"raw": torch.zeros(0, 3, 8, 8), "y": torch.zeros(0, dtype=torch.int64)}, "raw must be a non-empty batch"),
        ({"y": torch.zeros(5, dtype=torch.int64)}, r"y must be int64 of shape \(6,\)"),
        ({"y": torch.zeros(6)}, r"y must be int64 of shape \(6,\)"),
        ({"y": torch.tensor([0, 1, 2, 3, 4, 10])}, r"y must hold labels in 0..9, got labels in 0..10"),
        ({"y": torch.tensor([0, 1, 2, 3, 4, -1])}, r"y must hold labels in 0..9, got labels in -1..4"),
        ({"uniform_start": torch.zeros(6, 3, 8, 7)}, r"uniform_start must have raw's shape \(6, 3, 8, 8\)"),
        ({"uniform_start": torch.full((6, 3, 8, 8), 0.2)}, "uniform_start must lie in"),
        ({"uniform_start": torch.full((6, 3, 8, 8), float("nan"))}, "uniform_start must lie in"),
    ],
)
@pytest.mark.parametrize("loss_of", [fgsm_gradalign_loss, fgsm_random_start_loss])
def test_bad_input_is_refused_by_name(loss_of: Callable[..., object], changes: dict[str, object], message: str) -> None:
    raw, y = batch()
    arguments: dict[str, object] = {"raw": raw, "y": y, "eps": 0.1, "normalize": cifar} | changes
    with pytest.raises(ValueError, match=message):
        loss_of(small_net(), **arguments)


@pytest.mark.parametrize("lam", [-0.1, float("nan")])
def test_a_negative_weight_of_gradalign_is_refused(lam: float) -> None:
    raw, y = batch()
    with pytest.raises(ValueError, match="lam must be >= 0"):
        fgsm_gradalign_loss(small_net(), raw, y, 0.1, cifar, lam)
