"""What the primal-dual method moves besides the weights: amounts, multipliers, gates (Sec. 3)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from uvc_vit.resource import Costs

START = 1e-3  # of every multiplier [released code]


@dataclass
class Variables:
    """float32, on the model's device, never in a graph."""

    s: Tensor
    """heads and neurons to remove, (blocks, 2); real, rounded up where a number of groups is needed"""
    r: Tensor
    """value dimensions to remove inside each head, (blocks, heads)"""
    y: Tensor
    """multipliers of "the s smallest groups are zero", (blocks, 2)"""
    p: Tensor
    """multipliers of "the r smallest dimensions are zero", (blocks, heads)"""
    z: Tensor
    """multiplier of the budget, scalar"""
    gates: Tensor
    """logits of skipping and running each block, (blocks, 2)"""

    @classmethod
    def start(cls, costs: Costs) -> "Variables":
        """Nothing pruned, every gate open."""
        blocks, heads = costs.values.shape
        options: dict[str, Any] = {"device": costs.values.device, "dtype": torch.float32}
        return cls(
            s=torch.zeros(blocks, 2, **options),
            r=torch.zeros(blocks, heads, **options),
            y=torch.full((blocks, 2), START, **options),
            p=torch.full((blocks, heads), START, **options),
            z=torch.tensor(START, **options),
            gates=torch.tensor([[-1.0, 1.0]], **options).repeat(blocks, 1),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Copies, for a checkpoint."""
        return {field.name: getattr(self, field.name).detach().clone() for field in fields(self)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set back to what `state_dict` gave. Raises ValueError naming one that is missing or of another shape."""
        for field in fields(self):
            mine = getattr(self, field.name)
            if field.name not in state or state[field.name].shape != mine.shape:
                found = tuple(state[field.name].shape) if field.name in state else "nothing"
                raise ValueError(f"{field.name} must be of shape {tuple(mine.shape)}, got {found}")
            mine.copy_(state[field.name])
