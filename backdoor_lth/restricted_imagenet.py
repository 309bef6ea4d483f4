"""Restricted ImageNet: nine superclasses of ImageNet's thousand classes, all others dropped (spec d)."""

import torch
from torch import Tensor

from common.data import DataError, ImageSet

RANGES = {
    "dog": (151, 268),
    "cat": (281, 285),
    "frog": (30, 32),
    "turtle": (33, 37),
    "bird": (80, 100),
    "monkey": (365, 382),
    "fish": (389, 397),
    "crab": (118, 121),
    "insect": (300, 319),
}
"""first and last ImageNet index of each; its place here is its label"""


def superclass(labels: Tensor) -> Tensor:
    """ImageNet indices (n,) in [0, 1000) -> labels in [0, 9), or -1 where a class is dropped."""
    found = torch.full_like(labels, -1)
    for label, (first, last) in enumerate(RANGES.values()):
        found[(labels >= first) & (labels <= last)] = label
    return found


def restricted(data: ImageSet) -> ImageSet:
    """The images of the nine superclasses, with their labels. Raises `DataError` unless the labels are ImageNet's."""
    if data.classes != 1000:
        raise DataError(f"Restricted ImageNet needs labels of ImageNet's 1000 classes, got {data.classes} classes")
    labels = superclass(data.labels)
    kept = (labels >= 0).nonzero().squeeze(1)
    if not len(kept):
        raise DataError("Restricted ImageNet needs images of its nine superclasses, got none")
    return ImageSet(data.images[kept], labels[kept], len(RANGES))
