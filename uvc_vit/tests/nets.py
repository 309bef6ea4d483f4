"""Networks and vectors that several tests use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from uvc_vit.adapter import ViTAdapter

REFERENCE = Path(__file__).parent / "reference"


def vectors(name: str) -> dict[str, Any]:
    """A reference file: tensors, and `cfg` and `args` as dictionaries."""
    found: dict[str, Any] = {}
    with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as data:
        for key in data.files:
            text = data[key].dtype.kind == "U"
            found[key] = json.loads(str(data[key])) if text else torch.from_numpy(data[key].copy())
    return found


def vit(
    depth: int = 3, dim: int = 16, heads: int = 2, *, side: int = 16, patch: int = 4, seed: int = 0, **options: Any
) -> VisionTransformer:
    """A small vision transformer, in eval mode, with no parameter left at zero."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"img_size": side, "patch_size": patch, "num_classes": 5}
    shape |= {"embed_dim": dim, "depth": depth, "num_heads": heads, "mlp_ratio": 2.0, "weight_init": "jax"}
    return randomized(VisionTransformer(**(shape | options)).eval())


def randomized(model: VisionTransformer) -> VisionTransformer:
    """Every parameter moved a little at random."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def with_weights(proj: Tensor, fc2: Tensor, heads: int, side: int = 16, patch: int = 4) -> ViTAdapter:
    """A model whose attn.proj and mlp.fc2 have these weights, (blocks, ...)."""
    model = vit(len(proj), proj.shape[1], heads, side=side, patch=patch, mlp_ratio=fc2.shape[2] / proj.shape[1])
    with torch.no_grad():
        for block, proj_weight, fc2_weight in zip(model.blocks, proj, fc2, strict=True):
            block.attn.proj.weight.copy_(proj_weight)
            block.mlp.fc2.weight.copy_(fc2_weight)
    return ViTAdapter(model)


def images(count: int = 2, side: int = 16, seed: int = 0) -> Tensor:
    """Random images."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
