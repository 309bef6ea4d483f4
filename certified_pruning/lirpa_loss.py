"""CROWN-IBP training on auto_LiRPA's bounds, the library the paper trained with (`train.bounds: auto_lirpa`; spec c.4).

Without loss fusion, which its release cannot trace (spec f, T4): each margin is bounded. On a chain the loss and its
gradient are those of `crown_ibp_loss(..., loss_fusion=False)`; here any graph will do that the library can parse.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from certified_pruning.auto_lirpa import BoundedModule, crown_ibp_margins
from certified_pruning.ibp import margin_spec
from certified_pruning.train_ibp import ReluBounds


def lirpa_crown_ibp_loss(
    graph: BoundedModule, x_lb: Tensor, x_ub: Tensor, x: Tensor, y: Tensor, eps_frac: float
) -> tuple[Tensor, Tensor, list[ReluBounds]]:
    """Mean cross-entropy of the lower bounds of z_y - z_j on the box.

    The clean forward comes first, and it alone updates running statistics; bounds use those of its batch.

    Args:
        graph: what `bounded` made of a network in train mode.
        x_lb, x_ub: corners of the box in normalised units, (batch, channels, height, width).
        x: normalised clean images, same shape.
        y: labels, (batch,), int64.
        eps_frac: eps / eps_max in [0, 1]; the bounds are (1 - eps_frac) CROWN-IBP + eps_frac IBP.

    Returns:
        (loss, logits of the clean images, interval bounds of the ReLU inputs), all attached to the weights.

    Raises:
        ValueError: see `crown_ibp_margins` and `margin_spec`.
    """
    logits = graph(x)
    C, _ = margin_spec(y, logits.shape[1], logits.dtype)
    lower = crown_ibp_margins(graph, x_lb, x_ub, C, eps_frac)
    loss = F.cross_entropy(F.pad(-lower, (1, 0)), torch.zeros_like(y))
    return loss, logits, [_relu_bounds(relu) for relu in graph.relus]


def _relu_bounds(relu: BoundedModule) -> ReluBounds:
    """Bounds of the inputs of one of the graph's ReLU nodes, and the batch norm that computes them, if one does."""
    before = relu.inputs[0]
    if type(before).__name__ != "BoundBatchNormalization":
        return ReluBounds(relu.name, before.lower, before.upper)
    scale = before.inputs[1]
    return ReluBounds(relu.name, before.lower, before.upper, scale.ori_name.removesuffix(".weight"), scale.param)
