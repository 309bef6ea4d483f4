"""Input boxes and interval bound propagation (Gowal et al. 2018; spec c.1, c.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from certified_pruning.chain import ChainNet

PreBounds = list[tuple[Tensor, Tensor]]
"""(l, u) of the input of every ReLU layer, each (batch, neurons of the layer), flattened."""


@dataclass(frozen=True)
class Bounds:
    """`pre`: bounds of every ReLU input; `out`: (lb, ub) of the logits, (batch, out), or of C logits, (batch, S)."""

    pre: PreBounds
    out: tuple[Tensor, Tensor]


def channel_stats(mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and std of a normalisation, shaped to broadcast over `like` (batch, channels, ...).

    Raises:
        ValueError: not one number a channel (or one for all), a non-finite one, or std <= 0.
    """
    shaped = []
    for name, value in (("mean", mean), ("std", std)):
        t = torch.as_tensor(value, dtype=torch.float64).flatten().to(like.device)
        if t.numel() not in (1, like.shape[1]):
            raise ValueError(f"{name} must have 1 or {like.shape[1]} entries, got {t.numel()}")
        if not t.isfinite().all() or (name == "std" and bool((t <= 0).any())):
            raise ValueError(f"{name} must be finite{' and > 0' if name == 'std' else ''}, got {t.tolist()}")
        shaped.append(t.to(like.dtype).reshape(1, -1, *[1] * (like.dim() - 2)))
    return shaped[0], shaped[1]


def input_box(
    raw: Tensor,
    eps: float,
    mean: Sequence[float] | Tensor = (0.0,),
    std: Sequence[float] | Tensor = (1.0,),
) -> tuple[Tensor, Tensor]:
    """The L-inf ball around raw images, cut to [0, 1], then normalised: lo = (clip(r - eps, 0, 1) - mean) / std.

    Args:
        raw: images (batch, channels, ...) with pixels in [0, 1], any float dtype.
        eps: radius in raw pixel units, in [0, 1].
        mean, std: of the normalisation, one number or one a channel.

    Raises:
        ValueError: eps negative, above 1 or not finite; raw not finite or outside [0, 1]; see `channel_stats`.
    """
    if not isfinite(eps) or eps < 0:
        raise ValueError(f"eps must be finite and >= 0, got {eps}")
    if eps > 1:
        raise ValueError(f"eps must be at most 1, in units of pixels in [0, 1] such as 8/255, got {eps}")
    if not raw.isfinite().all():
        raise ValueError("raw must be finite, got NaN or Inf")
    if raw.numel() and (raw.min() < -1e-6 or raw.max() > 1 + 1e-6):
        raise ValueError(f"raw must be in [0, 1], got values in [{raw.min():.4g}, {raw.max():.4g}]")
    m, s = channel_stats(mean, std, raw)
    return ((raw - eps).clamp(0, 1) - m) / s, ((raw + eps).clamp(0, 1) - m) / s


def check_box(net: ChainNet, x_lb: Tensor, x_ub: Tensor) -> tuple[Tensor, Tensor]:
    """The box flattened to (batch, inputs). Raises ValueError: wrong shape, NaN or Inf, x_lb > x_ub anywhere."""
    for name, x in (("x_lb", x_lb), ("x_ub", x_ub)):
        if tuple(x.shape[1:]) not in (tuple(net.input_shape), (net.n_in,)):
            raise ValueError(f"{name} must have shape (batch, {', '.join(map(str, net.input_shape))}), got {x.shape}")
        if not x.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or Inf")
    if x_lb.shape != x_ub.shape:
        raise ValueError(f"x_ub must have the shape of x_lb {tuple(x_lb.shape)}, got {tuple(x_ub.shape)}")
    if bool((x_lb > x_ub).any()):
        raise ValueError(f"x_lb must be <= x_ub, got x_lb larger by up to {(x_lb - x_ub).max():.4g}")
    return x_lb.flatten(1), x_ub.flatten(1)


def interval(net: ChainNet, k: int, lb: Tensor, ub: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of A_k x for x in [lb, ub], (batch, in) -> (batch, out): centre A(mid), radius |W| rad."""
    centre = net.affines[k].forward((lb + ub) / 2)
    radius = net.affines[k].radius((ub - lb) / 2)
    return centre - radius, centre + radius


@torch.no_grad()
def ibp(net: ChainNet, x_lb: Tensor, x_ub: Tensor, C: Tensor | None = None) -> Bounds:
    """Interval bounds of all ReLU inputs and of the logits, or of C logits with C merged into the last layer.

    Args:
        x_lb, x_ub: box in the network's (normalised) coordinates, (batch, *input_shape).
        C: specification rows (batch, S, out), e.g. e_y - e_t; see `margin_spec`.

    Raises:
        ValueError: see `check_box`; C of another shape.
    """
    lb, ub = check_box(net, x_lb, x_ub)
    pre: PreBounds = []
    last = len(net.affines) - 1
    for k in range(last):
        lb, ub = interval(net, k, lb, ub)
        pre.append((lb, ub))
        lb, ub = lb.relu(), ub.relu()
    if C is None:
        return Bounds(pre, interval(net, last, lb, ub))
    if C.dim() != 3 or C.shape[0] != lb.shape[0] or C.shape[2] != net.n_out:
        raise ValueError(f"C must have shape ({lb.shape[0]}, S, {net.n_out}), got {tuple(C.shape)}")
    rows = net.affines[last].transposed(C.flatten(0, 1)).view(*C.shape[:2], lb.shape[1])
    centre = C @ net.affines[last].bias + (rows @ ((lb + ub) / 2).unsqueeze(2)).squeeze(2)
    radius = (rows.abs() @ ((ub - lb) / 2).unsqueeze(2)).squeeze(2)
    return Bounds(pre, (centre - radius, centre + radius))


def margin_spec(y: Tensor, n_classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows e_y - e_t for every other class t, ascending.

    Args:
        y: labels (batch,), integer, in [0, n_classes).

    Returns:
        C (batch, n_classes - 1, n_classes) and the classes t (batch, n_classes - 1).

    Raises:
        ValueError: n_classes < 2, a label that is not an integer or out of range.
    """
    if n_classes < 2:
        raise ValueError(f"n_classes must be at least 2, got {n_classes}")
    if y.dtype.is_floating_point or y.dtype == torch.bool or y.dim() != 1:
        raise ValueError(f"y must be a vector of integers, got {y.dtype} of shape {tuple(y.shape)}")
    if y.numel() and (y.min() < 0 or y.max() >= n_classes):
        raise ValueError(f"y must be in [0, {n_classes}), got values in [{y.min()}, {y.max()}]")
    y = y.long()
    other = torch.arange(n_classes - 1, device=y.device).expand(len(y), -1)
    targets = other + (other >= y[:, None])
    eye = torch.eye(n_classes, dtype=dtype, device=y.device)
    return eye[y][:, None] - eye[targets], targets
