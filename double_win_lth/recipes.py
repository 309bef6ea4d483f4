"""How a stage is trained: plain SGD, its length and its learning rate at every step (spec e)."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from common.config import require


@dataclass(frozen=True)
class SgdConfig:
    """SGD; weight decay acts on every parameter, batch norm and biases included, as in the released code."""

    steps: int = 0
    """length of the stage; 0: that of epochs"""
    epochs: int = 0
    """length of the stage; 0: that of steps"""
    batch_size: int = 128
    """over all ranks together"""
    lr: float = 0.1
    schedule: Literal["constant", "triangle", "milestones", "cosine"] = "constant"
    """triangle rises over the first fifth and falls to 0; milestones and cosine change between epochs"""
    milestones: list[int] = field(default_factory=list)
    """epochs after which lr is divided by 10"""
    warmup: int = 0
    """first epochs over which lr rises in a straight line, step by step"""
    momentum: float = 0.9
    weight_decay: float = 0.0

    def check(self, name: str) -> None:
        """Raise `ConfigError` naming the key that cannot be."""
        require(self.steps >= 0, f"{name}.steps", self.steps, "at least 0")
        require(self.epochs >= 0, f"{name}.epochs", self.epochs, "at least 0")
        require(not (self.steps and self.epochs), f"{name}.steps", self.steps, "0 where epochs are given")
        require(self.batch_size >= 1, f"{name}.batch_size", self.batch_size, "at least 1")
        require(0 < self.lr < math.inf, f"{name}.lr", self.lr, "positive")
        require(0 <= self.momentum < 1, f"{name}.momentum", self.momentum, "in [0, 1)")
        require(0 <= self.weight_decay < math.inf, f"{name}.weight_decay", self.weight_decay, "at least 0")
        require(self.warmup >= 0, f"{name}.warmup", self.warmup, "at least 0")
        by_epoch = self.schedule in ("milestones", "cosine")
        require(not by_epoch or self.epochs > 0, f"{name}.epochs", self.epochs, f"above 0 with {self.schedule}")

    def total(self, per_epoch: int) -> int:
        """Steps of the stage."""
        return self.steps or self.epochs * per_epoch

    def learning_rate(self, step: int, per_epoch: int) -> float:
        """Learning rate of step `step` (from 0) of the stage."""
        epoch = step // per_epoch
        if epoch < self.warmup:
            return self.lr * (step + 1) / (self.warmup * per_epoch)
        if self.schedule == "milestones":
            return self.lr * 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        if self.schedule == "triangle":
            total = self.total(per_epoch)
            rise = max(total / 5, 1)
            return self.lr * min((step + 1) / rise, (total - step) / max(total - rise, 1))
        return self.lr

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """Fresh SGD over all parameters of `model`."""
        return torch.optim.SGD(model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay)
