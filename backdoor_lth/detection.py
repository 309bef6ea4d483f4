"""From recovered triggers to a verdict: the label of the least mask, and how far it lies below the others (spec c9)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from backdoor_lth.inversion import Inversion

FLAG = 2.0
"""anomaly index above which Neural Cleanse calls a network Trojaned"""


@dataclass(frozen=True)
class Detection:
    """Suspected target, its norm, how anomalous it is, and the label that most noise images get without a trigger."""

    label: int
    l1: float
    index: float
    flagged: bool
    collapse_label: int


def anomaly_index(norms: Sequence[float]) -> float:
    """(median - least) / (1.4826 * median absolute deviation): only unusually small norms count.

    inf where all but the least are equal, 0 where all are. Raises ValueError for fewer than 3 norms or non-finite ones.
    """
    values = torch.as_tensor(norms, dtype=torch.float64)
    if values.ndim != 1 or len(values) < 3:
        raise ValueError(f"norms must be at least 3, got {tuple(values.shape)}")
    if not values.isfinite().all():
        raise ValueError(f"norms must be finite, got {norms}")
    median = values.quantile(0.5)
    below, spread = float(median - values.min()), float((values - median).abs().quantile(0.5))
    if spread == 0:
        return math.inf if below > 0 else 0.0
    return below / (1.4826 * spread)


def detect(inversion: Inversion, norm: Literal["mask", "trigger"] = "mask") -> Detection:
    """The label whose trigger is least, by the mask (the paper's tables) or by mask * mark (its text).

    Raises ValueError for fewer than 3 labels or another norm.
    """
    if norm not in ("mask", "trigger"):
        raise ValueError(f"norm must be one of mask, trigger, got {norm!r}")
    norms = (inversion.l1 if norm == "mask" else inversion.trigger_l1).tolist()
    index = anomaly_index(norms)
    least = min(range(len(norms)), key=norms.__getitem__)
    collapse = int(inversion.null_success.argmax())
    labels = inversion.labels
    return Detection(labels[least], norms[least], index, index > FLAG, labels[collapse])
