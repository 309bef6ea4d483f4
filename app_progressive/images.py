"""The pool that the stream is cut from, and batches of it with augmentation (spec d, h.4)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from app_progressive.settings import Config, StreamConfig
from common import distributed
from common.config import require
from common.data import DataConfig, ImageSet, crop_and_flip, in_order, load, pixels
from common.runs import generator

SHOTS, NOISE = 11, 12  # keys of the draws, apart from those of training


def pool_and_test(config: Config) -> tuple[ImageSet, ImageSet]:
    """The pool of training examples and the test set, both in memory.

    Raises:
        ConfigError: groups or shots that the data set cannot give. DataError: see `common.data.load`.
    """
    splits = load(config.data)
    train, test = (_grouped(split, config.stream.groups) for split in (splits.train, splits.test))
    if config.stream.shots:
        train = train.subset(_shots(train, config.stream.shots, config.seed))
    train, test = _in_memory(train), _in_memory(test)
    return ImageSet(train.images, _noisy(train, config.stream, config.seed), train.classes), test


def _grouped(data: ImageSet, groups: list[list[int]]) -> ImageSet:
    if not groups:
        return data
    outside = [label for group in groups for label in group if not 0 <= label < data.classes]
    require(not outside, "stream.groups", outside, f"of classes within [0, {data.classes})")
    group_of = torch.full((data.classes,), -1)
    for number, members in enumerate(groups):
        group_of[members] = number
    labels = group_of[data.labels]
    rows = (labels >= 0).nonzero().squeeze(1)
    return ImageSet(data.images[rows], labels[rows], len(groups))


def _shots(data: ImageSet, shots: int, seed: int) -> Tensor:
    """The first `shots` of each class in an order drawn from the seed."""
    order = torch.randperm(len(data), generator=generator(seed, SHOTS))
    labels = data.labels[order]
    rows = [order[labels == label][:shots] for label in range(data.classes)]
    fewest = min(map(len, rows))
    require(fewest == shots, "stream.shots", shots, f"at most the {fewest} examples of the rarest class")
    return torch.cat(rows)


def _in_memory(data: ImageSet) -> ImageSet:
    """Image files decoded once (resized, centre crop); what is in memory already stays."""
    if isinstance(data.images, Tensor):
        return data
    decoded = list(in_order(data, 250))
    return ImageSet(torch.cat([images for images, _ in decoded]), data.labels, data.classes)


def _noisy(data: ImageSet, stream: StreamConfig, seed: int) -> Tensor:
    """The labels, a part of them replaced by another class, uniformly."""
    draws = generator(seed, NOISE)
    flipped = torch.rand(len(data), generator=draws) < stream.noise
    shift = torch.randint(1, max(data.classes, 2), (len(data),), generator=draws)
    return torch.where(flipped, (data.labels + shift) % data.classes, data.labels)


def epoch_batches(
    pool: ImageSet,
    rows: Tensor,
    batch_size: int,
    data: DataConfig,
    keys: tuple[int, ...],
    *,
    shuffle: bool = True,
    whole: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over `rows` of the pool in batches, the last one as short as it must be, augmented as `data` says.

    A batch depends only on its place and `keys`. Under a data-parallel run each rank gets its part, and up to
    (ranks - 1) examples of the last batch are left out; with `whole` every rank gets all.

    Yields pixels in [0, 1], float32 (batch, channels, height, width), and labels int64, on the pool's device.
    """
    images = pool.images
    assert isinstance(images, Tensor)
    if shuffle:
        rows = rows[torch.randperm(len(rows), generator=generator(*keys))]
    spare = 0 if whole else len(rows) % distributed.world_size()
    for number, chosen in enumerate(rows[: len(rows) - spare].split(batch_size)):
        mine = (chosen if whole else distributed.shard(chosen)).to(pool.labels.device)
        batch, labels = images.index_select(0, mine), pool.labels.index_select(0, mine)
        if data.crop_padding or data.flip:
            draws = generator(*keys, number)
            offsets = torch.randint(0, 2 * data.crop_padding + 1, (2, len(chosen)), generator=draws)
            flips = (torch.rand(len(chosen), generator=draws) < 0.5) & data.flip
            down, right, flips = (d if whole else distributed.shard(d) for d in (*offsets, flips))
            batch = crop_and_flip(batch, down, right, flips, data.crop_padding)
        yield pixels(batch), labels
