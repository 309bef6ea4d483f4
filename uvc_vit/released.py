"""One step of the amounts, multipliers and gates as in the authors' code, its faults included: for audits only.

Against the Lagrangian it claims to descend: heads and neurons share one step in counts; the gradient of the gates is
weighted by the step's index and taken at other noise than R; outside +-z_clip the budget does not act; an amount that
reached its bound stays there.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from uvc_vit.gate_values import noisy_keep
from uvc_vit.group_norms import Ascending, GroupNorms, ranks
from uvc_vit.prox import shrinkage
from uvc_vit.resource import Costs, Resource, resource
from uvc_vit.setting_error import require
from uvc_vit.variables import Variables


@dataclass(frozen=True)
class ReleasedSettings:
    """Of the released code: its README and its DeiT-Tiny log."""

    slr: float = 0.02
    """step of s"""
    rlr: float = 0.02
    """step of r"""
    ylr: float = 1e-4
    """step of y"""
    plr: float = 1e-4
    """step of p"""
    zlr: float = 1.0
    """step of z"""
    glr: float = 0.1
    """step of the gates"""
    gate_momentum: float = 0.9
    """of the gates' SGD"""
    gate_decay: float = 1e-4
    """weight decay of the gates"""
    gating_weight: float = 5e-4
    """of R's part of the gates' gradient"""
    gating_interval: int = 50
    """steps between two of the gates"""
    z_clip: float = 0.5
    """R - budget acts on s, r and the gates within this only"""
    tau: float = 0.5
    """temperature of the noisy gates"""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require(0 <= value < math.inf, f"method.released.{name}", value, "at least 0 and finite")
        require(self.gate_momentum < 1, "method.released.gate_momentum", self.gate_momentum, "in [0, 1)")
        require(self.gating_interval >= 1, "method.released.gating_interval", self.gating_interval, "at least 1")
        require(self.tau > 0, "method.released.tau", self.tau, "positive")


@dataclass
class GateMemory:
    """What the gates' optimiser keeps between steps."""

    total: Tensor
    """of the weighted gradients since the last step, (blocks, 2)"""
    momentum: Tensor
    count: int = 0
    steps: int = 0
    """made so far by the method"""


def divisors(norms: GroupNorms, now: Variables, w_lr: float) -> tuple[Tensor, Tensor]:
    """The proximal step at the weights' own learning rate."""
    return shrinkage(norms, now.s, now.r, now.y, now.p, w_lr)


@torch.no_grad()
def released_step(
    now: Variables,
    memory: GateMemory,
    norms: GroupNorms,
    costs: Costs,
    task_grad: Tensor,
    noise: Tensor,
    budget: float,
    settings: ReleasedSettings,
) -> float:
    """Move `now` and `memory` in place, once, after the weights' step and the proximal step.

    Args:
        now: the variables.
        memory: of the gates' optimiser.
        norms: after the proximal step.
        costs: with accounting "released".
        task_grad: of the loss in the gates, clipped with the weights', (blocks, 2).
        noise: Gumbel, for the primal and the dual R, (2, blocks, 2).
        budget: share of the dense cost.
        settings: of the method.

    Returns:
        R before the step, at the first noise.
    """
    heads, neurons, columns = (Ascending.of(part) for part in (norms.head, norms.neuron, norms.column))
    slope_s = torch.stack([heads.slope(now.s[:, 0]), neurons.slope(now.s[:, 1])], dim=1)
    slope_r = columns.slope(now.r)
    keep, keep_slope = noisy_keep(now.gates, noise[0], settings.tau)
    found = _whole(costs, now, keep, norms)
    z = now.z * ((found.share - budget).abs() <= settings.z_clip)

    task = task_grad + z * settings.gating_weight * (found.by_keep[:, None] * keep_slope).float()
    _step_gates(now, memory, task, settings)
    most = torch.stack([costs.heads, costs.hidden], dim=1)
    _step_amounts(now.s, now.y * slope_s + z * found.by_amounts.float(), most, settings.slr)
    _step_amounts(now.r, now.p * slope_r + z * found.by_dims.float(), costs.values, settings.rlr)

    sums = torch.stack([heads.sum(now.s[:, 0]), neurons.sum(now.s[:, 1])], dim=1)
    now.y.add_(sums, alpha=settings.ylr).clamp_(min=0)
    now.p.add_(columns.sum(now.r), alpha=settings.plr).clamp_(min=0)
    after = _whole(costs, now, noisy_keep(now.gates, noise[1], settings.tau)[0], norms)
    now.z.add_(settings.zlr * (after.share - budget)).clamp_(min=0)
    return found.share.item()


def _whole(costs: Costs, now: Variables, keep: Tensor, norms: GroupNorms) -> Resource:
    alive = ranks(norms.head) >= now.s[:, :1].ceil()
    return resource(costs, now.s.ceil(), now.r.ceil(), keep, alive)


def _step_amounts(amounts: Tensor, gradient: Tensor, groups: Tensor, step: float) -> None:
    most = (groups.float() - 1).clamp(min=0)
    full, empty = amounts >= most, amounts <= 0
    gradient = torch.where(full, gradient.clamp(min=0), gradient)
    gradient = torch.where(empty, gradient.clamp(max=0), gradient)
    gradient = gradient * (1 / (gradient.abs().max() + 1e-6)).clamp(max=1)
    moved = (amounts - step * gradient).clamp(min=0)
    amounts.copy_(torch.where(full, most, moved))


def _step_gates(now: Variables, memory: GateMemory, gradient: Tensor, settings: ReleasedSettings) -> None:
    memory.steps += 1
    memory.total.add_(gradient, alpha=memory.steps % settings.gating_interval)
    memory.count += 1
    if (memory.steps + 1) % settings.gating_interval:
        return
    mean = memory.total / memory.count + settings.gate_decay * now.gates
    memory.momentum.mul_(settings.gate_momentum).add_(mean)
    now.gates.sub_(memory.momentum, alpha=settings.glr)
    memory.total.zero_()
    memory.count = 0
