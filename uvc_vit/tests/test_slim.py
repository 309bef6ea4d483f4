"""Facts about plans, masked and slim models. Numbers in brackets are acceptance checks of the specification."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from uvc_vit.adapter import ViTAdapter
from uvc_vit.controller import UVCController
from uvc_vit.macs import count_flops, macs
from uvc_vit.masked import apply_plan
from uvc_vit.plan import Plan
from uvc_vit.slim import Layout, slim
from uvc_vit.slim_attention import SlimAttention
from uvc_vit.tests import nets
from uvc_vit.uvc_config import UVCConfig
from uvc_vit.verify import verify

DOUBLE = {"float32": (torch.float32, 1e-5), "float64": (torch.float64, 1e-12)}


def random_plan(model: nn.Module, seed: int = 0, least: int = 1) -> Plan:
    """About half of everything."""
    draw, full = random.Random(seed), Plan.full(ViTAdapter(model).dims)

    def some(count: int) -> tuple[int, ...]:
        return tuple(sorted(draw.sample(range(count), draw.randint(min(least, count), count))))

    return replace(
        full,
        keep_block=(True, False, *(draw.random() < 0.7 for _ in full.sizes[2:])),
        keep_head=tuple(tuple(draw.random() < 0.7 for _ in sizes.v_dims) for sizes in full.sizes),
        keep_dim=tuple(tuple(some(size) for size in sizes.v_dims) for sizes in full.sizes),
        keep_mlp=tuple(some(sizes.hidden) for sizes in full.sizes),
    )


def changed(model: nn.Module, block: int = 0, **entries: Any) -> Plan:
    """The full plan with other entries for one block."""
    plan = Plan.full(ViTAdapter(model).dims)
    for name, value in entries.items():
        plan = replace(plan, **{name: tuple(value if i == block else old for i, old in enumerate(getattr(plan, name)))})
    return plan


PLANS: dict[str, Any] = {
    "random": random_plan,
    "one head": lambda model: changed(model, keep_head=(False, True)),
    "no head": lambda model: changed(model, keep_head=(False, False)),
    "one dimension": lambda model: changed(model, keep_dim=((3,), tuple(range(8)))),
    "no dimension in a head": lambda model: changed(model, keep_dim=((), tuple(range(8)))),
    "one neuron": lambda model: changed(model, keep_mlp=(5,)),
    "no neuron": lambda model: changed(model, keep_mlp=()),
    "all": lambda model: changed(model),
    "one block": lambda model: replace(changed(model), keep_block=(False, True, False)),
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without qkv bias": {"qkv_bias": False},
    "LayerScale": {"init_values": 0.5},
    "qk norm": {"qk_norm": True},
    "registers": {"reg_tokens": 2},
    "average pool": {"global_pool": "avg", "class_token": False},
    "patch 14": {"side": 28, "patch": 14},
}


def distilled() -> VisionTransformerDistilled:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 16}
    return nets.randomized(VisionTransformerDistilled(depth=3, num_heads=2, mlp_ratio=2, **sizes).eval())


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    model = copy.deepcopy(model)
    apply_plan(model, plan)
    return model


# Equal outputs


@pytest.mark.parametrize("layout", ["padded", "grouped"])
@pytest.mark.parametrize("precision", DOUBLE)
@pytest.mark.parametrize("name", PLANS)
def test_the_slim_model_computes_what_the_masked_one_does(name: str, precision: str, layout: Layout) -> None:
    dtype, atol = DOUBLE[precision]  # [12]
    model = nets.vit().to(dtype)
    plan = PLANS[name](model)
    for count in (1, 7, 64):
        verify(masked(model, plan), slim(model, plan, layout), nets.images(count).to(dtype), atol)
    assert (
        name == "all"
        or (masked(model, plan)(nets.images().to(dtype)) - model(nets.images().to(dtype))).abs().max() > 1e-3
    )


@pytest.mark.parametrize("layout", ["padded", "grouped"])
@pytest.mark.parametrize("name", [*MODELS, "distilled"])
def test_every_kind_of_vision_transformer_can_be_slimmed(name: str, layout: Layout) -> None:
    model: Any = distilled() if name == "distilled" else nets.vit(**MODELS[name])  # [12]
    side = MODELS.get(name, {}).get("side", 16)
    plan = random_plan(model)
    smaller = slim(model, plan, layout)
    verify(masked(model, plan), smaller, nets.images(7, side))
    assert count_flops(smaller, (side, side)) == 2 * macs(smaller, (side, side))  # [14]
    model = model.double()
    verify(masked(model, plan), slim(model, plan, layout), nets.images(7, side).double(), 1e-12)


def test_fused_attention_sees_values_as_wide_as_queries_and_equals_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nets.vit()
    smaller = slim(model, changed(model, keep_dim=((3,), (0, 2, 5))), "grouped")
    fused, widths = nn.functional.scaled_dot_product_attention, []

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        widths.append((q.shape[-1], v.shape[-1]))
        return fused(q, k, v, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    outputs = smaller(nets.images())
    assert set(widths) == {(8, 8)}  # its fast form needs that
    for block in smaller.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(smaller(nets.images()), outputs, rtol=0, atol=1e-5)
    assert len(widths) == 3


def test_a_slim_model_can_be_slimmed_again() -> None:
    model = nets.vit(depth=4)  # [12], [26]
    for layout in ("padded", "grouped"):
        first = slim(model, random_plan(model, 1, least=4), layout)
        plan = random_plan(first, 2, least=2)
        second = slim(first, plan, layout)
        verify(masked(first, plan), second, nets.images(7))
        assert count_flops(second, (16, 16)) == 2 * macs(second, (16, 16)) < 2 * macs(first, (16, 16))


def test_the_ratios_of_two_compressions_multiply() -> None:
    model = nets.vit(depth=4)  # [26]
    adapter = ViTAdapter(model)
    tokens, embed, head = adapter.tokens((16, 16)), adapter.embed_macs((16, 16)), adapter.head_macs()
    plan = random_plan(model, 1, least=4)
    first = slim(model, plan, "grouped")
    again = random_plan(first, 2, least=2)
    second = slim(first, again, "grouped")
    product = plan.share(tokens, embed) * again.share(tokens, embed)
    whole = [macs(net, (16, 16)) - head for net in (model, second)]
    assert product == pytest.approx(whole[1] / whole[0], rel=1e-12)


def test_a_model_slimmed_after_masking_is_the_model_slimmed_before() -> None:
    model = nets.vit()
    plan = random_plan(model)
    one, two = slim(model, plan), slim(masked(model, plan), plan)
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


# What is left


def test_kept_biases_and_the_scale_of_attention_are_those_of_the_model() -> None:
    model = nets.vit()  # [13]
    plan = changed(model, keep_head=(False, True), keep_dim=((), (1, 2)), keep_mlp=(3, 9))
    block, smaller = model.blocks[0], slim(model, plan).blocks[0]
    assert torch.equal(smaller.mlp.fc1.bias, block.mlp.fc1.bias[[3, 9]])
    assert torch.equal(smaller.mlp.fc2.bias, block.mlp.fc2.bias)
    assert torch.equal(smaller.attn.proj.bias, block.attn.proj.bias)
    assert smaller.attn.scale == block.attn.scale == 8**-0.5
    wrong = slim(model, plan)
    wrong.blocks[0].attn.scale = 2**-0.5
    with pytest.raises(ValueError, match=r"must be within 0.0001"):
        verify(masked(model, plan), wrong, nets.images(), 1e-4)


def test_slim_has_fewer_parameters_and_no_masks_and_its_weights_load_by_the_plan_alone() -> None:
    model = nets.vit(depth=4)  # [16]
    plan = random_plan(model)
    smaller, hidden = slim(model, plan), masked(model, plan)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in hidden.parameters())
    assert list(smaller.buffers()) == []
    fresh = slim(nets.vit(depth=4, seed=5), Plan.from_json(plan.to_json()))
    fresh.load_state_dict(smaller.state_dict())
    assert torch.equal(fresh(nets.images()), smaller(nets.images()))


def test_slimming_leaves_the_model_alone_and_shares_no_memory_with_it() -> None:
    model = nets.vit().train()
    before = copy.deepcopy(model.state_dict())
    smaller = slim(model, random_plan(model))
    assert smaller.training and smaller.blocks[0].attn.training
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert isinstance(smaller.blocks[0].attn, SlimAttention) and len(model.blocks) == 3


def test_a_plan_without_blocks_leaves_embedding_and_head_with_a_warning() -> None:
    model = nets.vit()
    plan = replace(changed(model), keep_block=(False,) * 3)
    with pytest.warns(UserWarning, match="keeps no block"):
        smaller = slim(model, plan)
    verify(masked(model, plan), smaller, nets.images())


@pytest.mark.parametrize("layout", ["padded", "grouped"])
def test_training_the_slim_model_is_training_the_masked_one(layout: Layout) -> None:
    model = nets.vit(depth=4).double()  # [15]
    plan = random_plan(model)
    big, small = masked(model, plan).train(), slim(model, plan, layout).train()
    images, labels = nets.images(8).double(), torch.arange(8) % 5

    def trained(net: nn.Module, after: Any, before: Any) -> Tensor:
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.05)
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            before()
            norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            assert norm > 0.1
            optimizer.step()
            after()
        return net.eval()(images)

    mask = lambda: apply_plan(big, plan, grads=True)  # noqa: E731
    difference = trained(big, mask, mask) - trained(small, lambda: None, lambda: None)
    assert difference.abs().max() <= 1e-12


def test_a_model_slimmed_with_its_gates_attached_has_none_and_can_be_saved(tmp_path: Path) -> None:
    model = nets.vit()
    plan = random_plan(model)
    method = UVCController(ViTAdapter(model), UVCConfig(), (16, 16))
    method.attach()
    smaller = slim(model, plan)
    torch.save(smaller, tmp_path / "small.pt")
    method.detach()
    found = torch.load(tmp_path / "small.pt", weights_only=False)
    assert torch.equal(found(nets.images()), slim(model, plan)(nets.images()))


# Refusals


def test_plans_survive_json_and_equal_plans_have_equal_hashes() -> None:
    plan = random_plan(nets.vit())
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.sha256() == plan.sha256() != random_plan(nets.vit(), 1).sha256()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"keep_mlp":[[', '"keep_mlp":[[9999,', "block 0 keep_mlp must be ascending indices below 32"),
        ('"keep_mlp":[[', '"keep_mlp":[[-3,', "at least 0, got -3"),
        ('"keep_mlp":[[', '"keep_mlp":[["1",', "whole"),
        ('"keep_block":[true', '"keep_block":[1', "must be true or false, got 1"),
        ('"keep_block":[true', '"keep_block":[true,true', "keep_block must have 3 blocks, got 4"),
        ('"keep_head":[[', '"keep_head":[[true,', "block 0 keep_head must have 2 heads, got 3"),
        ('"keep_dim":[[[0', '"keep_dim":[[[7', "keep_dim of head 0 must be ascending indices below 8"),
        ('"keep_mlp"', '"keep_it"', "not a plan: KeyError"),
        ("{", "[" * 100_000, "not a plan"),
        ("{", "", "not a plan: JSONDecodeError"),
        ('"dim":16', '"dim":NaN', "whole"),
        ('"dim":16', '"dim":true', "whole"),
        ('"dim":16', '"dim":' + "9" * 5000, "limit"),
        ('"v_dims":[8,8]', '"v_dims":8', "not a plan: TypeError"),
        ('"sizes":[{', '"sizes":[[],{', "not a plan: TypeError"),
    ],
)
def test_a_damaged_plan_is_refused_by_block_and_field(old: str, new: str, message: str) -> None:
    text = Plan.full(ViTAdapter(nets.vit()).dims).to_json()
    assert old in text
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text.replace(old, new, 1))


def test_a_plan_for_another_model_is_refused_by_block_and_field() -> None:
    plan = Plan.full(ViTAdapter(nets.vit()).dims)
    for other, message in (
        (nets.vit(depth=2), "plan is for 3 blocks, the model has 2"),
        (nets.vit(mlp_ratio=4.0), "plan block 0 is for hidden 32, the model has 64"),
        (nets.vit(heads=4), "plan block 0 is for qk_dim 8, the model has 4"),
    ):
        for use in (slim, apply_plan):
            with pytest.raises(ValueError, match=message):
                use(other, plan)


def test_verify_refuses_models_in_training_mode_and_outputs_that_are_no_numbers() -> None:
    model = nets.vit()
    with pytest.raises(ValueError, match="slim model must be in eval mode"):
        verify(model, nets.vit().train(), nets.images())
    with pytest.raises(ValueError, match="got nan"):
        verify(model, nets.vit(), nets.images() * torch.nan)


def test_masks_and_unknown_layouts_are_refused() -> None:
    model = nets.vit()
    plan = random_plan(model)
    with pytest.raises(ValueError, match="layout must be padded or grouped, got 'ragged'"):
        slim(model, plan, "ragged")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="takes no mask"):
        slim(model, plan).blocks[0].attn(torch.zeros(1, 2, 16), is_causal=True)
