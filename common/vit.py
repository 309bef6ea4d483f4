"""What the papers on vision transformers share: the networks, how they are trained, the learning rate, the average."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from common.config import ConfigError, require
from common.data import ImageSet
from common.experiment import InputConfig


@dataclass(frozen=True)
class ViTConfig(InputConfig):
    """The network."""

    name: str = "vit"
    """vit: a class-token ViT of the sizes below; else the name of a timm model with its own sizes"""
    dim: int = 64
    """of vit: channels"""
    heads: int = 2
    """of vit"""
    patch: int = 7
    """of vit: side of a patch in pixels"""
    depth: int = 12
    """blocks; 0: the timm model's own"""
    drop_path: float = 0.0
    """stochastic depth"""
    pretrained: bool = False
    """start from timm's weights, downloaded once"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.name == "vit" or timm.is_model(self.name), "model.name", self.name, "vit or a timm model")
        require(self.heads >= 1, "model.heads", self.heads, "at least 1")
        require(self.dim >= 1 and self.dim % self.heads == 0, "model.dim", self.dim, "a multiple of model.heads")
        require(self.patch >= 1, "model.patch", self.patch, "at least 1")
        least = 1 if self.name == "vit" else 0
        require(self.depth >= least, "model.depth", self.depth, f"at least {least}")
        require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "in [0, 1)")
        require(not (self.pretrained and self.name == "vit"), "model.pretrained", self.pretrained, "false for vit")


@dataclass(frozen=True)
class ViTTrainConfig:
    """How the network is trained: AdamW, cosine schedule, soft labels."""

    epochs: int = 8
    """0 keeps the starting weights, to measure them"""
    batch_size: int = 100
    """over all ranks together"""
    lr: float = 1e-3
    min_lr: float = 0.0
    """at the end of the cosine"""
    warmup: float = 0.8
    """epochs over which lr rises in a straight line"""
    warmup_lr: float = 0.0
    """where it starts"""
    schedule: Literal["steps", "epochs"] = "steps"
    """epochs: lr changes between epochs only and lags one behind, as in DeiT's released code"""
    weight_decay: float = 0.05
    """not on 1-D tensors, position and class tokens"""
    clip: float = 0.0
    """largest gradient norm; 0: none"""
    smoothing: float = 0.1
    """of the labels"""
    roll: int = 0
    """images are rolled by up to this many pixels"""
    mixup: float = 0.0
    """alpha; 0: none"""
    cutmix: float = 0.0
    """alpha; 0: none; where both are on each takes half of the batches"""
    erasing: float = 0.0
    """probability of random erasing"""
    ema: float = 0.0
    """decay of the moving average of the weights, measured beside them; 0: none"""
    amp: bool = False
    """bfloat16 autocast; losses stay in float32"""
    compile: bool = False
    """torch.compile of the network"""

    def __post_init__(self) -> None:
        require(self.epochs >= 0, "train.epochs", self.epochs, "at least 0")
        require(self.batch_size >= 2, "train.batch_size", self.batch_size, "at least 2")
        require(self.lr > 0, "train.lr", self.lr, "positive")
        require(0 <= self.min_lr <= self.lr, "train.min_lr", self.min_lr, "in [0, train.lr]")
        require(0 <= self.warmup <= self.epochs, "train.warmup", self.warmup, "in [0, train.epochs]")
        require(0 <= self.warmup_lr <= self.lr, "train.warmup_lr", self.warmup_lr, "in [0, train.lr]")
        for name in ("weight_decay", "clip", "roll", "mixup", "cutmix"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "at least 0")
        require(0 <= self.smoothing < 1, "train.smoothing", self.smoothing, "in [0, 1)")
        require(0 <= self.erasing <= 1, "train.erasing", self.erasing, "in [0, 1]")
        require(0 <= self.ema < 1, "train.ema", self.ema, "in [0, 1)")

    def learning_rate(self, step: int, per_epoch: int) -> float:
        """Of update number `step`: warm-up in a straight line, then half a cosine down to min_lr.

        With schedule epochs, epoch e uses the value of epoch max(e - 1, 0) and the cosine counts from epoch 0: the
        released code of DeiT steps its scheduler with the epoch just finished.
        """
        if self.schedule == "epochs":
            epoch = max(step // per_epoch - 1, 0)
            if epoch < self.warmup:
                return self.warmup_lr + (self.lr - self.warmup_lr) * epoch / self.warmup
            share = epoch / self.epochs
        else:
            rise = self.warmup * per_epoch
            if step < rise:
                return self.warmup_lr + (self.lr - self.warmup_lr) * min((step + 1) / rise, 1)
            share = (step - rise) / max(self.epochs * per_epoch - rise, 1)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * share)) / 2


def build_vit(model: ViTConfig, data: ImageSet, block: type[nn.Module] = Block, drop: float = 0.0) -> nn.Module:
    """The configured network for images like those of `data`, its weights drawn from the global generator or read now.

    Args:
        model: its configuration.
        data: gives channels, side and classes.
        block: of `vit`.
        drop: dropout of embedding, projections and MLPs, as --drop of the released DeiT script.

    Raises:
        ConfigError: where sizes do not fit.
    """
    channels, size = model.image_shape(data)
    options: dict[str, Any] = {"img_size": size, "in_chans": channels, "num_classes": data.classes}
    options["drop_path_rate"] = model.drop_path
    if drop or model.name == "vit":
        options |= {"pos_drop_rate": drop, "proj_drop_rate": drop}
    if model.depth:
        options["depth"] = model.depth
    if model.name == "vit":
        require(size % model.patch == 0, "model.patch", model.patch, f"a divisor of the images' side {size}")
        return VisionTransformer(
            patch_size=model.patch,
            embed_dim=model.dim,
            num_heads=model.heads,
            weight_init="jax",  # xavier: timm's default, standard deviation .02, leaves attention uniform at this width
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            block_fn=block,
            **options,
        )
    try:
        return timm.create_model(model.name, pretrained=model.pretrained, **options)
    except (TypeError, RuntimeError, AssertionError, OSError) as error:  # timm's, for what a network lacks
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"model.name {model.name} cannot be built as configured: {reason}") from error


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """One step of the moving average of the weights; buffers are copied."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(current)
