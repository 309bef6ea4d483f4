"""Projected gradient descent in the L-inf ball, and attacks that stop at an image's first error (Sec. 3; spec c, h).

Gradients are taken in the image alone: the weights are frozen meanwhile, in evaluation too, which saves a third of the
work. The gradient is taken at the perturbed image after every clip, since `clamp` passes none at its bounds.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = Callable[[Tensor], Tensor]


def pgd_linf(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    random_start: bool = True,
    start: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """The last of `steps` iterates delta <- clip(delta + step_size sign(grad CE(model(x + delta), y))).

    The model keeps its mode: in train mode every step normalises by the batch and moves the running statistics. Its
    `p.grad`, `requires_grad` and mode are as before afterwards, and all of its state if an error is raised.

    Args:
        model: images -> logits (N, classes), or (T, N, classes) from a `TicketBatch`; normalises inside.
        x: images (N, ...), float, within `bounds`.
        y: labels (N,), int64, in [0, classes).
        eps: radius, at least 0.
        step_size: above 0 where there are steps.
        steps: at least 0; with 0 the clipped start is returned.
        random_start: start uniformly in the ball, else at x.
        start: the raw perturbation to start from instead, as x, |start| <= eps; clipped to `bounds` with x added.
        bounds: the box of the images.
        generator: of the random start, on the CPU, so that every device draws the same.

    Returns:
        Adversarial images like x, detached, within eps of x and within `bounds`.

    Raises:
        ValueError: on any argument that is not as above. FloatingPointError: the loss is NaN or infinite.
    """
    x, delta = _first(x, y, eps, step_size, steps, random_start, start, bounds, generator)
    loss = x.new_zeros(())
    with _frozen(model):
        for _ in range(steps):
            _, now, gradient = look(model, x + delta, y)
            loss = loss + now
            delta = (delta + step_size * gradient.sign()).clamp_(-eps, eps)
            delta = (x + delta).clamp_(*bounds) - x
        _require_finite(loss, steps)
    return (x + delta).clamp_(*bounds)


def pgd_survivors(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    random_start: bool = True,
    start: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which images (N,), bool, are classified rightly at the start and at every iterate of `pgd_linf`.

    A broken image leaves the batch at once, so the cost falls with the survivors. The share of survivors is at most
    the accuracy at the last iterate. Arguments as in `pgd_linf`.

    Raises:
        ValueError: as there, or if the model is in train mode, where the images of a batch depend on one another.
        FloatingPointError: the loss of the images that are left is NaN or infinite.
    """
    if isinstance(model, nn.Module) and model.training:
        raise ValueError("model must be in eval mode, got train mode")
    x, delta = _first(x, y, eps, step_size, steps, random_start, start, bounds, generator)
    loss = x.new_zeros(())
    alive = torch.arange(len(x), device=x.device)
    with _frozen(model):
        for step in range(steps + 1):
            if not len(alive):
                break
            logits, now, gradient = look(model, x[alive] + delta, y[alive])
            loss = loss + now
            right = logits.argmax(1) == y[alive]
            alive, delta, gradient = alive[right], delta[right], gradient[right]
            if step < steps:
                delta = (delta + step_size * gradient.sign()).clamp_(-eps, eps)
                delta = (x[alive] + delta).clamp_(*bounds) - x[alive]
        _require_finite(loss, steps)
    survived = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    survived[alive] = True
    return survived


def mean_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy over the images; summed over the tickets where logits are (T, N, classes)."""
    if logits.ndim == 2:
        return F.cross_entropy(logits, y)
    return F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="sum") / len(y)


def uniform_start(shape: tuple[int, ...], eps: float, generator: torch.Generator | None = None) -> Tensor:
    """float32 uniform in [-eps, eps], drawn on the CPU."""
    return (2 * torch.rand(shape, generator=generator) - 1) * eps


def check_attack(eps: float, step_size: float, steps: int) -> None:
    """Raise ValueError unless eps >= 0, steps >= 0 and, with steps, step_size > 0; all finite."""
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number of at least 0, got {eps}")
    if steps < 0 or steps != int(steps):
        raise ValueError(f"steps must be an integer of at least 0, got {steps}")
    if steps and not 0 < step_size < float("inf"):
        raise ValueError(f"step_size must be above 0 and finite with steps={steps}, got {step_size}")


def look(model: Model, point: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, loss and gradient of the loss at images `point`; 0 where the loss does not depend on them."""
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
        classes = logits.shape[-1]
        if int(y.max()) >= classes:
            raise ValueError(f"y must be in [0, {classes}), got {int(y.max())}")
        loss = mean_loss(logits.to(point.dtype), y)
        (gradient,) = torch.autograd.grad(loss, point, allow_unused=True) if loss.requires_grad else (None,)
    return logits.detach(), loss.detach(), torch.zeros_like(point) if gradient is None else gradient


def _first(
    x: Tensor,
    y: Tensor,
    eps: float,
    step_size: float,
    steps: int,
    random_start: bool,
    start: Tensor | None,
    bounds: tuple[float, float],
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """x and the first perturbation, clipped so that x + delta stays in the box, both detached, after all checks."""
    check_attack(eps, step_size, steps)
    low, high = bounds
    if not low < high:
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds}")
    if not x.is_floating_point() or x.ndim < 2 or not len(x):
        raise ValueError(f"x must be float images (N, ...), N at least 1, got {x.dtype} {tuple(x.shape)}")
    smallest, largest = x.aminmax()
    if not (low <= smallest and largest <= high):  # NaN fails too
        raise ValueError(f"x must be within [{low}, {high}], got values in [{smallest:g}, {largest:g}]")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise ValueError(f"y must be {len(x)} int64 labels, got {y.dtype} {tuple(y.shape)}")
    if int(y.min()) < 0:
        raise ValueError(f"y must be in [0, classes), got {int(y.min())}")
    if start is None:
        start = uniform_start(tuple(x.shape), eps, generator) if random_start else torch.zeros_like(x)
    if start.shape != x.shape:
        raise ValueError(f"start must have x's shape {tuple(x.shape)}, got {tuple(start.shape)}")
    x = x.detach()
    start = start.detach().to(x)
    if not start.abs().max() <= eps * (1 + 1e-6):
        raise ValueError(f"start must be within eps={eps}, got |start| up to {start.abs().max():g}")
    return x, (x + start).clamp_(low, high) - x


def _require_finite(loss: Tensor, steps: int) -> None:
    if not loss.isfinite():
        raise FloatingPointError(f"loss of the attack must be finite, got {loss.item()} over {steps} steps")


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """No gradients of parameters meanwhile; buffers are put back if an error comes out."""
    parameters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    kept = [(b, b.clone()) for b in model.buffers()] if isinstance(model, nn.Module) and model.training else []
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    except Exception:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
        raise
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
