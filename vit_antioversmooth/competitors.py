"""Other cures for oversmoothing, to be built into a timm vision transformer by its constructor's arguments.

timm.create_model("deit_small_patch16_224", attn_layer=GraphFilterAttention)    # or CentredAttention, ReAttention
timm.create_model("deit_small_patch16_224", norm_layer=partial(ContraNorm, strength=0.2))

The graph filter and ContraNorm follow their authors' image code, the other two their formulas as recalled.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from vit_antioversmooth.attentions import refuse_masks
from vit_antioversmooth.spectral import Spectrum, centred_spectrum, graph_filter_spectrum, spectral_attention

MASKS = (("attn_mask", 0), ("is_causal", 1))


class SpectralAttention(Attention):
    """timm's attention with f(A) in the place of A; subclasses say by `spectrum` which f, or `mixed` in all."""

    def spectrum(self) -> Spectrum:
        """The coefficients now: those of softmax attention."""
        return Spectrum()

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What the heads put out; all (batch, heads, tokens, head_dim)."""
        dropout = self.attn_drop.p if self.training else 0.0
        return spectral_attention(query, key, value, self.spectrum(), dropout_p=dropout)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x and the result: (batch, tokens, dim). Raises ValueError for a mask or a causal call."""
        refuse_masks(MASKS, (attn_mask, is_causal), {})
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.norm(self.mixed(self.q_norm(query), self.k_norm(key), value).transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class CentredAttention(SpectralAttention):
    """(A - J) V: every head's output has mean zero over tokens."""

    def spectrum(self) -> Spectrum:
        """A - J."""
        return centred_spectrum()


class GraphFilterAttention(SpectralAttention):
    """A + beta (A + (K - 1) (A^2 - A)), one beta a head from 0, K = 4 (GFSA, arXiv 2312.04234, its image code)."""

    order = 4

    def __init__(self, dim: int, num_heads: int = 8, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.beta = nn.Parameter(torch.zeros(num_heads))

    def spectrum(self) -> Spectrum:
        """w0 = 0, w1 = 1, wK = beta."""
        return graph_filter_spectrum(0.0, 1.0, self.beta, self.order)


class ReAttention(SpectralAttention):
    """Norm(Theta^T A) V: maps mixed over heads by a learnable Theta, then batch norm (DeepViT, arXiv 2103.11886).

    Theta starts as I. The one cure that needs the map itself.
    """

    def __init__(self, dim: int, num_heads: int = 8, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.theta = nn.Parameter(torch.eye(num_heads))
        self.map_norm = nn.BatchNorm2d(num_heads)

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The mixed and normalised map on V."""
        attention = self.attn_drop((self.scale * query @ key.mT).softmax(-1))
        return self.map_norm(torch.einsum("gh,bgqk->bhqk", self.theta, attention)) @ value


class ContraNorm(nn.LayerNorm):
    """LayerNorm of x - strength softmax(cos(x, x) / temperature) x: tokens are pushed apart (arXiv 2303.06562)."""

    def __init__(self, dim: int, *, strength: float = 0.2, temperature: float = 1.0, **options: Any) -> None:
        super().__init__(dim, **{"eps": 1e-6, **options})
        self.strength, self.temperature = strength, temperature

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: (batch, tokens, dim)."""
        unit = F.normalize(x, dim=-1)
        alike = F.scaled_dot_product_attention(unit, unit, x, scale=1 / self.temperature)
        return super().forward(x - self.strength * alike)
