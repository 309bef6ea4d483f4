"""Structured baselines at the same cost: one ratio for all blocks, groups chosen once, by a score; and fewer blocks."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common import distributed
from uvc_vit.adapter import BlockDims, ViTAdapter
from uvc_vit.finalise import finalise
from uvc_vit.group_norms import GroupNorms
from uvc_vit.plan import Plan
from uvc_vit.resource import Costs, resource
from uvc_vit.variables import Variables

Batch = tuple[Tensor, Tensor]


@torch.no_grad()
def uniform_plan(
    scores: GroupNorms,
    costs: Costs,
    sizes: tuple[BlockDims, ...],
    budget: float,
    what: Literal["dims", "heads"],
    align: int = 0,
    even: bool = False,
) -> Plan:
    """Remove the lowest-scored neurons, and value dimensions or heads, by one ratio for all blocks; meets the budget.

    Args:
        scores: of the groups.
        costs: of the model.
        sizes: of the blocks.
        budget: share of the dense cost.
        what: goes beside neurons. Where all that may go by ratio is not enough, `finalise` takes more.
        align: see `finalise`; where the ratio leaves fewer dimensions than that, every head keeps its own number.
        even: see `finalise`.

    Raises:
        ValueError: where nothing meets the budget.
    """
    most = torch.stack([costs.heads, costs.hidden], dim=1) - 1
    keep, alive = torch.ones(len(sizes), device=most.device), costs.values > 0
    by_heads = torch.tensor([1.0 if what == "heads" else 0.0, 1.0], device=most.device)

    def amounts(ratio: float, step: int) -> tuple[Tensor, Tensor]:
        dims = costs.values - 1 if what == "dims" else torch.zeros_like(costs.values)
        s, r = ((ratio * part).clamp(min=0).floor() for part in (most * by_heads, dims))
        return s, torch.where(costs.values > step, r - r % step, r)

    def least(step: int) -> tuple[Tensor, Tensor]:
        """Amounts by the least ratio that is enough."""
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            enough = resource(costs, *amounts(middle, step), keep, alive).share <= budget
            low, high = (low, middle) if enough else (middle, high)
        return amounts(high, step)

    now = Variables.start(costs)
    s, r = least(1)
    if align and bool((costs.values - r >= align)[alive].all()):
        s, r = least(align)
    else:
        align = 0
    now.s.copy_(s)
    now.r.copy_(r)
    return finalise(now, scores, costs, sizes, budget, skip=False, align=align, even=even)


def random_scores(like: GroupNorms, generator: torch.Generator) -> GroupNorms:
    """Uniform noise in place of every norm, drawn on the CPU."""

    def drawn(norms: Tensor) -> Tensor:
        noise = torch.rand(norms.shape, generator=generator).to(norms) + 0.01
        return torch.where(norms.isfinite(), noise, torch.inf)

    return GroupNorms(drawn(like.column), drawn(like.head), drawn(like.neuron))


def head_scores(gradient: Tensor, output: Tensor) -> Tensor:
    """Mean over images of |sum over tokens and dimensions of gradient times output|.

    Args:
        gradient: of the loss in each head's output, (batch, tokens, heads, dims).
        output: the heads' outputs, likewise.
    """
    return (gradient * output).sum((1, 3)).abs().mean(0)


def neuron_scores(fc1_gradient: Tensor, fc2_gradient: Tensor) -> Tensor:
    """l1 norms of the gradients of fc1's rows, (neurons, dim), and of fc2's columns, (dim, neurons), added up."""
    return fc1_gradient.abs().sum(1) + fc2_gradient.abs().sum(0)


def gradient_scores(
    adapter: ViTAdapter, batches: Iterable[Batch], loss: Callable[[Tensor, Tensor], Tensor], like: GroupNorms
) -> GroupNorms:
    """Scores of heads and neurons from the loss's gradient over some batches (the authors' one-shot baseline).

    Args:
        adapter: of the model, all heads of a block equally wide.
        batches: images and targets; of a data-parallel run this rank's part of them.
        loss: of logits and targets.
        like: gives the columns' part, which stays.
    """
    model: nn.Module = adapter.model
    model.zero_grad()
    heads = torch.zeros_like(like.head)
    outputs: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            inputs[0].retain_grad()
            outputs[index] = inputs[0]

        return hook

    handles = [block.attn.proj.register_forward_pre_hook(keep(i)) for i, block in enumerate(adapter.blocks)]
    for images, targets in batches:
        loss(model(images), targets).backward()
        for index, output in outputs.items():
            gradient: Any = output.grad
            split = [tensor.detach().unflatten(-1, (adapter.dims[index].heads, -1)) for tensor in (gradient, output)]
            heads[index, : adapter.dims[index].heads] += head_scores(*split)
    for handle in handles:
        handle.remove()
    distributed.synchronize(model)
    distributed.average_([heads])
    neuron = torch.full_like(like.neuron, torch.inf)
    for index, block in enumerate(adapter.blocks):
        score = neuron_scores(block.mlp.fc1.weight.grad, block.mlp.fc2.weight.grad)
        neuron[index, : len(score)] = score
    model.zero_grad()
    return GroupNorms(like.column, torch.where(like.head.isfinite(), heads, torch.inf), neuron)


def first_blocks(costs: Costs, sizes: tuple[BlockDims, ...], budget: float) -> Plan:
    """The first blocks of a model, as many as the budget allows. Raises ValueError where it allows none."""
    blocks = costs.block + costs.head * costs.heads + costs.dim * costs.values.sum(-1) + costs.neuron * costs.hidden
    count = int((costs.embed + blocks.cumsum(0) <= budget * costs.dense).sum())
    if not count:
        least = ((costs.embed + blocks[0]) / costs.dense).item()
        raise ValueError(f"budget must be at least {least:.4f} for one block, got {budget}")
    return replace(Plan.full(sizes), keep_block=tuple(block < count for block in range(len(sizes))))
