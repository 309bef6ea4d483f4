"""Facts about every supported attention class: the efficient form is the map's definition; others are refused."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import timm
import torch
from timm.layers import AttentionRope
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from vit_antioversmooth.attentions import find_attentions, prefix_tokens
from vit_antioversmooth.attnscale import apply_attnscale
from vit_antioversmooth.featscale import apply_featscale
from vit_antioversmooth.scales import remove_scales, scale_parameters
from vit_antioversmooth.tests import nets

NAFLEX = NaFlexVitCfg(
    embed_dim=24, depth=2, num_heads=3, patch_size=4, pos_embed_grid_size=(4, 4), class_token=True, global_pool="token"
)
every_net = pytest.mark.parametrize("name", list(nets.NETS))
FOLDABLE = [name for name in nets.NETS if name not in ("scale_norm", "eva")]
every_form = pytest.mark.parametrize(
    ("name", "mode"), [*((name, "auto") for name in nets.NETS), *((name, "folded") for name in FOLDABLE)]
)
attnscale_folded = partial(apply_attnscale, mode="folded")


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "apply"),
    [
        *((name, apply) for name in nets.NETS for apply in (apply_attnscale, apply_featscale)),
        *((name, attnscale_folded) for name in FOLDABLE),
    ],
)
def test_at_zero_the_outputs_are_the_untouched_models_bit_for_bit_and_the_gradients_its_own(name, apply) -> None:
    model, x = nets.build(name), nets.images(name)
    plain, before = model(x), gradients(model, x)
    apply(model)
    assert torch.equal(model(x), plain)
    after = gradients(model, x)
    for key, gradient in before.items():
        assert torch.allclose(after[key], gradient, rtol=0, atol=1e-6 * gradient.abs().max().item()), key


@every_form
@pytest.mark.parametrize("include_prefix", [True, False])
def test_the_efficient_forms_equal_editing_the_map_with_its_gradients(name, mode, include_prefix) -> None:
    model, x = nets.build(name).double(), nets.images(name).double()
    other = copy.deepcopy(model)
    plain = model(x)
    apply_attnscale(model, include_prefix=include_prefix, mode=mode)
    apply_attnscale(other, include_prefix=include_prefix, mode="reference")
    nets.randomize(model)
    nets.randomize(other)
    assert not torch.allclose(model(x), plain, rtol=1e-3)
    assert torch.allclose(model(x), other(x), rtol=1e-10, atol=1e-10)
    ours, theirs = gradients(model, x), gradients(other, x)
    assert ours.keys() == theirs.keys() and any("omega" in key for key in ours)
    for key, gradient in ours.items():
        largest = theirs[key].abs().max().item()
        assert torch.allclose(gradient, theirs[key], rtol=1e-10, atol=1e-10 * max(largest, 1)), key


@every_form
def test_in_single_precision_the_omega_gradient_agrees_to_1e_4(name: str, mode: str) -> None:
    model, x = nets.build(name), nets.images(name)
    other = copy.deepcopy(model).double()
    apply_attnscale(model, mode=mode)
    apply_attnscale(other, mode="reference")
    nets.randomize(model, 0.3)
    nets.randomize(other, 0.3)
    ours, theirs = gradients(model, x), gradients(other, x.double())
    for key in (key for key in ours if "omega" in key):
        assert torch.allclose(ours[key].double(), theirs[key], rtol=1e-4, atol=1e-4 * theirs[key].abs().max().item())


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "auto") for name in nets.NETS), ("plain", "reference"), ("plain", "folded")]
)
def test_removing_the_scales_restores_outputs_names_and_hooks(name: str, mode: str) -> None:
    model, x = nets.build(name), nets.images(name)
    plain, keys = model(x), set(model.state_dict())
    kinds = [(type(m), getattr(m, "fused_attn", None)) for m in model.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    apply_attnscale(model, mode=mode)
    apply_featscale(model)
    nets.randomize(model)
    remove_scales(model)
    assert torch.equal(model(x), plain) and set(model.state_dict()) == keys
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert scale_parameters(model) == []
    assert [(type(m), getattr(m, "fused_attn", None)) for m in model.modules()] == kinds


@every_net
def test_a_plain_state_dict_lacks_exactly_the_scales_of_a_scaled_model(name: str) -> None:
    model, plain = nets.build(name), nets.build(name).state_dict()
    apply_attnscale(model)
    apply_featscale(model)
    missing, unexpected = model.load_state_dict(plain, strict=False)
    assert unexpected == [] and set(missing) == {key for key in model.state_dict() if "scale." in key} - set(plain)
    assert len(missing) == 3 * len(find_attentions(model))


@pytest.mark.parametrize("mode", ["auto", "folded"])
def test_grouped_value_heads_are_repeated(mode: str) -> None:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = AttentionRope(24, num_heads=6, num_kv_heads=2, qkv_fused=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x)

    model, x = Block().double(), torch.randn(2, 7, 24, dtype=torch.float64)
    other = copy.deepcopy(model)
    apply_attnscale(model, mode=mode)
    apply_attnscale(other, mode="reference")
    nets.randomize(model)
    nets.randomize(other)
    assert torch.allclose(model(x), other(x), atol=1e-12) and not torch.allclose(model(x), x * 0 + model(x)[:, :1])


def test_a_gate_behind_the_heads_changes_nothing() -> None:
    torch.manual_seed(0)
    block = nn.Module()
    block.attn = timm.layers.Attention(24, num_heads=3, qkv_bias=True, gated=True).double()
    other, x = copy.deepcopy(block), torch.randn(2, 7, 24, dtype=torch.float64)
    apply_attnscale(block)
    apply_attnscale(other, mode="reference")
    nets.randomize(block)
    nets.randomize(other)
    assert torch.allclose(block.attn(x), other.attn(x), atol=1e-12)


def test_naflex_is_supported_without_padding_and_refused_with() -> None:
    torch.manual_seed(0)
    model = NaFlexVit(NAFLEX, in_chans=3, num_classes=5).eval()
    other, x = copy.deepcopy(model), nets.images("plain")
    apply_attnscale(model)
    apply_attnscale(other, mode="reference")
    nets.randomize(model)
    nets.randomize(other)
    assert torch.allclose(model(x), other(x), atol=1e-5)
    mask = torch.zeros(2, 1, 17, 17, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attn_mask must be unset .* got a mask of shape \(2, 1, 17, 17\)"):
        model.blocks[0](torch.randn(2, 17, 24), attn_mask=mask)


@every_net
def test_prefix_tokens_are_those_that_are_no_patches(name: str) -> None:
    model = nets.build(name)
    counts = {"registers": 5, "eva_registers": 5, "distilled": 2, "pit": 2, "relpos": 0, "swin": 0, "cait": 0}
    assert {prefix_tokens(model, attention) for attention in find_attentions(model)} == {counts.get(name, 1)}


def test_caits_class_attention_is_left_alone() -> None:
    model = nets.build("cait")
    assert apply_attnscale(model) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    assert not any("token_only" in name and "scale" in name for name, _ in model.named_parameters())
    assert apply_featscale(model) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (lambda: VisionTransformer(**nets.IMAGE, **{**nets.SIZES, "num_heads": 2}, attn_layer="diff"), "DiffAttention"),
        (lambda: VisionTransformer(**nets.IMAGE, **nets.SIZES, block_fn=ParallelScalingBlock), "ParallelScalingBlock"),
        (
            lambda: VisionTransformer(
                **nets.IMAGE, **{**nets.SIZES, "num_heads": 2}, block_fn=DiffParallelScalingBlock
            ),
            "DiffParallelScalingBlock",
        ),
        (lambda: VisionTransformer(**nets.IMAGE, **nets.SIZES, global_pool="map"), "AttentionPoolLatent"),
        (lambda: timm.create_model("xcit_nano_12_p16_224"), "XCA|ClassAttention"),
        (lambda: nn.TransformerEncoderLayer(8, 2), "MultiheadAttention"),
    ],
)
@pytest.mark.parametrize("apply", [apply_attnscale, apply_featscale])
def test_an_attention_that_the_scales_do_not_fit_is_refused_by_name(model, kind, apply) -> None:
    with pytest.raises(TypeError, match=rf"must be one of timm's Attention, .*, got [\w.]*({kind})"):
        apply(model())


@pytest.mark.parametrize("apply", [apply_attnscale, apply_featscale])
def test_an_attention_in_two_places_and_a_wrapper_are_refused(apply) -> None:
    model = nets.build("plain")
    with pytest.raises(RuntimeError, match="must not be wrapped in DataParallel yet"):
        apply(nn.DataParallel(model))
    model.blocks[1].attn = model.blocks[0].attn
    with pytest.raises(ValueError, match=r"blocks\.1\.attn must be .*, got the one that is blocks\.0\.attn too"):
        apply(model)


def test_a_network_without_attention_is_refused_with_what_it_has() -> None:
    with pytest.raises(ValueError, match="must have a supported attention module, got only Conv2d, Sequential"):
        apply_attnscale(nn.Sequential(nn.Conv2d(3, 4, 3)))


@pytest.mark.parametrize("apply", [apply_attnscale, apply_featscale])
def test_layers_that_are_no_sequence_of_integers_are_refused_and_numpys_integers_are_not(apply) -> None:
    model = nets.build("plain")
    for wrong, told in ((2, "2"), ("12", "'12'"), ([0.5], r"\[0\.5\]")):
        with pytest.raises(TypeError, match=f"layers must be a sequence of integers or None, got {told}"):
            apply(model, layers=wrong)
    assert scale_parameters(model) == []
    assert apply(model, layers=np.arange(1, 3)) == ["blocks.1.attn", "blocks.2.attn"]


@pytest.mark.parametrize("apply", [apply_attnscale, apply_featscale])
def test_applying_twice_and_layers_out_of_range_are_refused(apply) -> None:
    model = nets.build("plain")
    with pytest.raises(IndexError, match=r"layers must be in \[0, 3\), got 99"):
        apply(model, layers=[0, 99])
    assert apply(model, layers=[2]) == ["blocks.2.attn"]
    with pytest.raises(RuntimeError, match=r"blocks\.2\.attn has (Attn|Feat)Scale already"):
        apply(model)
    assert len(scale_parameters(model)) == (1 if apply is apply_attnscale else 2)


@pytest.mark.parametrize("apply", [apply_attnscale, apply_featscale])
@pytest.mark.parametrize("call", [{"is_causal": True}, {"attn_mask": torch.zeros(17, 17)}])
def test_a_causal_or_masked_call_is_refused(apply, call: dict[str, object]) -> None:
    model = nets.build("plain")
    apply(model)
    with pytest.raises(ValueError, match=f"{next(iter(call))} must be unset"):
        model.blocks[0](torch.randn(1, 17, 24), **call)
    with pytest.raises(ValueError, match="attn_mask must be unset"):
        model.blocks[0].attn(torch.randn(1, 17, 24), torch.zeros(17, 17))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": float("nan")}, "init must be finite, got nan"),
        ({"mode": "fast"}, "mode must be one of auto, folded, reference, got 'fast'"),
        ({"share": "all"}, "share must be none, heads or layers, got 'all'"),
    ],
)
def test_an_impossible_option_of_attnscale_is_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_attnscale(nets.build("plain"), **options)


@pytest.mark.parametrize("init", [(0.0, float("inf")), (0.0,)])
def test_an_impossible_start_of_featscale_is_refused(init) -> None:
    with pytest.raises(ValueError, match="init must be two finite numbers"):
        apply_featscale(nets.build("plain"), init=init)


def test_the_folded_form_is_refused_where_something_lies_between_heads_and_projection_and_changes_nothing() -> None:
    model, x = nets.build("scale_norm"), nets.images("scale_norm")
    plain = model(x)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attn must have no norm between heads and projection, got LayerNorm"
    ):
        apply_attnscale(model, mode="folded")
    assert torch.equal(model(x), plain) and scale_parameters(model) == []
    gated = nn.Module()
    gated.attn = timm.layers.Attention(24, num_heads=3, gated=True)
    with pytest.raises(ValueError, match="attn must have no gate between heads and projection"):
        apply_attnscale(gated, mode="folded")

    class Other(nn.Linear):
        pass

    model = nets.build("plain")
    model.blocks[1].attn.proj = Other(24, 24)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn must have a Linear as projection, got Other"):
        apply_attnscale(model, mode="folded")
    assert type(model.blocks[0].attn.proj) is nn.Linear
