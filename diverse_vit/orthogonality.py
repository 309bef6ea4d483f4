"""Soft and conditional orthogonality of rows (Sec. 3.3; spec c.1.6, c.2, h).

SO: ||Z Z^T - I||_F^2. CNO: the squared gap between the extreme eigenvalues of A = W W^T, estimated by one power step
each: y = A x1, lmax = y^T A y / y^T y; p = (A - lmax I) x2, lmin = p^T A p / p^T p. A itself is never formed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diverse_vit.cosines import exact, full, unit


@exact
def so(z: Tensor, *, normalise: bool) -> Tensor:
    """Soft orthogonality ||Z Z^T - I||_F^2, the mean over leading axes.

    Args:
        z: rows to make orthogonal, (..., n, d).
        normalise: make rows unit vectors first (released: tokens yes, attention maps and weights no).
    """
    z = unit(z) if normalise else full(z)
    n, d = z.shape[-2:]
    if n > d:  # ||Z Z^T||_F = ||Z^T Z||_F
        return ((z.mT @ z).square().sum((-2, -1)) - 2 * z.square().sum((-2, -1)) + n).mean()
    return (z @ z.mT - torch.eye(n, dtype=z.dtype, device=z.device)).square().sum((-2, -1)).mean()


def cno_starts(
    rows: int, matrices: int, generator: torch.Generator, like: Tensor, *, start: str = "uniform"
) -> tuple[Tensor, Tensor]:
    """Two start vectors a matrix, (matrices, rows, 1) each, of the dtype and on the device of `like`.

    Args:
        start: "uniform" draws from [0, 1) as released, "normal" from N(0, 1).
    """
    if start not in ("uniform", "normal"):
        raise ValueError(f"start must be uniform or normal, got {start!r}")
    draw = torch.rand if start == "uniform" else torch.randn
    x1, x2 = draw(2, matrices, rows, 1, generator=generator).to(like)
    return x1, x2


@exact
def cno(w: Tensor, x1: Tensor, x2: Tensor, *, power_iters: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(lmax - lmin)^2 of W W^T for each matrix; on w.mT it is the "inverse" form, of W^T W.

    Both eigenvalues are Rayleigh quotients, hence inner estimates of the extremes. At the optimum, W a multiple of an
    orthogonal matrix, p vanishes: there, and where y is 0, value and gradient are 0 (the released code gives NaN).

    Args:
        w: (o, i), or m matrices (m, o, i).
        x1: start vector of the largest eigenvalue, (o, 1) or (m, o, 1); a constant.
        x2: of the smallest.
        power_iters: 1 as released; each further one moves the start vectors one power step, without gradient.

    Returns:
        Losses, lmax and lmin, (m,) each, () for one matrix; only losses are differentiable, once.

    Raises:
        ValueError: where shapes do not fit.
    """
    fits = w.ndim in (2, 3) and x1.shape == x2.shape == (*w.shape[:-1], 1)
    if not fits:
        shapes = f"{tuple(w.shape)}, {tuple(x1.shape)}, {tuple(x2.shape)}"
        raise ValueError(f"w, x1, x2 must be (m, o, i), (m, o, 1), (m, o, 1), or without m, got {shapes}")
    if power_iters < 1:
        raise ValueError(f"power_iters must be at least 1, got {power_iters}")
    w, x1, x2 = (full(tensor) for tensor in (w, x1, x2))
    if power_iters > 1:
        x1, x2 = _move_starts(w.detach(), x1, x2, power_iters - 1)
    if w.ndim == 3:
        return _Cno.apply(w, x1, x2)
    losses, largest, smallest = _Cno.apply(w[None], x1[None], x2[None])
    return losses[0], largest[0], smallest[0]


@exact
def cno_features(z: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
    """The released form for tokens or flattened heads: G = Z Z^T an image, norms guarded by 1e-6.

    Args:
        z: (batch, n, d); tokens as unit vectors, heads as they are.
        x1: start vectors, (batch, n, 1), normal.
        x2: likewise.

    Returns:
        The mean over images of (lmax - lmin)^2.
    """
    z = full(z)
    y = z @ (z.mT @ x1)
    largest = _guarded(_dot(z.mT @ y, z.mT @ y), y)
    p = z @ (z.mT @ x2) - largest * x2
    gap = _guarded(_dot(z.mT @ p, z.mT @ p) - largest * _dot(p, p), p)  # lmin - lmax: the quotient of G - lmax I
    return gap.square().mean()


def _guarded(form: Tensor, v: Tensor) -> Tensor:
    return form / (_dot(v, v) + 1e-6)


@torch.no_grad()
def _move_starts(w: Tensor, x1: Tensor, x2: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    for _ in range(steps):
        x1 = unit((w @ (w.mT @ x1)).mT).mT
    y = w @ (w.mT @ x1)
    largest = (w.mT @ y).square().sum((-2, -1), keepdim=True) / y.square().sum((-2, -1), keepdim=True).clamp_min(1e-30)
    for _ in range(steps):
        x2 = unit((w @ (w.mT @ x2) - largest * x2).mT).mT
    return x1, x2


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of vectors in columns."""
    return (a * b).sum(-2, keepdim=True)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


class _Cno(torch.autograd.Function):
    """Forward: four skinny products. Backward: one, and an update of rank six; only vectors are saved.

    Vectors are rows here, x^T W instead of W^T x: on processors such products are twice as fast.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        starts = torch.cat([x1, x2], -1).mT
        starts_w = starts @ w
        once = starts_w @ w.mT  # A x1, A x2
        once_w = once @ w
        twice = once_w @ w.mT
        (x1, x2), (y, a_x2), (a_y, a_a_x2) = (vectors.split(1, 1) for vectors in (starts, once, twice))
        (x1_w, x2_w), (y_w, a_x2_w) = starts_w.split(1, 1), once_w.split(1, 1)

        yy = _row_dot(y, y)
        no_y = yy == 0
        yy = torch.where(no_y, 1, yy)
        largest = _row_dot(y_w, y_w) / yy
        p, p_w, a_p = a_x2 - largest * x2, a_x2_w - largest * x2_w, a_a_x2 - largest * a_x2
        pp = _row_dot(p, p)
        tolerance = 1e-12 if w.dtype == torch.float64 else 1e-5  # rounding leaves 4e-7 of an orthogonal 384 x 384
        optimal = no_y | (pp <= (tolerance * largest).square() * _row_dot(x2, x2))
        pp = torch.where(optimal, 1, pp)
        quotient = _row_dot(p_w, p_w) / pp
        gap = torch.where(optimal, 0, quotient - largest)

        # d gap / d A = p p^T/pp + r_p x2^T + c (y y^T/yy + r_y x1^T)
        r_p, r_y = 2 * (a_p - quotient * p) / pp, 2 * (a_y - largest * y) / yy
        c = -1 - _row_dot(r_p, x2)
        left = torch.cat([p, y, x2, x1, r_p, r_y], 1)
        right = torch.cat([2 * p_w / pp, 2 * c * y_w / yy, x2_w, c * x1_w], 1)
        ctx.save_for_backward(w, left, right, c, gap)
        smallest = largest + gap
        ctx.mark_non_differentiable(largest, smallest)
        return gap.square().flatten(), largest.flatten(), smallest.flatten()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        w, left, right, c, gap = ctx.saved_tensors
        of_p, of_y, x2_w, x1_w = right.split(1, 1)
        r_p_w, r_y_w = (left[:, 4:] @ w).split(1, 1)
        # the same order as in `left`: with x2 goes r_p, with r_p goes x2, and so on
        right = torch.cat([of_p, of_y, r_p_w, c * r_y_w, x2_w, x1_w], 1)
        return 2 * (gradient[:, None, None] * gap * left).mT @ right, None, None
