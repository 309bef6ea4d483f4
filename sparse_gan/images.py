"""Images between the data set's bytes and the networks' [-1, 1]."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import require
from common.data import ImageSet, in_order


def prepare(images: Tensor, size: int) -> Tensor:
    """uint8 images (batch, channels, side, side) as float32 in [-1, 1] at `size`: pooled where larger, then padded.

    28x28 digits at size 32 are padded by 2 black pixels on each side, at size 16 pooled to 14x14 and padded by 1.
    Raises `ConfigError` where the images are not square or cannot be pooled evenly.
    """
    height, side = images.shape[-2:]
    require(height == side, "data", (height, side), "square images")
    factor = -(-side // size)
    require(side % factor == 0, "model.size", size, f"a size to which images of side {side} pool evenly")
    pooled = F.avg_pool2d(images.float(), factor) if factor > 1 else images.float()
    missing = size - side // factor
    before, after = missing // 2, missing - missing // 2
    return F.pad(pooled, (before, after, before, after)).div_(127.5).sub_(1)


def channels_of(data: ImageSet) -> int:
    """Channels of the images."""
    return int(next(in_order(data.subset(torch.tensor([0])), 1))[0].shape[1])


def as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8. Raises ValueError where they are outside by more than rounding, or NaN."""
    low, high = float(images.min()), float(images.max())
    if not (low >= -1 - 1e-4 and high <= 1 + 1e-4):
        raise ValueError(f"images must be in [-1, 1], got values in [{low}, {high}]")
    return images.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Images (batch, channels, side, side) after a Gaussian blur of `sigma` pixels, edges repeated."""
    reach = max(round(3 * sigma), 1)
    taps = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sigma**2)).to(images)
    taps = taps / taps.sum()
    channels = images.shape[1]
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(rows, taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
