"""How far a block runs, given its gate's two logits: with Gumbel noise, without, and by the l0 form (Sec. 3)."""

import torch
from torch import Tensor


def noisy_keep(gates: Tensor, noise: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Second entry of softmax((gates + noise) / tau), and its derivative in the gates.

    Args:
        gates: logits of skipping and running, (blocks, 2).
        noise: standard Gumbel, or 0; (blocks, 2).
        tau: temperature.

    Returns:
        keep, (blocks,), and (blocks, 2).
    """
    keep = ((gates + noise) / tau).softmax(-1)[..., 1]
    slope = keep * (1 - keep) / tau
    return keep, torch.stack([-slope, slope], dim=-1)


def mean_keep(gates: Tensor) -> tuple[Tensor, Tensor]:
    """Probability that a hard noisy gate is open, sigmoid of the logits' difference, and its derivative."""
    return noisy_keep(gates, torch.zeros_like(gates), 1.0)


def l0_keep(gates: Tensor, eps: float) -> Tensor:
    """g^2 / (g^2 + eps) of the second logit: the released code's form without noise; (blocks,)."""
    square = gates[:, 1].square()
    return square / (square + eps)


def gumbel(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise from a CPU generator, None: the global one."""
    return -torch.empty(shape).exponential_(generator=generator).clamp_(min=torch.finfo(torch.float32).tiny).log()
