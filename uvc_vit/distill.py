"""The training loss: soft-label cross-entropy and distillation from the uncompressed model (Sec. 3, DeiT's form)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uvc_vit.setting_error import require


@dataclass(frozen=True)
class KDConfig:
    """Distillation."""

    kind: Literal["soft", "hard", "none"] = "soft"
    """soft: Kullback-Leibler divergence to the teacher; hard: cross-entropy to its choice"""
    alpha: float = 0.5
    """its weight in the loss; the authors': 0.1"""
    temperature: float = 1.0
    reduction: Literal["batchmean", "numel"] = "batchmean"
    """numel: divided by the number of classes as well, as in the authors' code"""

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, "kd.alpha", self.alpha, "in [0, 1]")
        require(self.temperature > 0, "kd.temperature", self.temperature, "positive")

    @property
    def active(self) -> bool:
        """Whether a teacher is needed."""
        return self.kind != "none" and self.alpha > 0


def distilled_loss(
    outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor, teacher: Callable[[], Tensor], config: KDConfig
) -> Tensor:
    """(1 - alpha) cross-entropy + alpha distillation, float32.

    Args:
        outputs: logits (batch, classes), or those of class and distillation token: the first learns from the targets,
            the second from the teacher.
        targets: label distributions (batch, classes).
        teacher: gives its logits; called only where they are needed.
        config: of the distillation.
    """
    own, distilled = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    base = F.cross_entropy(own.float(), targets)
    if not config.active:
        return base
    logits, distilled = teacher().float(), distilled.float()
    if config.kind == "hard":
        return (1 - config.alpha) * base + config.alpha * F.cross_entropy(distilled, logits.argmax(1))
    ours, theirs = ((x / config.temperature).log_softmax(1) for x in (distilled, logits))
    soft = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * config.temperature**2
    if config.reduction == "numel":
        soft = soft / logits.shape[1]
    return (1 - config.alpha) * base + config.alpha * soft


class Teacher:
    """A frozen copy of a model, always in eval mode.

    Args:
        model: gives logits.
        classes: of the student.
        known: its logits by step; what is asked for at a step that is there is not computed again, what is computed
            stays there.

    Raises:
        ValueError: where it says (`num_classes`) that it has other classes than the student.
    """

    def __init__(self, model: nn.Module, classes: int, known: dict[int, Tensor] | None = None) -> None:
        net: Any = copy.deepcopy(model).eval().requires_grad_(False)
        if (found := getattr(net, "num_classes", classes)) != classes:
            raise ValueError(f"the teacher must have the student's {classes} classes, got {found}")
        self.model, self.known = net, known

    @torch.no_grad()
    def __call__(self, images: Tensor, step: int = 0) -> Tensor:
        """Its logits, (batch, classes); `step` is that of training."""
        if self.known is None:
            return self.model(images)
        if step not in self.known:
            self.known[step] = self.model(images)
        return self.known[step]
