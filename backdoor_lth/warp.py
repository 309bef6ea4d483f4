"""WaNet's trigger (Nguyen and Tran, ICLR 2021): the whole image bent by one smooth field, too little to be seen.

Without that paper's noise mode, as arXiv 2205.11819 attacks with it (claim B12).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoor_lth.triggers import check_pixels


def random_field(size: int, generator: torch.Generator | None = None) -> Tensor:
    """Displacements (2, size, size), right and down, drawn from U(-1, 1) and divided by their mean size."""
    if size < 2:
        raise ValueError(f"size must be at least 2, got {size}")
    field = 2 * torch.rand(2, size, size, generator=generator) - 1
    return field / field.abs().mean()


@dataclass(frozen=True)
class Warp:
    """A smooth field and how far it bends.

    Args:
        field: displacements (2, k, k), right and down, at k x k places over the image, bicubic between them.
        strength: a displacement of 1 moves by so many half pixels.

    Raises:
        ValueError: a field that is not such a tensor, a negative strength.
    """

    field: Tensor
    strength: float = 0.5

    def __post_init__(self) -> None:
        shape = tuple(self.field.shape)
        if len(shape) != 3 or shape[0] != 2 or shape[1] != shape[2] or shape[1] < 2:
            raise ValueError(f"field must be (2, k, k) with k at least 2, got {shape}")
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength must be at least 0, got {self.strength}")

    def stamp(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images bent, bilinear between pixels.

        Args:
            images: (n, channels, side, side), uint8 or float in [0, 1].
            generator: not used; a patch draws its places from it.

        Raises:
            ValueError: images of another shape, or floats outside [0, 1] (normalised by mistake).
        """
        if images.ndim != 4 or images.shape[2] != images.shape[3]:
            raise ValueError(f"images must be (n, channels, side, side), got {tuple(images.shape)}")
        check_pixels("images", images)
        side = images.shape[-1]
        field = self.field.to(images.device, torch.float32)
        field = F.interpolate(field[None], (side, side), mode="bicubic", align_corners=True)[0]
        line = torch.linspace(-1, 1, side, device=images.device)
        places = torch.stack([line.expand(side, side), line[:, None].expand(side, side)])
        grid = (places + self.strength * field / side).clamp(-1, 1).permute(1, 2, 0)
        pixels = images.to(torch.float32)
        bent = F.grid_sample(pixels, grid.expand(len(images), -1, -1, -1), align_corners=True)
        return bent.round_().to(torch.uint8) if images.dtype == torch.uint8 else bent.to(images.dtype)
