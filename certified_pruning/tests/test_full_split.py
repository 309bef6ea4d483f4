"""Where at most eight ReLUs are unstable every image is decided, and rightly: against one LP a pattern of the ReLUs."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from certified_pruning import leaf_lp
from certified_pruning.affine import Affine
from certified_pruning.chain import ChainNet
from certified_pruning.ibp import ibp, input_box, margin_spec
from certified_pruning.tests.nets import images, mlp, small_conv
from certified_pruning.verdicts import VerifyConfig, VerifyReport
from certified_pruning.verifier import CompleteVerifier

torch.set_num_threads(1)
MOST = 8
BLUNT = {"max_nodes": None, "pgd_restarts": 0, "root_steps": 0, "bab_steps": 0}  # little but the splits decides


class Case(NamedTuple):
    """A network, images of class 0 of it with 1 to 8 unstable ReLUs, their number, and the exact smallest margins."""

    model: nn.Module
    eps: float
    x: Tensor
    unstable: list[int]
    margin: list[float]

    def verify(self, **options: object) -> VerifyReport:
        config, y = VerifyConfig(**options), torch.zeros(len(self.x), dtype=torch.long)  # type: ignore[arg-type]
        classes = self.model[-1].out_features
        return CompleteVerifier(self.model, tuple(self.x.shape[1:]), self.eps, classes, config).verify(self.x, y)

    @property
    def expected(self) -> list[str]:
        return ["verified" if margin > 0 else "falsified" for margin in self.margin]


def smallest_margin(net: ChainNet, C: Tensor, x_lb: Tensor, x_ub: Tensor, on: Tensor, unstable: Tensor) -> float:
    """Minimum over the box (n,) of the rows C (S, out): the least of the LPs of all patterns of the unstable ReLUs."""
    box, least = torch.stack([x_lb, x_ub], 1).numpy(), np.inf
    maps = [matrix_of(affine) for affine in net.affines]
    for pattern in product([False, True], repeat=int(unstable.sum())):
        active = on.clone()
        active[unstable] = torch.tensor(pattern)
        weight, bias = maps[0]
        lines, limits = [], []  # sign (w x + b) >= 0 as lines x <= limits
        for k, (w, b) in enumerate(maps[1:]):
            here = slice(net.offsets[k], net.offsets[k + 1])
            sign, free = torch.where(active[here], 1.0, -1.0).double(), unstable[here]
            lines.append(-(sign[:, None] * weight)[free])
            limits.append((sign * bias)[free])
            weight, bias = w @ (weight * active[here, None]), w @ (bias * active[here]) + b
        A, limit = torch.cat(lines).numpy(), torch.cat(limits).numpy()
        for row in C:
            found = linprog((row @ weight).numpy(), A_ub=A, b_ub=limit, bounds=box, method="highs")
            if found.status == 2:  # no point of the box has this pattern
                break
            assert found.status == 0
            least = min(least, found.fun + float(row @ bias))
    return least


def matrix_of(affine: Affine) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,)."""
    eye = torch.eye(prod(affine.in_shape), dtype=torch.float64)
    return (affine.forward(eye) - affine.bias).T, affine.bias


def case(model: nn.Sequential, shape: tuple[int, ...], eps: float, n: int) -> Case:
    """The bias of class 0 is moved so that half of the margins are below 0, none of them by much."""
    for layer in model[:-1]:
        if isinstance(layer, nn.Linear):
            layer.weight.data *= 2
    net = ChainNet.from_module(model, shape, torch.float64)
    x = images(shape, n, seed=1)
    C, _ = margin_spec(torch.zeros(n, dtype=torch.long), net.n_out, torch.float64)
    x_lb, x_ub = (t.flatten(1) for t in input_box(x.double(), eps))
    lower, upper = (torch.cat(t, 1) for t in zip(*ibp(net, x_lb, x_ub).pre, strict=True))
    unstable = (lower < 0) & (upper > 0)
    few = ((unstable.sum(1) >= 1) & (unstable.sum(1) <= MOST)).nonzero().squeeze(1)
    found = [smallest_margin(net, C[i], x_lb[i], x_ub[i], lower[i] >= 0, unstable[i]) for i in few]
    clean = (C[few] @ net.forward(x.double())[few, :, None]).squeeze(2).amin(1)
    shift = torch.tensor(found).median() + 1e-3
    keep = clean - shift > 1e-3
    model[-1].bias.data[0] -= shift
    margins = (torch.tensor(found) - shift)[keep].tolist()
    assert all(abs(margin) > 1e-5 for margin in margins)
    return Case(model, eps, x[few][keep], unstable.sum(1)[few][keep].tolist(), margins)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    nets = [case(mlp([2, 5, 4, 3], seed), (2,), 0.4, 6) for seed in range(4)]
    nets += [case(mlp([2, 4, 4, 2], seed), (2,), 0.5, 6) for seed in range(6)]
    nets += [case(mlp([3, 6, 2], seed), (3,), 0.5, 6) for seed in range(4)]
    return [*nets, *(case(small_conv(seed, classes=2), (1, 6, 5), 0.02, 6) for seed in range(2))]


def test_the_cases_are_many_and_of_both_kinds(cases: list[Case]) -> None:
    expected = [status for case in cases for status in case.expected]
    assert len(expected) >= 60 and min(map(expected.count, ("verified", "falsified"))) >= 15
    assert {count for case in cases for count in case.unstable} >= set(range(2, MOST + 1))


@pytest.mark.parametrize("options", [BLUNT, BLUNT | {"branching": "babsr"}, {"max_nodes": None}])
def test_every_image_is_verified_or_falsified_as_it_truly_is(cases: list[Case], options: dict[str, object]) -> None:
    stages = set()
    for case in cases:
        report = case.verify(**options)
        assert [v.status for v in report.images] == case.expected
        targets = case.model[-1].out_features - 1
        for verdict, count, margin in zip(report.images, case.unstable, case.margin, strict=True):
            assert verdict.nodes <= targets * (2 ** (count + 1) - 2)  # no tree over `count` ReLUs has more
            assert verdict.lb <= margin + 1e-5
            stages.add(f"{verdict.status}/{verdict.stage}")
    if "bab_steps" in options:
        assert {"falsified/bab", "falsified/lp", "verified/lp"} <= stages


def test_without_scipy_an_image_is_at_worst_unknown(cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaf_lp, "linprog", None)
    found = [
        (v.status, e) for case in cases[::3] for v, e in zip(case.verify(**BLUNT).images, case.expected, strict=True)
    ]
    assert all(status in (expected, "unknown") for status, expected in found)
    assert sum(status == expected for status, expected in found) >= len(found) // 2
