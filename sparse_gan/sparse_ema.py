"""A sparse moving average of a network whose topology moves (spec c, SEMA).

A plain average under masks starts every grown weight from zero and so holds it too small for long; here it starts from
the weight itself.
"""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.masks import Masks


def sparse_average(average: Tensor, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    """0 where inactive, the weight where newly active (average 0), else decay * average + (1 - decay) * weight."""
    return torch.where(average == 0, weight, average.lerp(weight, 1 - decay)) * mask


def masked_average(average: Tensor, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    """mask * (decay * average + (1 - decay) * weight): the plain form, for comparison."""
    return average.lerp(weight, 1 - decay) * mask


class SparseEMA:
    """Moving average of a module under moving masks; `update()` after each step of the optimiser and of the topology.

    Args:
        module: the one in training.
        masks: its present masks; share the object that `DynamicSparsity` moves. Empty: a usual moving average.
        decay: in [0, 1), else ValueError.
        start: before this many updates the average is a copy.
        kind: "sparse", or "masked" for the plain form.
    """

    def __init__(
        self,
        module: nn.Module,
        masks: Masks,
        decay: float,
        start: int = 0,
        kind: Literal["sparse", "masked"] = "sparse",
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if start < 0:
            raise ValueError(f"start must be at least 0, got {start}")
        if kind not in ("sparse", "masked"):
            raise ValueError(f"kind must be sparse or masked, got {kind!r}")
        masks.apply_(module)
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.steps = 0
        self._masks, self._decay, self._start = masks, decay, start
        self._average = sparse_average if kind == "sparse" else masked_average
        live, kept = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (module, self.module))
        self._pairs = {name: (kept[name], live[name]) for name in live}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the module by one step: masked weights sparsely, all other floats plainly, integers as copies."""
        self.steps += 1
        decay = self._decay if self.steps >= self._start else 0.0
        averages, values = [], []
        for name, (average, value) in self._pairs.items():
            if name in self._masks:
                average.copy_(self._average(average, value, self._masks[name], decay))
            elif average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """The average and its counter, as plain data."""
        return {"module": self.module.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set back to a `state_dict`."""
        self.module.load_state_dict(state["module"])
        self.steps = state["steps"]
