"""Facts about WaNet's trigger."""

from __future__ import annotations

import pytest
import torch

from backdoor_lth.poisoning import FIELD, POISON
from backdoor_lth.tests.nets import config
from backdoor_lth.victim import victim
from backdoor_lth.warp import Warp, random_field
from common.config import ConfigError
from common.runs import generator


def ramp(side: int = 8) -> torch.Tensor:
    """Brighter by .1 from column to column, and by .01 from row to row."""
    line = torch.arange(side, dtype=torch.float32)
    return (0.1 * line + 0.01 * line[:, None]).expand(1, 3, side, side)


def test_a_field_has_displacements_of_mean_size_one() -> None:
    field = random_field(4, torch.Generator().manual_seed(0))
    assert field.shape == (2, 4, 4) and field.abs().mean().item() == pytest.approx(1)
    assert field.min() < 0 < field.max()


def test_an_even_field_moves_by_so_many_half_pixels() -> None:
    """To the right by 1 / 8 of the half width, (8 - 1) / 2 pixels; what would lie outside is the border."""
    right = torch.stack([torch.ones(4, 4), torch.zeros(4, 4)])
    bent = Warp(right, 1.0).stamp(ramp())
    shift = torch.full((8,), 0.1 * 3.5 / 8)
    shift[-1] = 0
    torch.testing.assert_close(bent - ramp(), shift.expand(1, 3, 8, 8), rtol=0, atol=1e-6)
    down = Warp(right.flip(0), 0.5).stamp(ramp()) - ramp()
    torch.testing.assert_close(down[..., :-1, :], torch.full((1, 3, 7, 8), 0.01 * 3.5 / 16), rtol=0, atol=1e-6)


def test_a_field_is_bicubic_between_its_places() -> None:
    field = torch.zeros(2, 3, 3)
    field[0, :, 1] = 1  # along the middle column only: of 5 columns 1 and 3 lie half-way
    image = (0.1 * torch.arange(5.0)).expand(1, 1, 5, 5)
    moved = (Warp(field, 1.0).stamp(image) - image)[0, 0, 2]
    cubic = torch.tensor([0, 0.59375, 1, 0.59375, 0])  # Keys's kernel, a = -3/4: at half-way .59375 each, edges repeat
    torch.testing.assert_close(moved, 0.1 * 2 / 5 * cubic, rtol=0, atol=1e-6)


def test_whole_numbers_are_bent_like_floats_and_left_alone_without_strength() -> None:
    images = torch.randint(0, 256, (3, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    field = random_field(4, torch.Generator().manual_seed(1))
    bent = Warp(field).stamp(images)
    assert bent.dtype == torch.uint8 and not torch.equal(bent, images)
    assert (Warp(field).stamp(images.float() / 255) * 255 - bent).abs().max() <= 0.5 + 1e-3
    assert torch.equal(Warp(field, 0.0).stamp(images), images)


def test_training_and_test_images_are_bent_by_one_field() -> None:
    there = victim(config("--attack.trigger", "warp", "--attack.ratio", 0.1, "--seed", 3))
    warp = Warp(random_field(4, generator(3, POISON, FIELD)))
    assert torch.equal(there.triggered.images, warp.stamp(there.test.images))  # type: ignore[arg-type]
    clean = victim(config("--attack.kind", "none", "--seed", 3)).poisoned
    rows = there.poisoned.is_poisoned
    assert int(rows.sum()) == int(0.1 * len(rows)) and (there.poisoned.labels[rows] == 0).all()
    assert torch.equal(there.poisoned.images[rows], warp.stamp(clean.images[rows]))
    assert torch.equal(there.poisoned.images[~rows], clean.images[~rows])


def test_what_cannot_be_bent_is_refused() -> None:
    with pytest.raises(ValueError, match=r"field must be \(2, k, k\) with k at least 2, got \(2, 1, 1\)"):
        Warp(torch.zeros(2, 1, 1))
    with pytest.raises(ValueError, match="strength must be at least 0, got -1"):
        Warp(torch.zeros(2, 4, 4), -1)
    with pytest.raises(ValueError, match=r"images must be \(n, channels, side, side\), got \(1, 3, 8, 7\)"):
        Warp(torch.zeros(2, 4, 4)).stamp(torch.zeros(1, 3, 8, 7))
    with pytest.raises(ValueError, match=r"images must be uint8 or float in \[0, 1\], got values in"):
        Warp(torch.zeros(2, 4, 4)).stamp(torch.full((1, 3, 8, 8), 2.0))
    with pytest.raises(ValueError, match="size must be at least 2, got 1"):
        random_field(1)
    for option, message in (("field", "attack.field must be at least 2, got 1"), ("strength", "must be at least 0")):
        with pytest.raises(ConfigError, match=message):
            config(f"--attack.{option}", 1 if option == "field" else -1)
