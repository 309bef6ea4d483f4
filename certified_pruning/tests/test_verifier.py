"""The complete verifier: verdicts, witnesses, budgets, determinism."""

from __future__ import annotations

import copy
import json
from math import isnan

import pytest
import torch
from torch import Tensor, nn

from certified_pruning import eval as evaluation
from certified_pruning import problem
from certified_pruning.attack import pgd_attack
from certified_pruning.bench import SHAPE as BENCH_SHAPE
from certified_pruning.bench import demo_net
from certified_pruning.chain import ChainNet
from certified_pruning.crown import crown_intermediate
from certified_pruning.frontier import Domains, Frontier
from certified_pruning.ibp import input_box
from certified_pruning.models import cnn_s
from certified_pruning.problem import Problem
from certified_pruning.settings import Config
from certified_pruning.stages import confirmed, outward
from certified_pruning.tests.nets import BOUNDS, bounds_net, images, mlp, odd_net, reference, small_conv, worked_net
from certified_pruning.verdicts import VerifyConfig, VerifyReport
from certified_pruning.verifier import CompleteVerifier
from common.data import ImageSet

torch.set_num_threads(1)
SHAPE = (1, 6, 5)
COMPLETE = VerifyConfig(max_nodes=None, bab_steps=10)


def statuses(report: VerifyReport) -> list[str]:
    return [v.status for v in report.images]


def nodes(report: VerifyReport) -> list[int]:
    return [v.nodes for v in report.images]


def labelled(model: nn.Module, shape: tuple[int, ...], n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = images(shape, n, seed)
    with torch.no_grad():
        return x, model(x).argmax(1)


def test_a_verifier_keeps_the_network_that_it_was_given() -> None:
    """Also one in float64, of which nothing needs converting."""
    model = mlp([6, 8, 3])
    x, y = labelled(model, (6,), 4)
    model.double()
    verifier = CompleteVerifier(model, (6,), 0.01, 3, COMPLETE)
    before = statuses(verifier.verify(x, y))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    assert statuses(verifier.verify(x, y)) == before
    assert statuses(CompleteVerifier(model, (6,), 0.01, 3, COMPLETE).verify(x, y)) != before


@pytest.mark.parametrize("branching", ["kfsb", "babsr"])
@pytest.mark.parametrize("name", BOUNDS)
def test_verdicts_equal_the_reference_for_every_batching(name: str, branching: str) -> None:
    data = reference(name)
    model, eps, n_classes = bounds_net(name, data), float(data["eps"]), data["spec"].shape[2]
    expected = [{1: "verified", 2: "falsified"}[v] for v in data["verdict"].tolist()]
    exact = data["margin_exact_f64"].amin(1).tolist()
    counts = []
    for config in (
        VerifyConfig(branching=branching, max_nodes=None, pgd_restarts=0),
        VerifyConfig(branching=branching, max_nodes=None, pgd_restarts=0, max_rows=1),
        VerifyConfig(branching=branching, max_nodes=None),
    ):
        verifier = CompleteVerifier(model, tuple(data["x"].shape[1:]), eps, n_classes, config)
        report = verifier.verify(data["x"], data["y"])
        assert statuses(report) == expected
        for v, minimum in zip(report.images, exact, strict=True):
            assert v.lb <= minimum + 1e-5
            assert (v.lb > 0) == (v.status == "verified")
        counts.append(nodes(report))
        if config.pgd_restarts == 0 and config.max_rows > 1:
            alone = [verifier.verify(data["x"][i : i + 1], data["y"][i : i + 1]) for i in range(len(expected))]
            assert [s for r in alone for s in statuses(r)] == expected
            assert [n for r in alone for n in nodes(r)] == counts[0]


@pytest.mark.parametrize("branching", ["kfsb", "babsr"])
def test_the_worked_net_takes_exactly_four_child_bounds(branching: str) -> None:
    box = -torch.ones(2), torch.ones(2)
    x, y = torch.zeros(1, 2), torch.tensor([0])
    config = VerifyConfig(branching=branching, pgd_restarts=0)
    v = CompleteVerifier(worked_net(2.5), (2,), None, 2, config, box=box).verify(x, y).images[0]
    assert (v.status, v.stage, v.nodes) == ("verified", "bab", 4)
    assert v.lb == pytest.approx(0.5, abs=1e-4)
    v = CompleteVerifier(worked_net(1.9), (2,), None, 2, config, box=box).verify(x, y).images[0]
    assert v.status == "falsified" and v.witness is not None
    assert worked_net(1.9)(v.witness.float())[0] < 0


@pytest.mark.parametrize("bab_steps", [10, 0])
@pytest.mark.parametrize("seed", range(6))
def test_verdicts_agree_with_a_fine_grid_of_the_plane(seed: int, bab_steps: int) -> None:
    """Without steps nothing but splits and leaf LPs decides; never unknown, whatever the net."""
    model = mlp([2, 6, 5, 3], seed)
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(1.5)
    x, y = labelled(model, (2,), 8, seed)
    eps = 0.25
    config = VerifyConfig(max_nodes=None, bab_steps=bab_steps, root_steps=bab_steps, pgd_restarts=0)
    report = CompleteVerifier(model, (2,), eps, 3, config).verify(x, y)
    lb, ub = input_box(x, eps)
    t = torch.linspace(0, 1, 201)
    grid = torch.cartesian_prod(t, t)
    for i, v in enumerate(report.images):
        assert v.status in ("verified", "falsified")
        with torch.no_grad():
            same = bool((model(lb[i] + grid * (ub - lb)[i]).argmax(1) == y[i]).all())
        if v.status == "verified":
            assert same
        if not same:
            assert v.status == "falsified"


@pytest.mark.parametrize(("seed", "eps"), [(0, 0.1), (1, 0.17)])
def test_witnesses_are_true_and_verified_images_survive_a_strong_attack(seed: int, eps: float) -> None:
    model, shape, norm = odd_net(seed), (2, 9, 7), ((0.45, 0.5), (0.8, 1.1))
    mean, std = (torch.tensor(t).view(1, 2, 1, 1) for t in norm)
    x = images(shape, 12, seed)
    with torch.no_grad():
        y = model((x - mean) / std).argmax(1)
    config = VerifyConfig(max_nodes=60, bab_steps=8, root_steps=8, pgd_restarts=1, pgd_steps=5)
    report = CompleteVerifier(model, shape, eps, 4, config, normalize=norm).verify(x, y)
    exact = odd_net(seed).double()
    for v, image, label in zip(report.images, x, y, strict=True):
        assert (v.witness is not None) == (v.status == "falsified")
        if v.witness is not None:
            lb, ub = input_box(image[None].double(), eps)
            assert bool((v.witness >= lb[0] - 1e-9).all()) and bool((v.witness <= ub[0] + 1e-9).all())
            assert exact(((v.witness - mean) / std).double()).argmax() != label
    keep = torch.tensor([v.status == "verified" for v in report.images])
    assert keep.any() and not keep.all()
    box = input_box(x[keep], eps, *norm)
    attack = pgd_attack(model, ((x - mean) / std)[keep], y[keep], *box, eps / 4, steps=200, restarts=10)
    assert bool((attack.margin > 0).all())


def test_verified_images_of_a_trained_net_survive_pgd_of_200_steps_and_10_starts() -> None:
    eps = 0.1
    model, x, y = demo_net(epochs=2, eps=eps)
    x, y = x[:18], y[:18]
    config = VerifyConfig(max_nodes=40, bab_steps=8, root_steps=8, pgd_restarts=0)
    report = CompleteVerifier(model, BENCH_SHAPE, eps, 10, config).verify(x, y)
    keep = torch.tensor([v.status == "verified" for v in report.images])
    assert keep.sum() >= 5 and "bab" in {v.stage for v in report.images if v.status == "verified"}
    net = ChainNet.from_module(model, BENCH_SHAPE)
    found = pgd_attack(net, x[keep], y[keep], *input_box(x[keep], eps), eps / 4, steps=200, restarts=10)
    assert bool((found.margin > 0).all())
    # The attack is strong enough to mean something: it breaks images that are not verified.
    found = pgd_attack(net, x[~keep], y[~keep], *input_box(x[~keep], eps), eps / 4, steps=20)
    assert bool((found.margin < 0).any())


def test_eps_zero_verifies_every_correct_image_at_the_first_stage() -> None:
    model = small_conv()
    x, y = labelled(model, SHAPE, 10)
    y[:3] = (y[:3] + 1) % 4
    report = CompleteVerifier(model, SHAPE, 0.0, 4).verify(x, y)
    assert statuses(report) == ["misclassified"] * 3 + ["verified"] * 7
    assert {v.stage for v in report.images[3:]} == {"ibp"}
    assert report.verified_accuracy == 70.0 and report.clean_accuracy == 70.0


def test_statuses_partition_the_images_and_wrong_ones_are_never_verified() -> None:
    model = small_conv()
    x, y = labelled(model, SHAPE, 30)
    y[::5] = (y[::5] + 1) % 4
    report = CompleteVerifier(model, SHAPE, 0.05, 4, VerifyConfig(max_nodes=20)).verify(x, y)
    assert sum(report.counts.values()) == 30
    assert report.counts["misclassified"] == 6
    assert [i for i, v in enumerate(report.images) if v.status == "misclassified"] == list(range(0, 30, 5))
    assert report.verified_accuracy == pytest.approx(100 * report.counts["verified"] / 30)


def test_a_larger_budget_only_decides_more() -> None:
    model = small_conv(4)
    x, y = labelled(model, SHAPE, 24)
    previous: list[str] | None = None
    unknowns = []
    for budget in (0, 2, 6, 20, 200, None):
        config = VerifyConfig(max_nodes=budget, pgd_restarts=0, root_steps=5, bab_steps=5)
        report = CompleteVerifier(model, SHAPE, 0.2, 4, config).verify(x, y)
        assert budget is None or max(nodes(report)) <= budget
        if budget == 0:
            assert {v.stage for v in report.images if v.status == "unknown"} == {"alpha"}
        now = statuses(report)
        if previous is not None:
            assert all(a == b for a, b in zip(previous, now, strict=True) if a != "unknown")
        unknowns.append(now.count("unknown"))
        previous = now
    assert unknowns[0] > unknowns[2] > 0 and unknowns[-1] == 0


def test_branching_never_splits_a_stable_neuron_or_one_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    bound = Problem.bound

    def checked(self: Problem, domains: Domains, *arguments: float) -> tuple[Domains, Tensor]:
        nonlocal seen
        unstable = self.relaxation.unstable
        for image, neuron, sign in zip(domains.image, domains.neuron, domains.sign, strict=True):
            split = neuron[sign != 0].long()
            assert len(split.unique()) == len(split)
            assert bool(unstable[image, split].all())
            seen += len(split)
        return bound(self, domains, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Problem, "bound", checked)
    model = small_conv(4)
    x, y = labelled(model, SHAPE, 12)
    for branching in ("kfsb", "babsr"):
        config = VerifyConfig(max_nodes=200, pgd_restarts=0, bab_steps=3, branching=branching)
        CompleteVerifier(model, SHAPE, 0.2, 4, config).verify(x, y)
    assert seen > 100


def test_a_child_is_never_below_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    bound, compared = Problem.bound, 0

    def checked(self: Problem, domains: Domains, *arguments: float) -> tuple[Domains, Tensor]:
        nonlocal compared
        result = bound(self, domains, *arguments)  # type: ignore[arg-type]
        assert bool((result[0].lb >= domains.lb).all())
        compared += int(domains.lb.isfinite().sum())
        return result

    monkeypatch.setattr(Problem, "bound", checked)
    model = small_conv(4)
    CompleteVerifier(model, SHAPE, 0.2, 4, VerifyConfig(bab_steps=2)).verify(*labelled(model, SHAPE, 8))
    assert compared > 50


def test_a_domain_costs_a_few_bytes_per_unstable_neuron_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int, int]] = []
    push = Frontier.push

    def measured(self: Frontier, domains: Domains) -> None:
        push(self, domains)
        if len(domains):
            sizes.append((self.bytes_per_domain, self.store.alpha.shape[1], self.store.sign.shape[1]))

    monkeypatch.setattr(Frontier, "push", measured)
    model = small_conv(4)
    CompleteVerifier(model, SHAPE, 0.2, 4, VerifyConfig(bab_steps=2)).verify(*labelled(model, SHAPE, 8))
    assert sizes and all(size < 8 * unstable + 64 * depth + 1024 for size, unstable, depth in sizes)
    assert max(depth for _, _, depth in sizes) > 0


@pytest.mark.parametrize("factor", [1e3, 1e-3])
def test_scaling_the_logits_changes_no_verdict(factor: float) -> None:
    plain, scaled = small_conv(4), small_conv(4)
    scaled[-1].weight.data.mul_(factor)
    scaled[-1].bias.data.mul_(factor)
    x, y = labelled(plain, SHAPE, 20)
    expected = CompleteVerifier(plain, SHAPE, 0.2, 4, COMPLETE).verify(x, y)
    got = CompleteVerifier(scaled, SHAPE, 0.2, 4, COMPLETE).verify(x, y)
    assert statuses(got) == statuses(expected)
    assert {"verified", "falsified"} <= set(statuses(expected))


def test_a_bound_that_only_float32_sees_above_zero_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The float32 result is tampered with, as rounding could; float64 must overrule it."""
    ascend = problem.ascend

    def optimistic(*arguments, **options):
        result = ascend(*arguments, **options)
        result.lb = result.lb + 1e-4
        return result

    monkeypatch.setattr(problem, "ascend", optimistic)
    # Margin 2 - h1 - h2 is 0 at the corners: not verified, and nothing is below 0.
    config = VerifyConfig(pgd_restarts=0)
    box = -torch.ones(2), torch.ones(2)
    for constant, allowed in ((2.0, {"unknown"}), (2.0 + 1e-5, {"verified"}), (2.0 - 1e-5, {"falsified", "unknown"})):
        verifier = CompleteVerifier(worked_net(constant), (2,), None, 2, config, box=box)
        assert set(statuses(verifier.verify(torch.zeros(1, 2), torch.tensor([0])))) <= allowed


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_widened_float32_bounds_contain_the_float64_bounds_and_keep_dead_neurons_dead(seed: int) -> None:
    shape = (2, 9, 7)
    model = odd_net(seed)
    model[10].weight.data[3] = 0.0
    model[10].bias.data[3] = 0.0
    net, exact = (ChainNet.from_module(model, shape, dtype) for dtype in (torch.float32, torch.float64))
    x_lb, x_ub = input_box(images(shape, 20, seed), 0.1)
    pre = crown_intermediate(net, x_lb, x_ub)
    wide = outward(net, x_lb, x_ub, pre)
    true = crown_intermediate(exact, x_lb.double(), x_ub.double())
    for (a, b), (lower, upper), (l, u) in zip(pre, wide, true, strict=True):  # noqa: E741
        assert bool((lower <= l).all()) and bool((upper >= u).all())
        most = 1e-3 * float((b - a).mean())  # of the width: what earlier layers' rounding may do is in it
        assert bool((a - lower <= most).all()) and bool((upper - b <= most).all())
    assert bool((wide[2][0][:, 3] == 0).all()) and bool((wide[2][1][:, 3] == 0).all())


@pytest.mark.parametrize(
    ("weight", "x0", "above"), [(1e3, 0.55, 1e-5), (1e3, 0.62, 5e-6), (1e3, 0.8, 1e-5), (1e4, 0.3, 2e-5)]
)
def test_rounding_of_one_layer_is_not_lost_in_the_next(weight: float, x0: float, above: float) -> None:
    """relu(w |x - x0| - top + above) is `above` at a corner in float64; in float32 its sum may seem below 0."""

    def net(bias: float, margin: float) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2)).eval()
        values = (
            [[weight], [-weight]],
            [-weight * x0, weight * x0],
            [[1.0, 1.0]],
            [bias],
            [[-1.0], [0.0]],
            [margin, 0.0],
        )
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), values, strict=True):
                parameter.copy_(torch.tensor(value))
        return model

    x, y = torch.tensor([[x0]], dtype=torch.float64), torch.tensor([0])
    corners = torch.cat([x - 1 / weight, x + 1 / weight])
    top = -net(0.0, 0.0).double()(corners)[:, 0].min().item()
    for margin, allowed in ((above / 2, {"unknown", "falsified"}), (0.1, {"verified"})):
        setting = (above - top, margin)
        first, second = net(*setting).double()(corners).T
        assert bool((first > second).all()) == (margin == 0.1)
        report = CompleteVerifier(net(*setting), (1,), 1 / weight, 2, VerifyConfig()).verify(x, y)
        assert set(statuses(report)) <= allowed


def many_small_weights() -> nn.Sequential:
    """Logits (.02 - 1e4 relu(z), 0) where the float32 sum of 1 + 3,071 terms z loses most of the small ones."""
    model = nn.Sequential(nn.Linear(3072, 1), nn.ReLU(), nn.Linear(1, 2)).eval()
    values = [torch.full((1, 3072), 2.0**-24), [0.0], [[-1e4], [0.0]], [0.02, 0.0]]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(torch.as_tensor(value))
        model[0].weight[0, 0] = 1.5
        x = torch.full((1, 3072), 0.9, dtype=torch.float64)
        model[0].bias.sub_((copy.deepcopy(model[0]).double()(x)[0] + 1e-6).float())
    return model


def test_the_worst_rounding_of_a_long_sum_verifies_nothing_that_float64_denies() -> None:
    model, eps = many_small_weights(), 5e-6
    x = torch.full((1, 3072), 0.9, dtype=torch.float64)
    first, second = copy.deepcopy(model).double()(x + eps)[0].tolist()
    assert first < second
    report = CompleteVerifier(model, (3072,), eps, 2).verify(x, torch.tensor([0]))
    assert statuses(report) != ["verified"]


def test_intervals_of_a_deeper_layer_are_confirmed_and_tightened_ones_left() -> None:
    """Float64 finds an interval bound .5 lower than float32 did; the one that CROWN tightened is not compared."""
    model = mlp([1, 2, 2, 2])
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), ([[1.0], [1.0]], [2, 2], torch.eye(2), [0, -2]), strict=False):
            parameter.copy_(torch.as_tensor(value))
    net, exact = (ChainNet.from_module(model, (1,), dtype) for dtype in (torch.float32, torch.float64))
    box = -torch.ones(1, 1), torch.ones(1, 1)
    pre = crown_intermediate(net, *box)
    assert [t.tolist() for t in pre[1]] == [[[1, -1]], [[3, 1]]]
    wrong = [(t[0] + 0.5, t[1] - 0.5) for t in pre]
    sure = confirmed(net, exact, *(t.double() for t in box), pre, wrong)
    assert torch.equal(sure[0][0], pre[0][0]) and torch.equal(sure[0][1], pre[0][1])
    assert [t.tolist() for t in sure[1]] == [[[1, -0.5]], [[3, 0.5]]]


def test_every_bound_is_computed_without_tf32_and_the_setting_of_the_caller_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def tf32() -> bool:
        return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32

    def watch(name: str) -> None:
        ours = getattr(evaluation, name)

        def watching(*args: object, **options: object) -> object:
            seen.append((name, tf32()))
            return ours(*args, **options)

        monkeypatch.setattr(evaluation, name, watching)

    for name in ("ibp", "crown_intermediate"):
        watch(name)
    config, net = Config(), cnn_s(1, 28, 10).eval()
    data = ImageSet(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1]), 10)
    net[0].register_forward_hook(lambda *_: seen.append(("the chain's own check", tf32())))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        ChainNet.from_module(net, (1, 28, 28))
        evaluation.stability(net, torch.rand(2, 1, 28, 28), config)
        evaluation.ibp_verified(net, data, config)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    check = ("the chain's own check", False)
    assert seen == [check, check, ("crown_intermediate", False), check, ("ibp", False)]


def test_same_seed_gives_the_same_verdicts_nodes_and_witnesses() -> None:
    model = small_conv(4)
    x, y = labelled(model, SHAPE, 16)
    a, b = (CompleteVerifier(model, SHAPE, 0.2, 4, VerifyConfig(max_nodes=50, seed=7)).verify(x, y) for _ in range(2))
    assert statuses(a) == statuses(b) and nodes(a) == nodes(b)
    for v, w in zip(a.images, b.images, strict=True):
        assert (v.witness is None) == (w.witness is None)
        assert v.witness is None or torch.equal(v.witness, w.witness)


def test_small_image_groups_give_the_same_verdicts() -> None:
    model = small_conv(4)
    x, y = labelled(model, SHAPE, 16)
    a, b = (
        CompleteVerifier(model, SHAPE, 0.2, 4, VerifyConfig(max_nodes=50, max_images=n)).verify(x, y) for n in (3, 256)
    )
    assert statuses(a) == statuses(b) and nodes(a) == nodes(b)


def test_an_image_out_of_time_or_hopeless_is_unknown() -> None:
    model = small_conv(4)
    x, y = labelled(model, SHAPE, 16)
    for config in (VerifyConfig(pgd_restarts=0, timeout_s=1e-9), VerifyConfig(pgd_restarts=0, hopeless_below=0.0)):
        report = CompleteVerifier(model, SHAPE, 0.2, 4, config).verify(x, y)
        assert report.counts["unknown"] > 0 and report.nodes == 0


def test_progress_rises_to_one() -> None:
    model = small_conv(4)
    x, y = labelled(model, SHAPE, 16)
    seen: list[float] = []
    CompleteVerifier(model, SHAPE, 0.2, 4, VerifyConfig(max_nodes=50, max_images=5)).verify(x, y, seen.append)
    assert seen == sorted(seen) and seen[0] >= 0 and seen[-1] == 1.0 and len(set(seen)) > 3


def test_no_images_give_an_empty_report_with_accuracy_nan() -> None:
    report = CompleteVerifier(small_conv(), SHAPE, 0.1, 4).verify(torch.zeros(0, *SHAPE), torch.zeros(0).long())
    assert report.images == [] and isnan(report.verified_accuracy) and isnan(report.clean_accuracy)
    assert json.loads(report.to_json())["summary"]["verified_accuracy"] is None


def test_the_json_report_holds_the_table() -> None:
    model = small_conv(4)
    report = CompleteVerifier(model, SHAPE, 0.1, 4).verify(*labelled(model, SHAPE, 6))
    table = json.loads(report.to_json(witnesses=True))
    assert [row["status"] for row in table["images"]] == statuses(report)
    assert table["summary"]["counts"] == report.counts
    for row, v in zip(table["images"], report.images, strict=True):
        assert (row["witness"] is None) == (v.witness is None)
        assert v.witness is None or torch.equal(torch.tensor(row["witness"], dtype=torch.float64), v.witness)


def test_a_net_without_relu_is_decided_exactly() -> None:
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    x, y = labelled(model, (3,), 40)
    report = CompleteVerifier(model, (3,), 0.1, 3, VerifyConfig(pgd_restarts=0)).verify(x, y)
    assert set(statuses(report)) == {"verified", "falsified"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"eps": -0.1}, "eps must be finite and >= 0, got -0.1"),
        ({"eps": 8}, "eps must be at most 1, .* got 8"),
        ({"eps": None}, "exactly one of eps and box"),
        ({"n_classes": 5}, "n_classes must be the 4 outputs"),
        ({"model": small_conv().train()}, "model must be in eval mode"),
        ({"input_shape": (1, 6, 9)}, "input_shape does not fit"),
        ({"normalize": ((0.0,), (0.0,))}, "std must be finite and > 0"),
    ],
)
def test_bad_construction_is_refused(change: dict, text: str) -> None:
    arguments = {"model": small_conv(), "input_shape": SHAPE, "eps": 0.1, "n_classes": 4} | change
    with pytest.raises(ValueError, match=text):
        CompleteVerifier(**arguments)


@pytest.mark.parametrize(
    ("x", "y", "text"),
    [
        (torch.zeros(2, 1, 5, 6), torch.zeros(2).long(), r"x must be floating point of shape \(batch, 1, 6, 5\)"),
        (torch.zeros(2, *SHAPE, dtype=torch.uint8), torch.zeros(2).long(), "x must be floating point"),
        (torch.full((2, *SHAPE), float("nan")), torch.zeros(2).long(), "raw must be finite"),
        (torch.full((2, *SHAPE), 200.0), torch.zeros(2).long(), r"raw must be in \[0, 1\]"),
        (torch.zeros(2, *SHAPE), torch.zeros(3).long(), "y must have 2 labels, got 3"),
        (torch.zeros(2, *SHAPE), torch.tensor([0, 4]), r"y must be in \[0, 4\)"),
        (torch.zeros(2, *SHAPE), torch.tensor([0, -1]), r"y must be in \[0, 4\)"),
        (torch.zeros(2, *SHAPE), [0, 1], "y must be a tensor, got list"),
        (torch.zeros(2, *SHAPE).numpy(), torch.zeros(2).long(), "x must be a tensor, got ndarray"),
    ],
)
def test_bad_images_and_labels_are_refused(x: Tensor, y: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CompleteVerifier(small_conv(), SHAPE, 0.1, 4).verify(x, y)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"branching": "random"}, "branching must be one of kfsb, babsr, got 'random'"),
        ({"reduce": "mean"}, "reduce must be one of min, max"),
        ({"max_nodes": -1}, "max_nodes must be >= 0, got -1"),
        ({"max_rows": 0}, "max_rows must be >= 1, got 0"),
        ({"timeout_s": 0.0}, "timeout_s must be > 0, got 0.0"),
    ],
)
def test_bad_configurations_are_refused(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        VerifyConfig(**change)
