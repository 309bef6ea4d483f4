"""Attention whose heads have fewer value dimensions than query dimensions, some heads fewer than others."""

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SlimAttention(nn.Module):
    """timm's `Attention` after pruning: same signature, same names of its parts.

    Rows of `qkv`: queries of all heads, keys of all heads, values head by head. Heads that follow each other with the
    same number of value dimensions share one call of fused attention.

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
        outputs, head, start = [], 0, 0
        for size, count in self.runs:
            part = v[..., start : start + count * size].unflatten(-1, (count, size)).transpose(1, 2)
            heads = slice(head, head + count)
            outputs.append(self._attend(q[:, heads], k[:, heads], part).transpose(1, 2).flatten(2))
            head, start = head + count, start + count * size
        return self.proj_drop(self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused_attn:
            drop = self.attn_drop.p if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)
        return self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(-1)) @ v
