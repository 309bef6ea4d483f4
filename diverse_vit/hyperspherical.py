"""Rows apart on the unit sphere: hyperspherical separation and Gram determinant (Sec. 3.3; spec c.2)."""

import torch
from torch import Tensor

from diverse_vit.cosines import exact, unit


@exact
def mhs(z: Tensor, *, legacy_ties: bool = False) -> Tensor:
    """Minus the smallest squared distance between two unit rows, the mean over sets: -(2 - 2 max cos).

    Args:
        z: (..., n, d), not zero everywhere in a row.
        legacy_ties: as released: multiplied by the number of exact ties, distances of exactly 0 ignored. Otherwise the
            gradient goes to the first closest pair alone.

    Raises:
        ValueError: for fewer than two rows.
    """
    squared = _squared_distances(z)
    n = z.shape[-2]
    pairs = torch.tril_indices(n, n, -1, device=z.device)
    distances = squared[..., pairs[0], pairs[1]]
    if not legacy_ties:
        first = distances.detach().argmin(-1, keepdim=True)
        return -distances.gather(-1, first).mean()
    apart = torch.where(distances > 0, distances, torch.inf)
    least = apart.amin(-1, keepdim=True)
    return -torch.where(apart == least, distances, 0).sum(-1).mean()


@exact
def mgd(z: Tensor, eps: float = 1e-6) -> Tensor:
    """Minus the log-determinant of the Gram matrix exp(-squared distance) + eps I of unit rows, the mean over sets.

    Args:
        z: (..., n, d).
        eps: keeps the matrix of equal rows regular.

    Raises:
        ValueError: for fewer than two rows.
    """
    squared = _squared_distances(z)
    gram = torch.exp(-squared) + eps * torch.eye(z.shape[-2], dtype=squared.dtype, device=z.device)
    return -torch.linalg.slogdet(gram).logabsdet.mean()


def _squared_distances(z: Tensor) -> Tensor:
    """2 - 2 cos / (1 + 1e-8), (..., n, n): the released code divides rows of norm 1 by sqrt(1 + 1e-8) once more."""
    if z.ndim < 2 or z.shape[-2] < 2:
        raise ValueError(f"z must be (..., n, d) with at least 2 rows, got shape {tuple(z.shape)}")
    u = unit(z)
    return 2 - 2 * (u @ u.mT) / (1 + 1e-8)
