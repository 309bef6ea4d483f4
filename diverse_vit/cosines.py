"""Cosines between tokens, heads or layers (Sec. 3.1; spec c.1, c.2): the first three regularizers.

Signed means over all pairs factor through mean unit vectors and cost O(n d); absolute ones do not, and go row by row.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

P = ParamSpec("P")
R = TypeVar("R")
EPS = 1e-8
ROWS = 64


def exact(loss: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the loss, whose first argument is a tensor, is computed without autocast, also within it."""
    name = next(iter(inspect.signature(loss).parameters))

    @functools.wraps(loss)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0] if args else kwargs.get(name)
        if first is None:
            return loss(*args, **kwargs)  # a TypeError that names what is missing
        with torch.autocast(first.device.type, enabled=False):
            return loss(*args, **kwargs)

    return run


def full(x: Tensor) -> Tensor:
    """x in float32 where it is of half precision, else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit(z: Tensor) -> Tensor:
    """z / max(||z||, 1e-8) on the last axis; zero vectors stay zero."""
    return F.normalize(full(z), dim=-1, eps=EPS)


@exact
def cosine(
    z: Tensor, *, absolute: bool = False, diagonal: bool = True, margin: float = 0.0, chunk: int = ROWS
) -> Tensor:
    """Mean cosine over all pairs of rows of each set, averaged over the sets.

    Args:
        z: (..., n, d), for instance the patch tokens of each image.
        absolute: of |cos|; the released losses are signed.
        diagonal: count a row with itself (its cosine is 1), as the released losses do.
        margin: of max(0, |cos| - margin); 0 leaves the cosine as it is.
        chunk: rows at a time where the mean does not factor; (..., n, n) is never kept.

    Returns:
        A scalar in [-1, 1]; in [0, 1] if signed with the diagonal, 1/n for orthogonal rows.

    Raises:
        ValueError: for fewer than two rows, or a margin outside [0, 1).
    """
    _check_rows(z, margin)
    n, u = z.shape[-2], unit(z)
    factors = not (absolute or margin)
    total = u.sum(-2).square().sum(-1) if factors else _over_pairs(u, u, margin, chunk)
    if diagonal:
        return total.mean() / n**2
    own = u.square().sum(-1)  # 1, or 0 for a zero row
    own = own if factors else _shaped(own, margin)
    return (total - own.sum(-1)).mean() / (n * (n - 1))


@exact
def cosine_across(a: Tensor, b: Tensor, *, absolute: bool = False, margin: float = 0.0, chunk: int = ROWS) -> Tensor:
    """Mean cosine over all n^2 pairs of a row of `a` with a row of `b`, averaged over the sets.

    Args:
        a: (..., n, d), for instance the tokens after one layer.
        b: (..., n, d), after another.
        absolute, margin, chunk: as for `cosine`.

    Raises:
        ValueError: for unequal shapes or fewer than two rows.
    """
    _check_alike(a, b)
    _check_rows(a, margin)
    u, v = unit(a), unit(b)
    if absolute or margin:
        return _over_pairs(u, v, margin, chunk).mean() / a.shape[-2] ** 2
    return (u.mean(-2) * v.mean(-2)).sum(-1).mean()


@exact
def contrastive(h_first: Tensor, h_last: Tensor) -> Tensor:
    """Each token shall be nearer to itself in the other layer than to the mean of the others (spec c.1.4).

    softplus(m_i - a_i) with a_i = cos(first_i, last_i) and m_i the mean cosine of first_i with the other last_j: the
    negatives are averaged inside the exponential, there is no temperature, and gradients flow into both layers.

    Args:
        h_first: (..., n, d).
        h_last: (..., n, d).

    Returns:
        A scalar, the mean over rows and sets; log 2 where all rows coincide.

    Raises:
        ValueError: for unequal shapes or fewer than two rows.
    """
    _check_alike(h_first, h_last)
    _check_rows(h_first)
    u, v = unit(h_first), unit(h_last)
    own = (u * v).sum(-1)
    others = ((u @ v.sum(-2, keepdim=True).mT).squeeze(-1) - own) / (u.shape[-2] - 1)
    return F.softplus(others - own).mean()


def _over_pairs(u: Tensor, v: Tensor, margin: float, chunk: int) -> Tensor:
    """Sum over all pairs of |u_i . v_j|, less the margin: (...,); rows in chunks, recomputed in backward."""
    if u.shape[-2] <= chunk:
        return _block_sum(u, v, margin)
    blocks = [checkpoint(_block_sum, part, v, margin, use_reentrant=False) for part in u.split(chunk, -2)]
    return torch.stack(blocks).sum(0)


def _block_sum(u: Tensor, v: Tensor, margin: float) -> Tensor:
    return _shaped(u @ v.mT, margin).sum((-2, -1))


def _shaped(cosines: Tensor, margin: float) -> Tensor:
    return F.relu(cosines.abs() - margin) if margin else cosines.abs()


def _check_rows(z: Tensor, margin: float = 0.0) -> None:
    if z.ndim < 2 or z.shape[-2] < 2:
        raise ValueError(f"z must be (..., n, d) with at least 2 rows, got shape {tuple(z.shape)}")
    if not 0 <= margin < 1:
        raise ValueError(f"margin must be in [0, 1), got {margin}")


def _check_alike(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"both layers must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
