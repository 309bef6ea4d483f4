"""Facts about data sets: sizes and splits, the stream of batches, and what is refused."""

import gzip
import itertools
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from common import data, distributed
from common.config import ConfigError, UserError
from common.data import DataConfig, DataError, ImageFiles, ImageSet, batches, crop_and_flip, in_order, load
from common.runs import generator

Batch = tuple[Tensor, Tensor]
Arrays = dict[str, np.ndarray]


def equal(ours: list[Batch], theirs: list[Batch]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


def take(count: int, stream: Iterator[Batch]) -> list[Batch]:
    return list(itertools.islice(stream, count))


def numbered(count: int, side: int = 4, classes: int = 5) -> ImageSet:
    """`count` images that all differ: image i is filled with the number i."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, side, side).clone()
    return ImageSet(images, torch.arange(count) % classes, classes)


def as_set(split: ImageSet) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


# Configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0.0}, "data.fraction must be in (0, 1], got 0.0"),
        ({"fraction": 1.5}, "data.fraction must be in (0, 1], got 1.5"),
        ({"fraction": float("nan")}, "data.fraction must be in (0, 1], got nan"),
        ({"val": 1.0}, "data.val must be in [0, 1), got 1.0"),
        ({"val": -0.1}, "data.val must be in [0, 1), got -0.1"),
        ({"split_seed": -1}, "data.split_seed must be at least 0, got -1"),
        ({"crop_padding": -1}, "data.crop_padding must be at least 0, got -1"),
        ({"repeats": 0}, "data.repeats must be at least 1, got 0"),
        ({"auto_augment": "rand-m9"}, "data.auto_augment must be empty but for imagefolder, got 'rand-m9'"),
        ({"size": 0}, "data.size must be at least 1, got 0"),
        ({"workers": 0}, "data.workers must be at least 1, got 0"),
        ({"classes": [1, 2, 1]}, "data.classes must be without repetition, got [1, 2, 1]"),
        ({"name": "npz"}, "data.path must be set for npz and imagefolder, and only for them, got ''"),
        ({"path": "a.npz"}, "data.path must be set for npz and imagefolder, and only for them, got 'a.npz'"),
    ],
)
def test_an_impossible_setting_is_refused_in_these_words(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        DataConfig(**settings)
    assert str(error.value) == message


# The embedded data set and its splits


@pytest.fixture(scope="module")
def mnist5k() -> data.Splits:
    return load(DataConfig())


def test_mnist5k_has_3600_400_and_1000_images_in_equal_classes(mnist5k: data.Splits) -> None:
    counts = [split.labels.bincount(minlength=10).tolist() for split in mnist5k]
    assert counts == [[360] * 10, [40] * 10, [100] * 10]
    assert all(split.images.shape[1:] == (1, 28, 28) and split.classes == 10 for split in mnist5k)


def test_mnist5k_images_are_all_different_across_the_splits(mnist5k: data.Splits) -> None:
    assert len(as_set(mnist5k.train) | as_set(mnist5k.val) | as_set(mnist5k.test)) == 5000


def test_without_validation_all_4000_images_train_in_the_order_of_the_file() -> None:
    with np.load(data.EMBEDDED, allow_pickle=False) as archive:
        images, labels = torch.from_numpy(archive["x_train"]), torch.from_numpy(archive["y_train"])
    train, val, _ = load(DataConfig(val=0.0))
    assert len(val) == 0
    assert torch.equal(train.images.reshape(images.shape), images)
    assert torch.equal(train.labels, labels.long())


def test_training_images_keep_the_order_of_the_file(mnist5k: data.Splits) -> None:
    whole = [image.numpy().tobytes() for image in load(DataConfig(val=0.0)).train.images]
    kept = as_set(mnist5k.train)
    assert [image.numpy().tobytes() for image in mnist5k.train.images] == [image for image in whole if image in kept]


def test_validation_from_test_halves_the_test_images_and_leaves_training_whole() -> None:
    splits = load(DataConfig(val=0.5, val_from="test"))
    counts = [split.labels.bincount(minlength=10).tolist() for split in splits]
    assert counts == [[400] * 10, [50] * 10, [50] * 10]
    assert as_set(splits.val) | as_set(splits.test) == as_set(load(DataConfig()).test)


def test_the_split_is_the_same_every_time(mnist5k: data.Splits) -> None:
    again = load(DataConfig())
    assert all(torch.equal(a.images, b.images) for a, b in zip(mnist5k, again, strict=True))


def test_another_split_seed_gives_another_validation_set_and_the_same_test_set(mnist5k: data.Splits) -> None:
    other = load(DataConfig(split_seed=7))
    assert as_set(other.val) != as_set(mnist5k.val)
    assert torch.equal(other.test.images, mnist5k.test.images)


def test_a_smaller_fraction_lies_within_a_larger_one_and_the_other_splits_stay(mnist5k: data.Splits) -> None:
    parts = [load(DataConfig(fraction=fraction)) for fraction in (0.01, 0.1, 0.5)]
    sets = [as_set(part.train) for part in parts] + [as_set(mnist5k.train)]
    assert [len(part) for part in sets] == [36, 360, 1800, 3600]
    assert all(small < large for small, large in itertools.pairwise(sets))
    assert all(torch.equal(part.val.images, mnist5k.val.images) for part in parts)


def test_a_fraction_is_stratified() -> None:
    assert load(DataConfig(fraction=0.1)).train.labels.bincount().tolist() == [36] * 10


def test_the_smallest_fraction_keeps_one_image_a_class() -> None:
    assert load(DataConfig(fraction=1e-9)).train.labels.sort().values.tolist() == list(range(10))


def test_chosen_classes_are_relabelled_in_the_order_given() -> None:
    whole, chosen = load(DataConfig(val=0.0)), load(DataConfig(val=0.0, classes=[7, 2]))
    for split, part in ((whole.train, chosen.train), (whole.test, chosen.test)):
        assert part.classes == 2
        assert torch.equal(part.images[part.labels == 0], split.images[split.labels == 7])
        assert torch.equal(part.images[part.labels == 1], split.images[split.labels == 2])
        assert len(part) == int(((split.labels == 7) | (split.labels == 2)).sum())


@pytest.mark.parametrize("classes", [[3, 10], [-1]])
def test_a_class_the_data_lacks_is_refused(classes: list[int]) -> None:
    with pytest.raises(ConfigError) as error:
        load(DataConfig(classes=classes))
    assert str(error.value) == f"data.classes must be within [0, 10), got {classes}"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 2**32))
def test_every_prefix_of_a_stratified_order_has_the_classes_in_proportion(labels: list[int], seed: int) -> None:
    rows = torch.tensor(labels)
    order = data.stratified_order(rows, generator(seed))
    assert order.sort().values.tolist() == list(range(len(labels)))
    present = rows.unique()
    assert rows[order[: len(present)]].sort().values.tolist() == present.tolist()
    for length in range(1, len(labels) + 1):
        for label in present.tolist():
            part = labels.count(label) / len(labels)
            excess = int((rows[order[:length]] == label).sum()) - length * part
            assert -len(present) * part - 1e-9 < excess < 1 + 1e-9  # every class is at most one image ahead


# Image sets


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), "images must be uint8 (n, channels, height, width), got "),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), "images must be uint8 (n, channels, "),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0.0, 1.0]), "labels must be 2 integers, got "),
        (
            torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
            torch.tensor([0]),
            "labels must be 2 integers, got torch.int64 (1,)",
        ),
        (
            torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
            torch.tensor([0, 2]),
            "labels must be in [0, 2), got 2 (1 outside)",
        ),
        (
            torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
            torch.tensor([-1, -1]),
            "labels must be in [0, 2), got -1 (2 outside)",
        ),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError) as error:
        ImageSet(images, labels, 2)
    assert str(error.value).startswith(message)


def test_pixels_are_the_bytes_over_255_in_float32() -> None:
    values = data.pixels(torch.arange(256, dtype=torch.uint8))
    assert torch.equal(values, torch.arange(256, dtype=torch.float32) / 255)


# The stream of batches


AUGMENTED = DataConfig(crop_padding=2, flip=True)


def test_the_same_seed_and_step_give_the_same_batch() -> None:
    images = numbered(50)
    assert equal(take(12, batches(images, 8, AUGMENTED, seed=3)), take(12, batches(images, 8, AUGMENTED, seed=3)))


@pytest.mark.parametrize("config", [DataConfig(), AUGMENTED])
@pytest.mark.parametrize("step", [0, 1, 5, 6, 7, 12, 17])
def test_resuming_at_any_step_continues_the_undisturbed_stream(config: DataConfig, step: int) -> None:
    images = numbered(50)  # 6 batches of 8 an epoch
    undisturbed = take(20, batches(images, 8, config, seed=3))
    assert equal(take(20 - step, batches(images, 8, config, seed=3, step=step)), undisturbed[step:])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.data(), st.integers(0, 2**40))
def test_an_epoch_shows_each_image_at_most_once_and_drops_less_than_a_batch(
    count: int, draw: st.DataObject, seed: int
) -> None:
    batch_size = draw.draw(st.integers(1, count))
    per_epoch = count // batch_size
    stream = batches(numbered(count), batch_size, DataConfig(), seed=seed)
    for _ in range(2):
        shown = torch.cat([images[:, 0, 0, 0] for images, _ in take(per_epoch, stream)]).tolist()
        assert len(set(shown)) == len(shown) == per_epoch * batch_size > count - batch_size


def test_repeats_show_a_third_of_the_images_three_times_apart_in_their_batch() -> None:
    config = DataConfig(repeats=3)
    epoch = take(5, batches(numbered(30), 6, config, seed=0))
    ids = torch.stack([images[:, 0, 0, 0] for images, _ in epoch])
    assert torch.equal(ids, torch.cat([ids[:, :2]] * 3, dim=1))
    assert len(ids.unique()) == 10
    assert equal(epoch[3:], take(2, batches(numbered(30), 6, config, seed=0, step=3)))


def test_copies_cut_by_the_end_of_a_batch_go_on_in_the_next() -> None:
    taken = take(2, batches(numbered(8), 4, DataConfig(repeats=3), seed=0))
    first, second = (images[:, 0, 0, 0].tolist() for images, _ in taken)
    a, b, c = first[0], first[1], second[1]
    assert (first, second) == ([a, b, a, a], [b, c, b, c])


def test_every_image_keeps_its_label() -> None:
    for images, labels in take(12, batches(numbered(50), 8, DataConfig(), seed=0)):
        assert torch.equal(images[:, 0, 0, 0].long() % 5, labels)


def test_epochs_and_seeds_differ_in_their_order() -> None:
    images = numbered(48)

    def epoch(seed: int, step: int) -> list[int]:
        return torch.cat(
            [x[:, 0, 0, 0] for x, _ in take(6, batches(images, 8, DataConfig(), seed=seed, step=step))]
        ).tolist()

    orders = [epoch(0, 0), epoch(0, 6), epoch(1, 0)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_every_step_of_every_epoch_draws_other_crops() -> None:
    drawn = []
    for step in range(16):  # two epochs
        ((images, _),) = take(1, batches(numbered(64, side=8), 8, AUGMENTED, seed=0, step=step))
        drawn.append((images[:, 0] == 0).flatten().tolist())
    assert all(a != b for a, b in itertools.combinations(drawn, 2))


def test_batches_are_uint8_and_int64_with_and_without_augmentation() -> None:
    for config in (DataConfig(), AUGMENTED):
        images, labels = next(batches(numbered(50), 8, config, seed=0))
        assert (images.dtype, images.shape, labels.dtype) == (torch.uint8, (8, 3, 4, 4), torch.int64)


def test_batches_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr, index]
    take(8, batches(numbered(50), 8, AUGMENTED, seed=0))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[union-attr, index]


def test_without_augmentation_the_images_come_as_they_are() -> None:
    for images, _ in take(6, batches(numbered(50), 8, DataConfig(), seed=0)):
        assert torch.equal(images, images[:, :1, :1, :1].expand_as(images))


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(DataError, match=r"^batch size must be at most the 50 training images, got 51$"):
        next(batches(numbered(50), 51, DataConfig(), seed=0))


def test_ranks_take_consecutive_slices_of_the_batch_one_process_would_see(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = take(13, batches(numbered(50), 8, AUGMENTED, seed=0))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(take(13, batches(numbered(50), 8, AUGMENTED, seed=0)))
    joined = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in zip(*parts, strict=True)]
    assert len(parts[0][0][0]) == 4
    assert equal(joined, whole)


def test_a_batch_the_ranks_cannot_share_evenly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(UserError, match=r"^batch size must be a multiple of the 3 processes, got 8$"):
        next(batches(numbered(50), 8, DataConfig(), seed=0))


def test_evaluation_batches_are_all_images_in_order_with_a_short_last_one() -> None:
    images = numbered(11)
    found = list(in_order(images, 4))
    assert [len(labels) for _, labels in found] == [4, 4, 3]
    assert torch.equal(torch.cat([x for x, _ in found]), images.images)
    assert torch.equal(torch.cat([y for _, y in found]), images.labels)


# Augmentation


def one_crop(image: np.ndarray, down: int, right: int, flip: bool, padding: int) -> np.ndarray:
    """The plain form for one image (channels, height, width)."""
    _, height, width = image.shape
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    crop = padded[:, down : down + height, right : right + width]
    return crop[:, :, ::-1] if flip else crop


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.sampled_from([1, 3]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 7),
)
def test_crop_and_flip_equals_padding_slicing_and_reversing_each_image(
    seed: int, count: int, channels: int, height: int, width: int, padding: int
) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, channels, height, width), dtype=np.uint8)
    down, right = rng.integers(0, 2 * padding + 1, (2, count))
    flips = rng.integers(0, 2, count).astype(bool)
    expected = [one_crop(*item, padding) for item in zip(images, down, right, flips, strict=True)]
    found = crop_and_flip(*(torch.from_numpy(array) for array in (images, down, right, flips)), padding)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.numpy(), np.stack(expected))


def test_crops_of_a_two_by_two_image_by_hand() -> None:
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8).expand(3, -1, -1, -1)
    found = crop_and_flip(
        image, torch.tensor([1, 0, 2]), torch.tensor([1, 1, 2]), torch.tensor([True, False, False]), padding=1
    )
    assert found[:, 0].tolist() == [[[2, 1], [4, 3]], [[0, 0], [1, 2]], [[4, 0], [0, 0]]]


def test_offsets_are_uniform_over_every_place_and_half_of_the_images_flip() -> None:
    down, right, flips = data.draw_crops(50_000, 2, True, generator(0))
    places = torch.bincount(down * 5 + right, minlength=25)
    assert len(places) == 25
    assert (places - 2000).abs().max() < 5 * 2000**0.5
    assert abs(int(flips.sum()) - 25_000) < 5 * 12_500**0.5


def test_without_flip_nothing_flips_and_without_padding_nothing_moves() -> None:
    down, right, flips = data.draw_crops(1000, 0, False, generator(0))
    assert not down.any() and not right.any() and not flips.any()


# The user's own arrays


def arrays(**changed: np.ndarray) -> Arrays:
    """Twelve training and six test images (5, 4), labels 0, 1, 2 in turn."""
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (12, 5, 4), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": rng.integers(0, 256, (6, 5, 4), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
        **changed,
    }


def npz(path: Path) -> DataConfig:
    return DataConfig(name="npz", path=str(path), val=0.0)


def refusal(config: DataConfig) -> str:
    """The one line with which this data set is refused."""
    with pytest.raises(DataError) as error:
        load(config)
    assert error.value.status == 2
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_read_in_every_usual_layout(
    tmp_path: Path, save: Callable[..., None], layout: str, channels: int
) -> None:
    content = arrays()
    for side in ("x_train", "x_test"):
        planes = [content[side] ^ np.uint8(plane) for plane in range(channels if layout != "NHW" else 1)]
        content[side] = planes[0] if layout == "NHW" else np.stack(planes, axis=3 if layout == "NHWC" else 1)
    save(tmp_path / "a.npz", **content)
    train, _, test = load(npz(tmp_path / "a.npz"))
    for split, plain in ((train, arrays()["x_train"]), (test, arrays()["x_test"])):
        planes = [plain ^ np.uint8(plane) for plane in range(split.images.shape[1])]
        np.testing.assert_array_equal(split.images.numpy(), np.stack(planes, axis=1))
    assert train.labels.tolist() == arrays()["y_train"].tolist()


def test_channels_first_is_meant_where_both_ends_could_be_channels(tmp_path: Path) -> None:
    colour = np.arange(12 * 3 * 5 * 3, dtype=np.uint8).reshape(12, 3, 5, 3)
    np.savez(tmp_path / "a.npz", **arrays(x_train=colour, x_test=colour[:6]))
    np.testing.assert_array_equal(load(npz(tmp_path / "a.npz")).train.images.numpy(), colour)


@pytest.mark.parametrize("kind", ["uint8", "int32", "int64", ">i8", "uint64"])
def test_labels_of_every_integer_type_are_read(tmp_path: Path, kind: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays(y_train=arrays()["y_train"].astype(kind)))
    assert load(npz(tmp_path / "a.npz")).train.labels.tolist() == [0, 1, 2] * 4


def test_an_archive_like_the_decoded_cifar10_gives_32_pixel_colour_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    content = {
        "x_train": rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8),
        "y_train": np.arange(50, dtype=np.int64) % 10,
        "x_test": rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8),
        "y_test": np.arange(20, dtype=np.int64) % 10,
    }
    np.savez(tmp_path / "cifar10.npz", **content)
    train, val, test = load(DataConfig(name="npz", path=str(tmp_path / "cifar10.npz"), val=0.2))
    assert [split.labels.bincount().tolist() for split in (train, val, test)] == [[4] * 10, [1] * 10, [2] * 10]
    np.testing.assert_array_equal(test.images.numpy(), content["x_test"].transpose(0, 3, 1, 2))


UINT8 = np.uint8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y_train": np.arange(12) % 3 - 1}, "labels must be in [0, 2), got -1 (4 outside)"),
        ({"y_test": np.full(6, 3)}, "labels must be in [0, 3), got 3 (6 outside)"),
        ({"y_train": np.zeros(12)}, "y_train must be a row of integers, got float64 (12,)"),
        ({"y_test": np.zeros(6, bool)}, "y_test must be a row of integers, got bool (6,)"),
        ({"y_train": np.zeros((12, 1), int)}, "y_train must be a row of integers, got int64 (12, 1)"),
        ({"y_train": np.zeros(11, int)}, "labels must be 12 integers, got torch.int64 (11,)"),
        (
            {"x_train": np.zeros((0, 5, 4), UINT8), "y_train": np.zeros(0, int)},
            "y_train must be a row of integers, got ",
        ),
        (
            {"x_test": np.zeros((0, 5, 4), UINT8), "y_test": np.zeros(0, int)},
            "y_test must hold labels below 12, the images to train on, one or more",
        ),
        ({"y_train": np.full(12, 10**7)}, "y_train must hold labels below 12, the images to train on, one or more"),
        ({"x_train": np.zeros((12, 5, 4), np.float32)}, "x_train must be uint8, got float32 (12, 5, 4)"),
        ({"x_test": np.zeros((6, 5, 4), np.int64)}, "x_test must be uint8, got int64 (6, 5, 4)"),
        ({"x_train": np.zeros((12, 5, 4), "<U4")}, "x_train must be uint8, got <U4 (12, 5, 4)"),
        ({"x_train": np.zeros((12, 5, 4), ">u2")}, "x_train must be uint8, got >u2 (12, 5, 4)"),
        (
            {"x_train": np.zeros((12, 20), UINT8)},
            "images must be uint8 (n, channels, height, width), got torch.uint8 (12, 20)",
        ),
        (
            {"x_test": np.zeros((6, 5, 5), UINT8)},
            "x_train and x_test must have images of one shape, got (12, 5, 4) and (6, 5, 5)",
        ),
    ],
)
def test_arrays_that_are_no_labelled_images_are_refused(tmp_path: Path, changed: Arrays, message: str) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays(**changed))
    assert refusal(npz(path)).startswith(f"{path}: {message}")


@pytest.mark.parametrize("name", ["x_train", "y_train", "x_test", "y_test"])
def test_a_missing_array_is_named(tmp_path: Path, name: str) -> None:
    content = arrays()
    del content[name]
    np.savez(tmp_path / "a.npz", **content)
    expected = f"{tmp_path / 'a.npz'}: must hold x_train, y_train, x_test, y_test, has no {name}"
    assert refusal(npz(tmp_path / "a.npz")) == expected


class Poison:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("form", ["object array", "pickle"])
def test_code_in_a_file_is_refused_and_not_executed(tmp_path: Path, form: str) -> None:
    mark, path = tmp_path / "executed", tmp_path / "a.npz"
    poison = pickle.dumps(Poison(mark))
    pickle.loads(poison)
    assert mark.exists()  # the poison works where it is let
    mark.unlink()
    if form == "pickle":
        path.write_bytes(poison)
    else:
        np.savez(path, **arrays(x_train=np.array([Poison(mark)], dtype=object)))
    assert refusal(npz(path)).startswith(f"{path}: not an npz archive, damaged, or holds Python objects")
    assert not mark.exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "a.npz"
    save(path, **arrays())
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert refusal(npz(path)).startswith(f"{path}: not an npz archive, damaged")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "a.npz"
    save(path, **arrays())
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        place = rng.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        try:
            train, _, test = load(npz(path))
        except DataError as error:
            assert "\n" not in str(error)
            continue
        for split, side in ((train, "train"), (test, "test")):
            assert split.images[:, 0].tolist() == arrays()[f"x_{side}"].tolist()
            assert split.labels.tolist() == arrays()[f"y_{side}"].tolist()


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (12",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000000,)}",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000000000000,)}",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (12,)}" + b" " * 20_000,
        b"__import__('os').system('true')",
        b"(" * 5000,
    ],
)
def test_an_array_with_a_forged_header_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **{name: array for name, array in arrays().items() if name != "x_train"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x_train.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n")
    assert refusal(npz(path)).startswith(f"{path}: not an npz archive, damaged")


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04" + bytes(40), b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    assert refusal(npz(path)).startswith(f"{path}: not an npz archive, damaged")


def test_a_single_array_in_place_of_an_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, arrays()["x_train"])
    assert refusal(npz(path)).startswith(f"{path}: not an npz archive, damaged")


def test_a_missing_file_and_a_folder_are_refused_in_the_systems_words(tmp_path: Path) -> None:
    assert refusal(npz(tmp_path / "absent.npz")) == f"{tmp_path / 'absent.npz'}: No such file or directory"
    assert refusal(npz(tmp_path)) == f"{tmp_path}: Is a directory"


# torchvision's data sets


NAMES = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (URLError("no network"), "<urlopen error no network>"),
        (RuntimeError("Error downloading a.gz:\nTried https://a, got:\n..."), "Error downloading a.gz:"),
        (AssertionError(), "AssertionError"),
        (EOFError("Ran out of input"), "Ran out of input"),
    ],
)
def test_a_failed_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)

    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets, NAMES[name], failing)
    assert refusal(DataConfig(name=name, root="here")) == (  # type: ignore[arg-type]
        f"{name}: damaged in here, or could not be downloaded ({reason}); "
        "fetch it where there is a network, or give your own arrays with --data.name npz --data.path FILE"
    )


def tensors(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Grey images (n, 5, 4) and labels of one side of `arrays`."""
    return arrays()[f"x_{side}"], arrays()[f"y_{side}"]


def fake_mnist(root: str, *, train: bool, download: bool) -> SimpleNamespace:
    assert root == "here" and download
    images, labels = tensors("train" if train else "test")
    return SimpleNamespace(data=torch.from_numpy(images), targets=torch.from_numpy(labels))


def fake_cifar(root: str, *, train: bool, download: bool) -> SimpleNamespace:
    assert root == "here" and download
    images, labels = tensors("train" if train else "test")
    return SimpleNamespace(data=np.stack([images, images ^ 1, images ^ 2], axis=3), targets=labels.tolist())


def fake_svhn(root: str, *, split: str, download: bool) -> SimpleNamespace:
    assert root == "here" and download
    images, labels = tensors(split)
    return SimpleNamespace(data=np.stack([images, images ^ 1, images ^ 2], axis=1), labels=labels)


@pytest.mark.parametrize(
    ("name", "fake", "channels"),
    [
        ("mnist", fake_mnist, 1),
        ("fashion_mnist", fake_mnist, 1),
        ("kmnist", fake_mnist, 1),
        ("cifar10", fake_cifar, 3),
        ("cifar100", fake_cifar, 3),
        ("svhn", fake_svhn, 3),
    ],
)
def test_each_layout_of_torchvision_becomes_the_same_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fake: Callable[..., SimpleNamespace], channels: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, NAMES[name], fake)
    train, _, test = load(DataConfig(name=name, root="here", val=0.0))  # type: ignore[arg-type]
    for split, side in ((train, "train"), (test, "test")):
        images, labels = tensors(side)
        expected = np.stack([images ^ np.uint8(plane) for plane in range(channels)], axis=1)
        np.testing.assert_array_equal(split.images.numpy(), expected)
        assert split.labels.tolist() == labels.tolist()
        assert split.classes == 3


def write_idx(root: Path, array: np.ndarray, name: str) -> Path:
    """The MNIST file format: magic number, sizes as big-endian integers, bytes."""
    path = root / "MNIST" / "raw" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes())
    return path


@pytest.fixture
def idx_root(tmp_path: Path) -> Path:
    for side, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = tensors(side)
        write_idx(tmp_path, images, f"{prefix}-images-idx3-ubyte")
        write_idx(tmp_path, labels.astype(np.uint8), f"{prefix}-labels-idx1-ubyte")
    return tmp_path


def test_idx_files_are_read_by_torchvision_itself_without_a_network(idx_root: Path) -> None:
    train, _, test = load(DataConfig(name="mnist", root=str(idx_root), val=0.0))
    for split, side in ((train, "train"), (test, "test")):
        images, labels = tensors(side)
        np.testing.assert_array_equal(split.images.numpy()[:, 0], images)
        assert split.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("damage", ["cut", "compressed", "empty"])
def test_a_damaged_idx_file_is_refused(idx_root: Path, damage: str) -> None:
    path = idx_root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-1], "compressed": gzip.compress(whole), "empty": b""}[damage])
    message = refusal(DataConfig(name="mnist", root=str(idx_root)))
    assert message.startswith(f"mnist: damaged in {idx_root}, or could not be downloaded (")


# Folders of images

RANDAUGMENT = "rand-m9-mstd0.5-inc1"


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten training and five validation images of two classes, 12 pixels high and 10 wide."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for side, kind, count in (("train", "cat", 6), ("train", "dog", 4), ("val", "cat", 2), ("val", "dog", 3)):
        (root / side / kind).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / side / kind / f"{index}.png")
    return root


@pytest.fixture
def folder(whole_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for path in whole_folder.rglob("*.png"):
        copy = tmp_path / path.relative_to(whole_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path


def images_in(folder: Path, workers: int = 1, val: float = 0.0, auto_augment: str = "") -> DataConfig:
    return DataConfig("imagefolder", str(folder), size=8, workers=workers, val=val, auto_augment=auto_augment)


def stream(
    folder: Path, count: int, *, workers: int = 1, seed: int = 0, step: int = 0, auto_augment: str = ""
) -> list[Batch]:
    config = images_in(folder, workers, auto_augment=auto_augment)
    return take(count, batches(load(config).train, 4, config, seed=seed, step=step))


def test_image_files_are_labelled_by_the_order_of_their_folders_names(whole_folder: Path) -> None:
    train, val, test = load(images_in(whole_folder, val=0.4))
    for split, counts in ((train, [4, 2]), (val, [2, 2]), (test, [2, 3])):
        assert split.labels.bincount().tolist() == counts
        assert isinstance(split.images, ImageFiles)
        names = [Path(path).parent.name for path in split.images.paths]
        assert names == [("cat", "dog")[label] for label in split.labels]


def test_batches_of_files_do_not_depend_on_the_number_of_workers(whole_folder: Path) -> None:
    one, two = stream(whole_folder, 5), stream(whole_folder, 5, workers=2)
    assert equal(one, two)
    assert all(images.dtype == torch.uint8 and images.shape == (4, 3, 8, 8) for images, _ in one)


def test_files_are_augmented_anew_by_every_seed_epoch_step_and_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(folder.rglob("*.png"))
    for path in paths[1:]:
        path.write_bytes(paths[0].read_bytes())  # so that the order of the images makes no difference
    found = [images for images, _ in stream(folder, 4) + stream(folder, 4, seed=1)]  # two epochs each
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "shard", lambda rows: rows)
    found += [images for images, _ in stream(folder, 1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize(("step", "policy"), [(1, ""), (2, ""), (3, ""), (1, RANDAUGMENT), (3, RANDAUGMENT)])
def test_batches_of_files_resume_in_mid_epoch(whole_folder: Path, step: int, policy: str) -> None:
    resumed = stream(whole_folder, 5 - step, step=step, workers=2, auto_augment=policy)
    assert equal(resumed, stream(whole_folder, 5, auto_augment=policy)[step:])


def test_randaugment_changes_the_training_images_alone(whole_folder: Path) -> None:
    plain, augmented = images_in(whole_folder), images_in(whole_folder, auto_augment=RANDAUGMENT)
    pairs = zip(stream(whole_folder, 2), stream(whole_folder, 2, auto_augment=RANDAUGMENT), strict=True)
    assert not any(torch.equal(a[0], b[0]) for a, b in pairs)
    assert equal(list(in_order(load(plain).test, 2)), list(in_order(load(augmented).test, 2)))


def test_without_colour_jitter_grey_images_keep_their_one_value(folder: Path) -> None:
    for path in (folder / "train").rglob("*.png"):
        Image.fromarray(np.full((12, 10, 3), 99, np.uint8)).save(path)
    plain = replace(images_in(folder), color_jitter=0.0)
    values = [
        {
            int(value)
            for images, _ in take(2, batches(load(config).train, 4, config, seed=0))
            for value in images.unique()
        }
        for config in (plain, images_in(folder))
    ]
    assert values[0] == {99} and len(values[1]) > 1


@pytest.mark.parametrize(("share", "sides"), [(1.0, 4), (0.5, 0)])
def test_the_part_of_an_image_that_is_evaluated_is_the_one_asked_for(folder: Path, share: float, sides: int) -> None:
    framed = np.zeros((64, 64, 3), np.uint8)
    framed[:8], framed[-8:], framed[:, :8], framed[:, -8:] = 255, 255, 255, 255
    for path in (folder / "val").rglob("*.png"):
        Image.fromarray(framed).save(path)
    ((images, _),) = in_order(load(replace(images_in(folder), crop_pct=share)).test, 8)
    edges = [images[0, 0, 0], images[0, 0, -1], images[0, 0, :, 0], images[0, 0, :, -1]]
    assert sum(bool(edge.float().mean() > 200) for edge in edges) == sides


@pytest.mark.parametrize("policy", ["rand-x9", "randomly", "v9"])
def test_a_policy_that_timm_does_not_know_is_refused(whole_folder: Path, policy: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(images_in(whole_folder, auto_augment=policy))
    message = str(error.value)
    assert message.startswith("data.auto_augment must be a policy that timm knows, such as rand-m9-mstd0.5-inc1 (")
    assert message.endswith(f"), got {policy!r}")


def test_batches_of_files_leave_the_global_random_state_alone(whole_folder: Path) -> None:
    before = torch.get_rng_state(), random.getstate()
    stream(whole_folder, 3, auto_augment=RANDAUGMENT)
    list(in_order(load(images_in(whole_folder)).test, 2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_files_are_evaluated_in_order_each_the_same_every_time(whole_folder: Path) -> None:
    test = load(images_in(whole_folder)).test
    found = list(in_order(test, 2))
    assert [labels.tolist() for _, labels in found] == [[0, 0], [1, 1], [1]]
    assert equal(found, list(in_order(load(images_in(whole_folder, workers=2)).test, 2)))


def test_evaluation_decodes_an_even_image_to_its_colour(tmp_path: Path) -> None:
    for side in ("train", "val"):
        (tmp_path / side / "red").mkdir(parents=True)
        Image.new("RGB", (20, 16), (200, 30, 7)).save(tmp_path / side / "red" / "0.png")
    ((images, _),) = in_order(load(images_in(tmp_path)).test, 1)
    assert torch.equal(images, torch.tensor([200, 30, 7], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 8, 8))


@pytest.mark.parametrize("damage", ["cut", "text", "gone"])
def test_a_broken_image_is_named_in_one_line(folder: Path, damage: str) -> None:
    path = folder / "val" / "dog" / "1.png"
    test = load(images_in(folder)).test
    whole = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(whole[:100] if damage == "cut" else b"no image")
    with pytest.raises(DataError) as error:
        list(in_order(test, 2))
    assert str(error.value).startswith(f"{path}: not a readable image (")
    assert "\n" not in str(error.value)


def test_a_broken_image_ends_training_too(folder: Path) -> None:
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="not a readable image"):
        stream(folder, 1)


@pytest.mark.parametrize("side", ["train", "val"])
def test_a_missing_folder_is_named(folder: Path, side: str) -> None:
    (folder / side).rename(folder / "elsewhere")
    message = refusal(images_in(folder))
    assert message.startswith(f"{folder / side}: must be a folder with one folder of images a class (")


def test_a_class_folder_without_images_is_refused(folder: Path) -> None:
    for path in (folder / "val" / "dog").iterdir():
        path.unlink()
    assert refusal(images_in(folder)).startswith(
        f"{folder / 'val'}: must be a folder with one folder of images a class"
    )


def test_training_and_validation_folders_of_other_classes_are_refused(folder: Path) -> None:
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    expected = f"{folder}: train and val must have the same class folders, only one has 'dog'"
    assert refusal(images_in(folder)) == expected
