"""Certified training: an upper bound of the cross-entropy anywhere in the box, by IBP and CROWN-IBP (spec c.4).

Loss fusion bounds log sum_j exp(z_j - z_y) as one function: IBP bounds every difference d_j = z_j - z_y, exp is
replaced by its chord over that interval, and one CROWN backward pass bounds the linear function that is left. It costs
one row an image instead of one row a class (auto_LiRPA, Xu et al. 2020).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certified_pruning.train_ibp import (
    BatchStats,
    IbpBounds,
    ReluBounds,
    bn_affine,
    clean_forward,
    ibp,
    sequential_leaves,
)

Leaves = list[tuple[str, nn.Module]]
NEGLIGIBLE = 1e-50
"""A share of eps or of CROWN below this counts as none (released code)."""


class CertifiedLoss(NamedTuple):
    """Loss (0-dim), logits of the clean images (batch, classes), and the IBP bounds, all attached to the graph."""

    loss: Tensor
    logits: Tensor
    bounds: IbpBounds


def crown_ibp_loss(
    model: nn.Module,
    x_lb: Tensor,
    x_ub: Tensor,
    x: Tensor,
    y: Tensor,
    eps_frac: float,
    loss_fusion: bool = True,
) -> CertifiedLoss:
    """Mean over the images of an upper bound of the cross-entropy on the box.

    The clean forward comes first. Its batch statistics, gradient included, normalise in every bound, and it alone
    updates the running statistics. The bound is f times that of CROWN with IBP intermediate bounds plus (1 - f) times
    that of IBP, f = 1 - eps_frac: CROWN is tighter where the ramp starts, IBP trains better where it ends. At
    eps_frac = 0 the loss is the clean cross-entropy; at eps_frac = 1 it is IBP alone.

    Args:
        model: chain of layers (see `train_ibp.ibp`).
        x_lb, x_ub: corners of the box in normalised units, (batch, channels, height, width).
        x: normalised clean images, same shape.
        y: labels, (batch,), int64.
        eps_frac: eps / eps_max, in [0, 1].
        loss_fusion: bound the sum of exponentials; else bound each margin and take the cross-entropy of the bounds.

    Raises:
        ValueError: eps_frac outside [0, 1]; labels of the wrong shape, type or range; a box that is none.
        UnsupportedLayerError: the model is no chain of supported layers.
    """
    if not 0 <= eps_frac <= 1:
        raise ValueError(f"eps_frac must be in [0, 1], got {eps_frac}")
    logits, stats = clean_forward(model, x)
    _check_labels(y, logits)
    bounds = ibp(model, x_lb, x_ub, batch_stats=stats)
    crown_share = 1 - eps_frac if 1 - eps_frac >= NEGLIGIBLE else 0.0
    if eps_frac < NEGLIGIBLE:
        loss = F.cross_entropy(logits, y)
    else:
        chain = _Chain(sequential_leaves(model), stats, bounds, x_lb, x_ub)
        loss = (_fused if loss_fusion else _margins)(chain, y, crown_share).mean()
    return CertifiedLoss(loss, logits, bounds)


class _Chain(NamedTuple):
    leaves: Leaves
    stats: BatchStats
    bounds: IbpBounds
    x_lb: Tensor
    x_ub: Tensor


def _fused(chain: _Chain, y: Tensor, crown_share: float) -> Tensor:
    """log of the upper bound of sum_j exp(z_j - z_y), (batch,)."""
    z_lb, z_ub, of_label = chain.bounds.out_lb, chain.bounds.out_ub, y[:, None]
    # Intervals are subtracted, the last layer is not merged: the j = y term is exp(width), not exp(0).
    d_lb, d_ub = z_lb - z_ub.gather(1, of_label), z_ub - z_lb.gather(1, of_label)
    shift = d_ub.detach().amax(dim=1, keepdim=True)
    exp_ub = (d_ub - shift).exp()
    total = exp_ub.sum(dim=1)
    if crown_share:
        slope = exp_ub * _mean_decay(d_ub - d_lb)  # of the chord of exp over [d_lb, d_ub]
        # sum_j k_j (z_j - z_y) in terms of the logits z
        coefficients = slope - F.one_hot(y, slope.shape[1]) * slope.sum(dim=1, keepdim=True)
        crown = (exp_ub - slope * d_ub).sum(dim=1) - _lower_bounds(chain, -coefficients)[1]
        total = crown_share * crown + (1 - crown_share) * total
    return total.log() + shift.squeeze(1)


def _margins(chain: _Chain, y: Tensor, crown_share: float) -> Tensor:
    """Cross-entropy of the lower bounds of z_y - z_j, (batch,)."""
    batch, classes = chain.bounds.out_lb.shape
    rows = F.one_hot(y, classes)[:, None] - torch.eye(classes, dtype=torch.long, device=y.device)  # (batch, j, classes)
    others = torch.arange(classes, device=y.device) != y[:, None]
    rows = rows[others].view(batch, classes - 1, classes).transpose(0, 1).flatten(0, 1)  # j by j, all images each
    by_ibp, by_crown = _lower_bounds(chain, rows.to(chain.x_lb), need_crown=crown_share > 0)
    lower = crown_share * by_crown + (1 - crown_share) * by_ibp
    margins = torch.cat([lower.new_zeros(batch, 1), lower.view(classes - 1, batch).T], dim=1)
    return F.cross_entropy(-margins, torch.zeros_like(y), reduction="none")


def _lower_bounds(chain: _Chain, rows: Tensor, need_crown: bool = True) -> tuple[Tensor, Tensor]:
    """Lower bounds of rows . logits by IBP (last layer merged with the rows) and by CROWN-IBP, (R,) each.

    Args:
        rows: (R, classes) with R a multiple of the batch; row r belongs to image r % batch.
        need_crown: if False the second result is the first.
    """
    sizes = _input_sizes(chain.leaves, chain.x_lb)
    relus = {relu.name: relu for relu in chain.bounds.relus}
    last = max((i for i, (name, _) in enumerate(chain.leaves) if name in relus), default=-1)
    constant, by_ibp = rows.new_zeros(len(rows)), None
    for i in range(len(chain.leaves) - 1, -1, -1):
        name, leaf = chain.leaves[i]
        if i == last:
            lower, upper = F.relu(relus[name].lower), F.relu(relus[name].upper)
            by_ibp = constant + _minimum(rows, lower, upper)
            if not need_crown:
                return by_ibp, by_ibp
        if isinstance(leaf, nn.ReLU):
            rows, shift = _through_relu(rows, relus[name])
        else:
            rows, shift = _through_affine(name, leaf, rows, sizes[i], chain.stats)
        constant = constant + shift
    by_crown = constant + _minimum(rows, chain.x_lb, chain.x_ub)
    return by_crown if by_ibp is None else by_ibp, by_crown


def _through_relu(rows: Tensor, relu: ReluBounds) -> tuple[Tensor, Tensor]:
    """Coefficients on the output of a ReLU to coefficients on its input, and what they add to the constant."""
    lower, upper = relu.lower.clamp(max=0), relu.upper.clamp(min=0)
    upper = torch.maximum(upper, lower + 1e-8)  # both are 0 only together: slope 1 there, intercept 0
    slope = upper / (upper - lower)  # 1 on, 0 off, the upper line of the triangle between
    intercept = -lower * slope
    by_image = rows.view(-1, *lower.shape)  # (rows of an image, batch, ...)
    low, high = by_image.clamp(min=0), by_image.clamp(max=0)
    rows_in = low * (slope > 0.5) + high * slope  # adaptive lower slope: 1 where the upper one passes 0.5, else 0
    return rows_in.flatten(0, 1), (high * intercept).flatten(2).sum(dim=2).flatten()


def _through_affine(
    name: str, leaf: nn.Module, rows: Tensor, size: torch.Size, stats: BatchStats
) -> tuple[Tensor, Tensor]:
    """Coefficients on the output of an affine layer to those on its input, and what they add to the constant."""
    shift = rows.new_zeros(len(rows))
    if isinstance(leaf, nn.BatchNorm2d):
        slope, intercept = bn_affine(name, leaf, None, stats)
        return rows * slope[:, None, None], rows.sum(dim=(2, 3)) @ intercept
    if isinstance(leaf, nn.Linear):
        return rows @ leaf.weight, shift if leaf.bias is None else rows @ leaf.bias
    if isinstance(leaf, nn.Conv2d):
        if leaf.bias is not None:
            shift = rows.sum(dim=(2, 3)) @ leaf.bias
        return _transposed_conv(leaf, rows, size), shift
    if isinstance(leaf, nn.AvgPool2d):
        # The vector-Jacobian product of a linear map is its transpose.
        origin = rows.new_zeros(len(rows), *size, requires_grad=True)
        return torch.autograd.grad(leaf(origin), origin, rows, create_graph=True)[0], shift
    return rows.reshape(len(rows), *size), shift  # Flatten, Identity


def _transposed_conv(conv: nn.Conv2d, rows: Tensor, size: torch.Size) -> Tensor:
    if isinstance(conv.padding, str):
        sides = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        whole = F.conv_transpose2d(rows, conv.weight, None, 1, 0, 0, conv.groups, conv.dilation)
        if conv.padding == "valid":
            return whole
        (top, left) = (side // 2 for side in sides)  # "same" pads the odd row and column at the end
        return whole[:, :, top : top + size[1], left : left + size[2]]
    geometry = zip(size[1:], rows.shape[2:], conv.stride, conv.padding, conv.dilation, conv.kernel_size, strict=True)
    extra = [n - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for n, out, s, p, d, k in geometry]
    return F.conv_transpose2d(rows, conv.weight, None, conv.stride, conv.padding, extra, conv.groups, conv.dilation)


@torch.no_grad()
def _input_sizes(leaves: Leaves, x: Tensor) -> list[torch.Size]:
    """Shape of each layer's input without the batch, seen on one image."""
    sizes, x = [], x[:1]
    for _, leaf in leaves:
        sizes.append(x.shape[1:])
        if not isinstance(leaf, nn.BatchNorm2d):  # keeps the shape, and would update its statistics
            x = leaf(x)
    return sizes


def _minimum(rows: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Minimum of rows . v over lower <= v <= upper, (R,); rows (R, ...), bounds (batch, ...)."""
    by_image = rows.reshape(-1, *lower.shape)
    middle, radius = (lower + upper) / 2, (upper - lower) / 2
    return (by_image * middle - by_image.abs() * radius).flatten(2).sum(dim=2).flatten()


def _mean_decay(width: Tensor) -> Tensor:
    """(1 - exp(-w)) / w, the mean of exp over an interval of width w that ends at 0; by its series for small w."""
    small = width < 1e-2
    safe = torch.where(small, 1.0, width)
    return torch.where(small, 1 - width / 2 + width.square() / 6, -torch.expm1(-safe) / safe)


def _check_labels(y: Tensor, logits: Tensor) -> None:
    if y.shape != logits.shape[:1] or y.dtype != torch.int64:
        raise ValueError(f"y must be int64 of shape ({logits.shape[0]},), got {y.dtype} of shape {tuple(y.shape)}")
    low, high = (bound.item() for bound in y.aminmax())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(f"y must hold labels in 0..{logits.shape[1] - 1}, got labels in {low}..{high}")
