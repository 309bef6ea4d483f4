"""Facts about trigger inversion (acceptance checks 1, 8, 10 to 13, 18)."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backdoor_lth.compaction import compact
from backdoor_lth.frozen import frozen
from backdoor_lth.inversion import invert
from backdoor_lth.neural_cleanse import CleanseConfig, neural_cleanse
from backdoor_lth.tabor import (
    COSTS,
    DOWN,
    SoftTrigger,
    adjusted,
    attack_losses,
    overlaid,
    penalties,
    smooth,
    squashed,
    tabor,
)
from backdoor_lth.tests.nets import REFERENCE, TinyNet, reference, tiny_net

RUNS = {"t3_img": 3, "t3_noise": 3, "t0_img": 0}


class Constant(nn.Module):
    """Always answers one label."""

    def __init__(self, label: int, classes: int = 4) -> None:
        super().__init__()
        self.logits = nn.Parameter(10.0 * nn.functional.one_hot(torch.tensor(label), classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + 0 * x.flatten(1).sum(1, keepdim=True)


# Against the authors' functions


@pytest.mark.parametrize("run", RUNS)
def test_the_first_steps_terms_and_gradients_are_the_authors(run: str) -> None:
    arrays, label = reference("tabor"), torch.tensor([RUNS[run]])
    model = tiny_net(arrays)
    mark, mask = (arrays[f"{run}_init_{name}"][None].requires_grad_() for name in ("mark", "mask"))
    x = arrays[f"{run}_x"][0] if f"{run}_x" in arrays else arrays["x"]
    trigger = squashed(mark, mask)
    alone = nn.functional.cross_entropy(model(trigger.mask[:, None] * trigger.mark), label, reduction="none")
    terms = penalties(trigger, alone)
    attack = attack_losses(model(overlaid(x, trigger)[0])[None], label, "ce")
    total = attack + (torch.tensor(COSTS).double() * terms).sum(1)
    close = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(terms[0], arrays[f"{run}_terms"][0], **close)
    torch.testing.assert_close(attack[0], arrays[f"{run}_ce"][0], **close)
    torch.testing.assert_close(total[0], arrays[f"{run}_total"][0], **close)
    gradients = torch.autograd.grad(total.sum(), [mark, mask])
    for gradient, name in zip(gradients, ("mark", "mask"), strict=True):
        torch.testing.assert_close(gradient[0], arrays[f"{run}_grad0_{name}"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("run", RUNS)
def test_a_whole_search_is_the_authors(run: str) -> None:
    arrays, label = reference("tabor"), torch.tensor([RUNS[run]])
    model = tiny_net(arrays)
    starts = [arrays[f"{run}_init_{name}"][None] for name in ("mark", "mask")]
    noise = arrays.get(f"{run}_x")
    steps = len(arrays[f"{run}_acc"])
    with frozen(model):
        found = tabor(model, label, *starts, lambda step: arrays["x"] if noise is None else noise[step], steps)
    torch.testing.assert_close(found.success[0].double(), arrays[f"{run}_acc"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.costs[0], arrays[f"{run}_cost"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.trigger.mark[0], arrays[f"{run}_final_mark"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.trigger.mask[0], arrays[f"{run}_final_mask"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("cost", "early"), [(0.001, 0), (0.001, 1), (0.01, 1)])
def test_neural_cleanse_is_the_authors(cost: float, early: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, run = reference("neural_cleanse"), f"t0_c{cost}_es{early}_"
    with np.load(REFERENCE / "neural_cleanse.npz") as archive:
        settings = json.loads(str(archive["settings"]))
    config = CleanseConfig(
        cost, settings["attack_succ_threshold"], settings["patience"], bool(early), settings["early_stop_patience"]
    )
    model = tiny_net(arrays)
    starts = [arrays[f"{run}init_{name}"][None] for name in ("mark", "mask")]
    cross_entropy, entropies = nn.functional.cross_entropy, []

    def recorded(*given: Tensor) -> Tensor:
        entropies.append(cross_entropy(*given))
        return entropies[-1]

    monkeypatch.setattr("backdoor_lth.neural_cleanse.F.cross_entropy", recorded)
    with frozen(model):
        found = neural_cleanse(model, torch.tensor([0]), *starts, lambda step: arrays["x"], settings["epoch"], config)
    trace = arrays[f"{run}loss_norm_cost_acc"]
    assert found.success.shape[1] == len(trace)
    torch.testing.assert_close(found.success[0].double(), trace[:, 3], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.costs[0, :, 0], trace[:, 2], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.stack(entropies), trace[:, 0] - trace[:, 2] * trace[:, 1], rtol=1e-6, atol=1e-6)
    assert (torch.stack(entropies) - arrays[f"{run}entropy"]).abs().min() < 1e-6
    torch.testing.assert_close(found.trigger.mark[0], arrays[f"{run}mark"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.trigger.mask[0], arrays[f"{run}mask"], rtol=1e-6, atol=1e-6)


# Terms and costs


def test_penalties_of_known_triggers() -> None:
    assert smooth(torch.tensor([[0.0, 1], [2, 4]])) == 18  # (1 + 4) + (4 + 9)
    torch.testing.assert_close(smooth(reference("helpers")["a"]), reference("helpers")["smooth"], rtol=1e-9, atol=0)
    half = SoftTrigger(torch.ones(1, 3, 32, 32), torch.full((1, 32, 32), 0.5))
    assert penalties(half, torch.tensor([7.0]))[0].tolist() == [512 + 256, 1536 + 768, 0, 0, 7]


def test_costs_rise_after_five_successes_and_fall_after_five_failures() -> None:
    costs = torch.tensor([COSTS, COSTS], dtype=torch.float64)
    up, down = torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    start = torch.tensor(COSTS, dtype=torch.float64)
    for _ in range(5):
        assert (costs == start).all()
        costs, up, down = adjusted(costs, torch.tensor([True, False]), up, down)
    torch.testing.assert_close(costs[0], 1.5 * start)
    torch.testing.assert_close(costs[1], start / 1.8371173070873836)
    assert pytest.approx(1.8371173070873836) == DOWN and up.tolist() == down.tolist() == [0, 0]
    for good in [False] * 4 + [True] + [False] * 4:  # a success in between
        before = costs
        costs, up, down = adjusted(costs, torch.tensor([good, good]), up, down)
        assert torch.equal(before, costs)
    assert down.tolist() == [4, 4] and up.tolist() == [0, 0]


def test_the_cw_loss_is_the_margin_that_is_missing() -> None:
    logits = torch.tensor([[[2.0, 5.0, 1.0], [0.0, 3.0, 4.0]], [[1.0, 0.0, 9.0], [0.0, 0.0, 1.0]]])
    assert attack_losses(logits, torch.tensor([1, 0]), "cw").tolist() == [0.5, 4.5]


# Facts about any search


def test_a_model_that_always_answers_the_label_gives_next_to_no_mask() -> None:
    found = invert(Constant(2), (3, 32, 32), [2], count=5)
    assert (found.success == 1).all() and found.null_success.tolist() == [1.0]
    assert 0.005 < float(found.l1) < 0.01  # the specification's own runs: .0075 to .0078


def test_a_label_never_reached_keeps_the_trigger_of_the_first_step() -> None:
    whole, first = (invert(Constant(2), (3, 32, 32), [0, 1], count=5, steps=steps) for steps in (30, 1))
    assert torch.equal(whole.mask, first.mask) and torch.equal(whole.mark, first.mark)
    assert not whole.success.any() and ((whole.l1 > 480) & (whole.l1 < 540)).all()  # half of 1,024


def test_a_label_does_not_depend_on_the_others_or_on_chunks() -> None:
    model = tiny_net(reference("tabor"))
    found = [
        invert(model, (3, 8, 8), labels, count=6, steps=20, chunk=chunk)
        for labels, chunk in (([3], 0), (None, 2), (None, 5))
    ]
    for other in found[1:]:
        torch.testing.assert_close(other.mask[3], found[0].mask[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(other.mark[3], found[0].mark[0], rtol=0, atol=1e-6)
    assert found[1].labels == [0, 1, 2, 3, 4] and found[0].labels == [3]


def test_the_model_comes_back_as_it_was() -> None:
    model = TinyNet().train()
    model.bn1.eval()
    model.fc.weight.requires_grad_(False)
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    before = copy.deepcopy(model.state_dict())
    invert(model, (3, 8, 8), [1], count=4, steps=3)
    with pytest.raises(ValueError, match="labels must be at least one"):
        invert(model, (3, 8, 8), [9], count=4, steps=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not model.bn1.training and model.bn2.training
    assert not model.fc.weight.requires_grad and model.conv1.weight.requires_grad
    assert (model.conv1.weight.grad == 1).all() and model.conv2.weight.grad is None


def test_labels_may_be_a_tensor_and_gradients_off() -> None:
    plain = invert(tiny_net(reference("tabor")), (3, 8, 8), [1, 2], count=4, steps=3)
    with torch.no_grad():
        found = invert(tiny_net(reference("tabor")), (3, 8, 8), torch.tensor([1, 2]), count=4, steps=3)  # type: ignore[arg-type]
    assert found.labels == [1, 2] and torch.equal(found.mask, plain.mask)


def test_compacted_and_plain_networks_give_the_same_search() -> None:
    torch.manual_seed(0)
    model = TinyNet().eval()
    with torch.no_grad():
        model.conv1.weight[1:] = 0
        model.conv2.weight[:, 3:] = 0
        model.fc.bias[2] += 3
    one, other = (invert(net, (3, 8, 8), count=10, steps=5, seed=4) for net in (model, compact(model, (3, 8, 8))))
    torch.testing.assert_close(one.mask, other.mask, rtol=0, atol=1e-4)
    whole = [invert(net, (3, 8, 8), count=10, steps=60, seed=4) for net in (model, compact(model, (3, 8, 8)))]
    always = (whole[0].success == 1).all(1)
    assert always.any()
    torch.testing.assert_close(whole[0].l1[always], whole[1].l1[always], rtol=0.01, atol=1e-3)


def test_given_images_and_the_least_mask() -> None:
    model = tiny_net(reference("tabor"))
    last, least = (
        invert(model, (3, 8, 8), [3], base=reference("tabor")["x"], steps=60, keep=keep, seed=1)  # type: ignore[arg-type]
        for keep in ("last", "min")
    )
    assert last.success.shape == (1, 60) and (last.success == least.success).all()
    assert least.l1 <= last.l1
    assert (last.trigger_l1 == (last.mask[:, None] * last.mark).sum((1, 2, 3))).all()


def test_neural_cleanse_scans_all_labels() -> None:
    found = invert(Constant(1), (1, 6, 6), count=4, steps=30, method="nc")
    assert found.success.shape == (4, 30) and found.success[1].all() and not found.success[0].any()
    assert found.null_success.tolist() == [0, 1, 0, 0] and found.l1[1] < 0.5 * found.l1[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (8, 8)}, r"input_shape must be \(channels, height, width\), got \(8, 8\)"),
        ({"base": torch.zeros(2, 1, 8, 8)}, r"base must be \(n, 3, 8, 8\) with n at least 1, got \(2, 1, 8, 8\)"),
        ({"base": torch.zeros(0, 3, 8, 8)}, r"base must be \(n, 3, 8, 8\) with n at least 1, got \(0, 3, 8, 8\)"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"chunk": -1}, "chunk must be at least 0, got -1"),
        ({"labels": [7]}, r"labels must be at least one, in \[0, 5\), got \[7\]"),
        ({"labels": []}, r"labels must be at least one, in \[0, 5\), got \[\]"),
        ({"method": "NC"}, "method must be one of tabor, nc, got 'NC'"),
        ({"attack_loss": "c&w"}, "attack_loss must be one of ce, cw, got 'c&w'"),
        ({"keep": "best"}, "keep must be one of last, min, got 'best'"),
        ({"base": "images"}, "base must be noise or images, got 'images'"),
        ({"model": nn.Conv2d(3, 2, 3)}, r"logits of the model must be \(n, classes\), got \(1, 2, 6, 6\)"),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 2), nn.LogSigmoid(), nn.Threshold(0, torch.nan))},
            "finite",
        ),
    ],
)
def test_searches_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    arguments = {"model": TinyNet(), "input_shape": (3, 8, 8), **options}
    with pytest.raises(ValueError, match=message):
        invert(**arguments)  # type: ignore[arg-type]
