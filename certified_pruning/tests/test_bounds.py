"""Interval and CROWN bounds: equal to reference vectors, sound on points, independent of batching."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from certified_pruning import crown, window
from certified_pruning.chain import ChainNet
from certified_pruning.crown import crown_intermediate, crown_lower
from certified_pruning.ibp import ibp, input_box, margin_spec
from certified_pruning.rows import Splits
from certified_pruning.tests.nets import (
    BOUNDS,
    bounds_net,
    images,
    odd_net,
    points,
    randomise_norms,
    reference,
    small_conv,
    worked_net,
)

torch.set_num_threads(1)
ODD = (2, 9, 7)


def load(name: str) -> tuple[dict[str, Tensor], ChainNet]:
    data = reference(name)
    return data, ChainNet.from_module(bounds_net(name, data), tuple(data["x"].shape[1:]))


def fixed_pre(data: dict[str, Tensor], kind: str, n: int) -> list[tuple[Tensor, Tensor]]:
    return [(data[f"pre_{kind}_lb{i}"].flatten(1), data[f"pre_{kind}_ub{i}"].flatten(1)) for i in range(n)]


@pytest.mark.parametrize("name", BOUNDS)
def test_interval_bounds_equal_the_reference(name: str) -> None:
    data, net = load(name)
    bounds = ibp(net, data["x_lb"], data["x_ub"])
    for ours, theirs in zip(bounds.pre, fixed_pre(data, "ibp", len(net.sizes)), strict=True):
        assert torch.allclose(ours[0], theirs[0], atol=1e-5)
        assert torch.allclose(ours[1], theirs[1], atol=1e-5)
    assert torch.allclose(bounds.out[0], data["logit_ibp_lb"], atol=1e-5)
    assert torch.allclose(bounds.out[1], data["logit_ibp_ub"], atol=1e-5)


@pytest.mark.parametrize("name", BOUNDS)
def test_crown_with_interval_bounds_equals_the_reference(name: str) -> None:
    data, net = load(name)
    pre = ibp(net, data["x_lb"], data["x_ub"]).pre
    margin = crown_lower(net, data["spec"], data["x_lb"], data["x_ub"], pre)
    assert torch.allclose(margin, data["margin_crownibp"], atol=1e-4)


@pytest.mark.parametrize("name", BOUNDS)
def test_pure_crown_equals_the_reference(name: str) -> None:
    data, net = load(name)
    pre = crown_intermediate(net, data["x_lb"], data["x_ub"], intersect=False)
    for (l, u), (lower, upper) in zip(pre, fixed_pre(data, "crown", len(net.sizes)), strict=True):  # noqa: E741
        unstable = (lower < 0) & (upper > 0)
        assert torch.allclose(l[unstable], lower[unstable], atol=1e-4)
        assert torch.allclose(u[unstable], upper[unstable], atol=1e-4)
    margin = crown_lower(net, data["spec"], data["x_lb"], data["x_ub"], pre)
    assert torch.allclose(margin, data["margin_crown"], atol=1e-4)


@pytest.mark.parametrize("name", BOUNDS)
def test_crown_intersected_with_intervals_is_never_looser_than_intervals(name: str) -> None:
    data, net = load(name)
    box = data["x_lb"], data["x_ub"]
    both, interval = crown_intermediate(net, *box), ibp(net, *box).pre
    gain = 0.0
    for (l, u), (a, b) in zip(both, interval, strict=True):  # noqa: E741
        assert bool((l >= a - 1e-6).all()) and bool((u <= b + 1e-6).all())
        gain += float((l - a).sum() + (b - u).sum())
    assert gain > 0.1


def test_worked_net_has_the_bounds_found_by_hand() -> None:
    net = ChainNet.from_module(worked_net(2.5), (2,))
    lb, ub = -torch.ones(1, 2), torch.ones(1, 2)
    C, _ = margin_spec(torch.tensor([0]), 2)
    bounds = ibp(net, lb, ub, C)
    assert bounds.out[0].item() == -1.5
    for alpha in (0.0, 0.3, 1.0):
        assert crown_lower(net, C, lb, ub, bounds.pre, alpha=torch.full((1, 2), alpha)).item() == pytest.approx(-0.5)
    for sign, expected in ((-1, 0.5), (1, -0.5)):
        splits = Splits(torch.tensor([[0]]), torch.tensor([[sign]]))
        assert crown_lower(net, C, lb, ub, bounds.pre, splits).item() == pytest.approx(expected)


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_thousand_points_of_each_box_stay_within_all_bounds(eps: float, seed: int) -> None:
    model = odd_net(seed)
    net = ChainNet.from_module(model, ODD)
    x_lb, x_ub = input_box(images(ODD, 3, seed), eps, (0.4, 0.5), (0.3, 0.2))
    x = points(x_lb, x_ub, 1000, seed)
    C, _ = margin_spec(torch.tensor([0, 1, 2]), 4)
    inner = {
        "ibp": ibp(net, x_lb, x_ub).pre,
        "crown": crown_intermediate(net, x_lb, x_ub),
        "alpha": crown_intermediate(net, x_lb, x_ub, refine_iters=5),
    }
    for k in range(len(net.sizes)):
        z = net.head(k).forward(x.flatten(0, 1)).view(3, 1000, -1)
        for pre in inner.values():
            assert bool((z >= pre[k][0][:, None] - 1e-5).all())
            assert bool((z <= pre[k][1][:, None] + 1e-5).all())
    margin = torch.einsum("bso,bno->bns", C, net.forward(x.flatten(0, 1)).view(3, 1000, 4))
    for pre in inner.values():
        assert bool((margin >= crown_lower(net, C, x_lb, x_ub, pre)[:, None] - 1e-5).all())
    merged = ibp(net, x_lb, x_ub, C).out
    assert bool((margin >= merged[0][:, None] - 1e-5).all()) and bool((margin <= merged[1][:, None] + 1e-5).all())


def test_bounds_hold_on_points_that_satisfy_the_splits_for_any_alpha_and_beta() -> None:
    net = ChainNet.from_module(small_conv(), (1, 6, 5))
    x_lb, x_ub = input_box(images((1, 6, 5), 1), 0.2)
    pre = crown_intermediate(net, x_lb, x_ub)
    x = points(x_lb, x_ub, 5000)[0]
    z = torch.cat([net.head(k).forward(x) for k in range(3)], 1)
    C, _ = margin_spec(torch.tensor([1]), 4)
    margin = net.forward(x) @ C[0].T
    unstable = torch.cat([(l < 0) & (u > 0) for l, u in pre], 1)[0].nonzero().squeeze(1)  # noqa: E741
    g = torch.Generator().manual_seed(0)
    tested = 0
    for _ in range(60):
        neuron = unstable[torch.randperm(len(unstable), generator=g)[:3]]
        sign = torch.randint(0, 2, (3,), generator=g) * 2 - 1
        inside = (z[:, neuron] * sign >= 0).all(1)
        splits = Splits(neuron.repeat(3, 1), sign.repeat(3, 1))
        alpha, beta = torch.rand(3, net.n_neurons, generator=g), torch.rand(3, 3, generator=g)
        lb = crown_lower(net, C, x_lb, x_ub, pre, splits, alpha, beta)[0]
        assert bool((margin[inside] >= lb - 1e-5).all())
        tested += int(inside.any())
    assert tested > 20


def test_a_split_against_the_bounds_gives_infinity() -> None:
    net = ChainNet.from_module(worked_net(2.5), (2,))
    lb, ub = torch.full((1, 2), 0.5), torch.ones(1, 2)
    C, _ = margin_spec(torch.tensor([0]), 2)
    pre = ibp(net, lb, ub).pre
    off = Splits(torch.tensor([[0]]), torch.tensor([[-1]]))
    assert crown_lower(net, C, lb, ub, pre, off).item() == float("inf")


def test_eps_zero_gives_the_forward_values() -> None:
    model = odd_net()
    net, x = ChainNet.from_module(model, ODD), images(ODD, 4)
    lb, ub = input_box(x, 0.0)
    for pre in (ibp(net, lb, ub).pre, crown_intermediate(net, lb, ub)):
        for k, (lower, upper) in enumerate(pre):
            assert torch.allclose(lower, net.head(k).forward(x), atol=1e-5)
            assert torch.equal(lower, upper)
    C, _ = margin_spec(torch.tensor([0, 1, 2, 3]), 4)
    expected = (C @ net.forward(x).unsqueeze(2)).squeeze(2)
    assert torch.allclose(crown_lower(net, C, lb, ub, pre), expected, atol=1e-5)


def test_bounds_do_not_depend_on_batching_order_or_chunks() -> None:
    net = ChainNet.from_module(odd_net(), ODD)
    x_lb, x_ub = input_box(images(ODD, 5), 0.1)
    C, _ = margin_spec(torch.tensor([0, 1, 2, 3, 0]), 4)
    pre = crown_intermediate(net, x_lb, x_ub)
    margin = crown_lower(net, C, x_lb, x_ub, pre)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = crown_intermediate(net, x_lb[order], x_ub[order])
    chunked = crown_intermediate(net, x_lb, x_ub, max_elements=1000)
    for k, (l, u) in enumerate(pre):  # noqa: E741
        assert torch.allclose(shuffled[k][0], l[order], atol=1e-6) and torch.allclose(
            shuffled[k][1], u[order], atol=1e-6
        )
        assert torch.allclose(chunked[k][0], l, atol=1e-6) and torch.allclose(chunked[k][1], u, atol=1e-6)
    for i in range(5):
        alone = crown_intermediate(net, x_lb[i : i + 1], x_ub[i : i + 1])
        for k, (l, u) in enumerate(pre):  # noqa: E741
            assert torch.allclose(alone[k][0], l[i : i + 1], atol=1e-6)
            assert torch.allclose(alone[k][1], u[i : i + 1], atol=1e-6)
        one = crown_lower(net, C[i : i + 1], x_lb[i : i + 1], x_ub[i : i + 1], alone)
        assert torch.allclose(one, margin[i : i + 1], atol=1e-5)
    rows = crown_lower(net, C.flatten(0, 1), x_lb, x_ub, pre, image=torch.arange(5).repeat_interleave(3))
    assert torch.equal(rows, margin.flatten())


def windowed_net(seed: int) -> nn.Sequential:
    """Input (2, 14, 11): three convolutions with odd strides, paddings, dilation and groups."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3, (2, 1), (1, 0)), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, (2, 3), 1, 1, groups=2)]
    layers += [nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 2, (1, 2), (0, 2), dilation=(2, 1)), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(108, 4)]
    return randomise_norms(nn.Sequential(*layers), seed).eval()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_windows_give_the_bounds_of_whole_maps(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (2, 14, 11)
    net = ChainNet.from_module(windowed_net(seed), shape, torch.float64)
    assert [window.has_windows(net.head(k)) for k in (1, 2)] == [True, True]
    x_lb, x_ub = input_box(images(shape, 3, seed).double(), 0.1)
    cut = crown_intermediate(net, x_lb, x_ub)
    chunked = crown_intermediate(net, x_lb, x_ub, max_elements=3000)
    monkeypatch.setattr(crown, "has_windows", lambda head: False)
    whole = crown_intermediate(net, x_lb, x_ub)
    for k in range(3):
        for i in (0, 1):
            assert torch.allclose(cut[k][i], whole[k][i], atol=1e-12)
            assert torch.allclose(chunked[k][i], whole[k][i], atol=1e-12)
    loose = ibp(net, x_lb, x_ub).pre[2:]
    assert (whole[2][1] - whole[2][0]).sum() < 0.9 * sum((u - l).sum() for l, u in loose)  # noqa: E741


def test_a_map_that_is_flattened_before_its_relu_is_bounded_like_one_that_is_not() -> None:
    torch.manual_seed(0)
    conv, more, linear = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3), nn.Linear(288, 4)
    before = nn.Sequential(conv, nn.ReLU(), more, nn.Flatten(), nn.ReLU(), linear).eval()
    after = nn.Sequential(conv, nn.ReLU(), more, nn.ReLU(), nn.Flatten(), linear).eval()
    box = input_box(images((1, 16, 16), 2, 0).double(), 0.1)
    ours, theirs = (
        crown_intermediate(ChainNet.from_module(m, (1, 16, 16), torch.float64), *box) for m in (before, after)
    )
    for (lower, upper), (low, high) in zip(ours, theirs, strict=True):
        assert torch.allclose(lower, low, atol=1e-12) and torch.allclose(upper, high, atol=1e-12)


def test_the_box_is_cut_to_the_pixel_range_and_never_loosens_the_bound() -> None:
    x = images(ODD, 4)
    x_lb, x_ub = input_box(x, 0.1)
    assert x_lb.min() >= 0 and x_ub.max() <= 1
    mean, std = (0.4, 0.5), (0.2, 0.3)
    lo, _ = input_box(x, 0.1, mean, std)
    shape = (1, 2, 1, 1)
    assert torch.allclose(lo, (x_lb - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape), atol=1e-6)
    net = ChainNet.from_module(odd_net(), ODD)
    C, _ = margin_spec(torch.tensor([0, 1, 2, 3]), 4)
    cut = ibp(net, x_lb, x_ub, C).out[0]
    assert bool((cut >= ibp(net, x - 0.1, x + 0.1, C).out[0] - 1e-6).all())


def test_optimised_intermediate_bounds_are_tighter_somewhere_and_looser_nowhere() -> None:
    net = ChainNet.from_module(odd_net(), ODD)
    x_lb, x_ub = input_box(images(ODD, 3), 0.3)
    plain, refined = crown_intermediate(net, x_lb, x_ub), crown_intermediate(net, x_lb, x_ub, refine_iters=10)
    widths = [(u - l).sum().item() for l, u in plain], [(u - l).sum().item() for l, u in refined]  # noqa: E741
    assert widths[1][1] < widths[0][1] and widths[1][2] < widths[0][2]
    assert bool((refined[1][0] >= plain[1][0] - 1e-6).all())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda lb, ub: (ub, lb), "x_lb must be <= x_ub"),
        (lambda lb, ub: (lb.masked_fill(lb > 0.5, float("nan")), ub), "x_lb must be finite"),
        (lambda lb, ub: (lb, ub / 0), "x_ub must be finite"),
        (lambda lb, ub: (lb[:, :, :3], ub[:, :, :3]), "x_lb must have shape"),
        (lambda lb, ub: (lb, ub[:1]), "x_ub must have the shape of x_lb"),
    ],
)
def test_bad_boxes_are_refused(change, text: str) -> None:
    net = ChainNet.from_module(small_conv(), (1, 6, 5))
    lb, ub = change(*input_box(images((1, 6, 5), 3), 0.1))
    for bound in (ibp, crown_intermediate):
        with pytest.raises(ValueError, match=text):
            bound(net, lb, ub)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"eps": -0.1}, "eps must be finite and >= 0, got -0.1"),
        ({"eps": float("nan")}, "eps must be finite"),
        ({"raw": torch.full((1, 2, 3, 3), 255.0)}, r"raw must be in \[0, 1\]"),
        ({"raw": torch.full((1, 2, 3, 3), float("inf"))}, "raw must be finite"),
        ({"mean": (0.1, 0.2, 0.3)}, "mean must have 1 or 2 entries, got 3"),
        ({"std": (0.0,)}, "std must be finite and > 0"),
    ],
)
def test_bad_arguments_of_the_input_box_are_refused(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        input_box(**({"raw": torch.zeros(1, 2, 3, 3), "eps": 0.1} | arguments))


def test_bad_labels_bounds_and_splits_are_refused() -> None:
    for y in (torch.tensor([4]), torch.tensor([-1]), torch.tensor([0.0])):
        with pytest.raises(ValueError, match="y must be"):
            margin_spec(y, 4)
    net = ChainNet.from_module(worked_net(1.0), (2,))
    lb, ub = -torch.ones(1, 2), torch.ones(1, 2)
    C, _ = margin_spec(torch.tensor([0]), 2)
    pre = ibp(net, lb, ub).pre
    with pytest.raises(ValueError, match="pre must have lower <= upper"):
        crown_lower(net, C, lb, ub, [(pre[0][1], pre[0][0])])
    with pytest.raises(ValueError, match="pre must bound"):
        crown_lower(net, C, lb, ub, [(pre[0][0][:, :1], pre[0][1][:, :1])])
    with pytest.raises(ValueError, match=r"splits\.neuron must be in"):
        crown_lower(net, C, lb, ub, pre, Splits(torch.tensor([[2]]), torch.tensor([[1]])))
    with pytest.raises(ValueError, match="C must have"):
        crown_lower(net, C[..., :1], lb, ub, pre)
