"""Untargeted L-inf PGD on pixels in [0, 1]: what makes clean-label poison (Turner et al. 2019; spec c2)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10  # the paper's; its code takes 7 steps


def uniform_start(shape: Sequence[int], eps: float, generator: torch.Generator) -> Tensor:
    """A perturbation drawn evenly from [-eps, eps], float32."""
    return eps * (2 * torch.rand(tuple(shape), generator=generator) - 1)


def perturbed(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    *,
    eps: float = EPS,
    step_size: float = STEP_SIZE,
    steps: int = STEPS,
) -> Tensor:
    """Images within eps of x, in [0, 1], that raise the cross-entropy of `model`.

    The loss is summed over the batch, so images do not influence each other in eval mode. The model's mode, flags and
    gradients are left alone.

    Args:
        model: pixels (n, channels, height, width) to logits (n, classes).
        x: pixels in [0, 1].
        y: (n,) their labels.
        start: first perturbation, like x.
        eps: radius, in pixel units of [0, 1].
        step_size: of one step, likewise.
        steps: at least 0.

    Raises:
        ValueError: negative eps, step_size or steps.
    """
    for name, value in (("eps", eps), ("step_size", step_size), ("steps", steps)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    delta = (x + start).clamp(0, 1) - x
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        loss = F.cross_entropy(model(x + delta), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + step_size * gradient.sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    return (x + delta.detach()).clamp(0, 1)
