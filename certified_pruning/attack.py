"""PGD attack with sign-Adam steps, restarts and one run per target class (alpha-beta-CROWN's attack; spec e)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from certified_pruning.chain import ChainNet
from certified_pruning.ibp import margin_spec


@dataclass(frozen=True)
class Attack:
    """Best adversarial points: `x_adv` as x, and `margin` (batch,) = z_y - max other there; negative is a success."""

    x_adv: Tensor
    margin: Tensor


class SignAdam:
    """Ascent by the sign of Adam's first moment, in a box: step t = lr decay^(t-1) / (1 - 0.9^t) sign(m_t).

    The bias correction makes the first step ten times lr: it jumps to a corner of the box.
    """

    def __init__(self, step: float | Tensor, decay: float = 0.99) -> None:
        self.size, self.decay, self.t = step, decay, 0
        self.m: Tensor | None = None

    def step(self, x: Tensor, grad: Tensor, lb: Tensor, ub: Tensor) -> Tensor:
        self.t += 1
        self.m = 0.1 * grad if self.m is None else self.m.mul_(0.9).add_(grad, alpha=0.1)
        size = self.size * (self.decay ** (self.t - 1) / (1 - 0.9**self.t))
        return torch.clamp(x + size * self.m.sign(), lb, ub)

    def select(self, rows: Tensor) -> None:
        if self.m is not None:
            self.m = self.m[rows]


def pgd_attack(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    x_lb: Tensor,
    x_ub: Tensor,
    step: float | Tensor,
    steps: int = 100,
    restarts: int = 1,
    decay: float = 0.99,
    random_start: bool = True,
    early_stop: bool = True,
    seed: int = 0,
    max_rows: int = 4096,
) -> Attack:
    """Search the box of each image for a point that another class wins; every target class is tried in each restart.

    The projection on the box stays outside the graph: since torch 2.14 the gradient of a clamp is 0 at its bounds, and
    with it an attack never leaves pixels at 0 or 1 (spec f, T1). The random starts are the same for every image, so
    results do not depend on which images share a call.

    Args:
        model: logits (rows, classes) of normalised inputs (rows, *input shape); differentiable in the input.
        x: starting images (batch, *input shape), inside the box (they are projected on it).
        y: labels (batch,), integer.
        x_lb, x_ub: the box.
        step: nominal step, in units of x; a tensor broadcasts over x (e.g. eps / 4 / std a channel).
        restarts: number of starts, 0 gives the clean margin only; uniform in the box unless `random_start=False`.
        early_stop: an image is left alone after its first success.
        max_rows: (image, restart, target) runs at once; changes memory, not values.

    Raises:
        ValueError: y out of range for the model's logits, shapes that differ, steps or restarts < 0.
    """
    for name, value in (("steps", steps), ("restarts", restarts)):
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if not x.shape == x_lb.shape == x_ub.shape or len(y) != len(x):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, x_lb, x_ub, y))
        raise ValueError(f"x, x_lb, x_ub must have one shape, and y one label an image, got {shapes}")
    if not len(x):
        return Attack(x.clone(), x.new_zeros(0))
    x = torch.clamp(x, x_lb, x_ub)
    with torch.no_grad():
        logits = model(x)
    C, _ = margin_spec(y, logits.shape[1], x.dtype)
    best = Attack(x.clone(), margin_of(logits, C).amin(1))
    n_targets = C.shape[1]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(restarts):
        noise = torch.rand((n_targets, *x.shape[1:]), generator=generator).to(x) if random_start else None
        live = (best.margin >= 0).nonzero().squeeze(1) if early_stop else torch.arange(len(x), device=x.device)
        for images in live.split(max(1, max_rows // n_targets)):
            _one_start(model, x, C, x_lb, x_ub, step, steps, decay, noise, early_stop, images, best)
    return best


def margin_of(logits: Tensor, C: Tensor) -> Tensor:
    """C logits: (batch, S, out) with (batch, out) -> (batch, S)."""
    return (C @ logits.unsqueeze(2)).squeeze(2)


def _one_start(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    C: Tensor,
    x_lb: Tensor,
    x_ub: Tensor,
    step: float | Tensor,
    steps: int,
    decay: float,
    noise: Tensor | None,
    early_stop: bool,
    images: Tensor,
    best: Attack,
) -> None:
    """One start of every target for `images`; improves `best` in place."""
    n_targets = C.shape[1]
    image = images.repeat_interleave(n_targets)
    target = torch.arange(n_targets, device=x.device).repeat(len(images))
    lb, ub = x_lb[image], x_ub[image]
    adv = x[image] if noise is None else lb + noise[target] * (ub - lb)
    size = step if not isinstance(step, Tensor) or step.dim() < x.dim() or len(step) == 1 else step[image]
    adam = SignAdam(size, decay)
    for t in range(steps + 1):
        logits, grad = _value_and_gradient(model, adv, -C[image, target])
        margin = margin_of(logits, C[image]).amin(1)
        _keep_best(best, image, adv, margin)
        if t == steps:
            return
        adv = adam.step(adv, grad, lb, ub)
        if early_stop and bool((margin < 0).any()):
            keep = (best.margin[image] >= 0).nonzero().squeeze(1)
            if not len(keep):
                return
            image, target, lb, ub, adv = image[keep], target[keep], lb[keep], ub[keep], adv[keep]
            adam.select(keep)
            if isinstance(adam.size, Tensor) and adam.size.dim() == x.dim() and len(adam.size) > 1:
                adam.size = adam.size[keep]


def _value_and_gradient(model: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of rows . logits in x."""
    if isinstance(model, ChainNet):
        return _chain_gradient(model, x, rows)
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        (grad,) = torch.autograd.grad((rows * logits).sum(), x)
    return logits.detach(), grad


@torch.no_grad()
def _chain_gradient(net: ChainNet, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same without autograd, through the transposed maps of the bounds: twice as fast (measured, cnn_s)."""
    z = net.affines[0].forward(x.flatten(1))
    on = []
    for affine in net.affines[1:]:
        h = z.relu_()
        on.append(h.sign())
        z = affine.forward(h)
    for affine, mask in zip(net.affines[:0:-1], on[::-1], strict=True):
        rows = affine.transposed(rows) * mask
    return z, net.affines[0].transposed(rows).view_as(x)


def _keep_best(best: Attack, image: Tensor, adv: Tensor, margin: Tensor) -> None:
    n = len(best.margin)
    smallest = best.margin.scatter_reduce(0, image, margin, "amin")
    hit = ((margin == smallest[image]) & (margin < best.margin[image])).nonzero().squeeze(1)
    # One row an image, the first of equals.
    row = torch.full((n,), len(image), device=image.device).scatter_reduce(0, image[hit], hit, "amin")
    row = row[row < len(image)]
    best.margin[image[row]], best.x_adv[image[row]] = margin[row], adv[row]
