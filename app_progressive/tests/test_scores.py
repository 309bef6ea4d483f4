"""Facts about scores: the authors' values, and that scoring leaves no trace (acceptance checks 5, 6, 19)."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from app_progressive import scores
from app_progressive.scores import some_of_each_class
from app_progressive.tests.nets import arrays, batch, convs, reference_batches, reference_net, small_net

CASES = [
    ("snip", "snip", False),
    ("snip_prev", "snip", True),
    ("taylor", "taylor", False),
    ("taylor_prev", "taylor", True),
    ("mag", "mag", False),
    ("grasp", "grasp", False),
    ("synflow_eval", "synflow", False),
]


@pytest.mark.parametrize(("name", "criterion", "masked"), CASES)
def test_scores_are_the_authors(name: str, criterion: str, masked: bool) -> None:
    values = arrays("scores")
    masks = convs(values, "prev_mask") if masked else None
    batches = reference_batches(values, 64 if criterion == "grasp" else 100)
    found = scores(reference_net(values), batches, criterion, masks=masks)
    for key, wanted in convs(values, f"score/{name}").items():
        assert torch.allclose(found[key], wanted, rtol=0, atol=1e-12), key


def test_grasp_takes_the_first_of_each_class_that_the_authors_take() -> None:
    values = arrays("scores")
    x, y = some_of_each_class(reference_batches(values, 64), 10)
    chosen = values["grasp_sel_idx"]
    assert torch.equal(y, values["grasp_sel_y"]) and torch.equal(x, values["x_u8"][chosen].double() / 255)


def test_grasp_with_a_generator_draws_twice_and_independently() -> None:
    values = arrays("scores")
    net, batches = reference_net(values), reference_batches(values, 64)
    draws = torch.Generator().manual_seed(0)
    (x1, y1), (x2, y2) = (some_of_each_class(batches, 10, draws) for _ in range(2))
    assert torch.equal(y1, values["grasp_sel_y"]) and torch.equal(y1, y2) and not torch.equal(x1, x2)
    found = scores(net, batches, "grasp", generator=torch.Generator().manual_seed(0))
    weights = [net.get_parameter(name) for name in found]

    def gradients(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(net.train()(x) / 200, y), weights, create_graph=True)

    product = sum((g1.detach() * g2).sum() for g1, g2 in zip(gradients(x1, y1), gradients(x2, y2), strict=True))
    signed = [
        weight * gradient for weight, gradient in zip(weights, torch.autograd.grad(product, weights), strict=True)
    ]
    total = abs(sum(float(score.detach().sum()) for score in signed)) + 1e-10
    for score, wanted in zip(found.values(), signed, strict=True):
        assert torch.allclose(score, wanted / total, rtol=1e-9, atol=1e-12)


def plain_snip(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """|w * sum of gradients| by `backward`, on a copy."""
    net = copy.deepcopy(net).train()
    for x, y in batches:
        F.cross_entropy(net(x), y).backward()
    return {
        name: (w.detach() * w.grad).abs()
        for name, w in net.named_parameters()
        if name in ("conv1.weight", "conv2.weight")
    }


def test_snip_on_live_weights_is_weight_times_gradient_and_sums_to_one() -> None:  # 5
    values = arrays("scores")
    net, batches = reference_net(values), reference_batches(values)
    masks = convs(values, "prev_mask")
    for name, mask in masks.items():
        net.get_parameter(name).data.mul_(mask)
    found, plain = scores(net, batches, masks=masks), plain_snip(net, batches)
    assert sum(float(score.sum()) for score in found.values()) == pytest.approx(1, abs=1e-12)
    total = sum(float(score.sum()) for score in plain.values())
    for name in found:
        assert torch.allclose(found[name], plain[name] / total, rtol=0, atol=1e-12)


def test_batches_have_statistics_of_their_own() -> None:  # 5
    values = arrays("scores")
    net, whole, halves = reference_net(values), reference_batches(values, 250), reference_batches(values, 125)
    for train_bn in (True, False):  # with running statistics halves of equal weight are the whole
        found = [scores(net, batches, train_bn=train_bn)["conv1.weight"] for batches in (whole, halves)]
        assert torch.allclose(*found, rtol=1e-9 if not train_bn else 1e-3, atol=0) != train_bn


def test_every_batch_counts_the_same_however_short() -> None:  # 5: three of each example have the loss of one
    values = arrays("scores")
    net, ((x, y), short, _) = reference_net(values), reference_batches(values)
    found = [scores(net, [(x.repeat(copies, 1, 1, 1), y.repeat(copies)), short]) for copies in (1, 3)]
    one, three = (torch.cat([score.flatten() for score in each.values()]) for each in found)
    assert torch.allclose(one, three, rtol=1e-9, atol=1e-15)


def test_opposite_gradients_cancel_before_the_absolute_value() -> None:  # 5
    net, (x, y) = small_net().double(), batch()
    signs = iter((1.0, -1.0))
    with torch.no_grad():  # which scoring does not heed
        found = scores(net, [(x.double(), y)] * 2, loss_fn=lambda z, labels: next(signs) * F.cross_entropy(z, labels))
    assert all((score == 0).all() for score in found.values())


def test_snip_is_blind_to_a_scale_that_batch_norm_undoes_and_magnitude_is_not() -> None:  # 5
    values = arrays("scores")
    net, batches = reference_net(values), reference_batches(values)
    before = {criterion: scores(net, batches, criterion) for criterion in ("snip", "mag")}
    net.conv1.weight.data.mul_(2)
    after = {criterion: scores(net, batches, criterion) for criterion in ("snip", "mag")}
    assert torch.equal(after["mag"]["conv1.weight"], 2 * before["mag"]["conv1.weight"])
    large = before["snip"]["conv1.weight"] > before["snip"]["conv1.weight"].mean()
    assert torch.allclose(after["snip"]["conv1.weight"][large], before["snip"]["conv1.weight"][large], rtol=1e-2)


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("criterion", ["snip", "taylor", "mag", "random", "grasp", "synflow"])
def test_scoring_leaves_no_trace(criterion: str, loader: bool) -> None:  # 6
    values = arrays("scores")
    net = nn.Sequential(reference_net(values), nn.Dropout(0.5))
    net.train()
    net[0].bn1.eval()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    batches = reference_batches(values, 64)
    F.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    net[0].conv2.weight.grad = None
    if loader:
        batches = DataLoader(TensorDataset(*map(torch.cat, zip(*batches, strict=True))), 64, shuffle=True)

    def everything() -> list[object]:
        grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in net.parameters()]
        flags = [module.training for module in net.modules()]
        noise = [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()]
        return [*(v.clone() for v in net.state_dict().values()), *grads, *momentum, flags, *noise]

    before = everything()
    scores(net, batches, criterion)
    for old, new in zip(before, everything(), strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new


def test_random_scores_depend_on_their_generator_alone() -> None:
    draws = [scores(small_net(), None, "random", generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0]["conv1.weight"], draws[1]["conv1.weight"])
    assert not torch.equal(draws[0]["conv1.weight"], draws[2]["conv1.weight"])


@pytest.mark.parametrize("criterion", ["snip", "taylor", "grasp", "synflow"])
def test_a_weight_without_gradient_scores_zero_with_a_warning(criterion: str) -> None:  # 19
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = small_net(), nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.warns(UserWarning, match=r"no gradient reaches idle\.weight: scored 0"):
        found = scores(Unused(), [batch(400)], criterion)
    assert (found["idle.weight"] == 0).all() and (found["used.conv1.weight"] > 0).any()


def test_synflow_of_a_deep_network_is_finite_and_keeps_its_proportions() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(3, 3, 1, bias=False) for _ in range(5)))
    wanted = scores(net, [batch()], "synflow")
    for conv in net:
        conv.weight.data.mul_(1e10)  # the output is 1e50 times as large
    found = scores(net, [batch()], "synflow")
    largest = max(score.max() for score in wanted.values())
    for name, score in found.items():
        assert score.dtype == torch.float32 and torch.allclose(score, wanted[name] / largest, rtol=1e-5)


@pytest.mark.parametrize(
    ("criterion", "batches", "message"),
    [
        ("magic", [batch()], "criterion must be one of snip, .* got 'magic'"),
        ("snip", [], r"batches must hold at least one \(x, y\), got none"),
        ("snip", None, "batches must hold at least one"),
        ("grasp", [batch(20)], "batches must hold 10 samples of class 0 for grasp, got"),
        ("snip", [(torch.full((4, 3, 8, 8), torch.nan), torch.arange(4))], "score conv1.weight must be finite"),
    ],
)
def test_impossible_scores_are_refused(criterion: str, batches: list | None, message: str) -> None:  # 19
    with pytest.raises(ValueError, match=message):
        scores(small_net(), batches, criterion)


def test_networks_and_masks_without_a_weight_to_score_are_refused() -> None:  # 19
    with pytest.raises(ValueError, match="model must have a weight to prune"):
        scores(nn.Linear(2, 2), None, "mag")
    with pytest.raises(ValueError, match="params must hold a weight to score, got none"):
        scores(small_net(), None, "mag", params={})
    masks = {"conv1.weight": torch.ones(6, 3, 3, 3)}
    with pytest.raises(ValueError, match=r"masks must hold one for each weight to score, got none for conv2\.weight"):
        scores(small_net(), [batch()], masks=masks)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_a_wrapped_network_is_scored_inside_under_its_own_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    wanted, found = (scores(net, [batch()]) for net in (small_net(), wrap(small_net())))
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], score) for name, score in wanted.items())
