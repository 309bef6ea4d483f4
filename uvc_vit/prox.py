"""The proximal step on the weights: the groups that are to vanish shrink (Sec. 3, primal update of W)."""

import torch
from torch import Tensor

from uvc_vit.adapter import ViTAdapter
from uvc_vit.group_norms import GroupNorms, present, ranks


def shrinkage(norms: GroupNorms, s: Tensor, r: Tensor, y: Tensor, p: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """By what to divide each column: 1 + 2 eta times the multiplier of each constraint it is selected by.

    All ranks are those before the step.

    Args:
        norms: of the weights.
        s: heads and neurons to remove, (blocks, 2); rounded up here.
        r: value dimensions to remove inside each head, (blocks, heads); rounded up here.
        y: multipliers of s, (blocks, 2).
        p: multipliers of r, (blocks, heads).
        eta: step size.

    Returns:
        Divisors of attn.proj's columns, (blocks, heads, dims), and of mlp.fc2's, (blocks, neurons).
    """
    in_dims = ranks(norms.column) < r.ceil()[..., None]
    in_heads = ranks(norms.head) < s[:, :1].ceil()
    in_neurons = ranks(norms.neuron) < s[:, 1:].ceil()
    column = 1 + 2 * eta * p[..., None] * in_dims
    return column * (1 + 2 * eta * y[:, :1] * in_heads)[..., None], 1 + 2 * eta * y[:, 1:] * in_neurons


@torch.no_grad()
def divide_columns(adapter: ViTAdapter, column: Tensor, neuron: Tensor) -> None:
    """Divide the columns of every attn.proj and mlp.fc2, in place; a divisor of 1 leaves every bit."""
    columns, neurons = present(adapter.dims, column.device)
    for index, block in enumerate(adapter.blocks):
        block.attn.proj.weight.div_(column[index][columns[index]].to(block.attn.proj.weight.dtype))
        block.mlp.fc2.weight.div_(neuron[index][neurons[index]].to(block.mlp.fc2.weight.dtype))
