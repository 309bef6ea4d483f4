"""Multiply-adds of a vision transformer: by formula, and by torch's counter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from uvc_vit.adapter import BlockDims, ViTAdapter


@dataclass(frozen=True)
class BlockMacs:
    """Multiply-adds of one block for one image."""

    qk_rows: int
    """of the queries and keys in qkv"""
    v_rows: int
    """of the values in qkv"""
    qk: int
    av: int
    proj: int
    fc1: int
    fc2: int

    @property
    def total(self) -> int:
        """Of the block."""
        return self.qk_rows + self.v_rows + self.qk + self.av + self.proj + self.fc1 + self.fc2


def block_macs(dims: BlockDims, tokens: int) -> BlockMacs:
    """Of a block of these sizes (norms, softmax, additions and activations are not counted)."""
    wide, values = dims.heads * dims.qk_dim, sum(dims.v_dims)
    return BlockMacs(
        qk_rows=2 * tokens * dims.dim * wide,
        v_rows=tokens * dims.dim * values,
        qk=tokens**2 * wide,
        av=tokens**2 * values,
        proj=tokens * dims.dim * values,
        fc1=tokens * dims.dim * dims.hidden,
        fc2=tokens * dims.dim * dims.hidden,
    )


def macs(model: nn.Module, input_size: tuple[int, int]) -> int:
    """Multiply-adds of `model` for one image of (height, width), classifier included. Raises: see `ViTAdapter`."""
    adapter = ViTAdapter(model)
    tokens = adapter.tokens(input_size)
    total = adapter.embed_macs(input_size) + adapter.head_macs()
    return total + sum(block_macs(dims, tokens).total for dims in adapter.dims)


@torch.no_grad()
def count_flops(model: nn.Module, input_size: tuple[int, int]) -> int:
    """FLOPs, 2 a multiply-add, that torch's counter sees in `model` for one image of (height, width).

    On CPUs the counter does not see fused attention, so that is off while it counts.
    """
    weight = next(model.parameters())
    image = torch.zeros(1, ViTAdapter(model).channels, *input_size, device=weight.device, dtype=weight.dtype)
    training = model.training
    counter = FlopCounterMode(display=False)
    with _plain_attention(model), counter:
        model.eval()(image)
    model.train(training)
    return counter.get_total_flops()


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    fused: dict[Any, Any] = {module: module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module, before in fused.items():
            module.fused_attn = before
