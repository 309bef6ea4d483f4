"""FLOPs of a network, dense and under masks, counted from shapes: 2 x multiply-adds of convolutions and linear."""

from typing import Any

import torch
from torch import Tensor, nn

from common.masks import Masks


@torch.no_grad()
def sparse_flops(module: nn.Module, inputs: tuple[Any, ...], masks: Masks) -> dict[str, int]:
    """FLOPs of one forward: {"dense": of all weights, "sparse": of the weights that `masks` keep}.

    A weight of a convolution works once for every output position (of a transposed one: input position), a weight of
    a linear layer once for every row.
    """
    total = {"dense": 0, "sparse": 0}

    def count(name: str, layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear, x: Tensor, output: Tensor) -> None:
        at = x if isinstance(layer, nn.ConvTranspose2d) else output
        uses = at.numel() // at.shape[-1 if isinstance(layer, nn.Linear) else -3]
        uses *= getattr(layer, "pooling", 1)  # of the convolution before its pooling
        mask = masks.get(f"{name}.weight".removeprefix("."))
        total["dense"] += 2 * layer.weight.numel() * uses
        total["sparse"] += 2 * (layer.weight.numel() if mask is None else int(mask.sum())) * uses

    hooks = [
        layer.register_forward_hook(lambda layer, x, output, name=name: count(name, layer, x[0], output))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    ]
    training = module.training
    try:
        module.eval()(*inputs)
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()
    return total


def training_flops(generator: float, discriminator: float, n_dis: int) -> float:
    """FLOPs of one generator step with its n_dis discriminator steps, from those of one image's (or batch's) forward.

    A pass that back-propagates costs three forwards. A discriminator step generates once and judges real and fake
    images; a generator step back-propagates through both networks once.
    """
    return n_dis * (generator + 3 * 2 * discriminator) + 3 * (generator + discriminator)
