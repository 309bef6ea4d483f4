"""Facts about folded models: the same outputs from plain weights, nothing left over, and what cannot be folded."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from vit_antioversmooth.attnscale import apply_attnscale
from vit_antioversmooth.featscale import apply_featscale
from vit_antioversmooth.fold import fold_
from vit_antioversmooth.scales import scale_parameters
from vit_antioversmooth.tests import nets

FOLDABLE = [name for name in nets.NETS if name not in ("scale_norm", "eva")]
METHODS = ("attnscale", "featscale", "both")


def scaled(name: str, method: str, **options: bool) -> nn.Module:
    model = nets.build(name)
    if method != "featscale":
        apply_attnscale(model, **options)
    if method != "attnscale":
        apply_featscale(model, **options)
    nets.randomize(model)
    return model


@pytest.mark.parametrize("name", FOLDABLE)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("include_prefix", [True, False])
def test_outputs_stay_equal_and_no_scale_and_no_hook_is_left(name: str, method: str, include_prefix: bool) -> None:
    model, x = scaled(name, method, include_prefix=include_prefix).double(), nets.images(name).double()
    expected, before = model(x), sum(p.numel() for p in nets.build(name).parameters())
    folded = fold_(model)
    assert folded is model
    with torch.no_grad():
        assert torch.allclose(folded(x), expected, rtol=1e-9, atol=1e-9)
    assert scale_parameters(folded) == [] and not any("scale.omega" in key for key in folded.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in folded.modules())
    assert sum(p.numel() for p in folded.parameters()) == before


@pytest.mark.parametrize("name", FOLDABLE)
def test_in_single_precision_outputs_agree_to_1e_5(name: str) -> None:
    model, x = scaled(name, "both"), nets.images(name)
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(fold_(model)(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_a_model_in_the_folded_form_of_training_folds_too() -> None:
    model, x = nets.build("plain").double(), nets.images("plain").double()
    apply_attnscale(model, mode="folded")
    nets.randomize(model)
    expected = model(x)
    assert torch.allclose(fold_(model)(x), expected, rtol=1e-9, atol=1e-9)


def test_a_layer_without_scales_stays_the_object_it_was() -> None:
    model = nets.build("plain")
    apply_attnscale(model, layers=[1], init=0.5)
    kept = model.blocks[0].attn
    fold_(model)
    assert model.blocks[0].attn is kept and type(model.blocks[1].attn).__name__ == "FoldedAttention"


def test_a_projection_without_bias_gets_one_where_the_values_have() -> None:
    model = timm.models.vision_transformer.VisionTransformer(**nets.IMAGE, **nets.SIZES, proj_bias=False).eval()
    apply_attnscale(model, init=0.5)
    x = nets.images("plain")
    model.head.weight.data.normal_()
    expected = model(x)
    assert torch.allclose(fold_(model)(x), expected, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_folded_model_refuses_masks_and_causal_calls_as_before(method: str) -> None:
    model, x, mask = fold_(scaled("plain", method)), torch.randn(1, 17, 24), torch.zeros(17, 17)
    for name, value in (("is_causal", True), ("attn_mask", mask)):
        with pytest.raises(ValueError, match=f"{name} must be unset"):
            model.blocks[0](x, **{name: value})
    with pytest.raises(ValueError, match=r"attn_mask must be unset .* got a mask of shape \(17, 17\)"):
        model.blocks[0].attn(x, mask)


@pytest.mark.parametrize("method", METHODS)
def test_under_bfloat16_autocast_a_folded_attention_stays_in_bfloat16(method: str) -> None:
    model, x = fold_(scaled("plain", method)), torch.randn(1, 17, 24)
    exactly = model.blocks[0].attn(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.blocks[0].attn(x)
    assert half.dtype == torch.bfloat16 and (half.float() - exactly).abs().max() < 3e-2 * exactly.abs().max()


def test_grouped_value_heads_fold_too() -> None:
    torch.manual_seed(0)
    block = nn.Module()
    block.attn = timm.layers.AttentionRope(24, num_heads=6, num_kv_heads=2, qkv_fused=False)
    block.double().eval()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    apply_attnscale(block)
    nets.randomize(block)
    expected = block.attn(x)
    fold_(block)
    assert torch.allclose(block.attn(x), expected, atol=1e-12)


def test_what_cannot_be_folded_is_refused_and_left_as_it_was() -> None:
    with pytest.raises(ValueError, match="must be in eval mode to be folded, got train mode"):
        fold_(scaled("plain", "both").train())
    with pytest.raises(ValueError, match="must have AttnScale or FeatScale to be folded, got none"):
        fold_(nets.build("plain"))
    model, x = scaled("scale_norm", "both"), nets.images("scale_norm")
    expected = model(x)
    with pytest.raises(ValueError, match="must have no norm between heads and projection, got LayerNorm"):
        fold_(model)
    assert torch.equal(model(x), expected)
    gated = nn.Module()
    gated.attn = timm.layers.Attention(24, num_heads=3, gated=True)
    apply_attnscale(gated.eval(), init=1)
    with pytest.raises(ValueError, match="must have no gate between heads and projection"):
        fold_(gated)
    with pytest.raises(ValueError, match="got its frequency-blind control"):
        fold_(scaled("plain", "attnscale", blind=True))


def test_a_copy_of_a_folded_model_is_independent_and_a_folded_model_takes_no_scales() -> None:
    model, x = fold_(scaled("plain", "both")), nets.images("plain")
    expected = model(x)
    copy.deepcopy(model).blocks[0].attn.mean_map.zero_()
    assert torch.equal(model(x), expected)
    with pytest.raises(TypeError, match="FoldedAttention"):
        apply_attnscale(model)


@pytest.mark.parametrize(
    ("name", "method", "place"),
    [("plain", "attnscale", "blocks.0.attn"), ("swin", "featscale", r"layers.0.blocks.0.drop_path1")],
)
def test_a_folded_model_that_is_folded_again_is_told_so(name: str, method: str, place: str) -> None:
    model, x = fold_(scaled(name, method)), nets.images(name).double()
    expected = model.double()(x)
    with pytest.raises(ValueError, match=f"model must not be folded already, got {place} folded"):
        fold_(model)
    assert torch.equal(model(x), expected)
