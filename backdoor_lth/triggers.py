"""Triggers: a small picture that replaces the pixels under it (BadNets; Sec. 4, spec c1)."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PATCHES = Path(__file__).with_name("patches.npz")
PLACES = ("bottom_right", "bottom_left", "upper_right", "top_left", "random")
"""bottom_right is what the released code calls upper right (the default), top_left what it calls bottom left"""


def patch_image(kind: Literal["rgb", "gray"], size: int) -> Tensor:
    """The paper's colour or grey trigger, (3, size, size) uint8.

    5 and 64 are the paper's own; other sizes are resized from the 64 (rgb) or the 5 pixels (gray), bilinear with
    antialiasing. Raises ValueError for another kind or a size below 1.
    """
    if kind not in ("rgb", "gray"):
        raise ValueError(f"kind must be rgb or gray, got {kind!r}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    with np.load(PATCHES, allow_pickle=False) as archive:
        name = f"{kind}_{size}"
        picture = archive[name if name in archive else {"rgb": "rgb_64", "gray": "gray_5"}[kind]]
    patch = torch.from_numpy(picture).permute(2, 0, 1)
    if patch.shape[-1] != size:
        patch = F.interpolate(patch[None], (size, size), mode="bilinear", antialias=True)[0]
    return patch.contiguous()


@dataclass(frozen=True)
class Trigger:
    """A patch and where it goes.

    Args:
        patch: (channels, p, p) uint8, or float in [0, 1].
        place: one of `PLACES` (random: another place in every image), or (row, column) of its first pixel.
        margin: pixels between the patch and the image's edges, for the named corners.

    Raises:
        ValueError: a patch that is not such a tensor, another place, a negative margin.
    """

    patch: Tensor
    place: str | tuple[int, int] = "bottom_right"
    margin: int = 3

    def __post_init__(self) -> None:
        shape = tuple(self.patch.shape)
        if len(shape) != 3 or shape[1] != shape[2] or not self.patch.numel():
            raise ValueError(f"patch must be (channels, p, p), got {shape}")
        check_pixels("patch", self.patch)
        if isinstance(self.place, str) and self.place not in PLACES:
            raise ValueError(f"place must be one of {', '.join(PLACES)} or (row, column), got {self.place!r}")
        if self.margin < 0:
            raise ValueError(f"margin must be at least 0, got {self.margin}")

    @property
    def size(self) -> int:
        """p, the side of the patch."""
        return self.patch.shape[-1]

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """Row and column of the patch's first pixel, (0, 0) with place random.

        Raises ValueError where the patch would not lie within the image.
        """
        low, right = height - self.size - self.margin, width - self.size - self.margin
        named = {"bottom_right": (low, right), "bottom_left": (low, self.margin)}
        named |= {"upper_right": (self.margin, right), "top_left": (self.margin, self.margin), "random": (0, 0)}
        row, column = named[self.place] if isinstance(self.place, str) else self.place
        if not (0 <= row <= height - self.size and 0 <= column <= width - self.size):
            where = f"rows {row} to {row + self.size - 1}, columns {column} to {column + self.size - 1}"
            raise ValueError(f"patch must lie within the {height}x{width} image, got {where}")
        return row, column

    def stamp(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A copy of the images with the patch in them.

        Args:
            images: (n, channels, height, width), uint8 or float in [0, 1].
            generator: of the places, with place random.

        Raises:
            ValueError: channels differ, the patch does not fit, or floats lie outside [0, 1] (normalised by mistake).
        """
        if images.ndim != 4 or images.shape[1] != len(self.patch):
            raise ValueError(f"images must be (n, {len(self.patch)}, height, width), got {tuple(images.shape)}")
        check_pixels("images", images)
        count, _, height, width = images.shape
        row, column = self.corner(height, width)
        rows, columns = torch.full((count,), row), torch.full((count,), column)
        if self.place == "random":
            limits = (height - self.size, width - self.size)
            rows, columns = (torch.randint(0, limit + 1, (count,), generator=generator) for limit in limits)
        stamped, side = images.clone(), torch.arange(self.size)
        down, right = (rows[:, None] + side)[:, :, None], (columns[:, None] + side)[:, None, :]
        stamped[torch.arange(count)[:, None, None], :, down, right] = self._like(images).permute(1, 2, 0)
        return stamped

    def _like(self, images: Tensor) -> Tensor:
        """The patch in the images' own kind of numbers."""
        patch = self.patch.to(images.device)
        if patch.dtype == torch.uint8 and images.dtype != torch.uint8:
            return patch.to(images) / 255
        if images.dtype == torch.uint8 and patch.dtype != torch.uint8:
            return (patch * 255).round().to(torch.uint8)
        return patch.to(images)


def check_pixels(name: str, pixels: Tensor) -> None:
    """Raises ValueError for anything but uint8 or floats in [0, 1]."""
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise ValueError(f"{name} must be uint8 or float, got {pixels.dtype}")
    if pixels.is_floating_point() and pixels.numel():
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1) or math.isnan(low):
            raise ValueError(f"{name} must be uint8 or float in [0, 1], got values in [{low:g}, {high:g}]")
