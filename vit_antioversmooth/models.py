"""The networks of the studies: any timm ViT, and a small one of free size whose attention skip can be left out."""

from functools import partial
from typing import Any

import timm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


class NoSkipBlock(Block):
    """timm's block without the skip connection around attention: nothing but attention carries tokens on."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: (batch, tokens, dim)."""
        x = self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def small_vit(
    image_size: int,
    channels: int,
    classes: int,
    *,
    dim: int,
    heads: int,
    depth: int,
    patch: int,
    skip: bool = True,
    drop: float = 0.0,
    drop_path: float = 0.0,
) -> VisionTransformer:
    """A class-token ViT with xavier ("jax") initial weights, drawn now from the global generator.

    timm's default initialisation (standard deviation .02) leaves attention uniform at this width.
    """
    return VisionTransformer(
        img_size=image_size,
        patch_size=patch,
        in_chans=channels,
        num_classes=classes,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        weight_init="jax",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        block_fn=Block if skip else NoSkipBlock,
        pos_drop_rate=drop,
        proj_drop_rate=drop,
        drop_path_rate=drop_path,
    )


def timm_vit(
    name: str,
    image_size: int,
    channels: int,
    classes: int,
    depth: int = 0,
    *,
    drop: float = 0.0,
    drop_path: float = 0.0,
    pretrained: bool = False,
) -> nn.Module:
    """A timm vision transformer by name; depth 0 is its own. Raises what timm raises where an option does not fit."""
    options: dict[str, Any] = {"img_size": image_size, "in_chans": channels, "num_classes": classes}
    if depth:
        options["depth"] = depth
    if drop:  # embedding, projections and MLPs, as --drop of the released DeiT script
        options |= {"pos_drop_rate": drop, "proj_drop_rate": drop}
    return timm.create_model(name, pretrained=pretrained, drop_path_rate=drop_path, **options)
