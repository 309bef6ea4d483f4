"""Spectral attention: f(A) V with f(A) = c_J J + c_0 I + c_1 A + c_2 A^2, one coefficient of each kind a head.

J = 11^T/N averages over the keys, A is the softmax map. A V is one call of fused attention, A^2 V = A (A V) a second
one, J V a mean: no map is ever formed. Softmax attention, AttnScale, centred attention and graph filters are settings.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

Coefficient = float | Tensor  # a number, or (heads,)


class Spectrum(NamedTuple):
    """The coefficients of f; as it stands, softmax attention. Rows of f(A) sum to the sum of all four."""

    mean: Coefficient = 0.0
    """c_J"""
    identity: Coefficient = 0.0
    """c_0"""
    attention: Coefficient = 1.0
    """c_1"""
    square: Coefficient = 0.0
    """c_2"""


def attnscale_spectrum(omega: Tensor) -> Spectrum:
    """J + (1 + omega) (A - J)."""
    return Spectrum(mean=-omega, attention=1 + omega)


def centred_spectrum() -> Spectrum:
    """A - J: without any DC part."""
    return Spectrum(mean=-1.0)


def graph_filter_spectrum(w0: Coefficient, w1: Coefficient, wk: Coefficient, order: int) -> Spectrum:
    """w0 I + w1 A + wk (A + (K - 1) (A^2 - A)): A^K by its first-order Taylor expansion (GFSA, arXiv 2312.04234)."""
    return Spectrum(identity=w0, attention=w1 + (2 - order) * wk, square=(order - 1) * wk)


def spectral_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spectrum: Spectrum,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """f(A) V of every head. Coefficients that are the number 0 cost nothing.

    Args:
        query: (batch, heads, tokens, head_dim).
        key: likewise.
        value: likewise.
        spectrum: the coefficients; tensors are cast to the value's dtype.
        scale: of the logits; None is 1 / sqrt(head_dim).
        dropout_p: of the entries of A; the two factors of A^2 are dropped apart.

    Returns:
        Shape and dtype of `value`.
    """

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, x, dropout_p=dropout_p, scale=scale)

    def by_head(coefficient: Coefficient) -> Coefficient:
        return coefficient.to(value.dtype).view(-1, 1, 1) if isinstance(coefficient, Tensor) else coefficient

    mean, identity, attention, square = map(by_head, spectrum)
    out = value.new_zeros(())
    if _counts(attention) or _counts(square):
        attended = attend(value)
        out = attention * attended
        if _counts(square):
            out = out + square * attend(attended)
    if _counts(identity):
        out = out + identity * value
    if _counts(mean):
        out = out + mean * value.mean(-2, keepdim=True)
    return out.expand_as(value)


def _counts(coefficient: Coefficient) -> bool:
    return isinstance(coefficient, Tensor) or coefficient != 0
