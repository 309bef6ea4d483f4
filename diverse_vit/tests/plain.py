"""Plain forms of every efficient loss, straight from the formulas: the oracles of the tests and of the benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise_cosines(a: Tensor, b: Tensor) -> Tensor:
    """(..., n, n)."""
    return F.normalize(a, dim=-1, eps=1e-8) @ F.normalize(b, dim=-1, eps=1e-8).mT


def cosine(z: Tensor, *, absolute: bool = False, diagonal: bool = True, margin: float = 0.0) -> Tensor:
    pairs = pairwise_cosines(z, z)
    if absolute or margin:
        pairs = (pairs.abs() - margin).clamp_min(0)
    if diagonal:
        return pairs.mean()
    return pairs[..., ~torch.eye(z.shape[-2], dtype=torch.bool)].mean()


def cosine_across(a: Tensor, b: Tensor, *, absolute: bool = False) -> Tensor:
    pairs = pairwise_cosines(a, b)
    return (pairs.abs() if absolute else pairs).mean()


def contrastive(first: Tensor, last: Tensor) -> Tensor:
    pairs = pairwise_cosines(first, last)
    n = first.shape[-2]
    own = pairs.diagonal(dim1=-2, dim2=-1)
    others = pairs.masked_fill(torch.eye(n, dtype=torch.bool), 0).sum(-1) / (n - 1)
    return -torch.log(own.exp() / (own.exp() + others.exp())).mean()


def head_cosine(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = q @ k.mT
    return cosine((logits if bias is None else logits + bias).softmax(-1).flatten(2))


def cno(w: Tensor, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one matrix (o, i), by W W^T."""
    a = w @ w.mT
    y = a @ x1
    largest = (y.mT @ a @ y / (y.mT @ y)).squeeze()
    p = (a - largest * torch.eye(len(a), dtype=a.dtype)) @ x2
    smallest = (p.mT @ a @ p / (p.mT @ p)).squeeze()
    return (largest - smallest) ** 2, largest, smallest


def targets(y1: Tensor, y2: Tensor, weight: Tensor, classes: int, smoothing: float) -> Tensor:
    """Smoothed targets of every token, (batch, t, classes)."""
    first, second = (F.one_hot(y, classes).double() * (1 - smoothing) + smoothing / classes for y in (y1, y2))
    return weight[:, None] * first[:, None] + (1 - weight)[:, None] * second[:, None]


def soft_cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """Token by token: the mean over tokens of each one's batch mean."""
    losses = [-(target[:, i] * F.log_softmax(z[:, i], -1)).sum(-1).mean() for i in range(z.shape[1])]
    return torch.stack(losses).mean()
