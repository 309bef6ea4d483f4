"""Common corruptions that no training saw, in five severities (optional measure; spec C8).

The formulas are those of Hendrycks & Dietterich (2019) for noise and contrast. Brightness shifts pixel values, theirs
the value of HSV, by the same amounts, which is not the same in colour; blur is Gaussian. The published CIFAR-10-C files
can be measured too, as a data set of their own (--target.name npz).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data import ImageSet, pixels
from common.runs import generator

SIGMAS = (0.08, 0.12, 0.18, 0.26, 0.38)
CONTRASTS = (0.4, 0.3, 0.2, 0.1, 0.05)
SHIFTS = (0.1, 0.2, 0.3, 0.4, 0.5)
WIDTHS = (0.5, 0.75, 1.0, 1.5, 2.0)  # of the blur, pixels


def noise(x: Tensor, severity: int) -> Tensor:
    """Gaussian noise, the same for every network."""
    drawn = torch.randn(x.shape, generator=generator(severity))
    return (x + SIGMAS[severity - 1] * drawn).clamp(0, 1)


def blur(x: Tensor, severity: int) -> Tensor:
    """Gaussian blur."""
    at = torch.arange(-6, 7, dtype=x.dtype)
    kernel = torch.exp(-((at / WIDTHS[severity - 1]) ** 2) / 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    planes = F.pad(x.flatten(0, 1).unsqueeze(1), (6, 6, 6, 6), mode="replicate")
    return F.conv2d(F.conv2d(planes, kernel), kernel.transpose(2, 3)).view_as(x).clamp(0, 1)


def contrast(x: Tensor, severity: int) -> Tensor:
    """Less contrast around the mean of each channel of an image."""
    mean = x.mean((2, 3), keepdim=True)
    return ((x - mean) * CONTRASTS[severity - 1] + mean).clamp(0, 1)


def brightness(x: Tensor, severity: int) -> Tensor:
    """All pixels of all channels brighter by one amount."""
    return (x + SHIFTS[severity - 1]).clamp(0, 1)


CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "brightness": brightness,
}


def corrupted(data: ImageSet, name: str, severity: int) -> ImageSet:
    """The images of `data` under one corruption at severity 1 to 5, rounded to 8 bits; labels stay."""
    if name not in CORRUPTIONS or severity not in range(1, 6):
        raise ValueError(f"corruption must be one of {', '.join(CORRUPTIONS)} at 1 to 5, got {name!r} at {severity}")
    if not isinstance(data.images, Tensor):
        raise ValueError("corruptions need images in memory, got image files")
    changed = CORRUPTIONS[name](pixels(data.images), severity)
    return ImageSet((changed * 255).round().to(torch.uint8), data.labels, data.classes)
