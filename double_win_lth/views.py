"""Images of any side as the network's side: random crops in training, the centre in testing (spec d)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common import distributed

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MARGIN = 256 / 224  # a test image is resized to this multiple of the crop's side


def random_resized_crop(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random part of each image, 8 to 100 % of its area at a ratio of 3/4 to 4/3, bilinearly at size x size.

    Where torchvision draws again for a part that sticks out, its longer side is cut to the image's here.

    Args:
        x: this rank's images (n, channels, height, width), float.
        size: 0 returns x.
        generator: draws for the images of all ranks, of which this one takes its share.
    """
    if not size:
        return x
    area, ratio, down, right = torch.rand(4, len(x) * distributed.world_size(), generator=generator)
    side = (AREA[0] + (AREA[1] - AREA[0]) * area).sqrt()
    stretch = torch.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * ratio).sqrt()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    # Centres of the parts in [-1, 1], the coordinates of grid_sample.
    centre_x, centre_y = (1 - width) * (2 * right - 1), (1 - height) * (2 * down - 1)
    zero = torch.zeros_like(width)
    rows = [torch.stack([width, zero, centre_x], 1), torch.stack([zero, height, centre_y], 1)]
    theta = distributed.shard(torch.stack(rows, 1)).to(x)
    grid = F.affine_grid(theta, [len(x), x.shape[1], size, size], align_corners=False)
    return F.grid_sample(x, grid, "bilinear", "border", align_corners=False).clamp_(0, 1)


def centre_crop(x: Tensor, size: int) -> Tensor:
    """Each image resized to 256/224 `size`, its central size x size; x itself if size is 0."""
    if not size:
        return x
    large = round(size * MARGIN)
    resized = F.interpolate(x, (large, large), mode="bilinear", align_corners=False, antialias=True).clamp_(0, 1)
    low = (large - size) // 2
    return resized[:, :, low : low + size, low : low + size]
