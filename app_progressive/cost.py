"""What a network costs: multiply-adds of a forward pass, dense and under masks; compute and memory of a stream.

As in ALMA: compute CC = sum over states of 3 E_t |train_t| F(m_t), F the forward multiply-adds; memory CM = sum of the
weights that are not masked, over states.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def layer_macs(model: nn.Module, image: Tensor) -> dict[str, int]:
    """Multiply-adds of each Conv2d and Linear weight for one image (1, channels, height, width), by weight name."""
    found: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def count(module: nn.Module, _: object, output: Tensor, name: str = name) -> None:
                per_position = module.get_parameter("weight").numel()
                positions = (
                    output[0, 0].numel()
                    if isinstance(module, nn.Conv2d)
                    else output[0].numel() // len(module.get_parameter("weight"))
                )
                found[f"{name}.weight"] = found.get(f"{name}.weight", 0) + per_position * positions

            hooks.append(module.register_forward_hook(count))
    training = model.training
    try:
        model.eval()(image)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


def forward_macs(macs: Mapping[str, int], densities: Mapping[str, float] | None = None) -> float:
    """Of one forward pass; each layer times its density where one is given."""
    densities = densities or {}
    return sum(count * densities.get(name, 1.0) for name, count in macs.items())


def training_images(train_sizes: Sequence[int], epochs: int) -> int:
    """Images seen in training over all states."""
    return epochs * sum(train_sizes)


def stream_macs(train_sizes: Sequence[int], epochs: int, forward: Sequence[float]) -> float:
    """CC: training multiply-adds over all states, backward counted as two forwards."""
    return sum(3.0 * epochs * size * macs for size, macs in zip(train_sizes, forward, strict=True))
