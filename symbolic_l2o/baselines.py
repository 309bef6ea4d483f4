"""Hand-made optimisers by name, and teachers as optimisers (spec c.11)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from symbolic_l2o.inner import Learner

Make = Callable[[Any, float], Optimizer]


def baseline(name: str, params: Any, lr: float, weight_decay: float = 0.0) -> Optimizer:
    """sgd, sgdm (momentum 0.9), nesterov, adam, adamw, rmsprop at torch's other defaults. Raises ValueError."""
    if name in ("sgd", "sgdm", "nesterov"):
        momentum = 0.0 if name == "sgd" else 0.9
        nesterov = name == "nesterov"
        return torch.optim.SGD(params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    if name not in kinds:
        raise ValueError(f"baseline must be one of sgd, sgdm, nesterov, {', '.join(kinds)}; got {name!r}")
    found: Optimizer = kinds[name](params, lr=lr, weight_decay=weight_decay)
    return found


def cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: half a cosine from 1 to 0."""
    return (1 + math.cos(math.pi * step / steps)) / 2


class LearnerOptimizer(Optimizer):
    """A numerical teacher as an optimiser: its recurrent state for every weight.

    Args:
        params: parameters or groups.
        learner: the teacher.
        lr: eta.
    """

    def __init__(self, params: Any, learner: Learner, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})
        self.learner = learner

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad.reshape(-1), group["lr"])
        return loss

    def _move(self, p: Tensor, g: Tensor, lr: float) -> None:
        state = self.state[p]
        if not state:
            state["moments"] = self.learner.features.init(g)
            state["hidden"] = self.learner.init_state(g)
        out, state["hidden"] = self.learner.step(self.learner.features(g, state["moments"]), state["hidden"])
        p.add_(out.view_as(p), alpha=lr)
