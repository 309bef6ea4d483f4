"""Our bounds against auto_LiRPA, on nets and boxes that have no stored reference. Skipped without the library."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from certified_pruning.alpha_beta import optimize_alpha_beta
from certified_pruning.auto_lirpa import bounded, lirpa_margins, relu_input_bounds
from certified_pruning.chain import ChainNet
from certified_pruning.crown import crown_intermediate, crown_lower
from certified_pruning.ibp import PreBounds, ibp, input_box, margin_spec
from certified_pruning.tests.nets import images, mlp, randomise_norms, small_conv

if importlib.util.find_spec("auto_LiRPA") is None:
    pytest.skip("auto_LiRPA is not installed", allow_module_level=True)

torch.set_num_threads(1)


def strided_net() -> nn.Sequential:
    """Input (3, 8, 8): three convolutions, of which two with batch norm."""
    torch.manual_seed(5)
    layers = [nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 1, 1), nn.BatchNorm2d(6)]
    layers += [nn.ReLU(), nn.Conv2d(6, 4, 2, 2, 0), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10), nn.ReLU()]
    return randomise_norms(nn.Sequential(*layers, nn.Linear(10, 5)), 5).eval()


CASES = {
    "mlp": (lambda: mlp([8, 20, 15, 6], 3), (8,), 0.12),
    "conv": (lambda: small_conv(4), (1, 6, 5), 0.1),
    "strided": (strided_net, (3, 8, 8), 0.03),
}


class Case:
    def __init__(self, name: str) -> None:
        build, shape, eps = CASES[name]
        self.model = build()
        x = images(shape, 5, seed=11)
        self.net = ChainNet.from_module(self.model, shape)
        self.box = input_box(x, eps)
        self.C, _ = margin_spec(self.net.forward(x).argmax(1), self.net.n_out)
        self.oracle = bounded(self.model, shape)

    def theirs(self, method: str, pre: PreBounds | None = None) -> Tensor:
        return lirpa_margins(self.oracle, *self.box, self.C, method, pre=pre)

    def crown(self, pre: PreBounds) -> Tensor:
        return crown_lower(self.net, self.C, *self.box, pre)


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_ibp_margins_equal_the_library(case: Case) -> None:
    ours = ibp(case.net, *case.box, case.C).out[0]
    assert torch.allclose(ours, case.theirs("ibp"), atol=1e-4)


def test_crown_ibp_margins_equal_the_library(case: Case) -> None:
    ours = case.crown(ibp(case.net, *case.box).pre)
    assert torch.allclose(ours, case.theirs("crown-ibp"), atol=1e-4)


def test_crown_margins_and_bounds_of_unstable_neurons_equal_the_library(case: Case) -> None:
    """Image by image: in a batch the library takes CROWN bounds for every neuron unstable in any of its images."""
    pre = crown_intermediate(case.net, *case.box, intersect=False)
    margins = case.crown(pre)
    compared = 0
    for i in range(len(case.C)):
        one = slice(i, i + 1)
        theirs = lirpa_margins(case.oracle, case.box[0][one], case.box[1][one], case.C[one], "crown")
        assert torch.allclose(margins[one], theirs, atol=1e-4)
        for (l, u), (lower, upper) in zip(pre, relu_input_bounds(case.oracle), strict=True):  # noqa: E741
            unstable = (lower < 0) & (upper > 0)
            assert torch.allclose(l[one][unstable], lower[unstable], atol=1e-4)
            assert torch.allclose(u[one][unstable], upper[unstable], atol=1e-4)
            compared += int(unstable.sum())
    assert compared > 20


def test_alpha_margins_reach_the_library_and_both_improve_on_crown(case: Case) -> None:
    pre = crown_intermediate(case.net, *case.box)
    crown = case.crown(pre)
    ours = optimize_alpha_beta(case.net, case.C, *case.box, pre, steps=100).lb
    theirs = case.theirs("alpha-crown", pre)
    assert bool((ours >= theirs - 2e-3).all())
    assert (ours - crown).max() > 0.01 and (theirs - crown).max() > 0.01
