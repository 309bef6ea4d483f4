"""Mean cosine between the attention maps of the heads of one layer, without keeping the maps (spec c.1.5, h).

With n_g = ||A_g|| and S = sum_g A_g / n_g, the mean over all pairs of heads is ||S||^2 / H^2. Two passes over blocks of
rows (norms, then S), a third in backward: peak memory is batch * H * chunk * N instead of batch * H * N^2.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diverse_vit.cosines import exact, full

ROWS = 64


@exact
def attention_map(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T + bias) in at least float32: (batch, H, N, N).

    Args:
        q: scaled queries, (batch, H, N, head_dim).
        k: keys, likewise.
        bias: of the logits, broadcast to (batch, H, N, N).
    """
    return _block(full(q), full(k), bias, slice(None))


@exact
def head_cosine(q: Tensor, k: Tensor, bias: Tensor | None = None, *, chunk: int = ROWS) -> Tensor:
    """Mean cosine over all pairs of heads (a head with itself included) of softmax(q k^T + bias), flattened.

    Maps are not negative, so the absolute cosine is the same.

    Args:
        q: scaled queries, (batch, H, N, head_dim).
        k: keys, likewise.
        bias: of the logits, four axes, broadcast to (batch, H, N, N).
        chunk: rows of the map at a time.

    Returns:
        A scalar in (0, 1], the mean over images; differentiable once.

    Raises:
        ValueError: for a single head, for which there is nothing to compare.
    """
    if q.shape[1] < 2:
        raise ValueError(f"attention must have at least 2 heads, got {q.shape[1]}")
    return _HeadCosine.apply(full(q), full(k), bias, chunk)


class _HeadCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, bias: Tensor | None, chunk: int) -> Tensor:
        batch, heads, tokens, _ = q.shape
        whole = _block(q, k, bias, slice(None)) if tokens <= chunk else None
        squares = q.new_zeros(batch, heads)
        for rows in _slices(tokens, chunk):
            squares = squares + (_block(q, k, bias, rows) if whole is None else whole).square().sum((2, 3))
        norms = squares.sqrt()  # at least 1: every row of a map sums to 1
        overlaps = torch.zeros_like(norms)  # <A_g, S>
        for rows in _slices(tokens, chunk):
            block = _block(q, k, bias, rows) if whole is None else whole
            overlaps = overlaps + (block * _sum_of_units(block, norms)).sum((2, 3))
        ctx.save_for_backward(q, k, bias, norms, overlaps)
        ctx.chunk = chunk
        return (overlaps / norms).sum(1).mean() / heads**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, bias, norms, overlaps = ctx.saved_tensors
        batch, heads, tokens, _ = q.shape
        factor = gradient * 2 / (batch * heads**2)
        pull = (factor * overlaps / norms**3)[..., None, None]
        push = (factor / norms)[..., None, None]
        dq, dk, dbias = [], torch.zeros_like(k), []
        for rows in _slices(tokens, ctx.chunk):
            block = _block(q, k, bias, rows)
            step = push * _sum_of_units(block, norms) - pull * block
            step = block * (step - (step * block).sum(-1, keepdim=True))  # through the softmax
            dq.append(step @ k)
            dk = dk + step.mT @ q[:, :, rows]
            if bias is not None and ctx.needs_input_grad[2]:
                dbias.append(step.sum_to_size(*bias.shape[:2], *step.shape[2:]))
        return torch.cat(dq, 2), dk, torch.cat(dbias, 2) if dbias else None, None


def _slices(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk))


def _block(q: Tensor, k: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
    """Some rows of the map: (batch, H, rows, N)."""
    logits = q[:, :, rows] @ k.mT
    return (logits if bias is None else logits + bias[:, :, rows]).softmax(-1)


def _sum_of_units(block: Tensor, norms: Tensor) -> Tensor:
    """The same rows of S: (batch, 1, rows, N)."""
    return (block / norms[..., None, None]).sum(1, keepdim=True)
