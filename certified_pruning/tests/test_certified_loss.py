"""Facts about certified training: the released losses, bounds that hold, and statistics of the clean batch alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certified_pruning.certified_loss import crown_ibp_loss
from certified_pruning.fast_ibp import fast_ibp_init_, fast_ibp_regulariser
from certified_pruning.tests.nets import load, odd_net, points, reference, small_conv
from certified_pruning.train_ibp import ReluBounds

ALL_CROWN = 1e-9  # eps / eps_max so small that CROWN has all the weight


def released() -> tuple[nn.Sequential, dict[str, Tensor], Tensor]:
    """Network, vectors and labels of lossfusion.npz.

    Its bounds were made in eval mode before the clean forward in train mode, whose update of the running statistics the
    state dict already has: it is taken back here.
    """
    data = reference("lossfusion")
    layers = [nn.Conv2d(1, 2, 3, 1, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 4, 2, 1), nn.ReLU()]
    net = load(nn.Sequential(*layers, nn.Flatten(), nn.Linear(27, 8), nn.ReLU(), nn.Linear(8, 4)), data)
    norm = net[1]
    with torch.no_grad():
        var, mean = torch.var_mean(net[0](data["x"]), dim=(0, 2, 3))
        norm.running_mean.copy_((norm.running_mean - 0.1 * mean) / 0.9)
        norm.running_var.copy_((norm.running_var - 0.1 * var) / 0.9)
    return net, data, torch.full((5,), int(data["label"]))


def box(x: Tensor, radius: float = 0.1) -> tuple[Tensor, Tensor]:
    return x - radius, x + radius


@pytest.fixture
def batch() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small network in train mode, five images, labels."""
    g = torch.Generator().manual_seed(0)
    return small_conv().train(), torch.rand(5, 1, 6, 5, generator=g), torch.tensor([0, 1, 2, 3, 1])


# The released values


@pytest.mark.parametrize(("eps_frac", "name"), [(1.0, "robust_ce_ibp"), (1e-12, "robust_ce_crownibp")])
def test_the_fused_loss_of_every_image_is_that_of_auto_lirpa(eps_frac: float, name: str) -> None:
    net, data, y = released()
    for i in range(5):
        image = slice(i, i + 1)
        corners = data["x_lb"][image], data["x_ub"][image]
        loss = crown_ibp_loss(net, *corners, data["x"][image], y[image], eps_frac).loss
        assert loss.item() == pytest.approx(data[name][i].item(), abs=1e-5)


def test_without_eps_the_loss_is_the_cross_entropy_of_the_clean_batch() -> None:
    net, data, y = released()
    net.train()
    result = crown_ibp_loss(net, data["x"], data["x"], data["x"], y, 0.0)
    assert result.loss.item() == pytest.approx(data["clean_ce"].mean().item(), abs=1e-6)
    assert torch.equal(result.logits, net(data["x"]))


def test_differences_of_logits_are_subtracted_as_intervals_so_that_the_label_itself_has_width() -> None:
    net, data, y = released()
    out = crown_ibp_loss(net, data["x_lb"], data["x_ub"], data["x"], y, 1.0).bounds
    label = int(data["label"])
    torch.testing.assert_close(out.out_ub - out.out_lb[:, label, None], data["exp_in_ub"], rtol=0, atol=1e-5)
    assert (data["exp_in_ub"][:, label] > 0.5).all()


def test_the_fast_ibp_regulariser_is_the_released_one() -> None:
    data = reference("lirpa_nrs")
    layers = [ReluBounds(str(i), data[f"lower{i}"], data[f"upper{i}"]) for i in (0, 1)]
    for eps_frac, name in ((0.25, "fast_ibp_reg_eps_quarter"), (1.0, "fast_ibp_reg_full")):
        value = fast_ibp_regulariser(layers, data["in_lower"], data["in_upper"], eps_frac)
        assert value.item() == pytest.approx(data[name].item(), abs=1e-5)


# Bounds


@pytest.mark.parametrize("eps_frac", [ALL_CROWN, 0.4, 1.0])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("build", [odd_net, small_conv])
def test_no_point_of_the_box_has_a_larger_cross_entropy(build: object, fused: bool, eps_frac: float) -> None:
    net = build()  # type: ignore[operator]
    shape = (2, 9, 7) if build is odd_net else (1, 6, 5)
    if build is odd_net:
        net[1] = nn.Sequential(*list(net[1])[:-1])  # training bounds know no dropout
    x, y = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3])
    corners = box(x)
    inside = points(*corners, 300).view(-1, *shape)
    worst = F.cross_entropy(net(inside), y.repeat_interleave(300), reduction="none").view(4, 300).amax(dim=1)
    images = [slice(i, i + 1) for i in range(4)]
    lower, upper = corners
    loss = [crown_ibp_loss(net, lower[i], upper[i], x[i], y[i], eps_frac, fused).loss for i in images]
    assert (torch.stack(loss) >= worst - 1e-5).all()


def test_crown_tightens_the_loss_and_separate_margins_tighten_it_further(batch: tuple) -> None:
    net, x, y = batch
    net.eval()
    crown, ibp = (crown_ibp_loss(net, *box(x), x, y, frac).loss for frac in (ALL_CROWN, 1.0))
    assert crown < ibp
    assert crown_ibp_loss(net, *box(x), x, y, 1.0, loss_fusion=False).loss < ibp


@pytest.mark.parametrize("fused", [True, False])
def test_a_box_of_radius_zero_gives_the_clean_cross_entropy(batch: tuple, fused: bool) -> None:
    net, x, y = batch
    for frac in (ALL_CROWN, 0.5, 1.0):
        result = crown_ibp_loss(net, x, x, x, y, frac, fused)
        assert result.loss.item() == pytest.approx(F.cross_entropy(result.logits, y).item(), abs=1e-5)


def test_between_crown_and_ibp_the_bounds_are_mixed_by_the_share_of_eps(batch: tuple) -> None:
    net, x, y = batch
    one = x[:1], y[:1]
    net.eval()
    crown, mixed, ibp = (
        crown_ibp_loss(net, *box(one[0]), *one, frac).loss.exp().item() for frac in (ALL_CROWN, 0.3, 1.0)
    )
    assert mixed == pytest.approx(0.7 * crown + 0.3 * ibp, rel=1e-5)


# Gradients and statistics


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_agree_with_finite_differences(batch: tuple, fused: bool) -> None:
    net, x, y = batch[0].double(), batch[1].double(), batch[2]

    def loss() -> Tensor:
        return crown_ibp_loss(net, *box(x, 0.02), x, y, 0.5, fused).loss

    loss().backward()
    for name, parameter in net.named_parameters():
        if name.startswith(("0.bias", "3.bias")):
            continue  # batch norm takes the bias of a convolution away again
        index = int(parameter.grad.abs().argmax())
        with torch.no_grad():
            values = []
            for step in (1e-6, -2e-6):
                parameter.view(-1)[index] += step
                values.append(loss().item())
            parameter.view(-1)[index] += 1e-6
        slope = (values[0] - values[1]) / 2e-6
        assert parameter.grad.view(-1)[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("frac", [1e-8, 1e-3])
def test_the_first_steps_of_a_ramp_have_ordinary_gradients(batch: tuple, frac: float) -> None:
    net, x, y = batch
    gradients = []
    for share, radius in ((0.0, 0.0), (frac, 0.1 * frac)):
        net.zero_grad()
        crown_ibp_loss(net, *box(x, radius), x, y, share).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_running_statistics_come_from_the_clean_batch_alone(batch: tuple) -> None:
    net, x, y = batch
    plain = copy.deepcopy(net)
    plain(x)
    for radius, frac in ((0.0, 0.0), (0.1, 0.5), (0.3, 1.0)):
        trained = copy.deepcopy(net)
        crown_ibp_loss(trained, *box(x, radius), x, y, frac).loss.backward()
        for ours, theirs in zip(trained.buffers(), plain.buffers(), strict=True):
            assert torch.equal(ours, theirs)


def test_the_bounds_use_the_statistics_of_the_clean_batch_with_gradient(batch: tuple) -> None:
    net, x, y = batch
    moved = x.clone().requires_grad_()
    crown_ibp_loss(net, *box(x), moved, y, 1.0).loss.backward()  # x enters the loss through the statistics alone
    assert moved.grad.abs().sum() > 0


# Fast IBP


def test_fast_ibp_draws_every_weight_but_the_last_with_deviation_sqrt_two_pi_over_fan_in() -> None:
    net = nn.Sequential(nn.Conv2d(4, 64, 5), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64, 200), nn.Linear(200, 9))
    last, scale = net[4].weight.clone(), net[1].weight.clone()
    fast_ibp_init_(net, torch.Generator().manual_seed(0))
    for weight, fan_in in ((net[0].weight, 100), (net[3].weight, 64)):
        assert weight.std().item() * fan_in == pytest.approx(2.5066, rel=0.03)
    assert torch.equal(net[4].weight, last) and torch.equal(net[1].weight, scale)


def test_the_fast_ibp_regulariser_has_finite_gradients_where_nothing_is_inactive() -> None:
    lower = torch.rand(2, 3, requires_grad=True)
    layer = ReluBounds("a", lower, lower + 0.5)
    value = fast_ibp_regulariser([layer], torch.zeros(2, 3), torch.full((2, 3), 0.01), 0.5)
    value.backward()
    assert value.item() == pytest.approx(0.25 * (0.5 - 0.01 / 0.5) / 0.5) and lower.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps_frac": 1.5}, r"eps_frac must be in \[0, 1\], got 1.5"),
        ({"eps_frac": float("nan")}, r"eps_frac must be in \[0, 1\], got nan"),
        ({"y": torch.tensor([0, 1, 2, 3, 4])}, r"y must hold labels in 0..3, got labels in 0..4"),
        ({"y": torch.zeros(5)}, r"y must be int64 of shape \(5,\)"),
        ({"x_lb": torch.full((5, 1, 6, 5), 9.0)}, "x_lb must be <= x_ub"),
    ],
)
def test_wrong_arguments_are_refused_by_name(batch: tuple, change: dict, message: str) -> None:
    net, x, y = batch
    given = {"x_lb": x - 0.1, "x_ub": x + 0.1, "x": x, "y": y, "eps_frac": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        crown_ibp_loss(net, **given)
