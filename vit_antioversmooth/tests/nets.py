"""Small networks of every supported attention class, the reference vectors, and what the tests do with both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.pit import PoolingVisionTransformer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from vit_antioversmooth.scales import scale_parameters

REFERENCE = Path(__file__).parent / "reference"
SIZES = {"embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
IMAGE = {"img_size": 16, "patch_size": 4}
Build = Callable[..., nn.Module]
NETS: dict[str, Build] = {
    "plain": partial(VisionTransformer, **IMAGE, **SIZES),
    "qk_norm": partial(VisionTransformer, **IMAGE, **SIZES, qk_norm=True),
    "layer_scale": partial(VisionTransformer, **IMAGE, **SIZES, init_values=1.0),
    "registers": partial(VisionTransformer, **IMAGE, **SIZES, reg_tokens=4),
    "distilled": partial(VisionTransformerDistilled, **IMAGE, **SIZES),
    "scale_norm": partial(VisionTransformer, **IMAGE, **SIZES, scale_attn_norm=True),
    "post_norm": partial(
        VisionTransformer, **IMAGE, **SIZES, block_fn=timm.models.vision_transformer.ResPostBlock, init_values=None
    ),
    "eva": partial(Eva, **IMAGE, **SIZES, qkv_fused=False, scale_attn_inner=True, use_rot_pos_emb=True),
    "eva_fused": partial(Eva, **IMAGE, **SIZES, qkv_fused=True, qkv_bias=True),
    "eva_registers": partial(Eva, **IMAGE, **SIZES, qkv_bias=True, num_reg_tokens=4),
    "rope": partial(Eva, **IMAGE, **SIZES, attn_type="rope", use_rot_pos_emb=True),
    "beit": partial(Beit, **IMAGE, **SIZES, qkv_bias=True, use_rel_pos_bias=True, init_values=None),
    "relpos": partial(VisionTransformerRelPos, **IMAGE, **SIZES, init_values=None),
    "swin": partial(
        SwinTransformer,
        img_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=12,
        depths=(2, 1),
        num_heads=(3, 3),
        num_classes=5,
    ),
    "cait": partial(Cait, **IMAGE, **SIZES, init_values=1.0),
    "pit": partial(
        PoolingVisionTransformer,
        **IMAGE,
        stride=2,
        base_dims=(8, 8),
        depth=(2, 1),
        heads=(2, 4),
        num_classes=5,
        distilled=True,
    ),
}


def build(name: str, **options: Any) -> nn.Module:
    """One of NETS in eval mode with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = NETS[name](**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(name: str, count: int = 2) -> Tensor:
    """Inputs of that network."""
    side = 32 if name == "swin" else 16
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def randomize(model: nn.Module, spread: float = 0.7) -> None:
    """Give every scale its own random value."""
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in scale_parameters(model):
            parameter.copy_(spread * torch.randn(parameter.shape, generator=draws))


def reference(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Arrays of a reference file, and its state dict."""
    with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as archive:
        arrays = {key: torch.from_numpy(np.asarray(archive[key])) for key in archive}
    state = {key.removeprefix("sd."): value for key, value in arrays.items() if key.startswith("sd.")}
    return arrays, state
