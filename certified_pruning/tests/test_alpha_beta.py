"""alpha- and beta-CROWN: closed-form gradients, reference optima, never above the exact minimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from certified_pruning import rows
from certified_pruning.alpha_beta import gradient, optimize_alpha_beta
from certified_pruning.chain import ChainNet
from certified_pruning.crown import crown_intermediate, crown_lower
from certified_pruning.ibp import input_box, margin_spec
from certified_pruning.rows import Relaxation, RowBatch, Splits, join
from certified_pruning.tests.nets import BOUNDS, bounds_net, images, mlp, odd_net, reference

torch.set_num_threads(1)


def load(name: str) -> tuple[dict[str, Tensor], ChainNet, list[tuple[Tensor, Tensor]]]:
    """Data, chain, and the reference's own intermediate bounds."""
    data = reference(name)
    net = ChainNet.from_module(bounds_net(name, data), tuple(data["x"].shape[1:]))
    pre = [(data[f"pre_crown_lb{i}"].flatten(1), data[f"pre_crown_ub{i}"].flatten(1)) for i in range(len(net.sizes))]
    return data, net, pre


@pytest.mark.parametrize("name", BOUNDS)
def test_alpha_bounds_reach_the_reference_and_stay_below_the_triangle_lp(name: str) -> None:
    data, net, pre = load(name)
    result = optimize_alpha_beta(net, data["spec"], data["x_lb"], data["x_ub"], pre, steps=100)
    assert bool((result.lb >= data["margin_alpha100_fixedinter"] - 2e-3).all())
    assert bool((result.lb <= data["margin_lp_triangle_f64"] + 1e-4).all())
    assert bool((result.lb <= data["margin_exact_f64"] + 1e-4).all())


def test_alpha_moves_off_its_corners_and_improves_on_crown() -> None:
    """A clamp inside an autograd graph leaves alpha where it starts; this is how that shows (spec f, T2)."""
    data, net, pre = load("bounds_fc")
    box = data["x_lb"], data["x_ub"]
    result = optimize_alpha_beta(net, data["spec"], *box, pre, steps=20)
    gain = result.lb - crown_lower(net, data["spec"], *box, pre)
    unstable = torch.cat([(lower < 0) & (upper > 0) for lower, upper in pre], 1).repeat_interleave(3, 0)
    some = unstable.any(1).view_as(gain)
    assert bool((gain >= 0).all())
    assert (gain[some] > 1e-5).double().mean() >= 0.5
    inner = (result.alpha > 0.01) & (result.alpha < 0.99)
    assert inner[unstable].any()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_closed_form_gradients_equal_autograd(seed: int) -> None:
    shape = (2, 9, 7)
    net = ChainNet.from_module(odd_net(seed), shape, torch.float64)
    g = torch.Generator().manual_seed(seed)
    x_lb, x_ub = input_box(images(shape, 2, seed).double(), 0.1)
    lower, upper = join(crown_intermediate(net, x_lb, x_ub), x_lb)
    image = torch.tensor([0, 0, 1, 1])
    unstable = [((lower < 0) & (upper > 0))[i].nonzero().squeeze(1) for i in image]
    neuron = torch.stack([u[torch.randperm(len(u), generator=g)[:4]] for u in unstable])
    sign = (torch.randint(0, 2, (4, 4), generator=g) * 2 - 1).double()
    sign[0, 2:] = 0  # padding
    C = torch.randn(4, 4, generator=g, dtype=torch.float64)
    box = x_lb.flatten(1), x_ub.flatten(1)
    batch = RowBatch.make(net, C, *box, Relaxation.of(lower, upper), image, Splits(neuron, sign))
    free = batch.relaxation.unstable
    alpha = torch.rand(4, net.n_neurons, generator=g, dtype=torch.float64)
    beta = torch.rand(4, 4, generator=g, dtype=torch.float64)
    alpha.requires_grad_(), beta.requires_grad_()
    expected = torch.autograd.grad(batch.bound(alpha, beta).sum(), [alpha, beta])
    with torch.no_grad():
        b = batch.backward(alpha, beta)
        lb = batch.concretize(b)
        ours = gradient(batch, b, batch.split_positions(), beta)
    # The net with its ReLUs replaced by lines takes the value of the bound at the minimiser.
    assert torch.allclose(ours[0], lb, atol=1e-12)
    assert torch.allclose(ours[1][free], expected[0][free], atol=1e-12)
    assert expected[0][free].abs().max() > 1e-5
    assert bool((expected[0][~free] == 0).all())  # alpha of a stable neuron has no effect
    assert ours[2] is not None
    assert torch.allclose(ours[2], expected[1], atol=1e-12)
    assert bool((expected[1][sign != 0].abs() > 1e-6).all())


def test_beta_bounds_approach_the_split_lp_and_never_pass_it() -> None:
    close, infeasible = [], []
    for name in BOUNDS:
        data, net, pre = load(name)
        cases, lp = data["split_cases"], data["split_lp_f64"]
        image = cases[:, 0]
        splits = Splits(cases[:, 2:7], cases[:, 7:12])
        C = data["spec"][image, cases[:, 1]]
        result = optimize_alpha_beta(
            net, C, data["x_lb"], data["x_ub"], pre, splits, steps=600, lr_beta=0.2, decay=0.995, image=image
        )
        feasible = lp.isfinite()
        assert bool((result.lb <= lp + 1e-4)[feasible].all())
        close.append((result.lb >= lp - 1e-2)[feasible])
        infeasible.append(result.lb[~feasible])
    assert torch.cat(close).double().mean() >= 0.9
    assert bool((torch.cat(infeasible) > 0).all())


def split_net() -> tuple[ChainNet, Tensor]:
    """Margin 2 - relu(x1 + 2); the second neuron x1 + x2 does not count in it."""
    net = mlp([2, 2, 2])
    net[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    net[0].bias.data.copy_(torch.tensor([2.0, 0.0]))
    net[2].weight.data.copy_(torch.tensor([[-1.0, 0.0], [0.0, 0.0]]))
    net[2].bias.data.copy_(torch.tensor([2.0, 0.0]))
    return ChainNet.from_module(net, (2,)), torch.tensor([[[1.0, -1.0]]])


def test_beta_recovers_what_the_split_implies_on_the_worked_net() -> None:
    net, C = split_net()
    lb, ub = torch.tensor([[-1.0, 0.5]]), torch.tensor([[1.0, 1.0]])
    pre = crown_intermediate(net, lb, ub)
    splits = Splits(torch.tensor([[1]]), torch.tensor([[-1]]))
    assert crown_lower(net, C, lb, ub, pre, splits).item() == pytest.approx(-1.0)
    assert crown_lower(net, C, lb, ub, pre, splits, beta=torch.ones(1, 1)).item() == pytest.approx(0.5)
    result = optimize_alpha_beta(net, C, lb, ub, pre, splits, steps=100)
    assert result.lb.item() == pytest.approx(0.5, abs=1e-3)
    assert result.beta is not None and result.beta.item() == pytest.approx(1.0, abs=1e-2)


def test_an_infeasible_split_passes_any_threshold() -> None:
    net, C = split_net()
    lb, ub = torch.tensor([[-1.0, 1.5]]), torch.tensor([[1.0, 2.0]])
    # Bounds from elsewhere that leave the neuron unstable, as root bounds do deep in the tree.
    pre = [(torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, 3.0]]))]
    splits = Splits(torch.tensor([[1]]), torch.tensor([[-1]]))
    bounds = [
        optimize_alpha_beta(net, C, lb, ub, pre, splits, steps=n, lr_beta=100.0, decay=1.0).lb.item()
        for n in (0, 10, 200)
    ]
    assert bounds[0] < bounds[1] < bounds[2] and bounds[2] > 100


def test_more_steps_never_lower_the_bound_and_steps_zero_is_crown() -> None:
    data, net, pre = load("bounds_conv")
    box = data["x_lb"], data["x_ub"]
    previous = crown_lower(net, data["spec"], *box, pre)
    for steps in (0, 1, 5, 30):
        lb = optimize_alpha_beta(net, data["spec"], *box, pre, steps=steps).lb
        assert bool((lb >= previous - 1e-6).all())
        if steps == 0:
            assert torch.equal(lb, previous)
        previous = lb


def test_returned_alpha_and_beta_reproduce_the_returned_bound() -> None:
    data, net, pre = load("bounds_conv")
    cases, image = data["split_cases"], data["split_cases"][:, 0]
    splits, C = Splits(cases[:, 2:7], cases[:, 7:12]), data["spec"][image, cases[:, 1]]
    box = data["x_lb"], data["x_ub"]
    r = optimize_alpha_beta(net, C, *box, pre, splits, steps=15, image=image)
    again = crown_lower(net, C, *box, pre, splits, r.alpha, r.beta, image=image)
    assert torch.allclose(again, r.lb, atol=1e-5)


def test_rows_that_leave_early_do_not_change_the_others() -> None:
    data, net, pre = load("bounds_conv3")
    box = data["x_lb"], data["x_ub"]
    full = optimize_alpha_beta(net, data["spec"], *box, pre, steps=20)
    threshold = float(full.lb.median())
    early = optimize_alpha_beta(net, data["spec"], *box, pre, steps=20, stop_above=threshold)
    below = full.lb <= threshold
    assert below.any() and not below.all()
    assert torch.allclose(early.lb[below], full.lb[below], atol=1e-5)
    assert bool((early.lb[~below] > threshold).all())


def test_rows_worked_on_a_few_at_a_time_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    data, net, pre = load("bounds_conv")
    cases, image = data["split_cases"], data["split_cases"][:, 0]
    arguments = net, data["spec"][image, cases[:, 1]], data["x_lb"], data["x_ub"], pre
    splits = Splits(cases[:, 2:7], cases[:, 7:12])
    whole = optimize_alpha_beta(*arguments, splits, steps=10, image=image)
    monkeypatch.setattr(rows, "CACHED", 0)
    assert len(cases) > rows.rows_at_once(net) == 16
    parts = optimize_alpha_beta(*arguments, splits, steps=10, image=image)
    assert torch.allclose(parts.lb, whole.lb, atol=1e-5) and torch.allclose(parts.alpha, whole.alpha, atol=1e-3)
    assert parts.beta is not None and whole.beta is not None
    assert torch.allclose(parts.beta, whole.beta, atol=1e-3)
    assert torch.allclose(parts.relu_coef, whole.relu_coef, atol=1e-3)
    assert parts.x_star.shape == whole.x_star.shape


def test_is_below_chooses_an_end_of_lerp_exactly() -> None:
    t = torch.tensor([-2.0, -1e-38, -0.0, 0.0, 1e-38, 3.0])
    a, b = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.lerp(a, b, rows.is_below(t, 0.0)), torch.where(t < 0, b, a))
    limit = torch.tensor([0.0, float("inf")]).repeat(3)
    assert torch.equal(torch.lerp(a, b, rows.is_below(t, limit)), torch.where(t < limit, b, a))


def test_x_star_is_a_corner_that_minimises_the_last_linear_bound() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    net = ChainNet.from_module(model, (4,))
    lb, ub = torch.zeros(1, 4), torch.ones(1, 4)
    C, _ = margin_spec(torch.tensor([0]), 3)
    r = optimize_alpha_beta(net, C, lb, ub, [], steps=0)
    margins = (C[0] * model(r.x_star)).sum(1)  # no ReLU: the bound is exact and taken at x*
    assert torch.allclose(margins, r.lb[0], atol=1e-6)


def test_negative_steps_are_refused() -> None:
    data, net, pre = load("bounds_fc")
    with pytest.raises(ValueError, match="steps must be >= 0, got -1"):
        optimize_alpha_beta(net, data["spec"], data["x_lb"], data["x_ub"], pre, steps=-1)
