"""What the masks of the next round depend on."""

from __future__ import annotations

import torch
from torch import nn

from certified_pruning.lottery import initial_masks, next_masks
from certified_pruning.settings import Config, PruneConfig
from common.data import ImageSet

NO_DATA = ImageSet(torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), 2)


def test_random_masks_are_drawn_anew_for_every_seed_and_round() -> None:
    model = nn.Sequential(nn.Conv2d(1, 20, 5), nn.ReLU())
    kept = {}
    for seed in (0, 1, 2):
        config = Config(seed=seed, prune=PruneConfig(method="random", rate=0.5))
        for level in (0, 1):
            kept[seed, level] = next_masks(config, model, initial_masks(config, model), level, NO_DATA)["0.weight"]
    masks = list(kept.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    config = Config(seed=1, prune=PruneConfig(method="random", rate=0.5))
    again = next_masks(config, model, initial_masks(config, model), 0, NO_DATA)["0.weight"]
    assert torch.equal(again, kept[1, 0])


def test_refill_ranks_filters_by_what_the_magnitude_step_left_of_them() -> None:
    """Means .5 and .475; after the four smallest of eight weights are gone, 1.5 / 4 and 1.7 / 4."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2), nn.ReLU())
    model[0].weight.data.copy_(torch.tensor([[0.5, 0.5, 0.5, 0.5], [1.7, 0.1, 0.05, 0.05]]).view(2, 1, 2, 2))
    for imp_rate, expected in ((0.0, [True, False]), (0.5, [False, True])):
        config = Config(prune=PruneConfig(method="refill", rate=0.5, imp_rate=imp_rate))
        masks = next_masks(config, model, initial_masks(config, model), 0, NO_DATA)
        assert masks["1.weight"].tolist() == masks["1.bias"].tolist() == expected
        assert masks["0.weight"].flatten(1).all(1).tolist() == expected
