"""Can the regression find update rules that are known? Five targets of the paper's sanity table (claim C1)."""

import numpy as np

from symbolic_l2o.regression import Array, Search, symbolic_regression

WINDOW = 10  # most recent gradients that the regression sees
TARGETS = {  # the paper's R2 and seconds on its machine
    "sgd": (1.0, 49),
    "window": (0.94, 126),
    "mixed": (0.98, 256),
    "momentum": (0.97, 90),
    "adam": (0.89, 879),
}


def target(name: str, gradients: Array) -> Array:
    """Update (N,) for histories of gradients (N, T), the latest first. Raises ValueError for an unknown name."""
    steps = np.arange(gradients.shape[1])
    if name == "sgd":
        return -0.01 * gradients[:, 0]
    if name == "window":
        return (gradients[:, :11] * (1 - 0.1 * steps[:11])).sum(1)
    if name == "mixed":
        return gradients[:, 0] ** 2 + gradients[:, 1] + 2 * gradients[:, 2] + np.exp(gradients[:, 4])
    if name == "momentum":
        return (gradients * 0.6**steps).sum(1)
    if name == "adam":
        weights = 0.9**steps
        return (gradients * weights).sum(1) / np.sqrt((gradients**2 * weights).sum(1) * weights.sum())
    raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {name!r}")


def recovered(name: str, search: Search, seed: int, rows: int = 2000, history: int = 40) -> float:
    """Largest R2 that symbolic regression reaches on independent normal gradients, the last 10 of which it sees."""
    gradients = np.random.default_rng(seed).normal(size=(rows, history))
    found = symbolic_regression(gradients[:, :WINDOW], target(name, gradients), "operon", search, seed)
    return max(candidate.r2 for candidate in found)
