"""Compress a model of one's own in one call: both stages over one's own loader, on the model's device."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from common.augment import soft_labels
from uvc_vit.adapter import ViTAdapter
from uvc_vit.controller import StepInfo, UVCController
from uvc_vit.decay import decay_groups
from uvc_vit.distill import KDConfig, Teacher, distilled_loss
from uvc_vit.plan import Plan
from uvc_vit.resource import Costs
from uvc_vit.slim import Layout, slim
from uvc_vit.uvc_config import UVCConfig


@dataclass(frozen=True)
class Compressed:
    """What `compress` gives."""

    model: nn.Module
    """physically smaller, in eval mode"""
    plan: Plan
    history: Sequence[StepInfo]
    """of stage 1, step by step"""
    share: float
    """R of the model: its multiply-adds over the dense one's, classifier not counted"""


def compress(
    model: nn.Module,
    train_loader: Any,
    input_size: tuple[int, int],
    config: UVCConfig,
    *,
    kd: KDConfig | None = None,
    teacher: nn.Module | None = None,
    epochs: tuple[int, int] = (8, 8),
    lr: float = 5e-4,
    weight_decay: float = 0.05,
    clip: float = 1.0,
    smoothing: float = 0.1,
    layout: Layout = "grouped",
    costs: Costs | None = None,
    seed: int = 0,
) -> Compressed:
    """Find what goes, remove it, train what is left; the given model stays as it is.

    Args:
        model: a trained vision transformer, see `ViTAdapter`.
        train_loader: sized; yields images (batch, channels, height, width) and labels (batch,), or label distributions.
        input_size: (height, width) of the images.
        config: of the method, not of mode released; its stage1_steps are set to the first epochs' number of batches.
        kd: distillation; the default where None.
        teacher: any module that gives logits; a frozen copy of `model` where None.
        epochs: of the two stages.
        lr: of AdamW; stage 1 keeps it, stage 2 lowers it as a cosine to 0.
        weight_decay: of AdamW; not of biases, norms, position embedding and tokens.
        clip: largest norm of the weights' gradient; 0: none.
        smoothing: of the labels.
        layout: see `slim`; with "padded" all heads of a block keep equally many value dimensions, none is padding.
        costs: of accounting latency: measured ones, see `LatencyTable`.
        seed: of the gates' noise.

    Raises:
        ValueError: before any training, where the budget is below the floor, the teacher has other classes, the mode is
            released, input_size is not the model's, epochs are none, or layout "padded" meets heads of unequal width;
            TypeError: where train_loader has no length;
            FloatingPointError: where loss or weights are not finite, with the step.
    """
    if not hasattr(train_loader, "__len__"):
        raise TypeError(f"train_loader must have a length, got {type(train_loader).__name__} without")
    if len(epochs) != 2 or epochs[0] < 1 or epochs[1] < 0:
        raise ValueError(f"epochs must be at least (1, 0), got {epochs}")
    if config.mode == "released":
        raise ValueError("mode must be solve or fixed here, got released: only train.py trains the gates as it does")
    net: Any = copy.deepcopy(model)
    kd = kd or KDConfig()
    classes, device = net.num_classes, next(net.parameters()).device
    frozen = Teacher(model if teacher is None else teacher, classes)
    adapter, even = ViTAdapter(net), layout == "padded"
    adapter.tokens(input_size)
    if even and any(len(set(sizes.v_dims)) > 1 for sizes in adapter.dims):
        raise ValueError("layout must be grouped for a model whose heads are unequally wide, got padded")
    if config.budget == 1:
        plan = Plan.full(adapter.dims)
        return Compressed(slim(net, plan, layout).eval(), plan, [], 1.0)
    steps = epochs[0] * len(train_loader)
    method = UVCController(adapter, replace(config, stage1_steps=steps), input_size, costs)
    draws = torch.Generator().manual_seed(seed)
    method.gates.generator = draws
    history: list[StepInfo] = []

    def train(net: Any, count: int, rate: Callable[[int, int], float], after: Callable[[float], None]) -> None:
        if hasattr(net, "set_distilled_training"):
            net.set_distilled_training(True)
        optimizer = torch.optim.AdamW(decay_groups(net, weight_decay), lr=lr)
        net.train()
        step, total = 0, count * len(train_loader)
        for _ in range(count):
            for images, labels in train_loader:
                images, targets = images.to(device), _targets(labels.to(device), classes, smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss = distilled_loss(net(images), targets, lambda images=images: frozen(images), kd)  # type: ignore[misc]
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(f"loss is {loss.item()} at step {step}")
                loss.backward()
                if clip:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                for group in optimizer.param_groups:
                    group["lr"] = rate(step, total)
                optimizer.step()
                after(rate(step, total))
                step += 1

    method.attach()
    train(net, epochs[0], lambda step, total: lr, lambda rate: history.append(method.step(rate, draws)))
    method.detach()
    plan = method.finalise(even=even)
    smaller = slim(net, plan, layout)
    train(smaller, epochs[1], lambda step, total: lr * (1 + math.cos(math.pi * step / total)) / 2, lambda rate: None)
    return Compressed(smaller.eval(), plan, history, method.resource(plan))


def _targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    return labels if labels.dim() == 2 else soft_labels(labels, classes, smoothing)
