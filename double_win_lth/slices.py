"""The loss along a random line through the weights: flat or sharp? (optional measure; spec C8)

The direction is filter-normalised (Li et al. 2018): each filter's part has the norm of the filter, and masked weights
stay zero, so that networks of other scale and sparsity can be compared.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from double_win_lth.pgd import mean_loss


@torch.no_grad()
def loss_slice(
    model: nn.Module, x: Tensor, y: Tensor, distances: Sequence[float], generator: torch.Generator
) -> list[float]:
    """Mean loss of the network in eval mode at weights w + a d for each distance a; `model` is not changed.

    Args:
        model: (N, ...) -> (N, classes).
        x, y: images (N, ...) and labels (N,).
        distances: a; 0 is the network itself.
        generator: of the direction d, which moves convolutions and the head but no norm or bias.
    """
    moved = copy.deepcopy(model).eval()
    directions = {}
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            d = torch.randn(weight.shape, generator=generator).to(weight) * (weight != 0)
            norms = d.flatten(1).norm(dim=1).clamp(min=1e-12)
            scale = weight.flatten(1).norm(dim=1) / norms
            directions[name] = d * scale.view(-1, *[1] * (weight.ndim - 1))
    found = []
    for distance in distances:
        for name, direction in directions.items():
            moved.get_parameter(name).copy_(model.get_parameter(name) + distance * direction)
        found.append(mean_loss(moved(x), y).item())
    return found
