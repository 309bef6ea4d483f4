"""Whether a slim model computes what the masked one computes."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def verify(masked: nn.Module, smaller: nn.Module, images: Tensor, atol: float = 1e-5) -> float:
    """The largest absolute difference of the outputs.

    Args:
        masked: a model to which a plan was applied.
        smaller: what `slim` made of it.
        images: (batch, channels, height, width).
        atol: allowed difference.

    Raises:
        ValueError: where a model is in training mode, or outputs differ by more than `atol` or are not numbers.
    """
    for name, model in (("masked", masked), ("slim", smaller)):
        if model.training:
            raise ValueError(f"{name} model must be in eval mode, got training mode")
    difference = (masked(images) - smaller(images)).abs().max().item()
    if not difference <= atol:
        raise ValueError(f"outputs of the slim model must be within {atol} of the masked one's, got {difference:.3g}")
    return difference
