"""Facts about training-side IBP and the NRS loss, against the released code's values and by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from certified_pruning.errors import UnsupportedLayerError
from certified_pruning.models import cifar_model_deep, cnn_a, cnn_s
from certified_pruning.nrs import nrs_from_bounds, nrs_loss, nrs_term
from certified_pruning.train_ibp import ReluBounds, clean_forward, ibp, pixel_box, relu_bounds

REFERENCE = Path(__file__).parent / "reference"
BN_OF_RELU = {"2": "1", "5": "4", "8": "7", "11": "10", "14": "13"}


def load(name: str) -> dict[str, Tensor]:
    with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


def normalizer(mean: Tensor, std: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda raw: (raw - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def reference_net(reference: dict[str, Tensor]) -> nn.Sequential:
    channels, size = reference["raw"].shape[1:3]
    widths = [reference[f"sd.{i}.weight"].shape[0] for i in (0, 3, 6, 9, 12)]
    model = cifar_model_deep(channels, size, 10, widths)
    missing = model.load_state_dict({k[3:]: v for k, v in reference.items() if k.startswith("sd.")}, strict=False)
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)
    return model.eval()


def random_net() -> Any:  # as Any, mypy does not ask which of its layers have weights
    """Non-square input (2, 6, 9), strides, padding, negative and zero batch-norm scales."""
    torch.manual_seed(0)
    net: Any = nn.Sequential(
        nn.Conv2d(2, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Sequential(nn.AvgPool2d(2, 1), nn.Conv2d(3, 4, 2)),
        nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip
    with torch.no_grad():
        for bn in (net[1], net[4]):
            bn.weight.copy_(torch.tensor([1.3, -0.7, 0.0, -2.0])[: len(bn.weight)])
            bn.bias.normal_()
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
    return net.eval()


# ---- boxes ----


@pytest.mark.parametrize(
    ("data", "mean", "std"),
    [
        ("cifar10", [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        ("cifar100", [0.5071, 0.4866, 0.4409], [0.2673, 0.2564, 0.2762]),
        ("svhn", [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
        ("FashionMNIST", [0.286], [0.315]),
    ],
)
def test_the_pixel_box_equals_the_released_one(data: str, mean: list[float], std: list[float]) -> None:
    reference = load("transform")
    mean_, std_ = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    raw = (reference[f"{data}.x"] * std_ + mean_).clamp(0, 1)
    lower, upper = pixel_box(raw, 0.1, normalizer(mean_, std_))
    torch.testing.assert_close(lower, reference[f"{data}.lb_eps0.1"], rtol=0, atol=2e-6)
    torch.testing.assert_close(upper, reference[f"{data}.ub_eps0.1"], rtol=0, atol=2e-6)


def test_the_pixel_box_never_leaves_the_range_of_pixels() -> None:
    lower, upper = pixel_box(torch.tensor([[0.0, 0.02, 0.98, 1.0]]), 0.1, lambda raw: raw)
    torch.testing.assert_close(lower, torch.tensor([[0.0, 0.0, 0.88, 0.9]]))
    torch.testing.assert_close(upper, torch.tensor([[0.1, 0.12, 1.0, 1.0]]))


@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
def test_a_radius_that_is_negative_or_not_finite_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be finite and >= 0"):
        pixel_box(torch.zeros(1, 1, 2, 2), eps, lambda raw: raw)


@pytest.mark.parametrize("pixel", [-0.1, 1.1, float("nan"), float("inf")])
def test_pixels_outside_0_to_1_are_refused(pixel: float) -> None:
    with pytest.raises(ValueError, match=r"raw must hold pixels in \[0, 1\]"):
        pixel_box(torch.tensor([[0.5, pixel]]), 0.1, lambda raw: raw)


# ---- interval bounds ----


@pytest.mark.parametrize("colour", ["rgb", "grey"])
def test_ibp_logit_bounds_equal_the_released_ones(colour: str) -> None:
    reference = load(f"ibp_nrs_{colour}")
    bounds = ibp(reference_net(reference), reference["x_lb"], reference["x_ub"], bn_eps=1e-8)
    torch.testing.assert_close(bounds.out_lb, reference["out_lb"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bounds.out_ub, reference["out_ub"], rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), radius=st.floats(0, 0.5))
def test_every_point_of_the_box_has_relu_inputs_and_outputs_within_the_bounds(seed: int, radius: float) -> None:
    net, draw = random_net(), torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, 6, 9, generator=draw)
    points = x + radius * (2 * torch.rand(50, 2, 6, 9, generator=draw) - 1)
    bounds = ibp(net, x - radius, x + radius)
    seen: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda _, i, o: seen.append(i[0])) for m in net.modules() if type(m) is nn.ReLU]
    with torch.no_grad():
        out = net(points)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(bounds.relus) == 3
    intervals = [(relu.lower, relu.upper) for relu in bounds.relus] + [(bounds.out_lb, bounds.out_ub)]
    for (lower, upper), values in zip(intervals, [*seen, out], strict=True):
        assert bool((values >= lower - 1e-5).all() and (values <= upper + 1e-5).all())


def test_a_box_of_radius_0_has_bounds_equal_to_the_forward_pass() -> None:
    net, x = random_net(), torch.randn(3, 2, 6, 9)
    bounds = ibp(net, x, x)
    torch.testing.assert_close(bounds.out_lb, net(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(bounds.out_lb, bounds.out_ub)


def test_one_affine_layer_has_exact_bounds() -> None:
    net = nn.Linear(2, 1)
    net.load_state_dict({"weight": torch.tensor([[2.0, -3.0]]), "bias": torch.tensor([1.0])})
    bounds = ibp(net, torch.tensor([[-1.0, -1.0]]), torch.tensor([[1.0, 2.0]]))
    assert (bounds.out_lb.item(), bounds.out_ub.item()) == (-7.0, 6.0)


def test_each_relu_knows_the_batch_norm_directly_before_it() -> None:
    relus = relu_bounds(random_net(), torch.zeros(1, 2, 6, 9), torch.ones(1, 2, 6, 9))
    assert [(relu.name, relu.bn) for relu in relus] == [("2", "1"), ("6", "4"), ("9", None)]
    assert [relu.bn for relu in relu_bounds(cnn_a(1, 8, 2), torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8))] == [
        None
    ] * 3


def test_batch_norm_uses_running_statistics_even_in_train_mode_and_leaves_them_alone() -> None:
    net, x = random_net(), torch.rand(2, 2, 6, 9)
    in_eval = ibp(net, x - 0.1, x + 0.1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    in_train = ibp(net.train(), x - 0.1, x + 0.1)
    assert torch.equal(in_eval.out_lb, in_train.out_lb)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_bounds_with_the_statistics_of_the_clean_batch_meet_the_train_mode_logits_at_radius_0() -> None:
    net, x = random_net().train(), torch.randn(5, 2, 6, 9)
    logits, stats = clean_forward(net, x)
    torch.testing.assert_close(ibp(net, x, x, batch_stats=stats).out_lb, logits, rtol=1e-5, atol=1e-5)


def test_the_clean_forward_updates_running_statistics_as_one_ordinary_forward() -> None:
    net, other, x = random_net().train(), random_net().train(), torch.randn(5, 2, 6, 9)
    torch.testing.assert_close(clean_forward(net, x)[0], other(x), rtol=0, atol=0)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())


def test_the_statistics_of_a_clean_forward_carry_gradient() -> None:
    net, x = random_net().train(), torch.randn(5, 2, 6, 9)
    mean, variance = clean_forward(net, x)[1]["1"]
    assert mean.requires_grad
    assert variance.requires_grad


def test_in_eval_mode_the_clean_forward_reports_the_running_statistics() -> None:
    net = random_net()
    stats = clean_forward(net, torch.randn(5, 2, 6, 9))[1]
    assert torch.equal(stats["4"][0], net[4].running_mean)
    assert torch.equal(stats["4"][1], net[4].running_var)


class Residual(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Reversed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Residual(), "the model is a Residual"),
        (nn.Sequential(nn.ReLU(), nn.Sequential(Residual())), "layer '1.0' is a Residual"),
        (nn.Sequential(nn.Sigmoid(), nn.ReLU()), "layer '0' is a Sigmoid"),
        (nn.Sequential(nn.ReLU(), nn.Sigmoid()), "layer '1' is a Sigmoid"),
        (Reversed(nn.ReLU()), "the model is a Reversed"),
        (
            nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), nn.ReLU()),
            "padding_mode is 'circular'",
        ),
        (nn.Sequential(nn.Flatten(0), nn.ReLU()), "layer '0' is a Flatten"),
    ],
)
def test_a_network_that_is_no_chain_of_known_layers_is_refused(model: nn.Module, message: str) -> None:
    box = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    with pytest.raises(UnsupportedLayerError, match=message):
        nrs_loss(model, *box)


@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        ([[0.0, 1.0]], [[1.0, 0.5]], "x_lb > x_ub in 1 places"),
        ([[0.0, float("nan")]], [[1.0, 1.0]], "finite"),
        ([[0.0, -float("inf")]], [[1.0, 1.0]], "finite"),
        ([[0.0, 1.0]], [[1.0]], "same shape"),
    ],
)
def test_an_impossible_box_is_refused(lower: list[list[float]], upper: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nrs_loss(nn.Sequential(nn.Linear(2, 1), nn.ReLU()), torch.tensor(lower), torch.tensor(upper))


def test_a_batch_norm_without_statistics_is_named() -> None:
    net = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.ReLU())
    box = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match="batch norm '0' has no running statistics"):
        nrs_loss(net, *box)
    with pytest.raises(ValueError, match="batch_stats must name every batch norm of the model; '0' is missing"):
        nrs_loss(net, *box, batch_stats={})


# ---- the NRS term ----


@pytest.mark.parametrize(
    ("lower", "upper", "gamma", "term"),
    [(-1, 1, 1, 0.0), (-1, 2, 1, 0.76159), (1, 2, 1, -0.99505), (-1, 2, 2, -0.46212)],
)
def test_the_nrs_term_has_its_worked_values(lower: float, upper: float, gamma: float, term: float) -> None:
    bounds = torch.tensor([[[[float(lower)]]]]), torch.tensor([[[[float(upper)]]]])
    assert nrs_term(*bounds, torch.tensor([float(gamma)])).item() == pytest.approx(term, abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_rescaling_a_channel_by_its_batch_norm_leaves_nrs_alone_but_not_rs(scale: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    lower, upper = -torch.rand(2, 3, 4, 4, generator=draw), torch.rand(2, 3, 4, 4, generator=draw)
    gamma = torch.rand(3, generator=draw) + 0.5
    nrs = nrs_term(lower, upper, gamma)
    torch.testing.assert_close(nrs_term(scale * lower, scale * upper, scale * gamma), nrs, rtol=1e-4, atol=1e-5)
    if not 0.9 < scale < 1.1:
        rs = nrs_term(lower, upper, gamma, gamma_pow=0)
        assert not torch.allclose(nrs_term(scale * lower, scale * upper, scale * gamma, gamma_pow=0), rs, atol=1e-3)


def test_a_pruned_channel_has_a_finite_term_and_gradient() -> None:
    net: Any = cnn_s(1, 8, 3)
    with torch.no_grad():
        net[1].weight[2], net[1].bias[2] = 0, 0
        net[4].weight[1], net[4].bias[1] = 0, 1  # never pruned like this, but division by zero all the same
    loss, stats = nrs_loss(net, torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8))
    loss.backward()
    assert stats.per_channel["1"][2].item() == pytest.approx(-np.tanh(1), abs=1e-6)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())


# ---- the NRS loss ----


@pytest.mark.parametrize("colour", ["rgb", "grey"])
@pytest.mark.parametrize(("gamma_pow", "key"), [(2, "nrs_loss"), (0, "nrs_loss_pow0")])
def test_the_nrs_and_rs_losses_equal_the_released_ones(colour: str, gamma_pow: int, key: str) -> None:
    reference = load(f"ibp_nrs_{colour}")
    net = reference_net(reference)
    loss, stats = nrs_loss(net, reference["x_lb"], reference["x_ub"], gamma_pow, bn_eps=1e-8)
    assert loss.item() == pytest.approx(reference[key].item(), abs=1e-5)
    assert stats.unstable_ratio.item() == pytest.approx(reference["unstable_ratio"].item(), abs=1e-6)


@pytest.mark.parametrize("colour", ["rgb", "grey"])
def test_the_statistics_of_layers_and_channels_equal_the_released_ones(colour: str) -> None:
    reference = load(f"ibp_nrs_{colour}")
    net = reference_net(reference)
    stats = nrs_loss(net, reference["x_lb"], reference["x_ub"], bn_eps=1e-8)[1]
    unstable = torch.stack([layer.unstable_ratio for layer in stats.per_layer.values()]).float()
    torch.testing.assert_close(unstable, reference["layer_unstable"], rtol=0, atol=1e-6)
    assert list(stats.per_layer) == ["2", "5", "8", "11", "14", "17"]
    assert list(stats.per_channel) == ["1", "4", "7", "10", "13"]
    for bn, means in stats.per_channel.items():
        torch.testing.assert_close(means, reference[f"chan_nrs.{bn}"], rtol=0, atol=1e-5)
    rs = nrs_loss(net, reference["x_lb"], reference["x_ub"], gamma_pow=0, bn_eps=1e-8)[1]
    layer_rs = torch.stack([layer.nrs for layer in rs.per_layer.values()])
    torch.testing.assert_close(layer_rs, reference["layer_rs"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("colour", ["rgb", "grey"])
def test_the_gradient_of_the_nrs_loss_equals_the_released_one(colour: str) -> None:
    reference = load(f"ibp_nrs_{colour}")
    net = reference_net(reference)
    nrs_loss(net, reference["x_lb"], reference["x_ub"], bn_eps=1e-8)[0].backward()
    compared = 0
    for name, parameter in net.named_parameters():
        if f"gsum.{name}" in reference:
            assert parameter.grad is not None
            total, absolute = parameter.grad.double().sum().item(), parameter.grad.double().abs().sum().item()
            scale = max(absolute, 1e-6)  # a sum of both signs is only as exact as its terms
            assert abs(total - reference[f"gsum.{name}"].item()) <= 1e-3 * scale
            assert absolute == pytest.approx(reference[f"gabs.{name}"].item(), rel=1e-3, abs=1e-6)
            compared += 1
    assert compared == 11


def lirpa_layers(reference: dict[str, Tensor]) -> list[ReluBounds]:
    return [
        ReluBounds(
            f"relu{i}",
            reference[f"lower{i}"].clone().requires_grad_(),
            reference[f"upper{i}"].clone().requires_grad_(),
            f"bn{i}",
            reference[f"gamma{i}"].clone().requires_grad_(),
        )
        for i in range(2)
    ]


def test_the_channel_reduction_and_its_gradient_equal_the_released_ones() -> None:
    reference = load("lirpa_nrs")
    layers = lirpa_layers(reference)
    loss, stats = nrs_from_bounds(layers, reduction="channel")
    loss.backward()
    assert loss.item() == pytest.approx(reference["nrs_loss"].item(), abs=1e-5)
    for i, layer in enumerate(layers):
        torch.testing.assert_close(stats.per_channel[f"bn{i}"], reference[f"chan_nrs{i}"], rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.lower.grad, reference[f"grad_lower{i}"], rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.upper.grad, reference[f"grad_upper{i}"], rtol=0, atol=1e-6)
        assert layer.gamma is not None
        assert layer.gamma.grad is None


def test_the_unstable_ratio_weighs_neurons_where_the_released_certified_path_weighs_channels() -> None:
    reference = load("lirpa_nrs")
    layers = lirpa_layers(reference)
    stats = nrs_from_bounds(layers, reduction="channel")[1]
    per_layer = torch.stack([layer.unstable_ratio for layer in stats.per_layer.values()]).float()
    torch.testing.assert_close(per_layer, reference["stat_layer"], rtol=0, atol=1e-6)
    per_neuron = reference["stat_neuron_unstable"].mean().item()
    assert stats.unstable_ratio.item() == pytest.approx(per_neuron, abs=1e-6)
    channels = torch.tensor([float(layer.lower.shape[1]) for layer in layers])
    released = (per_layer * channels).sum() / channels.sum()
    assert released.item() == pytest.approx(reference["stat_unstable_ratio"].item(), abs=1e-6)


def test_the_channel_reduction_weighs_channels_and_not_neurons() -> None:
    wide = ReluBounds("a", -torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4), "bn_a", torch.ones(1))  # terms 0
    thin = ReluBounds("b", torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0), "bn_b", torch.ones(1))  # -tanh(3)
    assert nrs_from_bounds([wide, thin], reduction="channel")[0].item() == pytest.approx(-np.tanh(3) / 2, abs=1e-6)
    assert nrs_from_bounds([wide, thin], reduction="neuron")[0].item() == pytest.approx(-np.tanh(3) / 17, abs=1e-6)


def test_fully_connected_relus_count_for_neurons_and_not_for_channels() -> None:
    conv = ReluBounds("a", -torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), "bn", torch.ones(1))
    linear = ReluBounds("b", torch.ones(1, 1), torch.full((1, 1), 2.0))
    assert nrs_from_bounds([conv, linear], reduction="channel")[0].item() == pytest.approx(0, abs=1e-6)
    assert nrs_from_bounds([conv, linear], reduction="neuron")[0].item() == pytest.approx(-np.tanh(3) / 2, abs=1e-6)


def test_the_scale_gets_gradient_through_the_bounds_and_not_through_the_denominator() -> None:
    net = random_net().double()
    with torch.no_grad():
        net[4].weight.copy_(torch.tensor([1.3, -0.7, 0.4, -2.0]))  # no kink of |gamma| at 0
    box = torch.zeros(2, 2, 6, 9, dtype=torch.float64), torch.rand(2, 2, 6, 9, dtype=torch.float64)
    nrs_loss(net, *box)[0].backward()
    denominators = {relu.name: relu.gamma.detach().clone() for relu in relu_bounds(net, *box) if relu.gamma is not None}

    def loss_with_fixed_denominator() -> float:
        relus = relu_bounds(net, *box)
        fixed = [ReluBounds(r.name, r.lower, r.upper, r.bn, denominators.get(r.name)) for r in relus]
        return nrs_from_bounds(fixed)[0].item()

    for channel in range(4):
        values = []
        for shift in (1e-6, -1e-6):
            with torch.no_grad():
                net[4].weight[channel] += shift
                values.append(loss_with_fixed_denominator())
                net[4].weight[channel] -= shift
        numeric = (values[0] - values[1]) / 2e-6
        assert net[4].weight.grad[channel].item() == pytest.approx(numeric, rel=1e-4, abs=1e-9)


def test_nothing_is_unstable_in_a_box_of_radius_0() -> None:
    x = torch.randn(3, 2, 6, 9)
    assert nrs_loss(random_net(), x, x)[1].unstable_ratio.item() == 0


def test_bounds_within_1e_5_of_zero_count_as_stable() -> None:
    lower, upper = torch.tensor([[-1e-5, -1.0, -1.0, -2e-5]]), torch.tensor([[1.0, 1e-5, 1.0, 2e-5]])
    assert nrs_from_bounds([ReluBounds("a", lower, upper)])[1].unstable_ratio.item() == 0.5


def test_the_loss_of_a_batch_is_the_mean_of_the_losses_of_its_images() -> None:
    net, x = random_net(), torch.randn(4, 2, 6, 9)
    for reduction in ("neuron", "channel"):
        whole = nrs_loss(net, x - 0.1, x + 0.1, reduction=reduction)[0]
        single = [nrs_loss(net, one - 0.1, one + 0.1, reduction=reduction)[0] for one in x.split(1)]
        torch.testing.assert_close(whole, torch.stack(single).mean(), rtol=0, atol=1e-6)


def test_a_forward_in_train_mode_between_loss_and_backward_changes_nothing() -> None:
    x = torch.randn(4, 2, 6, 9)
    gradients = []
    for forward_between in (False, True):
        net = random_net().train()
        loss = nrs_loss(net, x - 0.1, x + 0.1)[0]
        if forward_between:
            net(x)
        loss.backward()
        gradients.append(net[1].weight.grad)
    assert torch.equal(*gradients)


def test_the_options_are_checked_by_name() -> None:
    net, box = random_net(), (torch.zeros(1, 2, 6, 9), torch.ones(1, 2, 6, 9))
    with pytest.raises(ValueError, match=r"reduction must be one of \('neuron', 'channel'\), got 'layer'"):
        nrs_loss(net, *box, reduction="layer")  # type: ignore[arg-type]
    for power in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="gamma_pow must be >= 0"):
            nrs_loss(net, *box, gamma_pow=power)


def test_a_loss_over_no_relu_is_refused() -> None:
    box = torch.zeros(1, 4), torch.ones(1, 4)
    with pytest.raises(ValueError, match="at least one ReLU"):
        nrs_loss(nn.Linear(4, 2), *box)
    with pytest.raises(ValueError, match="at least one image"):
        nrs_loss(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.zeros(0, 4), torch.ones(0, 4))
    with pytest.raises(ValueError, match="batch norm directly before a ReLU"):
        nrs_loss(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), *box, reduction="channel")
