"""Facts about the other cures: each is its formula, and timm builds, trains and copies networks with it."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import Attention
from torch import Tensor, nn

from vit_antioversmooth.competitors import (
    CentredAttention,
    ContraNorm,
    GraphFilterAttention,
    ReAttention,
    SpectralAttention,
)
from vit_antioversmooth.frequency import mean_cosine
from vit_antioversmooth.tests import nets

DIM, HEADS = 12, 3
ATTENTIONS = (CentredAttention, GraphFilterAttention, ReAttention)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(kind: type[Attention], **options: object) -> Attention:
    torch.manual_seed(0)
    return kind(DIM, num_heads=HEADS, qkv_bias=True, **options).double().eval()


def by_the_map(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor, nn.Module]:
    """Map and value of each head of an attention on x, and what takes A V to its output."""
    query, key, value = attention.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    a = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    return a, value, lambda heads: attention.proj(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm}, {"gated": True}]
)
def test_with_the_spectrum_of_softmax_attention_it_is_timms_own(options: dict[str, object]) -> None:
    ours, theirs = built(SpectralAttention, **options), built(Attention, **options)
    theirs.load_state_dict(ours.state_dict())
    assert torch.allclose(ours(drawn(2, 7, DIM)), theirs(drawn(2, 7, DIM)), atol=1e-12)


def test_centred_attention_subtracts_the_mean_value_from_every_head() -> None:
    attention, x = built(CentredAttention), drawn(2, 7, DIM)
    a, value, project = by_the_map(attention, x)
    assert torch.allclose(attention(x), project((a - 1 / 7) @ value), atol=1e-12)


def test_a_graph_filter_starts_as_softmax_attention_and_then_is_its_formula() -> None:
    attention, x = built(GraphFilterAttention), drawn(2, 7, DIM)
    a, value, project = by_the_map(attention, x)
    assert torch.allclose(attention(x), project(a @ value), atol=1e-12)
    attention.beta.data.copy_(drawn(HEADS))
    high_order = 3 * (a @ a - a) + a
    filtered = (a + drawn(HEADS).view(-1, 1, 1) * high_order) @ value
    assert torch.allclose(attention(x), project(filtered), atol=1e-12)


def test_re_attention_mixes_the_maps_of_all_heads_and_normalises_them() -> None:
    attention, x = built(ReAttention).train(), drawn(2, 7, DIM)
    attention.theta.data.copy_(drawn(HEADS, HEADS))
    a, value, project = by_the_map(attention, x)
    mixed = torch.stack([sum(attention.theta[g, h] * a[:, g] for g in range(HEADS)) for h in range(HEADS)], 1)
    mean, spread = mixed.mean((0, 2, 3), keepdim=True), mixed.var((0, 2, 3), unbiased=False, keepdim=True)
    assert torch.allclose(attention(x), project((mixed - mean) / (spread + 1e-5).sqrt() @ value), atol=1e-10)


def test_contranorm_subtracts_what_is_alike_before_it_normalises() -> None:
    norm, x = ContraNorm(DIM, strength=0.3, temperature=0.5).double(), drawn(2, 7, DIM)
    norm.weight.data.copy_(drawn(DIM, seed=1))
    unit = x / x.norm(dim=-1, keepdim=True)
    rest = x - 0.3 * (unit @ unit.mT / 0.5).softmax(-1) @ x
    centred = rest - rest.mean(-1, keepdim=True)
    expected = norm.weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() + norm.bias
    assert torch.allclose(norm(x), expected, atol=1e-12)
    alike = 1 + 0.1 * drawn(2, 7, DIM)
    assert mean_cosine(norm(alike)).max() < mean_cosine(alike).min()


@pytest.mark.parametrize("options", [*({"attn_layer": kind} for kind in ATTENTIONS), {"norm_layer": ContraNorm}])
def test_timm_builds_networks_with_it_that_learn_in_every_parameter_and_can_be_copied(
    options: dict[str, object],
) -> None:
    torch.manual_seed(0)
    shape = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5, "img_size": 32}
    model = timm.create_model("deit_tiny_patch16_224", **shape, **options)
    x = torch.randn(4, 3, 32, 32)
    model(x).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
    other = copy.deepcopy(model.eval())
    assert torch.equal(other(x), model(x))


def test_strength_and_temperature_go_through_timms_constructor() -> None:
    shape = {"embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 5, "img_size": 32}
    model = timm.create_model("deit_tiny_patch16_224", **shape, norm_layer=partial(ContraNorm, strength=0.7))
    assert [m.strength for m in model.modules() if isinstance(m, ContraNorm)] == [0.7] * 3


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("call", [{"is_causal": True}, {"attn_mask": torch.zeros(7, 7)}])
def test_a_causal_or_masked_call_is_refused(kind: type[Attention], call: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(call))} must be unset"):
        built(kind)(drawn(1, 7, DIM), **call)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_dropout_is_on_in_training_only(kind: type[Attention]) -> None:
    attention, x = built(kind, attn_drop=0.5), drawn(1, 7, DIM)
    assert torch.equal(attention(x), attention(x))
    attention.train()
    assert not torch.equal(attention(x), attention(x))


def test_refused_by_the_scales_which_are_no_part_of_it() -> None:
    from vit_antioversmooth import apply_attnscale

    model = nets.NETS["plain"](attn_layer=GraphFilterAttention)
    with pytest.raises(TypeError, match=r"got vit_antioversmooth\.competitors\.GraphFilterAttention"):
        apply_attnscale(model)
