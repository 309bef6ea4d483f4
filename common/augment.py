"""Augmentation of whole batches, drawn from a given generator: roll, mixup or cutmix, random erasing.

Draws are for the global batch; of a data-parallel group each rank uses its part. Images are mixed with their neighbour
(2k with 2k + 1; batches are shuffled anyway), so that partners lie on one rank and two ranks equal one process.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common import distributed
from common.config import UserError


def roll(images: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Each image rolled by up to `reach` pixels in both directions.

    Args:
        images: this rank's, (batch, channels, height, width), any dtype.
        reach: largest shift; 0 returns `images`.
        generator: of the CPU.
    """
    if reach == 0:
        return images
    draws = torch.randint(-reach, reach + 1, (2, len(images) * distributed.world_size()), generator=generator)
    down, right = (distributed.shard(shifts).to(images.device) for shifts in draws)
    count, channels, height, width = images.shape
    rows = (torch.arange(height, device=images.device) - down[:, None]) % height
    columns = (torch.arange(width, device=images.device) - right[:, None]) % width
    index = (rows[:, :, None] * width + columns[:, None, :]).view(count, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view_as(images)


def soft_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """One-hot labels (batch, classes) with `smoothing` spread over all classes."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(
    images: Tensor, targets: Tensor, mixup: float, cutmix: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of the whole batch, each with probability 1/2 where both are on (DeiT's switch of .5).

    Args:
        images: this rank's, (batch, channels, height, width), float; an odd last one is mixed with itself.
        targets: (batch, classes).
        mixup: alpha of the Beta distribution of the mixing share; 0 turns it off.
        cutmix: likewise.
        generator: of the CPU.

    Raises:
        UserError: for an odd batch of one of several processes, which would not be mixed as in one process.
    """
    if mixup <= 0 and cutmix <= 0:
        return images, targets
    if len(images) % 2 and distributed.world_size() > 1:
        raise UserError(f"batch size must be even for each process where images are mixed, got {len(images)}")
    switch, down, right = torch.rand(3, generator=generator).tolist()
    cut = cutmix > 0 and (mixup <= 0 or switch < 0.5)
    keep = _beta(cutmix if cut else mixup, generator)
    partner = torch.arange(len(images), device=images.device) ^ 1
    partner = torch.where(partner < len(images), partner, partner ^ 1)
    if not cut:
        return torch.lerp(images[partner], images, keep), torch.lerp(targets[partner], targets, keep)
    height, width = images.shape[-2:]
    top, left, tall, wide = _box(keep, down, right, height, width)
    images = images.clone()
    images[..., top : top + tall, left : left + wide] = images[partner][..., top : top + tall, left : left + wide]
    keep = 1 - tall * wide / (height * width)
    return images, torch.lerp(targets[partner], targets, keep)


def erase(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Random erasing with normal noise a pixel: a box of 2 to 33 % of the area, aspect .3 to 3.3.

    Args:
        images: this rank's, (batch, channels, height, width), normalised.
        probability: of an image to be erased.
        generator: of the CPU.
    """
    if probability <= 0:
        return images
    count = len(images) * distributed.world_size()
    chance, area, aspect, down, right = torch.rand(5, count, generator=generator)
    noise_seed = torch.randint(0, 2**62, (count,), generator=generator)
    area, aspect = 0.02 + (0.33 - 0.02) * area, torch.exp((2 * aspect - 1) * torch.log(torch.tensor(3.3)))
    chance, area, aspect, down, right, noise_seed = map(
        distributed.shard, (chance, area, aspect, down, right, noise_seed)
    )
    height, width = images.shape[-2:]
    tall = ((area * aspect).sqrt() * height).round().clamp(1, height).int().tolist()
    wide = ((area / aspect).sqrt() * width).round().clamp(1, width).int().tolist()
    images = images.clone()
    for index in (chance < probability).nonzero().squeeze(1).tolist():
        top = int(down[index] * (height - tall[index] + 1))
        left = int(right[index] * (width - wide[index] + 1))
        box = images[index, :, top : top + tall[index], left : left + wide[index]]
        own = torch.Generator().manual_seed(int(noise_seed[index]))
        box.copy_(torch.randn(box.shape, generator=own))
    return images


def _beta(alpha: float, generator: torch.Generator) -> float:
    """A draw of Beta(alpha, alpha): torch's gamma sampler takes a generator, its Beta distribution does not."""
    one, two = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator).tolist()
    return one / (one + two) if one + two > 0 else 1.0


def _box(keep: float, down: float, right: float, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the pasted box: a share 1 - keep of the area around a uniform centre, clipped."""
    tall, wide = round(height * (1 - keep) ** 0.5), round(width * (1 - keep) ** 0.5)
    top, left = int(down * height) - tall // 2, int(right * width) - wide // 2
    bottom, end = min(top + tall, height), min(left + wide, width)
    top, left = max(top, 0), max(left, 0)
    return top, left, bottom - top, end - left
