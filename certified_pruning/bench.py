"""What the benchmark scripts share: a net like the demo's, and the speed limit of the machine."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from certified_pruning.affine import Conv, Dense
from certified_pruning.chain import ChainNet
from certified_pruning.fgsm import fgsm_random_start_loss
from certified_pruning.models import cnn_s
from common.bench import interleaved
from common.data import DataConfig, batches, in_order, load, pixels, steps_per_epoch

SHAPE = (1, 28, 28)


def demo_net(epochs: int, eps: float = 0.1, seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """`cnn_s` trained on mnist5k as the demo's dense nets (0.7 s an epoch), and raw test images with their labels."""
    config = DataConfig(name="mnist5k", val=0.5, val_from="test", split_seed=1234)
    splits = load(config)
    torch.manual_seed(seed)
    model = cnn_s(*SHAPE[:2], splits.train.classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    steps = epochs * steps_per_epoch(splits.train, 64)
    for step, (images, labels) in zip(range(steps), batches(splits.train, 64, config, seed=seed), strict=False):
        done = step / steps
        optimizer.param_groups[0]["lr"] = 0.05 * min(done / 0.1, (1 - done) / 0.9)
        loss, _ = fgsm_random_start_loss(model, pixels(images), labels, eps * min(1.0, done / 0.3), lambda x: x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 8.0)
        optimizer.step()
    images, labels = next(iter(in_order(splits.test, len(splits.test))))
    return model.eval(), pixels(images), labels


def peak() -> float:
    """Floating-point operations a second: the best of ten float32 products of 1024 x 1024 matrices."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / min(interleaved({"product": lambda: a @ a}, 10)["product"])


def operations(net: ChainNet) -> int:
    """Floating-point operations of one forward pass, or one transposed pass, of one row."""
    total = 0
    for op in (op for affine in net.affines for op in affine.ops):
        if isinstance(op, Conv):
            total += 2 * op.weight.numel() * prod(op.out_shape[1:])
        elif isinstance(op, Dense):
            total += 2 * op.weight.numel()
    return total
