"""Facts about norms, ranks and the proximal step. Numbers in brackets are acceptance checks of the specification."""

from __future__ import annotations

import pytest
import torch

from uvc_vit.adapter import ViTAdapter
from uvc_vit.group_norms import GroupNorms, group_norms, least, ranks
from uvc_vit.prox import divide_columns, shrinkage
from uvc_vit.tests import nets


@pytest.mark.parametrize(("amount", "total", "following"), [(0.0, 0, 1), (1.2, 3, 3), (4.0, 10, 4)])
def test_least_sums_the_smallest_norms_and_its_slope_is_the_next_one(amount: float, total: int, following: int) -> None:
    found = least(torch.tensor([4.0, 1, 3, 2]), torch.tensor(amount))  # [1]
    assert [value.item() for value in found] == [total, following]


def test_least_is_the_authors() -> None:
    given = nets.vectors("group_norms")  # [8]
    amounts = given["least_s"]
    total, slope = least(given["least_vec"].expand(len(amounts), -1), amounts)
    torch.testing.assert_close(total.double(), given["least_sum"], rtol=1e-5, atol=0)
    torch.testing.assert_close(slope.double(), given["least_grad"], rtol=1e-5, atol=0)


def test_group_norms_are_the_authors() -> None:
    given = nets.vectors("group_norms")  # [8]
    found = group_norms(nets.with_weights(given["proj_w"], given["fc2_w"], heads=3))
    for value, key in ((found.column, "col_sq"), (found.head, "head_sq"), (found.neuron, "mlp_sq")):
        torch.testing.assert_close(value, given[key], rtol=1e-5, atol=0)


def test_absent_groups_are_infinite_and_never_among_the_least() -> None:
    model = nets.vit(depth=2)
    model.blocks[1].mlp = nets.vit(depth=1, mlp_ratio=1.0).blocks[0].mlp
    norms = group_norms(ViTAdapter(model)).neuron
    assert norms[1, 16:].isinf().all() and norms[1, :16].isfinite().all() and norms[0].isfinite().all()
    total, following = least(norms, torch.tensor([0.0, 16.0]))
    torch.testing.assert_close(total[1], norms[1, :16].sum())
    assert following[1] == norms[1, :16].max()


def test_of_equal_norms_the_first_are_pruned_first() -> None:
    assert ranks(torch.tensor([2.0, 1, 2, 1, 0])).tolist() == [3, 1, 4, 2, 0]  # [27]
    assert ranks(torch.zeros(40)).tolist() == list(range(40))  # [29]


def test_the_proximal_step_is_the_authors() -> None:
    given = nets.vectors("prox_masks")  # [8]
    adapter = nets.with_weights(given["proj_w"], given["fc2_w"], heads=3)
    norms = group_norms(adapter)
    amounts = (given["s"], given["r"])
    total = torch.stack([least(norms.head, given["s"][:, 0])[0], least(norms.neuron, given["s"][:, 1])[0]], 1)
    torch.testing.assert_close(total, given["least_s_norm"], rtol=1e-5, atol=0)
    torch.testing.assert_close(least(norms.column, given["r"])[0], given["least_r_norm"], rtol=1e-5, atol=0)
    divide_columns(adapter, *shrinkage(norms, *amounts, given["y"], given["p"], float(given["lr"])))
    for index, block in enumerate(adapter.blocks):
        torch.testing.assert_close(block.attn.proj.weight.data, given["proj_after"][index], rtol=1e-6, atol=0)
        torch.testing.assert_close(block.mlp.fc2.weight.data, given["fc2_after"][index], rtol=1e-6, atol=0)


def one_block() -> tuple[ViTAdapter, GroupNorms]:
    """One block with two heads of two dimensions, whose first column is (3, 4, 0, 0) and the smallest of all."""
    proj = torch.full((1, 4, 4), 9.0)
    proj[0, :, 0] = torch.tensor([3.0, 4, 0, 0])
    adapter = nets.with_weights(proj, torch.full((1, 4, 8), 9.0), heads=2)
    return adapter, group_norms(adapter)


def test_a_selected_column_is_divided_by_one_plus_two_eta_y_and_no_other_bit_changes() -> None:
    adapter, norms = one_block()  # [2]
    weight = adapter.blocks[0].attn.proj.weight
    before, r = weight.detach().clone(), torch.tensor([[1.0, 0]])
    divide_columns(adapter, *shrinkage(norms, torch.zeros(1, 2), r, torch.zeros(1, 2), torch.full((1, 2), 2.0), 0.1))
    assert torch.equal(weight[:, 0], before[:, 0] / 1.4) and torch.equal(weight[:, 1:], before[:, 1:])


@pytest.mark.parametrize(("eta", "multiplier"), [(0.0, 2.0), (0.1, 0.0)])
def test_without_a_step_or_a_multiplier_the_proximal_step_changes_nothing(eta: float, multiplier: float) -> None:
    adapter, norms = one_block()  # [2]
    before = [parameter.detach().clone() for parameter in adapter.model.parameters()]
    y = torch.full((1, 2), multiplier)
    divide_columns(adapter, *shrinkage(norms, torch.ones(1, 2), torch.ones(1, 2), y, y, eta))
    assert all(map(torch.equal, before, adapter.model.parameters()))


def test_a_column_pruned_by_both_constraints_is_divided_twice_with_ranks_from_before() -> None:
    _, norms = one_block()  # [3]
    one = torch.tensor([[1.0, 0]])
    column, neuron = shrinkage(norms, one, one, torch.tensor([[2.0, 2.0]]), torch.ones(1, 2), 0.1)
    torch.testing.assert_close(column, torch.tensor([[[1.2 * 1.4, 1.4], [1.0, 1.0]]]))
    assert (neuron == 1).all()


def test_norms_after_shrinking_need_no_second_look_at_the_weights() -> None:
    given = nets.vectors("prox_masks")
    adapter = nets.with_weights(given["proj_w"], given["fc2_w"], heads=3)
    norms = group_norms(adapter)
    factors = shrinkage(norms, given["s"], given["r"], given["y"], given["p"], 0.05)
    divide_columns(adapter, *factors)
    predicted, found = norms.scaled(*(1 / factor for factor in factors)), group_norms(adapter)
    for name in ("column", "head", "neuron"):
        torch.testing.assert_close(getattr(predicted, name), getattr(found, name), rtol=1e-5, atol=0)
