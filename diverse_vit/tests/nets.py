"""Small networks of every supported kind, with weights large enough that attention is far from uniform."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from diverse_vit.timm_parts import blocks_of

SIZES = {"embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
IMAGE = {"img_size": 16, "patch_size": 4}
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 12, "num_classes": 5}
NETS: dict[str, Callable[..., nn.Module]] = {
    "plain": partial(VisionTransformer, **IMAGE, **SIZES),
    "qk_norm": partial(VisionTransformer, **IMAGE, **SIZES, qk_norm=True),
    "registers": partial(VisionTransformer, **IMAGE, **SIZES, reg_tokens=4),
    "pre_norm": partial(VisionTransformer, **IMAGE, **SIZES, pre_norm=True),
    "gap": partial(VisionTransformer, **IMAGE, **SIZES, class_token=False, global_pool="avg"),
    "map": partial(VisionTransformer, **IMAGE, **SIZES, class_token=False, global_pool="map"),
    "distilled": partial(VisionTransformerDistilled, **IMAGE, **SIZES),
    "eva": partial(Eva, **IMAGE, **SIZES, qkv_fused=False, scale_attn_inner=True, use_rot_pos_emb=True),
    "eva_fused": partial(Eva, **IMAGE, **SIZES, qkv_fused=True, qkv_bias=True),
    "rope": partial(Eva, **IMAGE, **SIZES, attn_type="rope", use_rot_pos_emb=True),
    "beit": partial(Beit, **IMAGE, **SIZES, qkv_bias=True, use_rel_pos_bias=True, init_values=None),
    "beit_shared": partial(Beit, **IMAGE, **SIZES, use_shared_rel_pos_bias=True, init_values=None),
    "relpos": partial(VisionTransformerRelPos, **IMAGE, **SIZES, init_values=None),
    "swin": partial(SwinTransformer, **SWIN, depths=(2, 1), num_heads=(3, 3)),
    "swin_one_stage": partial(SwinTransformer, **SWIN, depths=(2,), num_heads=(3,)),
    "cait": partial(Cait, **IMAGE, **SIZES, init_values=1.0),
    "one_head": partial(VisionTransformer, **IMAGE, **{**SIZES, "num_heads": 1}),
}


def build(name: str = "plain", **options: Any) -> Any:
    """One of NETS in eval mode."""
    torch.manual_seed(0)
    model = NETS[name](**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(name: str = "plain", count: int = 4) -> Tensor:
    """Inputs of that network."""
    side = 32 if name.startswith("swin") else 16
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def labels(count: int = 4) -> Tensor:
    return torch.arange(count) % 5


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """By parameter, of those that the loss depends on."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def unfused_map(model: Any, x: Tensor, layer: int = 0) -> Tensor:
    """The softmax map of a block as timm's unfused attention computes it."""
    attention, seen = blocks_of(model)[layer].attn, []
    handle = attention.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    attention.fused_attn, before = False, attention.fused_attn
    model(x)
    attention.fused_attn = before
    handle.remove()
    return seen[0]
