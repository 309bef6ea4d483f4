"""R: the share of the dense model's cost that is left, with its derivatives in closed form (Sec. 3, resource).

cost of block l = keep_l [ block + head (H - s_h) + dim (values - removed values) + neuron (F - s_m) ]
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from uvc_vit.adapter import BlockDims
from uvc_vit.group_norms import present
from uvc_vit.macs import block_macs

Accounting = Literal["exact", "released"]


@dataclass(frozen=True)
class Costs:
    """What each part of each block costs, in multiply-adds or any other unit; float64, (blocks,) where not said."""

    embed: float
    """of what is always computed"""
    block: Tensor
    """of a block that is not skipped, whatever is left of it; 0 where multiply-adds are counted"""
    head: Tensor
    """of a head without its values"""
    dim: Tensor
    """of a value dimension"""
    neuron: Tensor
    values: Tensor
    """number of value dimensions of each head, (blocks, heads)"""
    hidden: Tensor
    """number of neurons"""

    @cached_property
    def heads(self) -> Tensor:
        """Number of heads."""
        return (self.values > 0).sum(-1)

    @cached_property
    def mean_values(self) -> Tensor:
        """Value dimensions of a head, on average."""
        return self.values.sum(-1) / self.heads.clamp(min=1)

    @cached_property
    def dense(self) -> Tensor:
        """Cost of the whole model."""
        blocks = self.block + self.head * self.heads + self.dim * self.values.sum(-1) + self.neuron * self.hidden
        return self.embed + blocks.sum()

    def cpu(self) -> "Costs":
        """On the CPU."""
        return Costs(self.embed, *(getattr(self, field.name).cpu() for field in fields(self)[1:]))


@dataclass(frozen=True)
class Resource:
    """R and its derivatives, float64."""

    share: Tensor
    """R, a scalar"""
    by_amounts: Tensor
    """in s, (blocks, 2)"""
    by_dims: Tensor
    """in r, (blocks, heads)"""
    by_keep: Tensor
    """in the gates' keep, (blocks,)"""


def mac_costs(
    sizes: Sequence[BlockDims],
    tokens: int,
    embed_macs: int,
    accounting: Accounting = "exact",
    device: torch.device | None = None,
) -> Costs:
    """Multiply-adds of each part, classifier left out as in the paper.

    Args:
        sizes: of the blocks.
        tokens: of an image, prefix tokens included.
        embed_macs: of the patch embedding.
        accounting: "exact": removed value dimensions leave qkv too; "released", the authors' code: they do not.
        device: of the result.
    """
    rows = []
    for dims in sizes:
        cost, values = block_macs(dims, tokens), max(sum(dims.v_dims), 1)
        in_head = cost.v_rows if accounting == "released" else 0
        per_head = (cost.qk_rows + cost.qk + in_head) / max(dims.heads, 1)
        per_value = (cost.av + cost.proj + cost.v_rows - in_head) / values
        rows.append((0.0, per_head, per_value, 2 * cost.fc1 / max(dims.hidden, 1)))
    columns, neurons = present(sizes, device)
    block, head, dim, neuron = torch.tensor(rows, dtype=torch.float64, device=device).unbind(1)
    return Costs(embed_macs, block, head, dim, neuron, columns.sum(-1).double(), neurons.sum(-1).double())


def share_left(costs: Costs, s: Tensor, r: Tensor, keep: Tensor, alive: Tensor) -> Tensor:
    """R, float64; arguments as of `resource`, all but `alive` may have further axes in front, which R then has."""
    return (costs.embed + (keep.double() * _blocks(costs, s, r, alive)).sum(-1)) / costs.dense


def resource(costs: Costs, s: Tensor, r: Tensor, keep: Tensor, alive: Tensor) -> Resource:
    """R of given amounts; whoever wants whole numbers of groups rounds them up before.

    Args:
        costs: of the model.
        s: heads and neurons removed, (blocks, 2).
        r: value dimensions removed inside each head, (blocks, heads).
        keep: how far each block runs, in [0, 1], (blocks,).
        alive: heads whose `r` counts, those not removed, (blocks, heads) bool; a constant of the derivatives.
    """
    unit = keep.double() / costs.dense
    by_amounts = -torch.stack([costs.head + costs.dim * costs.mean_values, costs.neuron], dim=1) * unit[:, None]
    return Resource(
        share=share_left(costs, s, r, keep, alive),
        by_amounts=by_amounts,
        by_dims=-(costs.dim * unit)[:, None] * (alive & (costs.values > 0)),
        by_keep=_blocks(costs, s, r, alive) / costs.dense,
    )


def _blocks(costs: Costs, s: Tensor, r: Tensor, alive: Tensor) -> Tensor:
    """Cost of each block where it runs."""
    heads, neurons = s.double().unbind(-1)
    values = costs.values.sum(-1) - costs.mean_values * heads - (r * (alive & (costs.values > 0))).sum(-1)
    block = costs.block + costs.head * (costs.heads - heads) + costs.dim * values
    return block + costs.neuron * (costs.hidden - neurons)
