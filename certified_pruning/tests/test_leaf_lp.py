"""The exact answer at a leaf, against an exhaustive grid of the plane."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from certified_pruning import leaf_lp
from certified_pruning.chain import ChainNet
from certified_pruning.ibp import ibp
from certified_pruning.leaf_lp import Leaf, solve_leaf
from certified_pruning.rows import Splits, join
from certified_pruning.tests.nets import mlp

torch.set_num_threads(1)


@pytest.mark.parametrize("seed", range(5))
def test_leaves_cover_the_plane_and_each_has_its_exact_minimum(seed: int) -> None:
    net = ChainNet.from_module(mlp([2, 4, 3, 2], seed), (2,), torch.float64)
    lb, ub = -torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    lower, upper = (t[0] for t in join(ibp(net, lb[None], ub[None]).pre, lb[None]))
    neuron = ((lower < 0) & (upper > 0)).nonzero().squeeze(1)
    t = torch.linspace(-1, 1, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(t, t)
    z = torch.cat([net.head(k).forward(grid) for k in range(2)], 1)[:, neuron]
    C = torch.tensor([1.0, -1.0], dtype=torch.float64)
    value = net.forward(grid) @ C
    empty = 0
    for pattern in range(2 ** len(neuron)):
        sign = torch.tensor([1 if pattern >> i & 1 else -1 for i in range(len(neuron))])
        leaf = solve_leaf(net, C, lb, ub, lower, upper, Splits(neuron[None], sign[None]))
        inside = (z * sign >= 0).all(1)
        if not inside.any():
            empty += leaf.lb == float("inf")
            continue
        assert leaf.x is not None
        least = float(value[inside].min())
        assert leaf.lb <= least + 1e-9
        assert leaf.lb >= least - 0.02  # the grid misses the vertices by up to a step
        assert float(net.forward(leaf.x[None])[0] @ C) == pytest.approx(leaf.lb, abs=1e-6)
    assert empty > 0


def test_a_solver_that_calls_a_leaf_infeasible_is_believed_only_with_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    net = ChainNet.from_module(mlp([2, 3, 2]), (2,), torch.float64)
    one = torch.ones(3, dtype=torch.float64)
    splits = Splits(torch.tensor([[0, 1, 2]]), torch.ones(1, 3))
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    inside = (net.head(0).forward(torch.cartesian_prod(x, x)) >= 0).all(1)
    assert inside.any()
    monkeypatch.setattr(leaf_lp, "linprog", lambda *_, **__: SimpleNamespace(status=2))
    leaf = solve_leaf(net, one[:2], -one[:2], one[:2], -one, one, splits)
    assert leaf == Leaf(-float("inf"), None)


def test_an_undecided_neuron_is_refused() -> None:
    net = ChainNet.from_module(mlp([2, 3, 2]), (2,), torch.float64)
    one = torch.ones(3, dtype=torch.float64)
    box = -one[:2], one[:2]
    splits = Splits(torch.tensor([[0, 1]]), torch.tensor([[1, 1]]))
    with pytest.raises(ValueError, match="splits must decide every unstable neuron"):
        solve_leaf(net, one[:2], *box, -one, one, splits)
