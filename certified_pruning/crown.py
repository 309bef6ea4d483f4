"""CROWN: linear lower bounds propagated backwards through a ReLU chain (Zhang et al. 2018; spec c.8.4, c.8.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from certified_pruning.alpha_beta import ascend
from certified_pruning.chain import ChainNet
from certified_pruning.ibp import PreBounds, check_box, ibp, interval
from certified_pruning.rows import Relaxation, RowBatch, Splits, join, row_batch
from certified_pruning.window import has_windows, window_bounds, window_elements

__all__ = ["Splits", "crown_intermediate", "crown_lower"]


@torch.no_grad()
def crown_lower(
    net: ChainNet,
    C: Tensor,
    x_lb: Tensor,
    x_ub: Tensor,
    pre: PreBounds,
    splits: Splits | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """Lower bounds of C . logits over the box (and the splits), one CROWN pass.

    Args:
        net: the chain; C (B, S, out) rows of each image, or (R, out) with the image of each row in `image` (R,).
        x_lb, x_ub: box (B, *input_shape), in the network's coordinates.
        pre: bounds of all ReLU inputs on that box, from `ibp` or `crown_intermediate`.
        splits: split ReLUs, B*S (or R) rows.
        alpha: lower slopes (rows, N), cut to [0, 1]; by default the adaptive ones.
        beta: multipliers (rows, D) of the splits, cut to >= 0; by default 0.

    Returns:
        (B, S) or (R,); +inf where the splits contradict the bounds.

    Raises:
        ValueError: shapes that do not fit, a box or bounds with lower > upper or NaN.
    """
    batch, lead = row_batch(net, C, x_lb, x_ub, pre, splits, image)
    alpha = batch.relaxation.adaptive() if alpha is None else alpha.clamp(0, 1)
    return batch.bound(alpha, None if beta is None else beta.clamp_min(0)).view(lead)


@torch.no_grad()
def crown_intermediate(
    net: ChainNet,
    x_lb: Tensor,
    x_ub: Tensor,
    refine_iters: int = 0,
    intersect: bool = True,
    max_elements: int = 1 << 18,
) -> PreBounds:
    """Bounds of all ReLU inputs: interval bounds, tightened by CROWN where they leave a neuron unstable.

    Rows are the (image, unstable neuron) pairs of a layer, so work follows the number of unstable neurons of each
    image. Each layer uses the tightened bounds of the layers before it (spec c.8.4, h.2).

    Args:
        x_lb, x_ub: box (B, *input_shape).
        refine_iters: optimise alpha of these rows for so many steps (0: CROWN only).
        intersect: keep the tighter of CROWN and interval bound (interval bounds of the tightened layer before).
            False takes CROWN alone on neurons unstable by plain IBP, as auto_LiRPA does; only for comparisons.
        max_elements: bound on rows x neurons (or inputs) handled at once; changes memory, not values.

    Returns:
        [(l, u)], each (B, neurons of the layer).
    """
    x_lb, x_ub = check_box(net, x_lb, x_ub)
    loose = [] if intersect else ibp(net, x_lb, x_ub).pre
    pre: PreBounds = [interval(net, 0, x_lb, x_ub)] if len(net.affines) > 1 else []
    for k in range(1, len(net.affines) - 1):
        lower, upper = interval(net, k, pre[-1][0].relu(), pre[-1][1].relu()) if intersect else loose[k]
        image, neuron = ((lower < 0) & (upper > 0)).nonzero(as_tuple=True)
        if len(image):
            low, high = _tighten(net.head(k), x_lb, x_ub, pre, image, neuron, refine_iters, max_elements)
            if intersect:
                low, high = torch.maximum(lower[image, neuron], low), torch.minimum(upper[image, neuron], high)
            lower[image, neuron], upper[image, neuron] = low, high
            # Rounding can make the two meet the wrong way round by one unit in the last place.
            lower, upper = torch.minimum(lower, upper), torch.maximum(lower, upper)
        pre.append((lower, upper))
    return pre


def _tighten(
    head: ChainNet,
    x_lb: Tensor,
    x_ub: Tensor,
    pre: PreBounds,
    image: Tensor,
    neuron: Tensor,
    refine_iters: int,
    max_elements: int,
) -> tuple[Tensor, Tensor]:
    """CROWN bounds (l, u) of the (image, neuron) outputs of `head`."""
    relaxation = Relaxation.of(*join(pre, x_lb))
    if not refine_iters and has_windows(head):
        chunks = torch.arange(len(image), device=image.device).split(max(1, max_elements // window_elements(head)))
        cut = [window_bounds(head, x_lb, x_ub, relaxation, image[rows], neuron[rows]) for rows in chunks]
        return torch.cat([low for low, _ in cut]), torch.cat([high for _, high in cut])
    per_row = max([head.n_in, head.n_out, *head.sizes])
    bounds = []
    for sign in (1.0, -1.0):
        parts = []
        for rows in torch.arange(len(image), device=image.device).split(max(1, max_elements // per_row)):
            C = x_lb.new_zeros(len(rows), head.n_out)
            C[torch.arange(len(rows), device=C.device), neuron[rows]] = sign
            batch = RowBatch.make(head, C, x_lb, x_ub, relaxation, image[rows])
            alpha = batch.relaxation.adaptive()
            if refine_iters:
                parts.append(ascend(batch, alpha, None, refine_iters, lr_alpha=0.1, lr_beta=0.0).lb)
            else:
                parts.append(batch.bound(alpha))
        bounds.append(torch.cat(parts))
    return bounds[0], -bounds[1]
