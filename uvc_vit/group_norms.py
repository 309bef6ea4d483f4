"""Squared norms of what can be pruned, their ranks, and the sum of the k smallest (Sec. 3; constraint functions)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uvc_vit.adapter import BlockDims, ViTAdapter


@dataclass(frozen=True)
class GroupNorms:
    """Squared l2 norms by block; where blocks differ in size, absent groups are inf.

    `column`: of attn.proj's columns by head, (blocks, heads, dims); `head`: their sums, (blocks, heads);
    `neuron`: of mlp.fc2's columns, (blocks, neurons). float32.
    """

    column: Tensor
    head: Tensor
    neuron: Tensor

    def scaled(self, column: Tensor, neuron: Tensor) -> "GroupNorms":
        """After the weights' columns were multiplied by these factors: no second look at the weights."""
        return _with_heads(self.column * column.square(), self.neuron * neuron.square())

    def cpu(self) -> "GroupNorms":
        """On the CPU."""
        return GroupNorms(self.column.cpu(), self.head.cpu(), self.neuron.cpu())


@torch.no_grad()
def group_norms(adapter: ViTAdapter) -> GroupNorms:
    """Of the weights as they are, on their device."""
    columns = [squared_columns(block.attn.proj.weight) for block in adapter.blocks]
    neurons = [squared_columns(block.mlp.fc2.weight) for block in adapter.blocks]
    there = present(adapter.dims, columns[0].device)
    column, neuron = (torch.full(mask.shape, torch.inf, device=mask.device) for mask in there)
    column[there[0]] = torch.cat(columns)
    neuron[there[1]] = torch.cat(neurons)
    return _with_heads(column, neuron)


def present(sizes: Sequence[BlockDims], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Which value dimensions (blocks, heads, dims) and neurons (blocks, neurons) exist, in the weights' order."""
    most_heads = max(1, *(dims.heads for dims in sizes))
    values = torch.tensor([[*dims.v_dims, *[0] * (most_heads - dims.heads)] for dims in sizes], device=device)
    hidden = torch.tensor([dims.hidden for dims in sizes], device=device)
    dimension = torch.arange(max(1, int(values.max())), device=device)
    return dimension < values[:, :, None], torch.arange(max(1, int(hidden.max())), device=device) < hidden[:, None]


def squared_columns(weight: Tensor) -> Tensor:
    """Squared l2 norm of each column of (rows, columns), float32."""
    return weight.float().square().sum(0)  # ten times as fast as linalg.vector_norm along the rows


def ranks(norms: Tensor) -> Tensor:
    """Position of each entry in ascending order along the last axis; of equal ones the first comes first."""
    order = norms.argsort(dim=-1, stable=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(norms.shape[-1], device=norms.device).expand_as(order)
    )


@dataclass(frozen=True)
class Ascending:
    """Norms sorted once, to be asked for the sum of the least ones at several amounts.

    `norms`: ascending, (..., groups), inf where absent; `sums`: of the first 1, 2, ...; `last`: index of the largest,
    -1 where there is none, (..., 1).
    """

    norms: Tensor
    sums: Tensor
    last: Tensor

    @classmethod
    def of(cls, norms: Tensor) -> "Ascending":
        """Sorted; norms are (..., groups), inf where absent."""
        ascending = norms.sort(dim=-1).values
        there = ascending.isfinite()
        return cls(ascending, torch.where(there, ascending, 0).cumsum(-1), there.sum(-1, keepdim=True) - 1)

    def sum(self, amount: Tensor) -> Tensor:
        """Of the ceil(amount) smallest; amount and result are (...), amount at least 0."""
        count = amount.ceil().long().unsqueeze(-1)
        total = self.sums.gather(-1, (count - 1).minimum(self.last).clamp(min=0))
        return torch.where((count > 0) & (self.last >= 0), total, 0).squeeze(-1)

    def slope(self, amount: Tensor) -> Tensor:
        """Derivative of `sum` with ceil's taken as 1: the next larger norm, or the largest where all are taken."""
        count = amount.ceil().long().unsqueeze(-1)
        following = self.norms.gather(-1, count.minimum(self.last).clamp(min=0))
        return torch.where(self.last >= 0, following, 0).squeeze(-1)


def least(norms: Tensor, amount: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the ceil(amount) smallest norms and its derivative, see `Ascending`."""
    ascending = Ascending.of(norms)
    return ascending.sum(amount), ascending.slope(amount)


def _with_heads(column: Tensor, neuron: Tensor) -> GroupNorms:
    head = torch.where(column.isfinite(), column, 0).sum(-1)
    return GroupNorms(column, torch.where(column[..., 0].isfinite(), head, torch.inf), neuron)
