"""Facts about the attack: the released code's values, worked examples, what it leaves alone, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from double_win_lth import Regime, pgd_linf
from double_win_lth.pgd import pgd_survivors, uniform_start
from double_win_lth.tests import nets

TIMID = {"eps": 0.1, "step_size": 0.04, "steps": 3}


def slope(x: Tensor) -> Tensor:
    """f(x) = (x1 - x2, 0)."""
    return torch.stack([x[:, 0] - x[:, 1], 0 * x[:, 0]], 1)


@pytest.mark.parametrize("tag", "abcde")
@pytest.mark.parametrize("start", [0, 1])
def test_iterates_and_losses_are_those_of_the_released_code(tag: str, start: int) -> None:
    arrays = nets.reference("pgd")
    net = nets.reference_net(arrays, "state").eval()
    eps, steps, step_size = arrays[f"cfg_{tag}"].tolist()
    x, y = arrays["x"], arrays["y"]
    assert torch.allclose(net(x), arrays["logits_clean"], atol=1e-12)
    given = arrays[f"delta0_{tag}"] if start else None
    found = pgd_linf(net, x, y, eps=eps, step_size=step_size, steps=int(steps), random_start=False, start=given)
    assert torch.allclose(found, arrays[f"xadv_{tag}{start}"], atol=1e-12, rtol=0)
    losses = nn.functional.cross_entropy(net(found), y, reduction="none")
    assert torch.allclose(losses, arrays[f"loss_{tag}{start}"], atol=1e-9)
    assert (found - x).abs().max() <= eps + 1e-15 and found.min() >= 0 and found.max() <= 1


def test_in_train_mode_every_step_moves_the_running_statistics_as_in_the_released_code() -> None:
    arrays = nets.reference("pgd")
    net = nets.reference_net(arrays, "state").train()
    steps = int(arrays["train_k"])
    eps, _, step_size = arrays["cfg_a"].tolist()
    found = pgd_linf(
        net, arrays["x"], arrays["y"], eps=eps, step_size=step_size, steps=steps, start=arrays["train_delta0"]
    )
    assert torch.allclose(found, arrays["train_xadv"], atol=1e-12, rtol=0)
    for name, value in nets.part(arrays, "train_after").items():
        assert torch.allclose(net.state_dict()[name].double(), value.double(), atol=1e-12), name
    assert net.get_buffer("bn1.num_batches_tracked") == steps and net.training


@pytest.mark.parametrize(("label", "steps", "wanted"), [(0, 3, (0.4, 0.11)), (1, 3, (0.6, 0.0)), (0, 2, (0.42, 0.09))])
def test_the_worked_attack_comes_out(label: int, steps: int, wanted: tuple[float, float]) -> None:
    x = torch.tensor([[0.5, 0.01]], dtype=torch.float64)
    options = {**TIMID, "steps": steps}
    found = pgd_linf(slope, x, torch.tensor([label]), random_start=False, **options)
    assert found[0].tolist() == pytest.approx(wanted, abs=1e-12)


def test_a_pixel_without_gradient_does_not_move_and_a_constant_model_returns_the_clipped_start() -> None:
    x, y = torch.tensor([[0.5, 0.2, 0.7], [0.3, 0.95, 0.0]]), torch.tensor([0, 1])
    found = pgd_linf(slope, x, y, random_start=False, **TIMID)
    assert torch.equal(found[:, 2], x[:, 2]) and (found[:, 0] != x[:, 0]).all()
    start = torch.full_like(x, 0.1)
    for constant in (lambda x: torch.zeros(len(x), 2), lambda x: 0 * x[:, :2]):
        assert torch.equal(pgd_linf(constant, x, y, start=start, **TIMID), (x + start).clamp(0, 1))


def test_no_radius_or_no_steps_returns_the_image_exactly() -> None:
    x, y = nets.small_batch()
    net = nets.small_net().eval()
    for options in ({**TIMID, "eps": 0.0}, {**TIMID, "steps": 0}):
        assert torch.equal(pgd_linf(net, x, y, random_start=False, **options), x)
    assert torch.equal(pgd_linf(net, x, y, eps=0.0, step_size=0.1, steps=2), x)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 0.5), st.floats(0.001, 1), st.integers(0, 4), st.integers(0, 1000), st.booleans())
def test_the_result_is_in_the_ball_and_in_the_box(eps: float, size: float, steps: int, seed: int, random: bool) -> None:
    x, y = nets.small_batch(4, seed=seed)
    x[0], x[1] = 0, 1
    draws = torch.Generator().manual_seed(seed)
    found = pgd_linf(
        nets.small_net().eval(), x, y, eps=eps, step_size=size, steps=steps, random_start=random, generator=draws
    )
    assert (found - x).abs().max() <= eps + 1e-6 and found.min() >= 0 and found.max() <= 1 and not found.requires_grad


def test_images_and_starts_that_require_gradients_give_a_detached_result() -> None:
    x, y = nets.small_batch()
    net, start = nets.small_net().eval(), torch.full_like(x, 0.05)
    plain = pgd_linf(net, x, y, start=start, **TIMID)
    attached = x.clone().requires_grad_(), start.clone().requires_grad_()
    found = pgd_linf(net, attached[0], y, start=attached[1], **TIMID)
    assert torch.equal(found, plain) and not found.requires_grad
    assert attached[0].grad is None and attached[0].requires_grad
    assert not pgd_linf(net, attached[0], y, **{**TIMID, "steps": 0}).requires_grad


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (0.25, 0.5), (-3.0, -2.0)])
def test_the_box_is_that_of_bounds(bounds: tuple[float, float]) -> None:
    low, high = bounds
    x, y = torch.tensor([[low, high], [low + 0.1, high - 0.1]]), torch.tensor([1, 1])
    options = {"eps": 0.15, "step_size": 0.04, "steps": 4, "bounds": bounds}
    # Label 1 wants x1 - x2 larger: x1 rises, x2 falls, by the radius.
    found = pgd_linf(slope, x, y, random_start=False, **options)
    assert torch.allclose(found, x + torch.tensor([0.15, -0.15]))
    # Label 0 the other way, as far as the box lets them.
    wanted = torch.tensor([[low, high], [max(low + 0.1 - 0.15, low), min(high - 0.1 + 0.15, high)]])
    assert torch.allclose(pgd_linf(slope, x, 0 * y, random_start=False, **options), wanted)
    started = pgd_linf(slope, x, y, start=torch.full_like(x, 0.15), **{**options, "steps": 0})
    assert torch.allclose(started, (x + 0.15).clamp(low, high)) and started.max() <= high
    survived = pgd_survivors(slope, x, 0 * y, random_start=False, **{**options, "eps": 0.0})
    assert torch.equal(survived, slope(x).argmax(1) == 0)
    with pytest.raises(ValueError, match=rf"x must be within \[{low}, {high}\], got values in"):
        pgd_linf(slope, x + high - low, y, **options)


def test_gradients_flags_and_mode_are_as_before() -> None:
    x, y = nets.small_batch()
    net = nets.small_net().train()
    net[0].weight.grad = torch.full_like(net[0].weight, 7.0)
    net[3].bias.requires_grad_(False)
    before = net[0].weight.detach().clone()
    pgd_linf(net, x, y, **TIMID)
    assert (net[0].weight.grad == 7).all() and net[3].weight.grad is None and torch.equal(net[0].weight, before)
    assert [p.requires_grad for p in net.parameters()].count(False) == 1 and not net[3].bias.requires_grad
    assert net.training and int(net[1].num_batches_tracked) == 3
    pgd_linf(net.eval(), x, y, **TIMID)
    assert not net.training and int(net[1].num_batches_tracked) == 3


def test_in_eval_mode_images_do_not_depend_on_one_another_in_train_mode_they_do() -> None:
    x, y = nets.small_batch()
    net, start = nets.small_net(), uniform_start(tuple(x.shape), 0.1, torch.Generator().manual_seed(0))

    def rows() -> Tensor:
        pieces = zip(x.split(1), y.split(1), start.split(1), strict=True)
        return torch.cat([pgd_linf(net, *pair, start=first, **TIMID) for *pair, first in pieces])

    net.eval()
    assert torch.allclose(pgd_linf(net, x, y, start=start, **TIMID), rows(), atol=1e-6)
    net.train()
    assert not torch.allclose(pgd_linf(net, x, y, start=start, **TIMID), rows(), atol=1e-3)


def test_the_attack_finds_errors_and_survivors_are_a_part_of_what_the_last_iterate_leaves() -> None:
    x, y = nets.small_batch(64)
    net = nets.small_net().eval()
    net[7].bias.data = -net(x).mean(0).detach()  # no class is far ahead
    y = net(x).argmax(1)
    start = uniform_start(tuple(x.shape), 0.3, torch.Generator().manual_seed(0))
    last = net(pgd_linf(net, x, y, eps=0.3, step_size=0.1, steps=6, start=start)).argmax(1) == y
    survived = pgd_survivors(net, x, y, eps=0.3, step_size=0.1, steps=6, start=start)
    assert 0 < survived.sum() <= last.sum() < 64 and (last | ~survived).all()
    # By hand: right at the start and after each number of steps.
    iterates = [pgd_linf(net, x, y, eps=0.3, step_size=0.1, steps=k, start=start) for k in range(7)]
    assert torch.equal(survived, torch.stack([net(each).argmax(1) == y for each in iterates]).all(0))
    with pytest.raises(ValueError, match="model must be in eval mode, got train mode"):
        pgd_survivors(net.train(), x, y, **TIMID)


def test_the_regimes_have_the_released_step_sizes() -> None:
    assert Regime.adv(8 / 255).step_size == pytest.approx(16 / 765) and Regime.adv(8 / 255).steps == 3
    fast = Regime.fast(4 / 255)
    assert (fast.steps, fast.step_size, fast.random_start) == (1, pytest.approx(5 / 255), True)
    x, y = nets.small_batch()
    net = nets.small_net().eval()
    assert Regime.std().perturb(net, x, y) is x
    draws = [torch.Generator().manual_seed(5) for _ in range(2)]
    ours = Regime.fast(0.1).perturb(net, x, y, draws[0])
    assert torch.equal(ours, pgd_linf(net, x, y, eps=0.1, step_size=0.125, steps=1, generator=draws[1]))


X, Y = nets.small_batch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X * 255}, r"x must be within \[0.0, 1.0\], got values in \[.*, 25"),
        ({"x": X - 0.1}, r"x must be within \[0.0, 1.0\], got values in \[-0\.09"),
        ({"x": (X * 255).byte()}, r"x must be float images \(N, ...\), N at least 1, got torch.uint8"),
        ({"x": X.where(X > 0.01, torch.nan)}, r"x must be within .* got values in \[nan"),
        ({"y": Y[:-1]}, r"y must be 12 int64 labels, got torch.int64 \(11,\)"),
        ({"y": Y.float()}, "y must be 12 int64 labels, got torch.float32"),
        ({"y": torch.full_like(Y, -1)}, r"y must be in \[0, classes\), got -1"),
        ({"y": torch.full_like(Y, 4)}, r"y must be in \[0, 4\), got 4"),
        ({"eps": -1.0}, "eps must be a finite number of at least 0, got -1.0"),
        ({"eps": float("nan")}, "eps must be a finite number of at least 0, got nan"),
        ({"steps": -1}, "steps must be an integer of at least 0, got -1"),
        ({"step_size": 0.0}, "step_size must be above 0 and finite with steps=3, got 0.0"),
        ({"start": torch.zeros(2)}, r"start must have x's shape \(12, 2, 6, 6\), got \(2,\)"),
        ({"start": torch.full_like(X, 0.2)}, r"start must be within eps=0.1, got \|start\| up to 0.2"),
        ({"bounds": (1.0, 0.0)}, r"bounds must be \(low, high\) with low < high, got \(1.0, 0.0\)"),
    ],
)
def test_bad_input_is_refused_by_name_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    net = nets.small_net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    arguments = {"x": X, "y": Y, **TIMID, **change}
    with pytest.raises(ValueError, match=message):
        pgd_linf(net, arguments.pop("x"), arguments.pop("y"), **arguments)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_loss_that_is_not_finite_is_an_error_and_changes_nothing() -> None:
    net = nets.small_net().train()
    net[0].weight.data[0] = torch.inf
    before = net[1].running_mean.clone()
    with pytest.raises(FloatingPointError, match="loss of the attack must be finite, got nan over 3 steps"):
        pgd_linf(net, X, Y, **TIMID)
    assert torch.equal(net[1].running_mean, before) and int(net[1].num_batches_tracked) == 0
    with pytest.raises(FloatingPointError, match="loss of the attack must be finite, got nan over 3 steps"):
        pgd_survivors(net.eval(), X, 0 * Y, **TIMID)  # argmax of NaN is class 0
