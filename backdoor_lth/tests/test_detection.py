"""Facts about detection, metrics and the choice of tickets (acceptance checks 9, 14, 15, 18)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from backdoor_lth.detection import anomaly_index, detect
from backdoor_lth.inversion import Inversion
from backdoor_lth.metrics import answers, evaluate, hard_mask, implanted, recovered_success, trigger_driven
from backdoor_lth.tests.nets import reference
from backdoor_lth.tickets import denser, sparser, winner
from backdoor_lth.triggers import Trigger, patch_image
from common.data import ImageSet

CLEAN_TICKET = [436, 292, 476, 379, 300, 303, 301, 240, 392, 259]
CLEAN_DENSE = [254, 107, 123, 126, 233, 169, 187, 260, 265, 207]


def test_anomaly_indices_of_known_norms() -> None:
    ticket = [29.6, 393, 415.4, 534.5, 698, 522.5, 329.2, 552.7, 440.3, 177.8]
    assert anomaly_index(ticket) == pytest.approx(2.617, abs=5e-4)
    assert anomaly_index(CLEAN_TICKET) == pytest.approx(0.797, abs=5e-4)
    assert anomaly_index(CLEAN_DENSE) == pytest.approx(1.012, abs=5e-4)
    assert anomaly_index([5, 5, 5, 5]) == 0 and anomaly_index([5, 5, 1, 5]) == math.inf
    assert anomaly_index([1, 1, 1, 90]) == 0  # a large norm is no anomaly


def inversion(norms: list[float], marks: list[float], null: list[float]) -> Inversion:
    count = len(norms)
    mask = torch.tensor(norms).view(-1, 1, 1) / 4 * torch.ones(count, 2, 2)
    mark = torch.tensor(marks).view(-1, 1, 1, 1) * torch.ones(count, 3, 2, 2)
    return Inversion(list(range(count)), mark, mask, torch.zeros(count, 1), torch.tensor(null))


def test_the_least_norm_is_detected_and_flagged_by_its_index() -> None:
    found = detect(inversion([2, 2.2, 0.1, 2.4, 2.1], [1, 1, 1, 1, 0.01], [0, 0, 0, 0.9, 0.1]))
    assert (found.label, found.flagged, found.collapse_label) == (2, True, 3)
    assert found.l1 == pytest.approx(0.1) and found.index > 2
    assert detect(inversion([2, 2.2, 0.1, 2.4, 2.1], [1, 1, 1, 1, 0.01], [0] * 5), norm="trigger").label == 4
    assert not detect(inversion([2, 2.2, 1.9, 2.4, 2.1], [1] * 5, [0] * 5)).flagged


def test_norms_that_cannot_be_judged_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norms must be at least 3, got \(2,\)"):
        anomaly_index([1, 2])
    with pytest.raises(ValueError, match="norms must be finite"):
        anomaly_index([1, 2, math.nan])
    with pytest.raises(ValueError, match="norm must be one of mask, trigger, got 'l2'"):
        detect(inversion([1, 2, 3], [1] * 3, [0] * 3), norm="l2")  # type: ignore[arg-type]


# Metrics


class Brightest(nn.Module):
    """Answers the channel with the largest mean."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.mean((2, 3))


def colours(count: int = 30) -> ImageSet:
    images = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    labels = torch.arange(count) % 3
    images[torch.arange(count), labels] = 100
    return ImageSet(images, labels, 3)


def test_metrics_of_a_network_that_a_trigger_turns() -> None:
    clean, patch = colours(), torch.zeros(3, 8, 8, dtype=torch.uint8)
    patch[2] = 255
    triggered = ImageSet(Trigger(patch, (0, 0)).stamp(clean.images), clean.labels, 3)
    found = evaluate(Brightest().train(), clean, triggered, 2)
    assert found["sa"] == 100 and found["asr"] == found["asr_all"] == 100 and found["ctr"] == 0 and found["lift"] == 100
    assert found["top_share"] == pytest.approx(100 / 3)
    half = ImageSet(torch.cat([triggered.images[:15], clean.images[15:]]), clean.labels, 3)
    assert evaluate(Brightest(), clean, half, 2)["asr"] == 50
    assert evaluate(Brightest(), clean, half, 2)["asr_all"] == pytest.approx(100 * 20 / 30)


def test_a_constant_network_has_full_attack_success_and_no_lift() -> None:
    class Ones(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.eye(10)[4])

        def forward(self, x: Tensor) -> Tensor:
            return self.bias.expand(len(x), -1)

    clean = ImageSet(torch.zeros(50, 3, 8, 8, dtype=torch.uint8), torch.arange(50) % 10, 10)
    triggered = ImageSet(Trigger(patch_image("rgb", 5), (0, 0)).stamp(clean.images), clean.labels, 10)
    found = evaluate(Ones(), clean, triggered, 4)
    assert (found["sa"], found["asr_all"], found["asr"], found["ctr"], found["lift"]) == (10, 100, 100, 100, 0)
    assert (found["top_class"], found["top_share"]) == (4, 100)
    assert not trigger_driven(found["lift"], 100, 100)


def test_an_attack_is_trigger_driven_only_under_both_controls() -> None:
    assert trigger_driven(50, 31, 10)
    assert not trigger_driven(49.9, 100, 0) and not trigger_driven(90, 30, 10)


def test_every_modules_mode_comes_back_after_an_error_too() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    net[1].eval()
    answers(net, iter([torch.zeros(2, 3, 8, 8)]))
    with pytest.raises(RuntimeError):
        answers(net, iter([torch.zeros(2, 1, 8, 8)]))
    assert [module.training for module in net.modules()] == [True, True, False, True, True]


def test_an_attack_is_implanted_from_90_percent_on() -> None:
    assert implanted({"asr": 90}, "dirty") and not implanted({"asr": 89.9}, "clean_label")
    assert all(implanted({"asr": 1.0}, kind) for kind in ("none", "relabel"))


def test_images_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="clean and triggered must be equally many images, got 30 and 3"):
        evaluate(Brightest(), colours(), colours(3), 0)


def test_hard_masks_are_the_authors_and_exact() -> None:
    arrays = reference("helpers")
    for size in (2, 3):
        hard = hard_mask(arrays["a"], size)
        assert torch.equal(hard, arrays[f"hard_mask_{size}"].double()) and hard.sum() == size**2
    assert hard_mask(torch.ones(2, 2), 1).tolist() == [[0, 0], [0, 1]]
    for size in (0, 8):
        with pytest.raises(ValueError, match=rf"size must have a square in \[1, 49\], got {size}"):
            hard_mask(arrays["a"], size)


def test_a_recovered_trigger_works_by_its_hard_mask_alone() -> None:
    mark = torch.zeros(3, 8, 8)
    mark[1] = 1
    mask = torch.full((8, 8), 0.2)
    mask[2:6, 2:6] = 0.9
    success = [recovered_success(Brightest(), colours(), mark, mask, 1, size, lambda x: x) for size in (1, 4, 8)]
    assert success == [pytest.approx(100 / 3), pytest.approx(100 / 3), 100]
    strong = [recovered_success(Brightest(), colours(), 9 * mark, mask, 1, size, lambda x: x) for size in (1, 4)]
    assert strong == [pytest.approx(100 / 3), 100]


# Tickets


def test_the_winner_has_the_peak_score_of_the_extreme_regime_ties_to_the_sparser() -> None:
    scores, densities = [0.9, 0.1, 0.3, 0.3, 0.2], [0.8, 0.2, 0.1, 0.05, 0.01]
    assert winner(scores, densities, 0.2) == 3 and winner(scores, densities, 1.0) == 0
    with pytest.raises(ValueError, match=r"extreme must be at least the least density 0.01, got 0.001"):
        winner(scores, densities, 0.001)


def test_denser_and_sparser_neighbours() -> None:
    sa, asr = [90, 89, 70, 30, 12, 10], [99, 96, 99, 95, 80, 20]
    assert denser(sa, asr, 90) == 1 and denser([80.0], [99.0], 90) is None
    assert sparser(sa, asr, 2, 10) == 5 and sparser(sa[:5], asr[:5], 0, 10) == 4
    assert sparser([90.0] * 9, [99.0] * 9, 1, 10) == 5
    assert sparser(sa[:5], asr[:5], 3, 10) == 4 and sparser(sa[:5], asr[:5], 4, 10) is None
