"""A plan applied to a model of unchanged shape: what is pruned is set to zero (the authors' second stage)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from uvc_vit.adapter import ViTAdapter
from uvc_vit.plan import Plan


class SkippedBlock(nn.Module):
    """Stands where a block was skipped: keeps the block, hands tokens on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x, (batch, tokens, dim)."""
        return x


@torch.no_grad()
def apply_plan(model: nn.Module, plan: Plan, grads: bool = False) -> None:
    """Zero what the plan prunes, in place: proj columns, fc2 columns, fc1 rows; skipped blocks hand tokens on.

    Repeat it after every optimiser step. The bias of a removed neuron stays: its fc2 column is zero,
    and so is its gradient.

    Args:
        model: the plan's.
        plan: what stays.
        grads: zero the same entries of the gradients, so that a clipped norm counts only weights that are there.

    Raises:
        ValueError: where the plan is for another model.
    """
    adapter = ViTAdapter(model)
    plan.validate(adapter)
    blocks = model.get_submodule("blocks")
    for index, block in enumerate(adapter.blocks):
        if not plan.keep_block[index]:
            blocks[index] = SkippedBlock(block)  # type: ignore[index,operator]
            if grads:
                block.zero_grad()
            continue
        for parameter, mask in _masks(block, plan, index):
            parameter.mul_(mask)
            if grads and parameter.grad is not None:
                parameter.grad.mul_(mask)


def _masks(block: nn.Module, plan: Plan, index: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each pruned weight of a block with its mask, 1 where it stays."""
    columns = [torch.zeros(size) for size in plan.sizes[index].v_dims]
    for head in plan.heads(index):
        columns[head][list(plan.keep_dim[index][head])] = 1
    neurons = torch.zeros(plan.sizes[index].hidden)
    neurons[list(plan.keep_mlp[index])] = 1
    for name, mask in (
        ("attn.proj.weight", torch.cat(columns)),
        ("mlp.fc2.weight", neurons),
        ("mlp.fc1.weight", neurons[:, None]),
    ):
        parameter = block.get_parameter(name)
        yield parameter, mask.to(parameter)
