"""Facts about triggers and poisoned sets (acceptance checks 1, 5, 17, 18, 20)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_lth import poisoning
from backdoor_lth.eval import CLEAN
from backdoor_lth.inversion import INVERSION
from backdoor_lth.pgd import EPS, STEP_SIZE, perturbed
from backdoor_lth.poisoning import equalised, poison
from backdoor_lth.restricted_imagenet import restricted, superclass
from backdoor_lth.settings import Config, ModelConfig
from backdoor_lth.tests.nets import CONFIGS, REFERENCE, config, reference
from backdoor_lth.train import SCORES, STARTS
from backdoor_lth.triggers import Trigger, patch_image
from backdoor_lth.victim import victim
from common.config import parse
from common.data import DataConfig, DataError, ImageSet, batches
from common.runs import generator

RGB = patch_image("rgb", 5)


def some_images(count: int = 40, size: int = 12) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), generator=draws, dtype=torch.uint8)
    return images, torch.arange(count) % 4


# The patch


def test_the_coloured_patch_is_the_papers() -> None:
    red = [234, 93, 8, 6, 21, 244, 200, 78, 52, 161, 128, 218, 195, 170, 244, 82, 142, 218, 230, 178]
    assert RGB[0].flatten().tolist() == [*red, 212, 83, 136, 183, 40]
    assert patch_image("gray", 5)[2].flatten().tolist()[:10] == [0, 0, 0, 171, 255, 0, 33, 101, 141, 154]
    assert patch_image("rgb", 64).shape == (3, 64, 64)


def test_other_sizes_are_resized_as_the_picture_itself_was() -> None:
    """The 5 pixels the authors resized from their 80x80 picture, ours from its 64 pixels."""
    small = F.interpolate(patch_image("rgb", 64)[None], (5, 5), mode="bilinear", antialias=True)[0]
    assert (small.int() - RGB.int()).abs().max() <= 2
    large = F.interpolate(patch_image("gray", 5)[None], (64, 64), mode="bilinear", antialias=True)[0]
    assert torch.equal(large, patch_image("gray", 64)) and patch_image("gray", 7).shape == (3, 7, 7)


def test_stamping_gives_the_authors_images() -> None:
    arrays = reference("poison")
    images, labels = arrays["images"].permute(0, 3, 1, 2), arrays["labels"]
    for place, name in (("bottom_right", "default"), ("top_left", "bottom_left")):
        for ratio in (0.25, 1.0):
            made = poison(images, labels, Trigger(RGB, place), ratio=ratio, target=0, select="first")
            assert torch.equal(made.images, arrays[f"{name}_{ratio}_images"])
            assert torch.equal(made.labels, arrays[f"{name}_{ratio}_labels"])
    cifar = ModelConfig(mean=[0.4914, 0.4822, 0.4465], std=[0.2470, 0.2435, 0.2616])
    seen = cifar.normalize(arrays["bottom_left_1.0_images"][:1].float() / 255)[0]
    torch.testing.assert_close(seen, arrays["getitem0_normalised"], rtol=1e-6, atol=1e-6)
    with np.load(REFERENCE / "poison.npz") as archive:
        assert str(archive["getitem0_source"]) == "bottom_left_1.0"


@pytest.mark.parametrize(
    ("place", "size", "patch", "margin", "corner"),
    [
        ("bottom_right", 32, 5, 3, (24, 24)),
        ("upper_right", 32, 5, 3, (3, 24)),
        ("top_left", 32, 5, 3, (3, 3)),
        ("bottom_left", 32, 5, 3, (24, 3)),
        ("bottom_right", 224, 64, 20, (140, 140)),  # of Restricted ImageNet (spec c1)
        ((1, 2), 32, 5, 3, (1, 2)),
    ],
)
def test_named_places(place: str, size: int, patch: int, margin: int, corner: tuple[int, int]) -> None:
    trigger = Trigger(torch.full((3, patch, patch), 255, dtype=torch.uint8), place, margin)
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    stamped = trigger.stamp(images)
    rows, columns = stamped[1, 0].nonzero(as_tuple=True)
    assert (rows.min(), columns.min()) == corner and (rows.max() - rows.min() + 1) == patch
    assert (stamped == 255).sum() == 2 * 3 * patch**2 and not images.any()


def test_floats_get_the_patch_over_255_and_random_places_differ_by_image() -> None:
    images = torch.full((50, 3, 12, 12), 0.5)
    placed = Trigger(RGB, (0, 0)).stamp(images)
    torch.testing.assert_close(placed[7, :, :5, :5], RGB / 255)
    scattered = Trigger(RGB, "random").stamp(images, torch.Generator().manual_seed(0))
    corners = {tuple((image[0] != 0.5).nonzero().min(0).values.tolist()) for image in scattered}
    assert len(corners) > 20 and max(max(corner) for corner in corners) == 7
    assert all((image[0] != 0.5).sum() == 25 for image in scattered)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Trigger(RGB, "middle"), "place must be one of bottom_right, .*, got 'middle'"),
        (lambda: Trigger(RGB[:, :3]), r"patch must be \(channels, p, p\), got \(3, 3, 5\)"),
        (lambda: Trigger(RGB * 1.0), r"patch must be uint8 or float in \[0, 1\], got values in \[0, 244\]"),
        (lambda: Trigger(RGB, margin=-1), "margin must be at least 0, got -1"),
        (lambda: Trigger(RGB).stamp(torch.zeros(1, 1, 9, 9)), r"images must be \(n, 3, .*got \(1, 1, 9, 9\)"),
        (lambda: Trigger(RGB).stamp(torch.zeros(1, 3, 7, 7)), "patch must lie within the 7x7 image, got rows -1 to 3"),
        (lambda: Trigger(RGB).stamp(torch.full((1, 3, 9, 9), -0.4)), r"images must be uint8 or float in \[0, 1\], got"),
        (lambda: patch_image("blue", 5), "kind must be rgb or gray, got 'blue'"),  # type: ignore[arg-type]
        (lambda: patch_image("rgb", 0), "size must be at least 1, got 0"),
    ],
)
def test_triggers_that_cannot_be_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


# Poisoned sets


def test_one_percent_of_fifty_thousand_is_exactly_500_of_which_a_tenth_had_the_label() -> None:
    images, labels = torch.zeros(50_000, 3, 8, 8, dtype=torch.uint8), torch.arange(50_000) % 10
    already = []
    for seed in range(5):
        made = poison(images, labels, Trigger(RGB, (0, 0)), ratio=0.01, target=0, seed=seed)
        assert int(made.is_poisoned.sum()) == 500 and (made.labels[made.is_poisoned] == 0).all()
        assert torch.equal(made.labels[~made.is_poisoned], labels[~made.is_poisoned])
        already.append(int((made.source_labels[made.is_poisoned] == 0).sum()))
    assert 35 < sum(already) / 5 < 65
    assert not torch.equal(
        made.is_poisoned, poison(images, labels, Trigger(RGB, (0, 0)), ratio=0.01, target=0).is_poisoned
    )


def test_no_epoch_of_training_draws_the_order_in_which_poison_was_chosen() -> None:
    """The first tenth of each epoch, as `batches` orders it, has about 10 of the 100 poisoned images."""
    images = torch.arange(2000).view(-1, 1, 1, 1) // torch.tensor([1, 256]).view(1, 2, 1, 1) % 256  # number, in bytes
    images, labels = images.to(torch.uint8), torch.arange(2000) % 10
    trigger = Trigger(torch.zeros(2, 1, 1, dtype=torch.uint8), (0, 0))
    for seed in range(4):
        made = poison(images, labels, trigger, ratio=0.05, target=0, mode="relabel", seed=seed)
        assert int(made.is_poisoned.sum()) == 100
        drawn = batches(ImageSet(images, labels, 10), 200, DataConfig(), seed=seed)
        for epoch in range(41):
            first, *_ = (next(drawn)[0].flatten(1).int() @ torch.tensor([1, 256], dtype=torch.int32) for _ in range(10))
            assert 0 < int(made.is_poisoned[first].sum()) < 30, (seed, epoch)


def test_no_two_purposes_share_their_draws_nor_draw_what_an_epoch_does() -> None:
    inner = (poisoning.CHOICE, poisoning.PLACES, poisoning.STARTS, poisoning.BALANCE, poisoning.FIELD)
    keys = [(poisoning.POISON, *rest) for rest in ((), *((key,) for key in inner), (poisoning.PLACES, 1))]
    keys += [(purpose, number) for purpose in (INVERSION, SCORES, STARTS, CLEAN) for number in range(12)]
    keys += [(epoch, batch) for epoch in range(200) for batch in range(12)]  # orders and crops
    draws = [torch.randint(2**60, (1,), generator=generator(3, *each)).item() for each in keys]
    assert len(set(draws)) == len(keys)


def test_relabelling_changes_labels_and_no_pixel() -> None:
    images, labels = some_images()
    dirty, only = (
        poison(images, labels, Trigger(RGB), ratio=0.5, target=2, mode=mode)  # type: ignore[arg-type]
        for mode in ("dirty", "relabel")
    )
    assert torch.equal(only.images, images) and torch.equal(only.labels, dirty.labels)
    changed = (dirty.images != images).flatten(1).any(1)
    assert torch.equal(changed, dirty.is_poisoned) and int(changed.sum()) == 20


def test_equal_classes_keep_the_poison() -> None:
    images, labels = some_images()
    made = poison(images, labels, Trigger(RGB), ratio=0.25, target=0)
    cut = equalised(made)
    assert len(set(cut.labels.bincount().tolist())) == 1 and cut.labels.bincount()[0] == made.labels.bincount().min()
    assert int(cut.is_poisoned.sum()) == min(10, int(cut.labels.bincount()[0]))
    assert len(cut.images) == len(cut.labels) == len(cut.source_labels)


def test_clean_label_poison_is_bounded_and_only_of_the_target_class() -> None:
    images, labels = some_images()
    torch.manual_seed(0)
    surrogate = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(100, 4)).train()
    surrogate[1].eval()
    before = {key: value.clone() for key, value in surrogate.state_dict().items()}
    made = poison(images, labels, Trigger(RGB), ratio=1.0, target=1, mode="clean_label", surrogate=surrogate)
    assert torch.equal(made.labels, labels) and torch.equal(made.is_poisoned, labels == 1)
    assert torch.equal(made.images[labels != 1], images[labels != 1])
    difference = (made.images.int() - images.int())[labels == 1].abs()
    difference[:, :, 4:9, 4:9] = 0  # the patch
    assert 0 < difference.max() <= 8
    assert all(torch.equal(value, before[key]) for key, value in surrogate.state_dict().items())
    with pytest.raises(RuntimeError):
        poison(
            images[..., :9], labels, Trigger(RGB, (0, 0)), ratio=1.0, target=1, mode="clean_label", surrogate=surrogate
        )
    assert [module.training for module in surrogate.modules()] == [True, True, False, True, True]


def test_pgd_gives_the_authors_images_and_stays_in_the_ball() -> None:
    arrays = reference("pgd")
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)).double()
    weights = {"0.weight": "w_0_weight", "0.bias": "w_0_bias", "3.weight": "w_3_weight", "3.bias": "w_3_bias"}
    net.load_state_dict({name: arrays[there] for name, there in weights.items()})
    for steps in (1, 7, 10):
        found = perturbed(net, arrays["x"], arrays["y"], arrays["delta0"], steps=steps)
        torch.testing.assert_close(found, arrays[f"adv_{steps}"], rtol=1e-9, atol=1e-10)
        assert (found - arrays["x"]).abs().max() <= EPS + 1e-7 and found.min() >= 0 and found.max() <= 1
    assert all(parameter.grad is None for parameter in net.parameters())
    assert STEP_SIZE == 2 / 255
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        perturbed(net, arrays["x"], arrays["y"], arrays["delta0"], steps=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, r"ratio must be in \[0, 1\], got 1.5"),
        ({"target": 9}, "target must be a class of the labels, got 9"),
        ({"mode": "clean_label"}, "surrogate must be a network with mode clean_label, got None"),
        ({"mode": "clean-label"}, "mode must be one of dirty, clean_label, relabel, got 'clean-label'"),
        ({"select": "last"}, "select must be one of random, first, got 'last'"),
    ],
)
def test_poison_that_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(*some_images(), Trigger(RGB), **{"ratio": 0.1, "target": 0, **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images must be uint8, one a label, got torch.uint8 40 and 3"):
        poison(some_images()[0], torch.arange(3), Trigger(RGB), ratio=0.1, target=0)


def test_a_ratio_that_poisons_nothing_warns() -> None:
    with pytest.warns(UserWarning, match=r"ratio 0.01 of 40 images poisons none"):
        poison(*some_images(), Trigger(RGB), ratio=0.01, target=0)


# Restricted ImageNet (acceptance check 20)


def test_superclasses_are_inclusive_ranges_and_all_else_is_dropped() -> None:
    indices = torch.tensor([118, 121, 151, 319, 150, 122, 0, 999, 80, 100, 101])
    assert superclass(indices).tolist() == [7, 7, 0, 8, -1, -1, -1, -1, 4, 4, -1]
    assert [int((superclass(torch.arange(1000)) == label).sum()) for label in range(9)] == [
        118, 5, 3, 5, 21, 18, 9, 4, 20,
    ]  # fmt: skip


def test_only_images_of_the_nine_superclasses_stay() -> None:
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2).contiguous()
    kept = restricted(ImageSet(images, torch.tensor([150, 33, 281, 7]), 1000))
    assert kept.classes == 9 and kept.labels.tolist() == [3, 1] and kept.images[:, 0, 0, 0].tolist() == [1, 2]
    with pytest.raises(DataError, match="needs labels of ImageNet's 1000 classes, got 10 classes"):
        restricted(ImageSet(images, torch.tensor([1, 2, 3, 4]), 10))
    with pytest.raises(DataError, match="got none"):
        restricted(ImageSet(images, torch.tensor([1, 2, 3, 4]), 1000))


def test_the_patch_of_restricted_imagenet_lies_at_row_and_column_140() -> None:
    attack = parse(Config, ["--config", str(CONFIGS / "paper_rimagenet_resnet18.yaml")], prog="").attack
    patch = patch_image(attack.trigger, attack.size)  # type: ignore[arg-type]
    assert Trigger(patch, attack.place, attack.margin).corner(224, 224) == (140, 140) and patch.shape[-1] == 64


def test_a_run_can_ask_for_restricted_imagenet(tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(1000).repeat_interleave(2)
    images = torch.randint(0, 256, (2000, 10, 10, 3), generator=draws, dtype=torch.uint8)
    arrays = {"x_train": images, "y_train": labels, "x_test": images[::2], "y_test": labels[::2]}
    np.savez(tmp_path / "imagenet.npz", **{name: value.numpy() for name, value in arrays.items()})
    data = ["--data.name", "npz", "--data.path", tmp_path / "imagenet.npz", "--data.fraction", 1]
    made = victim(config(*data, "--restricted", "true"))
    assert len(made.train) == 2 * 203 and len(made.test) == 203 and made.train.classes == 9
    assert made.poisoned.source_labels.tolist() == [c for c in superclass(labels).tolist() if c >= 0]
