"""Diversity of the loss's gradients in the tokens (spec c.2, an alternative the authors ship)."""

import torch
from torch import Tensor


def gradient_diversity(g: Tensor) -> Tensor:
    """-sum_i ||g_i||^2 / ||sum_i g_i||^2, the mean over images: -1/n where all n gradients are equal.

    Args:
        g: gradients of the loss in the tokens of the last layer, (batch, n, d), made with create_graph=True.

    Returns:
        A scalar; an image without any gradient counts -1e-8, as released.
    """
    own, total = g.square().sum((-2, -1)), g.sum(-2).square().sum(-1)
    none = (own == 0) & (total == 0)
    return -torch.where(none, 1e-8, own / torch.where(none, 1, total)).mean()
