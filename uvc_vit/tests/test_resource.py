"""Facts about R, its derivatives and counted FLOPs. Numbers in brackets are acceptance checks of the specification."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from timm import create_model
from torch import Tensor

from uvc_vit.adapter import BlockDims, ViTAdapter
from uvc_vit.group_norms import group_norms, ranks
from uvc_vit.macs import block_macs, count_flops, macs
from uvc_vit.plan import Plan
from uvc_vit.resource import Accounting, Costs, Resource, mac_costs, resource
from uvc_vit.tests import nets

ENTRIES = {entry["name"]: entry for entry in json.loads((nets.REFERENCE / "macs.json").read_text())}
DEIT = [name for name in ENTRIES if name.startswith("deit")]


def meta(name: str, **options: Any) -> ViTAdapter:
    with torch.device("meta"):
        return ViTAdapter(create_model(name, **options))


def costs_of(adapter: ViTAdapter, side: int, accounting: Accounting = "exact") -> Costs:
    return mac_costs(adapter.dims, adapter.tokens((side, side)), adapter.embed_macs((side, side)), accounting)


def whole(costs: Costs, s: Tensor, r: Tensor, keep: Tensor, head_norms: Tensor) -> Resource:
    """R of whole groups."""
    return resource(costs, s.ceil(), r.ceil(), keep, ranks(head_norms) >= s[:, :1].ceil())


# The formula


@pytest.mark.parametrize("name", DEIT)
def test_multiply_adds_are_the_authors(name: str) -> None:
    entry, adapter = ENTRIES[name], meta(name)  # [8]
    cost = block_macs(adapter.dims[0], adapter.tokens((224, 224)))
    found = {
        "qkv": cost.qk_rows + cost.v_rows,
        **{key: getattr(cost, key) for key in ("qk", "av", "proj", "fc1", "fc2")},
    }
    assert found == entry["block_macs"] and cost.total == entry["block_total"]
    assert adapter.embed_macs((224, 224)) == entry["embed_macs"] and adapter.head_macs() == entry["head_macs"]
    assert macs(adapter.model, (224, 224)) == entry["total_released"] + entry["head_macs"]


@pytest.mark.parametrize("name", DEIT)
def test_each_skipped_block_saves_its_share(name: str) -> None:
    costs = costs_of(meta(name), 224)  # [5]
    zero, keep, norms = torch.zeros(12, 2), torch.ones(12), torch.rand(12, costs.values.shape[1])
    for count, expected in enumerate(ENTRIES[name]["R_after_skipping_k_blocks"]):
        keep[:count] = 0
        share = whole(costs, zero, torch.zeros_like(norms), keep, norms).share.item()
        assert share == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("accounting", "macs_left", "by_dim"), [("released", 3120, 65), ("exact", 2960, 105)])
def test_the_worked_example(accounting: Accounting, macs_left: int, by_dim: int) -> None:
    costs = mac_costs([BlockDims(8, 4, (4, 4), 16)] * 2, tokens=5, embed_macs=100, accounting=accounting)  # [4]
    s, r = torch.tensor([[1.0, 4], [0, 0]]), torch.tensor([[0.0, 2], [1, 3]])
    found = whole(costs, s, r, torch.tensor([1, 0.5]), torch.tensor([[1.0, 2], [1, 2]]))
    assert costs.dense.item() == 6020
    assert found.share.item() == pytest.approx(macs_left / 6020, abs=1e-9)
    assert found.by_amounts[0].tolist() == pytest.approx([-840 / 6020, -80 / 6020], abs=1e-9)
    assert found.by_dims[0].tolist() == pytest.approx([0, -by_dim / 6020], abs=1e-9)


@pytest.mark.parametrize(("kind", "macs_left"), [("released", 3120), ("exact", 2960), ("padded", 3065)])
def test_a_plan_counts_the_worked_example(kind: Any, macs_left: int) -> None:
    dims, neurons = tuple(range(4)), tuple(range(16))  # [4] block 1 runs by half: the mean of with it and without
    found = []
    for runs in (True, False):
        plan = Plan(
            sizes=(BlockDims(8, 4, (4, 4), 16),) * 2,
            keep_block=(True, runs),
            keep_head=((False, True), (True, True)),
            keep_dim=((dims, dims[:2]), (dims[:3], dims[:1])),
            keep_mlp=(neurons[:12], neurons),
        )
        assert plan.share(5, 100, kind) == pytest.approx(plan.macs(5, 100, kind) / 6020, abs=1e-12)
        found.append(plan.macs(5, 100, kind))
    assert sum(found) / 2 == macs_left


@pytest.mark.parametrize("gates", ["nogate", "l0", "gumbel"])
def test_r_and_its_derivatives_are_the_authors(gates: str) -> None:
    given = nets.vectors("resource")  # [8]
    adapter = nets.with_weights(given["proj_w"], given["fc2_w"], heads=3)
    costs, norms = costs_of(adapter, 16, "released"), group_norms(adapter)
    for k, (s, r) in enumerate(zip(given["s"], given["r"], strict=True)):
        logits = given["gate"].clone().requires_grad_()
        keep = torch.ones(len(s))
        if gates == "l0":
            keep = logits[:, 1] ** 2 / (logits[:, 1] ** 2 + given["eps"])
        elif gates == "gumbel":
            keep = ((logits + given["gumbel_noise"][k]) / given["tau"]).softmax(-1)[:, 1]
        found = whole(costs, s, r, keep.detach(), norms.head)
        assert found.share.item() == pytest.approx(given[f"R_{gates}"][k].item(), abs=2e-6)
        torch.testing.assert_close(found.by_amounts.float(), given[f"dRds_{gates}"][k], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.by_dims.float(), given[f"dRdr_{gates}"][k], rtol=1e-4, atol=1e-7)
        if gates != "nogate":
            (slope,) = torch.autograd.grad(keep, logits, found.by_keep.float())
            torch.testing.assert_close(slope, given[f"dRdg_{gates}"][k], rtol=1e-4, atol=1e-7)


def test_r_with_hard_gates_is_the_authors() -> None:
    given = nets.vectors("resource")  # [8]
    adapter = nets.with_weights(given["proj_w"], given["fc2_w"], heads=3)
    costs, norms = costs_of(adapter, 16, "released"), group_norms(adapter)
    for k, (s, r) in enumerate(zip(given["s"], given["r"], strict=True)):
        keep = (given["gate"] + given["gumbel_noise"][k]).argmax(-1)
        assert whole(costs, s, r, keep, norms.head).share.item() == pytest.approx(
            given["R_gumbel_hard"][k].item(), abs=2e-6
        )


# Its laws


SIZES = [BlockDims(8, 4, (4, 4, 4), 16), BlockDims(8, 4, (4, 4, 4), 10)]
NORMS = torch.tensor([[1.0, 2, 3], [3, 1, 2]])


@pytest.mark.parametrize("accounting", ["released", "exact"])
def test_r_falls_with_every_amount_that_counts(accounting: Accounting) -> None:
    costs = mac_costs(SIZES, 5, 100, accounting)  # [6]
    s, r, keep = torch.tensor([[1.0, 2], [0, 0]]), torch.ones(2, 3), torch.ones(2)
    before = whole(costs, s, r, keep, NORMS).share
    for block in range(2):
        for kind in range(2):
            more = s.clone()
            more[block, kind] += 1
            assert whole(costs, more, r, keep, NORMS).share < before
        for head in range(3):
            more = r.clone()
            more[block, head] += 1
            dead = (block, head) == (0, 0)
            after = whole(costs, s, more, keep, NORMS).share
            assert after == before if dead else after < before


@pytest.mark.parametrize("accounting", ["released", "exact"])
def test_r_has_a_slope_where_nothing_is_pruned_yet(accounting: Accounting) -> None:
    costs = mac_costs(SIZES, 5, 100, accounting)  # [7] a clamp with derivative 0 at its bounds would never prune
    found = whole(costs, torch.zeros(2, 2), torch.zeros(2, 3), torch.ones(2), NORMS)
    assert (found.by_amounts < 0).all() and (found.by_dims < 0).all() and found.share == 1


@pytest.mark.parametrize("accounting", ["released", "exact"])
def test_with_fixed_ranks_a_unit_difference_equals_the_slope(accounting: Accounting) -> None:
    costs = mac_costs(SIZES, 5, 100, accounting)  # [9]
    s, r, keep, alive = (
        torch.tensor([[0.0, 2], [0, 5]]),
        torch.zeros(2, 3),
        torch.tensor([1, 0.3]),
        torch.ones(2, 3) > 0,
    )
    start = resource(costs, s, r, keep, alive)
    for block in range(2):
        for kind in range(2):
            more = s.clone()
            more[block, kind] += 1
            difference = resource(costs, more, r, keep, alive).share - start.share
            assert difference.item() == pytest.approx(start.by_amounts[block, kind].item(), abs=1e-6)
        more = r.clone()
        more[block, 1] += 1
        difference = resource(costs, s, more, keep, alive).share - start.share
        assert difference.item() == pytest.approx(start.by_dims[block, 1].item(), abs=1e-6)


def test_all_groups_of_a_block_together_are_the_block() -> None:
    costs = mac_costs(SIZES, 5, 100)  # [9]
    found = whole(costs, torch.zeros(2, 2), torch.zeros(2, 3), torch.ones(2), NORMS)
    totals = (found.by_amounts * torch.stack([costs.heads, costs.hidden], 1)).sum(1)
    torch.testing.assert_close(totals, -found.by_keep)


# Counted by torch


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deit_tiny_patch16_224", 1_253_683_200),
        ("deit_small_patch16_224", 4_598_882_304),
        ("deit_base_patch16_224", 17_563_828_224),
        ("deit_tiny_distilled_patch16_224", 1_261_003_776),
    ],
)
def test_torch_counts_the_same_integer(name: str, expected: int) -> None:
    adapter = meta(name)  # [14] without weights: counting needs shapes only
    assert macs(adapter.model, (224, 224)) == expected
    assert count_flops(adapter.model, (224, 224)) == 2 * expected


@pytest.mark.parametrize(
    "options",
    [{"qkv_bias": False}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}, {"side": 28, "patch": 14}],
)
def test_torch_counts_the_same_for_other_transformers(options: dict[str, Any]) -> None:
    model, side = nets.vit(**options), options.get("side", 16)
    assert count_flops(model, (side, side)) == 2 * macs(model, (side, side))


def test_a_convolutional_hybrid_whose_patches_are_of_feature_maps_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = create_model("vit_tiny_r_s16_p8_224")
    with pytest.raises(NotImplementedError, match="HybridEmbed: only patches of one convolution or T2T's"):
        ViTAdapter(model)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = nets.vit().train()
    count_flops(model, (16, 16))
    assert model.training and all(block.attn.fused_attn for block in model.blocks)
