"""What a state may start from instead of the last state's weights: less of them, with noise (spec c, Baselines)."""

import torch
from torch import nn


@torch.no_grad()
def shrink_and_perturb_(model: nn.Module, fresh: nn.Module, shrink: float = 0.6, noise: float = 0.1) -> None:
    """w <- shrink w + noise w_fresh on all parameters, in place (Ash & Adams 2020, Sec. 5).

    Args:
        model: to change; its buffers stay.
        fresh: the same network, newly initialised.
        shrink, noise: the two factors.
    """
    for weight, new in zip(model.parameters(), fresh.parameters(), strict=True):
        weight.mul_(shrink).add_(new, alpha=noise)
