"""Augmentation of whole batches, drawn from a given generator for the global batch; each rank uses its part."""

import torch
from torch import Tensor

from common import distributed


def roll(images: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Each image (batch, channels, height, width) of this rank rolled by up to `reach` pixels down and right."""
    if reach == 0:
        return images
    shifts = torch.randint(-reach, reach + 1, (2, len(images) * distributed.world_size()), generator=generator)
    down, right = (distributed.shard(shift).to(images.device)[:, None] for shift in shifts)
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=images.device) - down) % height
    columns = (torch.arange(width, device=images.device) - right) % width
    own = torch.arange(len(images), device=images.device)[:, None, None]
    return images[own, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def erase(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Random erasing: normal noise in a box of 2 to 33 % of the area, aspect .3 to 3.3, of a share of the images.

    Args:
        images: this rank's, (batch, channels, height, width), normalised; left as they are.
        probability: of an image to be erased.
        generator: of the CPU.
    """
    if probability == 0:
        return images
    count, (height, width) = len(images) * distributed.world_size(), images.shape[-2:]
    chance, area, aspect, down, right = torch.rand(5, count, generator=generator)
    seeds = torch.randint(2**62, (count,), generator=generator)
    share, ratio = 0.02 + 0.31 * area, 3.3 ** (2 * aspect - 1)
    tall = ((share * ratio).sqrt() * height).round().clamp(1, height)
    wide = ((share / ratio).sqrt() * width).round().clamp(1, width)
    top, left = (down * (height - tall + 1)).floor(), (right * (width - wide + 1)).floor()
    chosen = (chance < probability).double()
    boxes = distributed.shard(torch.stack([chosen, top, left, tall, wide], 1)).int().tolist()
    images = images.clone()
    for index, ((hit, y, x, h, w), seed) in enumerate(zip(boxes, distributed.shard(seeds).tolist(), strict=True)):
        if hit:
            noise = torch.Generator().manual_seed(seed)
            images[index, :, y : y + h, x : x + w] = torch.randn(images.shape[1], h, w, generator=noise).to(images)
    return images
