"""From the method's real amounts to a plan of whole groups that meets the budget exactly."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uvc_vit.adapter import BlockDims
from uvc_vit.group_norms import GroupNorms, ranks
from uvc_vit.plan import Plan
from uvc_vit.resource import Costs
from uvc_vit.variables import Variables


@dataclass
class Choice:
    """What stays, as masks on the CPU; present groups only."""

    blocks: Tensor
    """(blocks,)"""
    heads: Tensor
    """(blocks, heads)"""
    dims: Tensor
    """(blocks, heads, dims)"""
    neurons: Tensor
    """(blocks, neurons)"""

    def cost(self, costs: Costs) -> float:
        """Of what stays."""
        dims = (self.dims & self.heads[..., None]).sum((1, 2))
        heads = (self.heads & self.dims.any(-1)).sum(-1)
        block = costs.block + costs.head * heads + costs.dim * dims + costs.neuron * self.neurons.sum(-1)
        return costs.embed + (self.blocks * block).sum().item()

    def plan(self, sizes: tuple[BlockDims, ...]) -> Plan:
        """As lists of indices."""
        return Plan(
            sizes=sizes,
            keep_block=tuple(self.blocks.tolist()),
            keep_head=tuple(tuple(self.heads[i, : dims.heads].tolist()) for i, dims in enumerate(sizes)),
            keep_dim=tuple(
                tuple(tuple(self.dims[i, head].nonzero().flatten().tolist()) for head in range(dims.heads))
                for i, dims in enumerate(sizes)
            ),
            keep_mlp=tuple(tuple(row.nonzero().flatten().tolist()) for row in self.neurons),
        )


def rounded(now: Variables, norms: GroupNorms, skip: bool) -> Choice:
    """The amounts rounded up, the smallest groups removed; a block stays where its gate says so or `skip` is false."""
    s, r = now.s.ceil(), now.r.ceil()
    gap = now.gates[:, 1] - now.gates[:, 0]
    return Choice(
        blocks=((gap > 0) if skip else torch.ones_like(gap, dtype=torch.bool)).cpu(),
        heads=((ranks(norms.head) >= s[:, :1]) & norms.head.isfinite()).cpu(),
        dims=((ranks(norms.column) >= r[..., None]) & norms.column.isfinite()).cpu(),
        neurons=((ranks(norms.neuron) >= s[:, 1:]) & norms.neuron.isfinite()).cpu(),
    )


@torch.no_grad()
def finalise(
    now: Variables,
    norms: GroupNorms,
    costs: Costs,
    sizes: tuple[BlockDims, ...],
    budget: float,
    *,
    prune: bool = True,
    skip: bool = True,
    free: Tensor | None = None,
    align: int = 0,
    even: bool = False,
) -> Plan:
    """The plan nearest to the variables whose R is at most `budget` and within one group of it.

    Blocks whose gates are open stay, and those nearest to open while they fit, one more where even all groups of the
    others do not use the budget up; then neurons with the least norm a saved cost go (at least one of a block stays)
    until the budget is met, after them value dimensions, then heads, then the blocks with the least open gates; and the
    largest removed neurons, dimensions and heads return until no more of them fits. Without `prune` only whole blocks
    go.

    Args:
        now: the variables.
        norms: of the weights, relative to their layer.
        costs: of the model, with accounting "exact" or measured.
        sizes: of the blocks.
        budget: share of the dense cost.
        prune: whether groups inside blocks may go.
        skip: whether blocks may go.
        free: blocks that may be touched, (blocks,); None: all.
        align: where heads are wider, all heads of a block keep equally many value dimensions, a multiple of this, which
            kernels like: their mean, rounded; so many of each head are then one group. 0: every head its own number.
        even: in the other blocks too all heads keep equally many, so that layout padded adds nothing.

    Raises:
        ValueError: where nothing that may go suffices.
    """
    choice = rounded(now, norms, skip)
    norms, costs = norms.cpu(), costs.cpu()
    free = torch.ones(len(sizes), dtype=torch.bool) if free is None else free.cpu()
    limit = budget * costs.dense.item()
    gap = (now.gates[:, 1] - now.gates[:, 0]).cpu()

    for block in gap.argsort(descending=True, stable=True).tolist():
        if not choice.blocks[block]:
            choice.blocks[block] = True
            if choice.cost(costs) > limit:
                choice.blocks[block] = prune and _unpruned(choice, norms, block).cost(costs) <= limit
                break
    units = _units(norms, align, even)
    if prune:
        choice.dims = _even(choice, norms, units, torch.round)
        for kind in ("neurons", "dims"):
            _remove(choice, kind, norms, costs, limit, free)
        choice.dims = _even(choice, norms, units, torch.floor)
        _remove(choice, "heads", norms, costs, limit, free)
    if skip:
        for block in gap.argsort(stable=True).tolist():
            if choice.cost(costs) > limit and free[block]:
                choice.blocks[block] = False
    if choice.cost(costs) > limit:
        raise ValueError(f"budget must be at least {choice.cost(costs) / costs.dense.item():.4f} here, got {budget}")
    while prune:
        before = choice.cost(costs)
        _restore(choice, "neurons", norms, costs, limit)
        _restore(choice, "dims", norms, costs, limit, units == 0)
        _widen(choice, norms, costs, limit, units)
        _restore(choice, "heads", norms, costs, limit)
        if choice.cost(costs) == before:
            break
    return choice.plan(sizes)


def _even(choice: Choice, norms: GroupNorms, units: Tensor, whole: Callable[[Tensor], Tensor]) -> Tensor:
    """The dims, in blocks with a unit equally many in each head: their mean in units, rounded by `whole`.

    Blocks with all dimensions there stay as they are.
    """
    if not units.any():
        return choice.dims
    there, alive = norms.column.isfinite(), choice.heads & choice.dims.any(-1)
    mean = (choice.dims & alive[..., None]).sum((1, 2)) / alive.sum(-1).clamp(min=1)
    width = torch.maximum(whole(mean / units.clamp(min=1)) * units, units)
    kept = there & (ranks(torch.where(there, -norms.column, torch.inf)) < width[:, None, None])
    whole_blocks = (choice.dims | ~there).flatten(1).all(-1)
    return torch.where(((units > 0) & ~whole_blocks)[:, None, None], kept, choice.dims)


def _units(norms: GroupNorms, align: int, even: bool) -> Tensor:
    """Of how many value dimensions of each head a group of a block is, (blocks,); 0: every head has its own number.

    `align` where a head is wider than it, elsewhere 1 if heads are to be `even`.
    """
    wide = (norms.column.isfinite().sum(-1).amax(-1) > align) & (align > 0)
    return torch.where(wide, align, int(even))


def _unpruned(choice: Choice, norms: GroupNorms, without: int) -> Choice:
    """The choice with every group of its blocks back, but for one block."""
    blocks = choice.blocks.clone()
    blocks[without] = False
    return Choice(blocks, norms.head.isfinite(), norms.column.isfinite(), norms.neuron.isfinite())


def _groups(choice: Choice, kind: str, norms: GroupNorms, costs: Costs) -> tuple[Tensor, Tensor, Tensor]:
    """Of one kind of group: its mask, norms, and what each one costs where it stays in a block that stays."""
    shape = (-1, 1, 1) if kind == "dims" else (-1, 1)
    there = choice.blocks.view(shape)
    if kind == "neurons":
        return choice.neurons, norms.neuron, (there * costs.neuron.view(shape)).expand_as(norms.neuron)
    if kind == "dims":
        unit = there * choice.heads[..., None] * costs.dim.view(shape)
        return choice.dims, norms.column, unit.expand_as(norms.column)
    return choice.heads, norms.head, there * (costs.head.view(shape) + costs.dim.view(shape) * choice.dims.sum(-1))


def _remove(choice: Choice, kind: str, norms: GroupNorms, costs: Costs, limit: float, free: Tensor) -> None:
    """Remove groups of a kind, the least norm a saved cost first, until the cost is at most `limit`."""
    excess = choice.cost(costs) - limit
    if excess <= 0:
        return
    mask, norm, saves = _groups(choice, kind, norms, costs)
    largest = torch.where(mask, norm, -1).argmax(-1, keepdim=True)  # stays, so that a block or head keeps one
    may_go = (mask & (saves > 0) & free.view(-1, *[1] * (mask.dim() - 1))).scatter(-1, largest, False)
    candidates = may_go.flatten().nonzero().flatten()
    saves, norm = saves.flatten()[candidates], norm.flatten()[candidates]
    order = (norm / saves).argsort(stable=True)
    needed = int((saves[order].cumsum(0) < excess).sum()) + 1
    mask.view(-1)[candidates[order[:needed]]] = False


def _restore(
    choice: Choice, kind: str, norms: GroupNorms, costs: Costs, limit: float, where: Tensor | None = None
) -> None:
    """Bring removed groups of a kind back, the largest norm first, as long as the cost stays at most `limit`.

    Only in the blocks `where`, (blocks,); None: in all.
    """
    room = limit - choice.cost(costs)
    mask, norm, saves = _groups(choice, kind, norms, costs)
    gone = ~mask if where is None else ~mask & where.view(-1, *[1] * (mask.dim() - 1))
    candidates = (gone & norm.isfinite() & (saves > 0) & (saves <= room)).flatten().nonzero().flatten()
    order = candidates[norm.flatten()[candidates].argsort(descending=True, stable=True)]
    for group, cost in zip(order.tolist(), saves.flatten()[order].tolist(), strict=True):
        if cost <= room:
            mask.view(-1)[group] = True
            room -= cost


def _widen(choice: Choice, norms: GroupNorms, costs: Costs, limit: float, units: Tensor) -> None:
    """Bring a unit of every head of a block back, block by block, while the cost stays in `limit`."""
    wider = _even(choice, norms, units, lambda steps: steps.floor() + 1)
    for block, dims in enumerate(wider):
        there = choice.dims.clone()
        there[block] = dims
        if choice.cost(costs) < replace(choice, dims=there).cost(costs) <= limit:
            choice.dims = there
