"""Attention whose heads have fewer value dimensions than query dimensions, some heads fewer than others."""

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SlimAttention(nn.Module):
    """timm's `Attention` after pruning: same signature, same names of its parts.

    Rows of `qkv`: queries of all heads, keys of all heads, values head by head. One call of fused attention serves all
    heads: it is fast where queries and values are equally wide, so that values are filled up with zeros inside of it.

    Args:
        qkv: (dim) -> (2 heads * head_dim + sum of v_dims).
        proj: (sum of v_dims) -> (dim); without heads the output is its bias.
        head_dim: of queries and keys.
        v_dims: value dimensions of each head.
        scale: of the products of queries and keys; that of the unpruned head.
    """

    def __init__(self, qkv: nn.Linear, proj: nn.Linear, head_dim: int, v_dims: tuple[int, ...], scale: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.v_dims, self.scale = len(v_dims), head_dim, v_dims, scale
        self.runs = [(size, len(list(run))) for size, run in groupby(v_dims)]
        self.fused_attn = True
        self.qkv, self.proj = qkv, proj
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: (batch, tokens, dim). Raises NotImplementedError on a mask."""
        if attn_mask is not None or is_causal:
            raise NotImplementedError("SlimAttention takes no mask")
        if not self.num_heads:
            return self.proj_drop(self.proj(x[..., :0]))
        width = self.num_heads * self.head_dim
        q, k, v = self.qkv(x).split([width, width, sum(self.v_dims)], dim=-1)
        q = self.q_norm(q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
        k = self.k_norm(k.unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
        outputs = self._fused(q, k, self._heads(v)) if self.fused_attn else self._plain(q, k, self._heads(v))
        return self.proj_drop(self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)))

    def _heads(self, v: Tensor) -> list[Tensor]:
        """(batch, tokens, sum of v_dims) as one (batch, tokens, heads, dims) for each run of equally wide heads."""
        parts = v.split([size * count for size, count in self.runs], dim=-1)
        return [part.unflatten(-1, (count, size)) for part, (size, count) in zip(parts, self.runs, strict=True)]

    def _fused(self, q: Tensor, k: Tensor, values: list[Tensor]) -> list[Tensor]:
        filled = [F.pad(part, (0, self.head_dim - part.shape[-1])) for part in values]
        v = (filled[0] if len(filled) == 1 else torch.cat(filled, dim=2)).transpose(1, 2)
        drop = self.attn_drop.p if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale).transpose(1, 2)
        runs = heads.split([count for _, count in self.runs], dim=2)
        return [part[..., :size].flatten(2) for part, (size, _) in zip(runs, self.runs, strict=True)]

    def _plain(self, q: Tensor, k: Tensor, values: list[Tensor]) -> list[Tensor]:
        maps = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(-1))
        runs = maps.split([count for _, count in self.runs], dim=1)
        return [(part @ v.transpose(1, 2)).transpose(1, 2).flatten(2) for part, v in zip(runs, values, strict=True)]
