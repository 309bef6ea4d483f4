"""Mixup or cutmix of a batch that knows what share of every patch is whose (spec c.1.2).

In cutmix a patch outside the pasted box keeps its image's label, one inside has the partner's, and one on the border a
part of both; in mixup all patches share the image's weight.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class MixedBatch(NamedTuple):
    """Images (batch, c, h, w), two labels an image (batch,), the share `lam` of the first; by patch (n,)."""

    x: Tensor
    y1: Tensor
    y2: Tensor
    lam: float
    patch_weight: Tensor


class Box(NamedTuple):
    """Rows [top, bottom) and columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int


class PatchMixup:
    """Mix each image with that of the reversed batch: one draw a batch, image b with image batch - 1 - b.

    Args:
        mixup_alpha: the share is drawn from Beta(alpha, alpha); 0 turns mixup off.
        cutmix_alpha: likewise.
        prob: of mixing a batch at all.
        switch_prob: of cutmix where both are on.
        patch_size: side of a patch in pixels, or (height, width).
        generator: what draws, numpy's global generator if None (as released).

    Raises:
        ValueError: for impossible values.
    """

    def __init__(
        self,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        *,
        patch_size: int | tuple[int, int],
        generator: np.random.RandomState | None = None,
    ) -> None:
        if mixup_alpha < 0 or cutmix_alpha < 0 or mixup_alpha + cutmix_alpha == 0:
            raise ValueError(f"alphas must be at least 0 and not both 0, got {mixup_alpha} and {cutmix_alpha}")
        for name, value in (("prob", prob), ("switch_prob", switch_prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        self.mixup_alpha, self.cutmix_alpha, self.prob, self.switch_prob = mixup_alpha, cutmix_alpha, prob, switch_prob
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        self.generator = np.random.mtrand._rand if generator is None else generator

    def __call__(self, x: Tensor, y: Tensor) -> MixedBatch:
        """Mix images (batch, c, h, w), floating point, with labels (batch,); `x` itself is left as it is.

        Raises:
            ValueError: for an odd batch, integer images, or a size that patches do not tile.
        """
        if len(x) % 2:
            raise ValueError(f"batch must be even, got {len(x)} images")
        if not x.is_floating_point():
            raise ValueError(f"images must be floating point, got {x.dtype}")
        height, width = x.shape[-2:]
        counts = patch_grid(height, width, self.patch_size)
        if self.generator.rand() >= self.prob:
            return MixedBatch(x, y, y.flip(0), 1.0, x.new_ones(counts[0] * counts[1]))
        both = self.mixup_alpha > 0 and self.cutmix_alpha > 0
        cut = self.generator.rand() < self.switch_prob if both else self.cutmix_alpha > 0
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        lam = float(self.generator.beta(alpha, alpha))
        if not cut:
            weight = x.new_full((counts[0] * counts[1],), lam)
            return MixedBatch(torch.lerp(x.flip(0), x, lam), y, y.flip(0), lam, weight)
        box = draw_box(lam, height, width, self.generator)
        return MixedBatch(paste(x, box), y, y.flip(0), *box_weights(box, height, width, self.patch_size, x))


def draw_box(lam: float, height: int, width: int, generator: np.random.RandomState) -> Box:
    """The box of a cutmix that shall keep the share `lam`: uniform centre, row drawn first, clipped at the border."""
    ratio = (1 - lam) ** 0.5
    tall, wide = int(height * ratio), int(width * ratio)
    row, column = int(generator.randint(height)), int(generator.randint(width))
    top, bottom = row - tall // 2, row + tall // 2
    left, right = column - wide // 2, column + wide // 2
    return Box(max(top, 0), min(bottom, height), max(left, 0), min(right, width))


def paste(x: Tensor, box: Box) -> Tensor:
    """Images with the box of the reversed batch in them."""
    mixed = x.clone()
    inside = (..., slice(box.top, box.bottom), slice(box.left, box.right))
    mixed[inside] = x.flip(0)[inside]
    return mixed


def box_weights(
    box: Box, height: int, width: int, patch_size: tuple[int, int], like: Tensor | None = None
) -> tuple[float, Tensor]:
    """The share of the image outside the box, and of each patch, row by row, (n,), of `like`'s dtype and device."""
    lam = 1 - (box.bottom - box.top) * (box.right - box.left) / (height * width)
    outside = torch.ones(1, height, width) if like is None else like.new_ones(1, height, width)
    outside[:, box.top : box.bottom, box.left : box.right] = 0
    return lam, F.avg_pool2d(outside, patch_size).flatten()


def patch_grid(height: int, width: int, patch_size: tuple[int, int]) -> tuple[int, int]:
    """Patches from top to bottom and from left to right. Raises ValueError where they do not tile the image."""
    if height % patch_size[0] or width % patch_size[1]:
        raise ValueError(f"image size must be a multiple of the patch size {patch_size}, got {(height, width)}")
    return height // patch_size[0], width // patch_size[1]
