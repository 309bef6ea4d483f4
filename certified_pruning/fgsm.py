"""Losses on clean and on one-step adversarial images: standard, FGSM+GradAlign, random-start FGSM (spec c.4, i).

Images are raw pixels in [0, 1]; `normalize` maps them to network inputs. Gradients are taken in the image after every
clip: `clamp` of torch 2.14.1 has zero gradient exactly at its bounds, so an attack differentiated through
clip(raw + delta, 0, 1) at delta = 0 would never move pixels that are 0 or 1, most of MNIST (spec f.T1).

The random start is an argument, so that data-parallel ranks can draw one global start and pass their slice of it. Pass
the bare module, not its DistributedDataParallel wrapper, which does not allow `torch.autograd.grad`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certified_pruning.train_ibp import check_eps, check_pixels

Normalize = Callable[[Tensor], Tensor]


def standard_loss(model: nn.Module, raw: Tensor, y: Tensor, normalize: Normalize) -> tuple[Tensor, Tensor]:
    """Cross-entropy on the clean images.

    Args:
        model: network, (batch, channels, height, width) -> (batch, classes).
        raw: pixels in [0, 1], (batch, channels, height, width).
        y: labels in 0..classes-1, (batch,), int64.
        normalize: map from pixels to network inputs.

    Returns:
        (mean loss, logits).

    Raises:
        ValueError: pixels outside [0, 1] or NaN; labels of the wrong shape, type or range.
    """
    _check_batch(raw, y)
    logits = _checked_forward(model, normalize(raw), y)
    return F.cross_entropy(logits, y), logits


def fgsm_gradalign_loss(
    model: nn.Module,
    raw: Tensor,
    y: Tensor,
    eps: float,
    normalize: Normalize,
    lam: float = 0.2,
    step: float = 1.25,
    uniform_start: Tensor | None = None,
    generator: torch.Generator | None = None,
    legacy_double_input: bool = False,
) -> tuple[Tensor, Tensor]:
    """FGSM from the clean image, and GradAlign: input gradients must agree between the image and a random point.

    g1 = d CE / d raw at the image; x_adv = clip(raw + delta, 0, 1) with delta = clip(step*eps*sign(g1), -eps, eps);
    loss = CE(x_adv) + lam * (1 - mean cos(g1, g2)), with g2 the gradient at clip(raw + uniform_start, 0, 1). The mean
    is over the samples where neither gradient is zero (the released code returns NaN if there are none; here 0). g1 is
    a constant, g2 is differentiated a second time. As in the released code g2 is the gradient in the start, before the
    clip: zero on pixels that the start moved out of [0, 1]. A pixel that lands exactly on 0 or 1 keeps its gradient.

    The model runs three times, two if lam = 0: image, adversarial image, random point. In train mode each of these
    forwards normalises by its own batch and updates the running statistics once, as in the released code.
    At eps = 0 the loss equals `standard_loss`, which costs one forward.

    Args:
        model, raw, y, normalize: as in `standard_loss`.
        eps: radius in pixel units, >= 0.
        lam: weight of GradAlign, >= 0.
        step: FGSM step in units of eps, > 0.
        uniform_start: random perturbation in [-eps, eps], raw's shape; drawn uniformly if None. Unused if lam = 0.
        generator: source of that draw; torch's global one if None.
        legacy_double_input: reproduce the released code, where both gradients are taken at the network input
            normalize(raw) + normalize(clip(raw + delta, 0, 1)) (spec f.R1). For comparisons only.

    Returns:
        (loss, logits on the adversarial images).

    Raises:
        ValueError: as `standard_loss`; eps, lam or step out of range; uniform_start of the wrong shape or range.
    """
    _check_batch(raw, y)
    _check_attack(eps, step)
    if not lam >= 0:
        raise ValueError(f"lam must be >= 0, got {lam}")

    offset = normalize(raw) if legacy_double_input else None
    clean_gradient = _input_gradient(model, raw, y, normalize, offset)
    delta = (step * eps * clean_gradient.sign()).clamp(-eps, eps)
    logits = model(normalize((raw + delta).clamp(0, 1)))
    loss = F.cross_entropy(logits, y)
    if lam > 0:
        moved = raw + _uniform_start(raw, eps, uniform_start, generator)
        inside = (moved >= 0) & (moved <= 1)
        random_gradient = _input_gradient(model, moved.clamp(0, 1), y, normalize, offset, create_graph=True) * inside
        loss = loss + lam * _misalignment(clean_gradient, random_gradient)
    return loss, logits


def fgsm_random_start_loss(
    model: nn.Module,
    raw: Tensor,
    y: Tensor,
    eps: float,
    normalize: Normalize,
    step: float = 1.25,
    uniform_start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """FGSM from a random point of the box, projected back onto the box; the demo's training loss (spec i).

    x_adv = project(x_0 + step*eps*sign(d CE / d x_0)) with x_0 = clip(raw + uniform_start, 0, 1) and the box
    {|x - raw| <= eps} within [0, 1]. The model runs twice: random point, adversarial image; in train mode both forwards
    update the running statistics.

    Args and errors: as `fgsm_gradalign_loss`.

    Returns:
        (mean cross-entropy, logits) on the adversarial images.
    """
    _check_batch(raw, y)
    _check_attack(eps, step)
    start = (raw + _uniform_start(raw, eps, uniform_start, generator)).clamp(0, 1)
    gradient = _input_gradient(model, start, y, normalize)
    adversarial = torch.clamp(start + step * eps * gradient.sign(), (raw - eps).clamp(0, 1), (raw + eps).clamp(0, 1))
    logits = model(normalize(adversarial))
    return F.cross_entropy(logits, y), logits


def _input_gradient(
    model: nn.Module,
    image: Tensor,
    y: Tensor,
    normalize: Normalize,
    offset: Tensor | None = None,
    create_graph: bool = False,
) -> Tensor:
    """d (sum of cross-entropies) / d image, at network input normalize(image) + offset.

    The sum and not the mean: only sign and direction are used, and small gradients underflow later.
    """
    image = image.detach().requires_grad_()
    x = normalize(image)
    logits = _checked_forward(model, x if offset is None else x + offset, y)
    return torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), image, create_graph=create_graph)[0]


def _misalignment(gradient: Tensor, other: Tensor) -> Tensor:
    """Mean of 1 - cos over the samples where both gradients, (batch, ...), are non-zero; 0 if there are none."""
    gradient, other = gradient.flatten(1), other.flatten(1)
    norm, other_norm = torch.linalg.vector_norm(gradient, dim=1), torch.linalg.vector_norm(other, dim=1)
    valid = (norm > 0) & (other_norm > 0)
    # Unit vectors first: the product of two small norms would underflow.
    unit = gradient / torch.where(valid, norm, 1)[:, None]
    other_unit = other / torch.where(valid, other_norm, 1)[:, None]
    total: Tensor = torch.where(valid, 1 - (unit * other_unit).sum(dim=1), 0).sum()
    return total.div(valid.sum().clamp(min=1))


def _uniform_start(raw: Tensor, eps: float, uniform_start: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if uniform_start is None:
        draw = torch.rand(raw.shape, generator=generator, dtype=raw.dtype, device=raw.device)
        return (2 * draw - 1) * eps
    if uniform_start.shape != raw.shape:
        raise ValueError(f"uniform_start must have raw's shape {tuple(raw.shape)}, got {tuple(uniform_start.shape)}")
    largest = uniform_start.abs().max().item() if uniform_start.numel() else 0.0
    if not largest <= eps * (1 + 1e-6) + 1e-12:  # room for eps rounded to float32
        raise ValueError(f"uniform_start must lie in [-eps, eps] = [-{eps}, {eps}], got magnitude {largest}")
    return uniform_start


def _checked_forward(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The model's logits, once the labels are known to fit them."""
    logits: Tensor = model(x)
    low, high = (bound.item() for bound in y.aminmax())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(f"y must hold labels in 0..{logits.shape[1] - 1}, got labels in {low}..{high}")
    return logits


def _check_batch(raw: Tensor, y: Tensor) -> None:
    if raw.dim() < 2 or raw.shape[0] == 0:
        raise ValueError(f"raw must be a non-empty batch of images, got shape {tuple(raw.shape)}")
    check_pixels(raw)
    if y.shape != raw.shape[:1] or y.dtype != torch.int64:
        raise ValueError(f"y must be int64 of shape ({raw.shape[0]},), got {y.dtype} of shape {tuple(y.shape)}")


def _check_attack(eps: float, step: float) -> None:
    check_eps(eps)
    if not step > 0:
        raise ValueError(f"step must be > 0, got {step}")
