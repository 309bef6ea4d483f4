"""One step of the same Lagrangian in ratios, the budget's multiplier solved for or controlled.

Amounts move as shares of their groups and norms are relative to their layer's first mean, so that one step size suits
heads, neurons and dimensions alike. Gates are taken without noise. Mode solve eliminates z: it is the smallest z >= 0
whose step meets the budget. Mode fixed keeps dual ascent on z, damped by a proportional term.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from uvc_vit.gate_values import mean_keep
from uvc_vit.group_norms import Ascending, GroupNorms, ranks
from uvc_vit.resource import Costs, resource, share_left
from uvc_vit.uvc_config import UVCConfig
from uvc_vit.variables import Variables

TUNED_FOR = 200  # steps of stage 1 that the step sizes are meant for
SPLITS, ROUNDS = 256, 4  # of the interval of z, 257^4 > 2^30


@dataclass(frozen=True)
class Relative:
    """Mean norms of each layer's groups at the start, which norms are divided by; (blocks, 1, 1) or (blocks, 1)."""

    column: Tensor
    head: Tensor
    neuron: Tensor

    @classmethod
    def of(cls, norms: GroupNorms) -> "Relative":
        """The means of `norms`; 1 where all are zero."""
        column = _mean(norms.column.flatten(1))
        return cls(column[..., None], _mean(norms.head), _mean(norms.neuron))

    def __call__(self, norms: GroupNorms) -> GroupNorms:
        """`norms` in these units."""
        return GroupNorms(norms.column / self.column, norms.head / self.head, norms.neuron / self.neuron)


@dataclass(frozen=True)
class Outcome:
    """Of one step."""

    share: float
    """R after the step, amounts not rounded, gates without noise"""
    z: float


@torch.no_grad()
def solve_step(
    now: Variables,
    norms: GroupNorms,
    costs: Costs,
    task_grad: Tensor,
    target: float,
    settings: UVCConfig,
    free: Tensor,
) -> Outcome:
    """Move `now` in place, once, after the weights' step and the proximal step.

    Args:
        now: the variables.
        norms: after the proximal step, relative.
        costs: of the model.
        task_grad: of the loss in the gates, (blocks, 2).
        target: share that R is to be brought to.
        settings: of the method.
        free: blocks that may be touched, (blocks,) bool.
    """
    scale = TUNED_FOR / settings.stage1_steps
    alive = ranks(norms.head) >= now.s[:, :1].ceil()
    ub = torch.stack([costs.heads, costs.hidden], dim=1).float().clamp(min=1)
    heads, neurons, columns = (Ascending.of(part) for part in (norms.head, norms.neuron, norms.column))
    slope_s = torch.stack([heads.slope(now.s[:, 0]), neurons.slope(now.s[:, 1])], dim=1)
    slope_r = columns.slope(now.r)
    dims = costs.values.float().clamp(min=1)
    keep, keep_slope = mean_keep(now.gates)
    start = resource(costs, now.s, now.r, _kept(keep, settings, free), alive)
    by_gates = start.by_keep[:, None].float() * keep_slope

    def moved(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Amounts, gates and R after a step at this z, a scalar or (values, 1, 1)."""
        s, r, gates = now.s, now.r, now.gates
        if settings.prune:
            step = settings.es * scale * free[:, None]
            s = s - step * ub * (now.y * slope_s + z * start.by_amounts.float() * ub)
            r = r - step * dims * (now.p * slope_r + z * start.by_dims.float() * dims)
            s, r = s.clamp(min=0).minimum(ub - 1), r.clamp(min=0).minimum(dims - 1)
        if settings.skip:
            slope = settings.task_weight * task_grad + settings.resource_weight * z * by_gates
            gates = gates - settings.eg * scale * free[:, None] * slope
        return s, r, gates, share_left(costs, s, r, _kept(mean_keep(gates)[0], settings, free), alive)

    if settings.mode == "solve":
        z = _smallest(lambda values: moved(values[:, None, None])[3] <= target, now.z, settings.z_max)
        now.z.copy_(z)
    else:
        now.z.add_(settings.ez * scale * (start.share - target)).clamp_(0, settings.z_max)
        z = (now.z + settings.mu * (start.share - target).float()).clamp(0, settings.z_max)
    s, r, gates, after = moved(z)
    now.s.copy_(s), now.r.copy_(r), now.gates.copy_(gates)
    if settings.prune:
        sums = torch.stack([heads.sum(now.s[:, 0]), neurons.sum(now.s[:, 1])], dim=1)
        now.y.add_(settings.ey * scale * sums / ub)
        now.p.add_(settings.ep * scale * columns.sum(now.r) / dims)
    return Outcome(after.item(), z.item())


def _kept(keep: Tensor, settings: UVCConfig, free: Tensor) -> Tensor:
    return torch.where(free, keep, 1.0) if settings.skip else torch.ones_like(keep)


def _smallest(enough: Callable[[Tensor], Tensor], like: Tensor, z_max: float) -> Tensor:
    """The smallest z in [0, z_max] that is enough, to z_max / 2^30; z_max where none is. A device need not be awaited.

    Args:
        enough: monotone, of (values,) z.
        like: a scalar, for dtype and device.
        z_max: the largest z.
    """
    low, width = torch.zeros_like(like), torch.full_like(like, z_max)
    shares = torch.arange(SPLITS + 1, device=like.device) / (SPLITS + 1)
    for _ in range(ROUNDS):
        width = width / (SPLITS + 1)
        candidates = low + shares * width * (SPLITS + 1)
        low = low + width * ((~enough(candidates)).sum() - 1).clamp(min=0)
    return torch.where(enough(torch.zeros(1).to(like)).squeeze(0), 0, low + width)


def _mean(norms: Tensor) -> Tensor:
    there = norms.isfinite()
    mean = torch.where(there, norms, 0).sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mean > 0, mean, 1.0)
