"""The primal-dual method beside a training loop: gates in the model, one step after each step of the weights.

controller = UVCController(ViTAdapter(model), UVCConfig(budget=0.5, stage1_steps=n), input_size=(224, 224))
controller.attach()
for each of n batches: loss.backward(); optimizer.step(); controller.step()
controller.detach(); plan = controller.finalise()
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from uvc_vit.adapter import ViTAdapter
from uvc_vit.finalise import finalise, rounded
from uvc_vit.gate_values import gumbel, mean_keep
from uvc_vit.gates import Attachment, Gates
from uvc_vit.group_norms import GroupNorms, group_norms, ranks
from uvc_vit.plan import Plan
from uvc_vit.prox import divide_columns, shrinkage
from uvc_vit.released import GateMemory, released_step
from uvc_vit.resource import Costs, mac_costs, share_left
from uvc_vit.solve import Relative, solve_step
from uvc_vit.uvc_config import UVCConfig
from uvc_vit.variables import Variables


@dataclass(frozen=True)
class StepInfo:
    """Of one step."""

    R: float
    """share of the dense cost; in mode released that seen before the step, at its noise"""
    z: float
    """multiplier of the budget"""
    target: float
    """what R is to be"""


class UVCController:
    """Variables of the method for one model.

    Args:
        adapter: of the model.
        config: of the method.
        input_size: (height, width) of the images.
        costs: of accounting latency, and only of it: measured ones, see `LatencyTable`.

    Raises:
        ValueError: where no plan can meet the budget, warm-up takes all of stage 1, a protected block is not there, or
            the costs do not go with the accounting;
            FloatingPointError: where the weights are not finite.
    """

    def __init__(
        self, adapter: ViTAdapter, config: UVCConfig, input_size: tuple[int, int], costs: Costs | None = None
    ) -> None:
        self.adapter, self.config = adapter, config
        device = adapter.blocks[0].mlp.fc2.weight.device
        self.tokens, self.embed_macs = adapter.tokens(input_size), adapter.embed_macs(input_size)
        exact = mac_costs(adapter.dims, self.tokens, self.embed_macs, "exact", device)
        self.costs = self.final_costs = exact if costs is None else costs
        if config.accounting == "released":
            self.costs = mac_costs(adapter.dims, self.tokens, self.embed_macs, "released", device)
        if (config.accounting == "latency") != (costs is not None):
            given = "none" if costs is None else "some"
            raise ValueError(f"costs must be those of a LatencyTable for accounting latency, else none, got {given}")
        if config.warmup_steps >= config.stage1_steps:
            steps = f"the {config.stage1_steps} steps of stage 1"
            raise ValueError(f"warmup_steps must be below {steps}, got {config.warmup_steps}")
        blocks = len(adapter.dims)
        self.free = torch.ones(blocks, dtype=torch.bool, device=device)
        for block in config.protect_blocks:
            if not 0 <= block < blocks:
                raise ValueError(f"protect_blocks must be below {blocks}, got {block}")
            self.free[block] = False
        if config.budget < (floor := self.floor()):
            raise ValueError(f"budget must be at least {floor:.4f} for this model, got {config.budget}")
        self.gates = Gates(blocks, config.tau, config.hard).to(device)
        self.gates.free = self.free.tolist()
        self.variables = Variables.start(self.costs)
        self.variables.gates = self.gates.logits.data
        self.memory = GateMemory(torch.zeros_like(self.gates.logits.data), torch.zeros_like(self.gates.logits.data))
        self.steps = 0
        self.gates.warm_up = config.warmup_steps > 0
        self.relative = Relative.of(self._norms())
        self._attachment: Attachment | None = None

    def parameters(self) -> list[nn.Parameter]:
        """The gates' logits, to be kept out of the weights' optimiser.

        `step` clears their gradient. Neither a `GradScaler` nor DDP knows it: before `step` divide it by the scale,
        average it over the processes.
        """
        return [self.gates.logits]

    def attach(self) -> None:
        """Put gates around the blocks, if blocks may be skipped."""
        if self.config.skip and self._attachment is None:
            self._attachment = Attachment(self.adapter.model, self.gates)

    def detach(self) -> None:
        """Leave the model's blocks as they were."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    @property
    def target(self) -> float:
        """What R is to be after the next step: from 1 down to the budget in the first half of stage 1."""
        if self.config.mode != "solve":
            return self.config.budget
        half = max(self.config.stage1_steps / 2, 1)
        return 1 - (1 - self.config.budget) * min(1, (self.steps + 1) / half)

    def step(self, w_lr: float = 0.0, generator: torch.Generator | None = None) -> StepInfo:
        """Shrink what is to go, then move amounts, multipliers and gates once; call it after the optimiser's step.

        Args:
            w_lr: learning rate of the weights; the proximal step of mode released.
            generator: of the CPU; of mode released's noise.

        Raises:
            RuntimeError: where blocks may be skipped and no gates are attached, so that the loss would not reach them;
                FloatingPointError: naming the step, where weights or the gates' gradient are not finite.
        """
        if self.config.skip and self._attachment is None:
            raise RuntimeError("step() needs the gates in the model: call attach() before the training loop")
        config, now, released = self.config, self.variables, self.config.mode == "released"
        target = self.target
        task_grad, self.gates.logits.grad = self.gates.logits.grad, None  # in no optimiser, which would clear it
        task_grad = torch.zeros_like(now.gates) if task_grad is None else task_grad.detach().float()
        if not task_grad.isfinite().all():
            raise FloatingPointError(f"the gates' gradient is not finite at step {self.steps}")
        norms = self._norms()
        column, neuron = shrinkage(norms, now.s, now.r, now.y, now.p, w_lr if released else config.eta_p)
        divide_columns(self.adapter, column, neuron)
        norms = norms.scaled(1 / column, 1 / neuron)
        scaled = norms if released else self.relative(norms)
        self.steps += 1
        if self.steps <= config.warmup_steps:
            self.gates.warm_up = self.steps < config.warmup_steps
            return StepInfo(self.soft_share(), now.z.item(), target)
        if released:
            noise = gumbel((2, *now.gates.shape), generator).to(now.gates)
            arguments = (now, self.memory, scaled, self.costs, task_grad, noise)
            return StepInfo(released_step(*arguments, config.budget, config.released), now.z.item(), target)
        outcome = solve_step(now, scaled, self.costs, task_grad, target, config, self.free)
        return StepInfo(outcome.share, outcome.z, target)

    @torch.no_grad()
    def soft_share(self) -> float:
        """R at the variables as they are: amounts not rounded, gates without noise, every removed head the least."""
        now, keep = self.variables, mean_keep(self.variables.gates)[0]
        keep = torch.where(self.free, keep, 1.0) if self.config.skip else torch.ones_like(keep)
        alive = ranks(self._norms().head) >= now.s[:, :1].ceil()
        return share_left(self.costs, now.s, now.r, keep, alive).item()

    def resource(self, plan: Plan) -> float:
        """R of a plan, in exact multiply-adds."""
        return plan.share(self.tokens, self.embed_macs)

    def as_is(self) -> Plan:
        """The plan of the variables as they are: amounts rounded up, open gates; the budget is not looked at."""
        return rounded(self.variables, self._norms(), self.config.skip).plan(self.adapter.dims)

    def finalise(self, budget: float | None = None, even: bool = False) -> Plan:
        """The plan of the variables that meets the budget, the configured one by default; `even`: see `finalise`."""
        flags: dict[str, Any] = {name: getattr(self.config, name) for name in ("prune", "skip", "align")}
        norms, budget = self.relative(self._norms()), self.config.budget if budget is None else budget
        flags |= {"free": self.free, "even": even}
        return finalise(self.variables, norms, self.final_costs, self.adapter.dims, budget, **flags)

    def floor(self) -> float:
        """The least R that a plan can have and still keep a block that attends, in `align` dimensions, and a neuron."""
        costs = self.costs
        whole = costs.block + costs.head * costs.heads + costs.dim * costs.values.sum(-1) + costs.neuron * costs.hidden
        width = torch.where(costs.values.amax(-1) > self.config.align, self.config.align, 1).clamp(min=1)
        least = costs.block + costs.head + costs.dim * width + costs.neuron if self.config.prune else whole
        least = torch.where(self.free, least, whole)
        held = (~self.free).any() or not self.config.skip
        needed = (least.sum() if not self.config.skip else least[~self.free].sum()) if held else least.min()
        return ((costs.embed + needed) / costs.dense).item()

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which the method goes on bit for bit."""
        memory = {"total": self.memory.total.clone(), "momentum": self.memory.momentum.clone()}
        counts = {"count": self.memory.count, "memory_steps": self.memory.steps, "steps": self.steps}
        relative = {name: getattr(self.relative, name) for name in ("column", "head", "neuron")}
        return {"variables": self.variables.state_dict(), "memory": memory, "relative": relative, **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set back to what `state_dict` gave. Raises ValueError where it is another model's."""
        self.variables.load_state_dict(state["variables"])
        memory = {name: value.to(self.free.device) for name, value in state["memory"].items()}
        self.memory = GateMemory(memory["total"], memory["momentum"], state["count"], state["memory_steps"])
        self.relative = Relative(**{name: value.to(self.free.device) for name, value in state["relative"].items()})
        self.steps = state["steps"]
        self.gates.warm_up = self.steps < self.config.warmup_steps

    def _norms(self) -> GroupNorms:
        norms = group_norms(self.adapter)
        there = self.costs.values.sum(), self.costs.hidden.sum()
        if norms.column.isfinite().sum() != there[0] or norms.neuron.isfinite().sum() != there[1]:
            raise FloatingPointError(f"weights are not finite at step {self.steps}")
        return norms
