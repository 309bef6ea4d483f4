"""Data sets as in-memory uint8 images, seeded stratified splits, and batched augmentation on the tensor's own device.

A batch depends only on (data, seed, epoch, batch index): resuming needs no loader state, and the ranks of a
data-parallel run take slices of the same global batch.
"""

import contextlib
import fcntl
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.data
from torch import Tensor

from common import distributed
from common.config import ConfigError, UserError, require
from common.runs import generator

Array = np.ndarray[Any, Any]
EMBEDDED = Path(__file__).with_name("mnist5k.npz")


class DataError(UserError):
    """A data set that is missing, damaged or mislabelled."""


@dataclass(frozen=True)
class DataConfig:
    """Which images, which part of them, and how they are augmented."""

    name: Literal[
        "mnist5k", "mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100", "svhn", "npz", "imagefolder"
    ] = "mnist5k"
    """mnist5k is embedded; npz and imagefolder are your own (see path); torchvision downloads the others once"""
    path: str = ""
    """npz: a file with x_train, y_train, x_test, y_test; imagefolder: a folder with train/ and val/"""
    root: str = "data"
    """where downloads are kept"""
    classes: list[int] = field(default_factory=list)
    """keep these classes only, relabelled 0, 1, ... in this order; empty keeps all"""
    fraction: float = 1.0
    """part of the training images to use, stratified; a smaller part lies within a larger one"""
    val: float = 0.1
    """part of the images held out for validation, stratified"""
    val_from: Literal["train", "test"] = "train"
    """which split the validation images are taken from"""
    split_seed: int = 1234
    """seed of the validation split and of the fraction; not the run's seed"""
    crop_padding: int = 0
    """random crop after padding with this many zeros"""
    flip: bool = False
    """random horizontal flip"""
    repeats: int = 1
    """an image is drawn this often in one epoch, which then holds that many times fewer images"""
    auto_augment: str = ""
    """imagefolder: timm's name of a policy, rand-m9-mstd0.5-inc1 for instance; empty: color_jitter"""
    color_jitter: float = 0.4
    """imagefolder: strength of the random changes of brightness, contrast and saturation, without auto_augment"""
    size: int = 224
    """imagefolder: side of the square images"""
    crop_pct: float = 0.875
    """imagefolder: what is evaluated is the centre of the image, this part of its shorter side"""
    workers: int = 4
    """imagefolder: loading processes"""

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, "data.fraction", self.fraction, "in (0, 1]")
        require(0 <= self.val < 1, "data.val", self.val, "in [0, 1)")
        require(self.split_seed >= 0, "data.split_seed", self.split_seed, "at least 0")
        require(self.crop_padding >= 0, "data.crop_padding", self.crop_padding, "at least 0")
        require(self.repeats >= 1, "data.repeats", self.repeats, "at least 1")
        files = self.name == "imagefolder"
        require(files or not self.auto_augment, "data.auto_augment", self.auto_augment, "empty but for imagefolder")
        require(0 <= self.color_jitter < math.inf, "data.color_jitter", self.color_jitter, "at least 0")
        require(0 < self.crop_pct <= 1, "data.crop_pct", self.crop_pct, "in (0, 1]")
        require(self.size > 0, "data.size", self.size, "at least 1")
        require(self.workers >= 1, "data.workers", self.workers, "at least 1")
        require(len(set(self.classes)) == len(self.classes), "data.classes", self.classes, "without repetition")
        needs_path = self.name in ("npz", "imagefolder")
        require(bool(self.path) == needs_path, "data.path", self.path, "set for npz and imagefolder, and only for them")


@dataclass(frozen=True)
class ImageFiles:
    """Image files too many for memory, decoded by DataLoader workers with timm's transforms."""

    paths: list[str]
    config: DataConfig

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> "ImageFiles":
        return ImageFiles([self.paths[index] for index in indices.tolist()], self.config)


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: (n, channels, height, width) uint8 in memory, or n files; labels (n,) int64 in [0, classes).

    Raises `DataError` where shapes, types or labels do not fit.
    """

    images: Tensor | ImageFiles
    labels: Tensor
    classes: int

    def __post_init__(self) -> None:
        if isinstance(self.images, Tensor) and (self.images.ndim != 4 or self.images.dtype != torch.uint8):
            raise DataError(f"images must be uint8 (n, channels, height, width), got {_describe(self.images)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self.images),):
            raise DataError(f"labels must be {len(self.images)} integers, got {_describe(self.labels)}")
        outside = self.labels[(self.labels < 0) | (self.labels >= self.classes)]
        if len(outside):
            raise DataError(f"labels must be in [0, {self.classes}), got {int(outside[0])} ({len(outside)} outside)")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "ImageSet":
        """The images at `indices` (n,), in that order."""
        return ImageSet(self.images[indices], self.labels[indices], self.classes)


class Splits(NamedTuple):
    """Training, validation and test images."""

    train: ImageSet
    val: ImageSet
    test: ImageSet


def load(config: DataConfig) -> Splits:
    """The configured data set. Raises `DataError` (missing, damaged, mislabelled) or `ConfigError`."""
    train, test = _read(config)
    if config.classes:
        outside = [c for c in config.classes if not 0 <= c < train.classes]
        require(not outside, "data.classes", config.classes, f"within [0, {train.classes})")
        train, test = (keep_classes(split, config.classes) for split in (train, test))
    source = train if config.val_from == "train" else test
    order = stratified_order(source.labels, generator(config.split_seed))
    count = round(config.val * len(source))
    val, rest = source.subset(order[:count]), source.subset(order[count:].sort().values)
    train, test = (rest, test) if config.val_from == "train" else (train, rest)
    if config.fraction < 1:
        order = stratified_order(train.labels, generator(config.split_seed, 1))
        train = train.subset(order[: max(round(config.fraction * len(train)), len(train.labels.unique()))])
    return Splits(train, val, test)


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order (n,) of which every prefix has the classes in proportion; the first of each class come first."""
    shuffled = torch.randperm(len(labels), generator=generator)
    quantile = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        rows = (labels[shuffled] == label).nonzero().squeeze(1)
        quantile[rows] = torch.arange(len(rows), dtype=torch.float64) / len(rows)
    return shuffled[quantile.argsort(stable=True)]


def keep_classes(data: ImageSet, classes: list[int]) -> ImageSet:
    """The images of `classes`, relabelled by position in that list."""
    rows, positions = (data.labels[:, None] == torch.tensor(classes)).nonzero(as_tuple=True)
    return ImageSet(data.images[rows], positions, len(classes))


def steps_per_epoch(data: ImageSet, batch_size: int) -> int:
    """Complete batches in one epoch. Raises `DataError` if there are fewer images than one batch."""
    if len(data) < batch_size:
        raise DataError(f"batch size must be at most the {len(data)} training images, got {batch_size}")
    return len(data) // batch_size


def batches(
    data: ImageSet, batch_size: int, config: DataConfig, *, seed: int, step: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, augmented training batches without end, from number `step` on; each epoch drops an incomplete last one.

    With `repeats` (repeated augmentation) an epoch has as many batches; copies of an image lie apart in their batch.
    Yields this rank's images (batch_size / ranks, channels, height, width) uint8 and labels int64.
    """
    per_epoch = steps_per_epoch(data, batch_size)
    for epoch in itertools.count(step // per_epoch):
        order = torch.randperm(len(data), generator=generator(seed, epoch)).repeat_interleave(config.repeats)
        apart = torch.cat([torch.arange(batch_size)[first :: config.repeats] for first in range(config.repeats)])
        plan = [distributed.shard(rows[apart]) for rows in order[: per_epoch * batch_size].split(batch_size)]
        start = step % per_epoch if epoch == step // per_epoch else 0
        if isinstance(data.images, ImageFiles):
            yield from _decoded(data, plan, start, (seed, epoch))
            continue
        for index in range(start, per_epoch):
            images, labels = data.images.index_select(0, plan[index]), data.labels.index_select(0, plan[index])
            if config.crop_padding or config.flip:
                crops = draw_crops(batch_size, config.crop_padding, config.flip, generator(seed, epoch, index))
                images = crop_and_flip(images, *crops, config.crop_padding)
            yield images, labels


def in_order(data: ImageSet, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in order, without augmentation, the last batch as short as it must be; the same on every rank."""
    plan = list(torch.arange(len(data)).split(batch_size))
    if isinstance(data.images, ImageFiles):
        yield from _decoded(data, plan)
        return
    yield from zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True)


def draw_crops(count: int, padding: int, flip: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's part of `count` random vertical and horizontal offsets in [0, 2 * padding] and flips (bool)."""
    down, right = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5 if flip else torch.zeros(count, dtype=torch.bool)
    return distributed.shard(down), distributed.shard(right), distributed.shard(flips)


def crop_and_flip(images: Tensor, down: Tensor, right: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Crop each zero-padded image (n, channels, height, width) at its offsets (n,) to its old size, flip where asked.

    One gather on the images' own device; offsets in [0, 2 * padding], flips bool.
    """
    count, channels, height, width = images.shape
    device = images.device
    down, right, flips = (t.to(device) for t in (down, right, flips))
    padded = F.pad(images, (padding,) * 4)
    columns = torch.arange(width, device=device)
    columns = torch.where(flips[:, None], width - 1 - columns, columns) + right[:, None]
    rows = (torch.arange(height, device=device) + down[:, None]) * padded.shape[-1]
    index = (rows[:, :, None] + columns[:, None, :]).view(count, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view_as(images)


def pixels(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


class _Decoder(torch.utils.data.Dataset[tuple[Tensor, Tensor] | DataError]):
    """One item is one decoded batch, its augmentation seeded by its place: resuming and workers change nothing."""

    def __init__(self, data: ImageSet, files: ImageFiles, plan: list[Tensor], seeds: tuple[int, ...]) -> None:
        self.transform = _transform(files.config, training=bool(seeds))
        self.data, self.files, self.plan, self.seeds = data, files, plan, seeds

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | DataError:
        from torchvision.datasets.folder import default_loader

        if self.seeds:  # the transforms draw from the worker's global generators
            random.seed(str((*self.seeds, index, distributed.rank())))
            np.random.seed(random.getrandbits(32))
            torch.manual_seed(random.getrandbits(63))
        rows = self.plan[index]
        images = []
        for path in (self.files.paths[row] for row in rows.tolist()):
            try:
                images.append(self.transform(default_loader(path)))
            except Exception as error:  # returned: raised in a worker, it would arrive as a traceback of many lines
                return DataError(f"{path}: not a readable image ({_reason(error)})")
        return torch.stack(images), self.data.labels[rows]


def _transform(config: DataConfig, training: bool) -> Callable[[Any], Tensor]:
    """timm's transform of a PIL image to (3, size, size) uint8. Raises `ConfigError` for an unknown policy."""
    from timm.data import create_transform  # here, like torchvision below: these imports take seconds

    try:
        return create_transform(  # type: ignore[no-any-return]
            (3, config.size, config.size),
            is_training=training,
            auto_augment=config.auto_augment or None,
            color_jitter=config.color_jitter,
            crop_pct=config.crop_pct,
            interpolation="bicubic",
            normalize=False,
        )
    except Exception as error:  # assertions and errors of keys and numbers, by what is wrong with the name
        allowed = f"a policy that timm knows, such as rand-m9-mstd0.5-inc1 ({_reason(error)})"
        raise ConfigError(f"data.auto_augment must be {allowed}, got {config.auto_augment!r}") from error


def _decoded(data: ImageSet, plan: list[Tensor], start: int = 0, seeds: tuple[int, ...] = ()) -> Iterator[Any]:
    assert isinstance(data.images, ImageFiles)
    decoder = _Decoder(data, data.images, plan, seeds)
    sampler, workers = range(start, len(plan)), data.images.config.workers
    # With a generator of its own, or it would draw from the global one and a resumed run would see other numbers.
    loader = torch.utils.data.DataLoader(decoder, None, sampler=sampler, num_workers=workers, generator=generator(0))
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _read(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    if config.name in ("mnist5k", "npz"):
        return _read_npz(Path(config.path) if config.path else EMBEDDED)
    if config.name == "imagefolder":
        return _read_folders(config)
    return _read_torchvision(config)


def _read_npz(path: Path) -> tuple[ImageSet, ImageSet]:
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in names if name in archive}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # numpy, zipfile, zlib and tokenize each have their own kinds
        wrong = "not an npz archive, damaged, or holds Python objects, which are not read"
        raise DataError(f"{path}: {wrong} ({_reason(error)})") from error
    if missing := [name for name in names if name not in arrays]:
        raise DataError(f"{path}: must hold {', '.join(names)}, has no {missing[0]}")
    try:
        return _image_sets(**arrays)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _read_torchvision(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    from torchvision import datasets

    kind = getattr(datasets, {"fashion_mnist": "FashionMNIST"}.get(config.name, config.name.upper()))
    svhn = config.name == "svhn"
    sides: list[dict[str, Any]] = [{"split": s} if svhn else {"train": s == "train"} for s in ("train", "test")]
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # where nothing may be written nothing is downloaded either
                Path(config.root).mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(Path(config.root) / f".{config.name}.lock", "a"))
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process downloads, the others wait and find it
            loaded = [kind(config.root, download=True, **side) for side in sides]
    except Exception as error:  # of the network, of each file format, or torchvision's bare assertions
        raise DataError(
            f"{config.name}: damaged in {config.root}, or could not be downloaded ({_reason(error)}); "
            "fetch it where there is a network, or give your own arrays with --data.name npz --data.path FILE"
        ) from error
    labels = "labels" if svhn else "targets"
    return _image_sets(*(np.asarray(array) for side in loaded for array in (side.data, getattr(side, labels))))


def _read_folders(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    from torchvision import datasets

    _transform(config, training=True)  # refuses a policy before anything is computed
    sets, classes = [], []
    for folder in (Path(config.path) / "train", Path(config.path) / "val"):
        try:
            found = datasets.ImageFolder(str(folder))
        except OSError as error:
            raise DataError(f"{folder}: must be a folder with one folder of images a class ({error})") from error
        files = ImageFiles([path for path, _ in found.samples], config)
        sets.append(ImageSet(files, torch.tensor(found.targets), len(found.classes)))
        classes.append(set(found.classes))
    if odd := sorted(classes[0] ^ classes[1]):
        raise DataError(f"{config.path}: train and val must have the same class folders, only one has {odd[0]!r}")
    return sets[0], sets[1]


def _image_sets(x_train: Array, y_train: Array, x_test: Array, y_test: Array) -> tuple[ImageSet, ImageSet]:
    """Images (n, height, width[, channels]) or (n, channels, height, width), integer labels; classes from y_train."""
    sets = []
    for side, images, labels in (("train", x_train, y_train), ("test", x_test, y_test)):
        if labels.dtype.kind not in "iu" or labels.ndim != 1 or not len(y_train):
            raise DataError(f"y_{side} must be a row of integers, got {labels.dtype} {labels.shape}")
        if not len(labels) or labels.max() >= len(y_train):
            raise DataError(f"y_{side} must hold labels below {len(y_train)}, the images to train on, one or more")
        if images.dtype != np.uint8:
            raise DataError(f"x_{side} must be uint8, got {images.dtype} {images.shape}")
        if images.ndim == 3:
            images = images[:, None]
        elif images.ndim == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
            images = images.transpose(0, 3, 1, 2)
        tensor = torch.from_numpy(np.ascontiguousarray(images))
        sets.append(ImageSet(tensor, torch.from_numpy(labels.astype(np.int64)), int(y_train.max()) + 1))
    if sets[0].images.shape[1:] != sets[1].images.shape[1:]:  # type: ignore[union-attr]
        raise DataError(f"x_train and x_test must have images of one shape, got {x_train.shape} and {x_test.shape}")
    return sets[0], sets[1]


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _describe(tensor: Tensor | ImageFiles) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"{len(tensor)} files"
