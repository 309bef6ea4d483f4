"""The pruned model made physically smaller, with the outputs of the masked one."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uvc_vit.adapter import BlockDims, ViTAdapter
from uvc_vit.plan import Plan
from uvc_vit.slim_attention import SlimAttention

Layout = Literal["padded", "grouped"]
HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")


@torch.no_grad()
def slim(model: nn.Module, plan: Plan, layout: Layout = "grouped") -> nn.Module:
    """A copy of `model` without what the plan removes; weights equal, no mask, no gate and no forward hook left.

    Args:
        model: the plan's, masked or not, with gates attached or not.
        plan: what stays.
        layout: "grouped": heads sorted by their number of value dimensions, none of which is only padding; "padded":
            all heads of a block get as many value dimensions as its widest, the missing ones zero, and need no slicing
            (zeros stay zero in training: each side of the product has gradient 0).

    Raises:
        ValueError: where the plan is for another model, or layout is unknown.
    """
    if layout not in ("padded", "grouped"):
        raise ValueError(f"layout must be padded or grouped, got {layout!r}")
    adapter = ViTAdapter(model)
    plan.validate(adapter)
    if not any(plan.keep_block):
        warnings.warn("the plan keeps no block: embedding, norm and head are left", stacklevel=2)
    smaller: Any = copy.copy(model)  # shares everything but what is replaced, which then is copied without the rest
    smaller._modules = dict(model._modules)
    smaller._modules["blocks"] = nn.Sequential()
    for kind in HOOKS:  # those of attached gates are functions that no file can hold
        setattr(smaller, kind, OrderedDict())
    smaller = copy.deepcopy(smaller)
    for index, block in enumerate(adapter.blocks):
        if plan.keep_block[index]:
            smaller.blocks.append(_slim_block(block, plan, index, layout))
    return smaller.train(model.training)


def _slim_block(block: Any, plan: Plan, index: int, layout: Layout) -> nn.Module:
    smaller = copy.deepcopy(block)
    smaller.attn = _slim_attention(block.attn, plan, index, layout)
    neurons = torch.tensor(plan.keep_mlp[index], dtype=torch.long, device=block.mlp.fc1.weight.device)
    smaller.mlp.fc1 = _linear(block.mlp.fc1, neurons, None)
    smaller.mlp.fc2 = _linear(block.mlp.fc2, None, neurons)
    return smaller


def _slim_attention(attention: Any, plan: Plan, index: int, layout: Layout) -> nn.Module:
    sizes, heads = plan.sizes[index], plan.heads(index)
    kept = [plan.keep_dim[index][head] for head in heads]
    if layout == "grouped":
        order = sorted(range(len(heads)), key=lambda place: len(kept[place]))
        heads, kept = [heads[place] for place in order], [kept[place] for place in order]
        widths = tuple(map(len, kept))
    else:
        widths = (max(map(len, kept), default=0),) * len(heads)
    slot = value_slots(sizes, heads, kept, widths).to(attention.proj.weight.device)
    width = sizes.heads * sizes.qk_dim
    q_rows = [head * sizes.qk_dim + row for head in heads for row in range(sizes.qk_dim)]
    rows = torch.tensor([*q_rows, *(width + row for row in q_rows)], dtype=torch.long, device=slot.device)
    rows = torch.cat([rows, torch.where(slot < 0, -1, 2 * width + slot)])

    qkv, proj = _linear(attention.qkv, rows, None), _linear(attention.proj, None, slot)
    smaller = SlimAttention(qkv, proj, sizes.qk_dim, widths, attention.scale)
    for name in ("q_norm", "k_norm", "attn_drop", "proj_drop"):
        setattr(smaller, name, copy.deepcopy(getattr(attention, name)))
    smaller.fused_attn = attention.fused_attn
    return smaller.train(attention.training)


def value_slots(sizes: BlockDims, heads: Sequence[int], kept: Sequence[Sequence[int]], widths: Sequence[int]) -> Tensor:
    """For each value dimension of the smaller attention, its index among the model's; -1 where it is only padding.

    Args:
        sizes: of the block.
        heads: that stay, in their new order.
        kept: value dimensions of each of them.
        widths: room for them.
    """
    starts = [sum(sizes.v_dims[:head]) for head in heads]
    slots: list[int] = []
    for start, dims, width in zip(starts, kept, widths, strict=True):
        slots += [start + dim for dim in dims] + [-1] * (width - len(dims))
    return torch.tensor(slots, dtype=torch.long)


def _linear(layer: nn.Linear, rows: Tensor | None, columns: Tensor | None) -> nn.Linear:
    """The layer with these rows and columns; index -1 is a row or column of zeros, None all of them."""
    weight = _take(_take(layer.weight, 0, rows), 1, columns)
    bias = None if layer.bias is None else _take(layer.bias, 0, rows)
    smaller = nn.Linear(1, 1, bias=bias is not None, device="meta")
    smaller.out_features, smaller.in_features = weight.shape
    smaller.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        smaller.bias = nn.Parameter(bias.clone(), requires_grad=layer.weight.requires_grad)
    return smaller.train(layer.training)


def _take(tensor: Tensor, dim: int, index: Tensor | None) -> Tensor:
    if index is None:
        return tensor
    taken = tensor.index_select(dim, index.clamp(min=0))
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return torch.where((index < 0).view(shape), 0, taken)
