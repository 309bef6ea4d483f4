"""How close generated images are to real ones in the features of any network: Fréchet distance, KID, precision, recall.

With Inception features these are FID and KID; with a classifier of one's own they are not and must not be called so.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 3  # Kynkäänniemi et al. 2019
ROWS = 1024  # of a matrix of all pairs that are in memory at a time


class Gaussian(NamedTuple):
    """Mean (d,) and covariance (d, d) of features, float64."""

    mean: Tensor
    covariance: Tensor


def gaussian(features: Tensor) -> Gaussian:
    """Mean and covariance of features (n, d). Raises ValueError unless they are finite and n > d."""
    if features.ndim != 2 or len(features) <= features.shape[1]:
        raise ValueError(f"features must be (n, d) with n > d, got {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError(f"features must be finite, got {int((~features.isfinite()).sum())} values that are not")
    double = features.double()
    return Gaussian(double.mean(0), double.T.cov())


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians: means (d,), covariances (d, d).

    Symmetric eigenproblems in float64: C1 C2 has the eigenvalues of C1^(1/2) C2 C1^(1/2). Raises ValueError on NaN,
    Inf or shapes that do not fit.
    """
    m1, c1, m2, c2 = (tensor.double() for tensor in (mean1, covariance1, mean2, covariance2))
    if not (m1.ndim == 1 and m1.shape == m2.shape and c1.shape == c2.shape == (len(m1), len(m1))):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (m1, c1, m2, c2))
        raise ValueError(f"means and covariances must be (d,) and (d, d), got {shapes}")
    if not all(tensor.isfinite().all() for tensor in (m1, c1, m2, c2)):
        raise ValueError("means and covariances must be finite, got values that are not")
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp_min(0).sqrt().sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """KID: unbiased squared maximum mean discrepancy with the kernel (x y / d + 1)^3 (Bińkowski et al. 2018)."""

    def total(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([((rows @ b.T / b.shape[1] + 1) ** 3).sum() for rows in a.split(ROWS)]).sum()

    def within(a: Tensor) -> Tensor:
        own = (a.square().sum(1) / a.shape[1] + 1) ** 3
        return (total(a, a) - own.sum()) / (len(a) * (len(a) - 1))

    x, y = real.double(), fake.double()
    return float(within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y)))


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of fakes in the real manifold and of reals in the fake one; balls up to the k-th nearest neighbour."""

    def distances(a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")

    def covered(points: Tensor, manifold: Tensor) -> float:
        radii = torch.cat(
            [
                distances(rows, manifold).kthvalue(neighbours + 1, dim=1).values  # the nearest is itself
                for rows in manifold.split(ROWS)
            ]
        )
        inside = [(distances(rows, manifold) <= radii).any(1) for rows in points.split(ROWS)]
        return float(torch.cat(inside).double().mean())

    x, y = real.double(), fake.double()
    return covered(y, x), covered(x, y)


class GenerativeEvaluator:
    """Scores of generated against real images.

    Args:
        features: images (n, channels, height, width) in [-1, 1] -> (n, d).
        batch_size: images a call of `features`.
    """

    def __init__(self, features: Callable[[Tensor], Tensor], batch_size: int = 500) -> None:
        self._features, self._batch_size = features, batch_size

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (n, d) of images. Raises ValueError where these are not in [-1, 1] up to rounding."""
        low, high = float(images.min()), float(images.max())
        if not (low >= -1 - 1e-4 and high <= 1 + 1e-4):  # so written, NaN fails
            raise ValueError(f"images must be in [-1, 1], got values in [{low}, {high}]")
        return torch.cat([self._features(batch) for batch in images.split(self._batch_size)])

    def distance(self, real: Tensor, fake: Tensor) -> float:
        """The Fréchet distance alone."""
        return frechet_distance(*gaussian(self.features(real)), *gaussian(self.features(fake)))

    def score(self, real: Tensor, fake: Tensor) -> dict[str, float]:
        """{"fd", "kid", "precision", "recall"}; the last two on as many fakes as there are reals, or the reverse.

        Raises ValueError where images are out of range, features not finite, or n <= d.
        """
        x, y = self.features(real), self.features(fake)
        distance = frechet_distance(*gaussian(x), *gaussian(y))
        count = min(len(x), len(y))
        precision, recall = precision_recall(x[:count], y[:count])
        return {"fd": distance, "kid": kernel_distance(x, y), "precision": precision, "recall": recall}
