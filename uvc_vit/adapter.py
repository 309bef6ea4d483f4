"""Where a vision transformer can be pruned: heads, value dimensions and MLP neurons of its blocks (Sec. 3)."""

from dataclasses import dataclass
from typing import Any

from timm.layers import Mlp, PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from uvc_vit.models import TokensToToken
from uvc_vit.slim_attention import SlimAttention


@dataclass(frozen=True)
class BlockDims:
    """Sizes of one block."""

    dim: int
    """channels of a token"""
    qk_dim: int
    """of a head's queries and keys"""
    v_dims: tuple[int, ...]
    """of each head's values; as many as there are heads"""
    hidden: int
    """neurons of the MLP"""

    @property
    def heads(self) -> int:
        """Number of heads."""
        return len(self.v_dims)


class ViTAdapter:
    """A timm VisionTransformer (also distilled, T2T, or slimmed before) seen as a stack of prunable blocks.

    Raises:
        NotImplementedError: naming the class that is not supported.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, VisionTransformer):
            raise NotImplementedError(f"{type(model).__name__}: only timm's VisionTransformer family is supported")
        if model.attn_pool is not None:
            raise NotImplementedError(f"{type(model.attn_pool).__name__}: attention pooling is not supported")
        embed: Any = model.patch_embed
        if not _exactly(embed, PatchEmbed) and not _exactly(embed, TokensToToken):
            raise NotImplementedError(f"{type(embed).__name__}: only patches of one convolution or T2T's are supported")
        self.model: Any = model
        self.dims: tuple[BlockDims, ...] = tuple(_dims(block) for block in self.blocks)

    @property
    def blocks(self) -> list[Any]:
        """The blocks themselves, also where gates are wrapped around them."""
        return [getattr(block, "block", block) for block in self.model.blocks]

    @property
    def channels(self) -> int:
        """Of an image."""
        embed = self.model.patch_embed
        return embed.in_chans if hasattr(embed, "in_chans") else embed.proj.in_channels

    def tokens(self, input_size: tuple[int, int]) -> int:
        """Tokens of an image of (height, width), class, distillation and register tokens included.

        Raises:
            ValueError: where the model takes no such images.
        """
        rows, columns = self._grid(input_size)
        return rows * columns + self.model.num_prefix_tokens

    def embed_macs(self, input_size: tuple[int, int]) -> int:
        """Multiply-adds of the patch embedding. Raises: see `tokens`."""
        embed, (rows, columns) = self.model.patch_embed, self._grid(input_size)
        if isinstance(embed, TokensToToken):
            return embed.macs(input_size)
        return rows * columns * embed.proj.weight.numel()

    def head_macs(self) -> int:
        """Multiply-adds of the classifier, or of both of a distilled model."""
        heads = (self.model.head, getattr(self.model, "head_dist", None))
        return sum(head.weight.numel() for head in heads if isinstance(head, nn.Linear))

    def _grid(self, input_size: tuple[int, int]) -> tuple[int, int]:
        """Patches of an image down and across, as the patch embedding makes them."""
        pair = isinstance(input_size, tuple | list) and len(input_size) == 2
        if not pair or not all(isinstance(side, int) and side > 0 for side in input_size):
            raise ValueError(f"input_size must be (height, width) in pixels, got {input_size!r}")
        size, embed = (input_size[0], input_size[1]), self.model.patch_embed
        high, wide = embed.patch_size
        if isinstance(embed, TokensToToken):
            rows, columns = embed.grid_size
            allowed, fits = f"the model's {(rows * high, columns * wide)}", size == (rows * high, columns * wide)
        elif embed.strict_img_size and embed.img_size is not None:
            allowed, fits = f"the model's {tuple(embed.img_size)}", size == tuple(embed.img_size)
        else:
            allowed = f"multiples of the patches' {(high, wide)}"
            fits = embed.dynamic_img_pad or (size[0] % high == 0 and size[1] % wide == 0)
        if not fits:
            raise ValueError(f"input_size must be {allowed}, got {size}")
        return embed.grid_size if isinstance(embed, TokensToToken) else embed.dynamic_feat_size(size)


def _dims(block: Any) -> BlockDims:
    if not _exactly(block, Block):
        raise NotImplementedError(f"{type(block).__name__}: only timm's pre-norm Block is supported")
    attention, mlp = block.attn, block.mlp
    if not _exactly(mlp, Mlp) or not isinstance(mlp.norm, nn.Identity) or not isinstance(mlp.fc1, nn.Linear):
        raise NotImplementedError(f"{type(mlp).__name__}: only timm's plain Mlp is supported")
    dim, hidden = mlp.fc2.out_features, mlp.fc1.out_features
    if isinstance(attention, SlimAttention):
        return BlockDims(dim, attention.head_dim, attention.v_dims, hidden)
    if not _exactly(attention, Attention):
        raise NotImplementedError(f"{type(attention).__name__}: only timm's Attention is supported")
    if attention.gate is not None or not isinstance(attention.norm, nn.Identity):
        raise NotImplementedError(f"{type(attention).__name__} with a gate or a norm of its output is not supported")
    return BlockDims(dim, attention.head_dim, (attention.head_dim,) * attention.num_heads, hidden)


def _exactly(part: Any, kind: type) -> bool:
    """Not a subclass, whose forward may be another."""
    return type(part) is kind
