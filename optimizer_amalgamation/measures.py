"""How well and how steadily an optimiser trains: measures of loss curves, and their spread (App. E; spec c11)."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.ndimage import gaussian_filter1d

SMOOTHING, TRUNCATE = 2.0, 4.0  # epochs; deviations

Floats = NDArray[np.float64]


def best(losses: ArrayLike) -> Floats:
    """Logarithm of the smallest loss (...) over the epochs (..., E)."""
    return np.log(_losses(losses)).min(-1)


def meta(losses: ArrayLike) -> Floats:
    """Mean over the epochs (..., E) of the logarithm of the loss."""
    return np.log(_losses(losses)).mean(-1)


def instability(losses: ArrayLike, first: int = 0) -> Floats:
    """Optimization stability (...): deviation over the epochs (..., E) from `first` on of log smoothed - log loss.

    Smoothed by a Gaussian of 2 epochs, the ends repeated. 0 for a constant curve; the less, the steadier.
    """
    losses = _losses(losses)
    smooth = gaussian_filter1d(losses, SMOOTHING, axis=-1, mode="nearest", truncate=TRUNCATE)
    return (np.log(smooth) - np.log(losses))[..., first:].std(-1)


def _losses(losses: ArrayLike) -> Floats:
    array = np.asarray(losses, float)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"losses must have at least one epoch, got shape {array.shape}")
    if not (array > 0).all():
        raise ValueError(f"losses must be positive numbers to have a logarithm, got {array[~(array > 0)][0]}")
    return array


class Interval(NamedTuple):
    """Two-sided."""

    low: float
    high: float


@dataclass(frozen=True)
class RandomEffects:
    """y_ij = mean + a_i + e_ij of I replicates i with J evaluations j each: an optimiser meta-trained I times.

    Args:
        mean: over all.
        within: mean square within replicates, MSW; 0 at J = 1.
        between: mean square between them, MSB.
        replicates: I.
        evaluations: J.
    """

    mean: float
    within: float
    between: float
    replicates: int
    evaluations: int

    @property
    def evaluation_sd(self) -> float:
        """Evaluation stability: deviation of e."""
        return self.within**0.5

    @property
    def meta_sd(self) -> float:
        """Meta-stability: deviation of a, with the share of e in the replicates' means taken out."""
        return (max(0.0, self.between - self.within) / self.evaluations) ** 0.5

    def interval(self, confidence: float = 0.95) -> Interval:
        """Confidence interval of the mean, by Student's t with I - 1 degrees of freedom."""
        half = float(stats.t.ppf((1 + confidence) / 2, self.replicates - 1))
        half *= (self.between / (self.replicates * self.evaluations)) ** 0.5
        return Interval(self.mean - half, self.mean + half)


def random_effects(values: ArrayLike) -> RandomEffects:
    """Balanced estimates for values (I, J).

    Raises:
        ValueError: for another number of axes, fewer than two replicates, no evaluation, or values not finite.
    """
    y = np.asarray(values, float)
    if y.ndim != 2 or y.shape[0] < 2 or y.shape[1] < 1:
        raise ValueError(f"values must be (replicates >= 2, evaluations >= 1), got shape {y.shape}")
    if not np.isfinite(y).all():
        raise ValueError(f"values must be finite, got {y[~np.isfinite(y)][0]}")
    replicates, evaluations = y.shape
    means = y.mean(1)
    within = float(((y - means[:, None]) ** 2).sum() / (replicates * (evaluations - 1))) if evaluations > 1 else 0.0
    between = float(evaluations * ((means - y.mean()) ** 2).sum() / (replicates - 1))
    return RandomEffects(float(y.mean()), within, between, replicates, evaluations)


def equal_spread(*groups: ArrayLike) -> float:
    """p of Levene's test (medians) that all groups, each a list of numbers, have one variance.

    Raises:
        ValueError: for fewer than two groups, or one with fewer than two numbers.
    """
    arrays = [np.asarray(group, float).ravel() for group in groups]
    if len(arrays) < 2 or min(map(len, arrays)) < 2:
        raise ValueError(f"there must be two groups or more of two numbers or more, got {list(map(len, arrays))}")
    return float(stats.levene(*arrays, center="median").pvalue)
