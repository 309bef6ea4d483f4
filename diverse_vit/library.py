"""The alternatives of the ablations by name, for `extra` of DiverseRegularizer (spec c.2).

Each takes what its level has to offer and a generator for random start vectors, and returns a scalar.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diverse_vit.cosines import contrastive, cosine, cosine_across, unit
from diverse_vit.hyperspherical import mgd, mhs
from diverse_vit.orthogonality import cno, cno_features, cno_starts, so

GRADIENT_DIVERSITY = "emb_gradient"  # made by the regularizer itself: it needs the loss

Embedding = Callable[[Tensor, Tensor, torch.Generator], Tensor]  # tokens (batch, n, d) of first and last layer
Attention = Callable[[Sequence[Tensor], torch.Generator], Tensor]  # maps by layer, heads flattened (batch, H, N * N)
Weight = Callable[[Tensor, torch.Generator], Tensor]  # matrices (m, out, in); summed over matrices


def _cno_features(z: Tensor, generator: torch.Generator) -> Tensor:
    return cno_features(z, *cno_starts(z.shape[1], len(z), generator, z, start="normal"))


def _cno_inverse(w: Tensor, generator: torch.Generator) -> Tensor:
    return cno(w.mT, *cno_starts(w.shape[2], len(w), generator, w))[0].sum()


EMBEDDING: dict[str, Embedding] = {
    "emb_cos_abs": lambda first, last, _: cosine(last, absolute=True),
    "emb_across": lambda first, last, _: cosine_across(first, last),
    "emb_across_abs": lambda first, last, _: cosine_across(first, last, absolute=True),
    "emb_so": lambda first, last, _: so(last, normalise=True),
    "emb_cno": lambda first, last, generator: _cno_features(unit(last), generator),
    "emb_mhs": lambda first, last, _: mhs(last),
    "emb_mgd": lambda first, last, _: mgd(last),
}
ATTENTION: dict[str, Attention] = {
    "attn_nce": lambda maps, _: contrastive(maps[0], maps[-1]),
    "attn_across": lambda maps, _: cosine_across(maps[0], maps[-1]),
    "attn_so": lambda maps, _: torch.stack([so(heads, normalise=False) for heads in maps]).mean(),
    "attn_cno": lambda maps, generator: torch.stack([_cno_features(heads, generator) for heads in maps]).mean(),
    "attn_mhs": lambda maps, _: torch.stack([mhs(heads) for heads in maps]).mean(),
    "attn_mgd": lambda maps, _: torch.stack([mgd(heads) for heads in maps]).mean(),
}
WEIGHT: dict[str, Weight] = {
    "weight_so": lambda w, _: len(w) * so(w, normalise=False),
    "weight_cno_inverse": _cno_inverse,
    "weight_mhs": lambda w, _: len(w) * mhs(w),
    "weight_mgd": lambda w, _: len(w) * mgd(w),
}
EXTRAS = (*EMBEDDING, GRADIENT_DIVERSITY, *ATTENTION, *WEIGHT)
TWO_MAPS = ("attn_nce", "attn_across")
