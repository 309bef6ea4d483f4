"""Facts about augmentation: what each draw does to a batch, and that ranks get their part of the global batch."""

from __future__ import annotations

import pytest
import torch

from common import augment
from common.augment import erase, mix, roll, soft_labels
from common.runs import generator

IMAGES = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def test_rolled_images_are_rolled_by_at_most_the_reach_in_both_directions() -> None:
    rolled, shifts = roll(IMAGES, 2, generator(0)), set()
    for before, after in zip(IMAGES, rolled, strict=True):
        found = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.equal(torch.roll(before, (down, right), (1, 2)), after)
        ]
        assert len(found) == 1
        shifts |= set(found)
    assert len(shifts) > 2 and roll(IMAGES, 0, generator(0)) is IMAGES


def test_smoothed_labels_sum_to_one() -> None:
    assert soft_labels(torch.tensor([1]), 4, 0.2).tolist()[0] == pytest.approx([0.05, 0.85, 0.05, 0.05])


def test_mixup_mixes_each_image_and_label_with_its_neighbour() -> None:
    targets = torch.eye(6)
    images, mixed = mix(IMAGES, targets, 0.8, 0.0, generator(1))
    keep = mixed[0, 0].item()
    assert 0 < keep < 1
    assert torch.allclose(images[0], keep * IMAGES[0] + (1 - keep) * IMAGES[1], atol=1e-6)
    assert torch.allclose(mixed[5], keep * targets[5] + (1 - keep) * targets[4])


def test_cutmix_pastes_one_box_and_mixes_labels_by_its_area() -> None:
    for seed in range(5):
        images, mixed = mix(IMAGES, torch.eye(6), 0.0, 1.0, generator(seed))
        pasted = (images != IMAGES).all(1)
        assert torch.equal(images, torch.where(pasted[:, None], IMAGES[torch.tensor([1, 0, 3, 2, 5, 4])], IMAGES))
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        assert torch.equal(pasted[0], rows[:, None] & columns)
        assert mixed[0, 1].item() == pytest.approx(pasted[0].float().mean().item(), abs=1e-6)


def test_where_both_are_on_each_takes_some_of_the_batches() -> None:
    cut = [bool((mix(IMAGES, torch.eye(6), 0.8, 1.0, generator(seed))[0] == IMAGES).any()) for seed in range(40)]
    assert 8 < sum(cut) < 32
    assert mix(IMAGES, torch.eye(6), 0.0, 0.0, generator(0))[0] is IMAGES


def test_erased_images_have_one_box_of_noise_of_2_to_33_percent() -> None:
    images = torch.zeros(200, 3, 32, 32)
    changed = (erase(images, 0.25, generator(0)) != 0).all(1)
    erased = changed.flatten(1).any(1)
    assert 30 < erased.sum() < 70
    for one in changed[erased]:
        assert torch.equal(one, one.any(1)[:, None] & one.any(0))
        assert 0.01 < one.float().mean() < 0.36
    assert images.abs().sum() == 0


@pytest.mark.parametrize("form", ["roll", "erase", "mix"])
def test_each_rank_gets_its_part_of_what_one_process_would_do(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, targets = torch.randn(8, 1, 8, 8), torch.eye(8)

    def work(part: slice) -> torch.Tensor:
        if form == "roll":
            return roll(images[part], 2, generator(3))
        if form == "erase":
            return erase(images[part], 0.6, generator(3))
        return mix(images[part], targets[part], 0.8, 1.0, generator(3))[0]

    whole = work(slice(0, 8))
    for rank in range(2):
        monkeypatch.setattr(augment.distributed, "world_size", lambda: 2)
        monkeypatch.setattr(augment.distributed, "shard", lambda draws, rank=rank: draws.chunk(2)[rank])
        assert torch.equal(work(slice(4 * rank, 4 * rank + 4)), whole[4 * rank : 4 * rank + 4])
