"""Direct-current and high-frequency parts of token sequences, and how alike tokens are.

The DC part of x is its mean over tokens, repeated; the HC part is the rest. That is the DFT along tokens with only, or
without, bin 0. Self-attention shrinks HC against DC; that ratio is what to watch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dc(x: Tensor) -> Tensor:
    """DC[x] = 11^T/n x: the token mean at every token; x (..., tokens, dim)."""
    return x.mean(-2, keepdim=True).expand_as(x)


def hc(x: Tensor) -> Tensor:
    """HC[x] = x - DC[x]; x (..., tokens, dim)."""
    return x - x.mean(-2, keepdim=True)


def hc_ratio(x: Tensor) -> Tensor:
    """||HC[x]||_F / ||DC[x]||_F of each sequence.

    HC is computed centred: ||x||^2 - n ||mean||^2 would cancel.

    Args:
        x: tokens, (..., tokens, dim).

    Returns:
        (...,). 0 where all tokens are equal; `inf` where the mean token is zero and they are not.
    """
    high, low = torch.linalg.matrix_norm(hc(x)), torch.linalg.matrix_norm(dc(x))
    return torch.where(high == 0, torch.zeros_like(high), high / low)


def mean_cosine(x: Tensor) -> Tensor:
    """Mean cosine over all pairs of different tokens: (n ||u||^2 - 1) / (n - 1) with u the mean of unit-norm tokens.

    Args:
        x: (..., n, dim); n >= 2. Works in O(n dim).

    Returns:
        (...,). Zero tokens count as orthogonal to all others.

    Raises:
        ValueError: for fewer than two tokens.
    """
    n = x.shape[-2]
    if n < 2:
        raise ValueError(f"x must have at least 2 tokens, got {n}")
    unit = F.normalize(x, dim=-1)
    total, own = unit.sum(-2).square().sum(-1), unit.square().sum((-2, -1))  # own = n without zero tokens
    return (total - own) / (n * (n - 1))


def lowpass_curve(attention: Tensor, z: Tensor, steps: int) -> Tensor:
    """||HC[A^t z]|| / ||DC[A^t z]|| for t = 1 .. steps (Theorem 1).

    HC and mean are carried apart, HC[A x] = (I - J) A HC[x] as A 1 = 1, so that the curve does not end in rounding.

    Args:
        attention: row-stochastic A, (..., n, n).
        z: (..., n, dim).
        steps: at least 1.

    Returns:
        (..., steps); `inf` where the mean is 0 and z is not constant.

    Raises:
        ValueError: for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    mean, high = z.mean(-2, keepdim=True), hc(z)
    ratios = []
    for _ in range(steps):
        moved = attention @ high
        mean, high = mean + moved.mean(-2, keepdim=True), hc(moved)
        size = torch.linalg.matrix_norm(high)
        low = z.shape[-2] ** 0.5 * torch.linalg.matrix_norm(mean)
        ratios.append(torch.where(size == 0, torch.zeros_like(size), size / low))
    return torch.stack(ratios, -1)
