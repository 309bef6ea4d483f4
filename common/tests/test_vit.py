"""Facts about what the papers on vision transformers share."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from timm.scheduler import CosineLRScheduler

from common.config import ConfigError
from common.data import ImageSet
from common.vit import ViTConfig, ViTTrainConfig, build_vit, follow


def digits(side: int = 28, channels: int = 1) -> ImageSet:
    return ImageSet(torch.zeros(2, channels, side, side, dtype=torch.uint8), torch.tensor([0, 1]), 10)


# The network


def test_the_small_net_has_the_sizes_asked_for_and_weights_of_the_global_generator() -> None:
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        nets.append(build_vit(ViTConfig(dim=12, heads=3, depth=2, patch=14, drop_path=0.2), digits()))
    first = nets[0]
    assert first.pos_embed.shape == (1, 5, 12) and len(first.blocks) == 2 and first.blocks[0].attn.num_heads == 3
    assert first(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert first.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    weights = [net.blocks[0].attn.qkv.weight for net in nets]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].std().item() == pytest.approx((2 / (12 + 36)) ** 0.5, rel=0.1)


def test_dropout_and_another_block_go_into_the_small_net() -> None:
    class Other(Block):
        pass

    net = build_vit(ViTConfig(dim=4, heads=1, depth=1, patch=14), digits(), Other, drop=0.3)
    assert type(net.blocks[0]) is Other
    assert [net.pos_drop.p, net.blocks[0].attn.proj_drop.p, net.blocks[0].mlp.drop1.p] == [0.3, 0.3, 0.3]


def test_a_timm_model_takes_images_classes_and_depth() -> None:
    net = build_vit(ViTConfig(name="test_vit", depth=1), digits(side=32, channels=3), drop=0.1)
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 10) and len(net.blocks) == 1 and net.pos_drop.p == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 5}, "model.patch must be a divisor of the images' side 28, got 5"),
        ({"name": "resnet18", "depth": 3}, "model.name resnet18 cannot be built as configured: "),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_vit(ViTConfig(**settings), digits())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vitt"}, "model.name must be vit or a timm model, got 'vitt'"),
        ({"heads": 0}, "model.heads must be at least 1, got 0"),
        ({"dim": 65}, "model.dim must be a multiple of model.heads, got 65"),
        ({"patch": 0}, "model.patch must be at least 1, got 0"),
        ({"depth": 0}, "model.depth must be at least 1, got 0"),
        ({"drop_path": 1.0}, "model.drop_path must be in [0, 1), got 1.0"),
        ({"pretrained": True}, "model.pretrained must be false for vit, got True"),
        ({"std": [0.0]}, "model.std must be positive, got [0.0]"),
    ],
)
def test_an_impossible_network_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ViTConfig(**settings)
    assert str(error.value) == message


# Training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, "train.epochs must be at least 0, got -1"),
        ({"batch_size": 1}, "train.batch_size must be at least 2, got 1"),
        ({"lr": 0.0}, "train.lr must be positive, got 0.0"),
        ({"min_lr": 1.0}, "train.min_lr must be in [0, train.lr], got 1.0"),
        ({"warmup": 9}, "train.warmup must be in [0, train.epochs], got 9"),
        ({"warmup_lr": 1.0}, "train.warmup_lr must be in [0, train.lr], got 1.0"),
        ({"weight_decay": -1.0}, "train.weight_decay must be at least 0, got -1.0"),
        ({"clip": -1.0}, "train.clip must be at least 0, got -1.0"),
        ({"roll": -1}, "train.roll must be at least 0, got -1"),
        ({"mixup": -1.0}, "train.mixup must be at least 0, got -1.0"),
        ({"cutmix": float("nan")}, "train.cutmix must be at least 0, got nan"),
        ({"smoothing": 1.0}, "train.smoothing must be in [0, 1), got 1.0"),
        ({"erasing": 1.1}, "train.erasing must be in [0, 1], got 1.1"),
        ({"ema": 1.0}, "train.ema must be in [0, 1), got 1.0"),
    ],
)
def test_an_impossible_training_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ViTTrainConfig(**settings)
    assert str(error.value) == message


def test_the_learning_rate_rises_in_a_straight_line_and_falls_along_half_a_cosine() -> None:
    there = ViTTrainConfig(lr=1.0, warmup=1, epochs=2, min_lr=0.2)
    rates = [there.learning_rate(step, 4) for step in range(8)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.8828427, 0.6, 0.3171573])


def test_the_released_schedule_lags_one_epoch_and_is_timms() -> None:
    there = ViTTrainConfig(lr=1.0, warmup=3, epochs=10, schedule="epochs")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = CosineLRScheduler(optimizer, t_initial=10, warmup_t=3, warmup_lr_init=0.0, lr_min=0.0)
    theirs = []
    for epoch in range(10):
        theirs.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    assert [there.learning_rate(5 * epoch + 2, 5) for epoch in range(10)] == pytest.approx(theirs)


def test_the_average_moves_towards_the_weights_and_copies_buffers() -> None:
    torch.manual_seed(0)
    model = torch.nn.BatchNorm1d(3)
    average = copy.deepcopy(model)
    with torch.no_grad():
        model.weight.fill_(2.0)
    model(torch.randn(8, 3))
    follow(average, model, 0.75)
    assert torch.equal(average.weight, torch.full((3,), 1.25))
    assert torch.equal(average.running_mean, model.running_mean) and average.num_batches_tracked == 1
