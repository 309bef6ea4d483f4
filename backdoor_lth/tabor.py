"""Trigger inversion by a TABOR variant, all labels side by side (Sec. 4, Eq. 3; Guo et al. 2019; spec c7).

Labels do not influence each other: K labels are one batch, with their own costs, counters and entries of Adam.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COSTS = (1e-3, 1e-5, 2e-3, 1e-4, 1.0)
"""of the five penalties at the start"""
THRESHOLD, PATIENCE, UP, DOWN = 0.99, 5, 1.5, 1.5**1.5
LR, BETAS = 0.1, (0.5, 0.9)
Base = Callable[[int], Tensor]
AttackLoss = Literal["ce", "cw"]


@dataclass(frozen=True)
class SoftTrigger:
    """A soft trigger of each label: mark (K, C, H, W) and mask (K, H, W), both in (0, 1)."""

    mark: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Search:
    """What a search returns: the triggers, share of successes (K, steps), costs used (K, steps, 5)."""

    trigger: SoftTrigger
    success: Tensor
    costs: Tensor


def squashed(mark: Tensor, mask: Tensor) -> SoftTrigger:
    """The trigger for unbounded variables: (tanh + 1) / 2 of each."""
    return SoftTrigger((mark.tanh() + 1) / 2, (mask.tanh() + 1) / 2)


def overlaid(x: Tensor, trigger: SoftTrigger) -> Tensor:
    """x + z * (mark - x) for each label: x (N, C, H, W) or (K, N, C, H, W) -> (K, N, C, H, W)."""
    z = trigger.mask[:, None, None]
    return x + z * (trigger.mark[:, None] - x)


def smooth(a: Tensor) -> Tensor:
    """Sum of squared differences between neighbours over the last two axes."""
    return a.diff(dim=-1).square().sum((-2, -1)) + a.diff(dim=-2).square().sum((-2, -1))


def penalties(trigger: SoftTrigger, overlay_loss: Tensor) -> Tensor:
    """R1 ... R5, (K, 5): size of the mask, of the pattern outside it, their smoothness, and the trigger alone."""
    z = trigger.mask
    q = (1 - z)[:, None] * trigger.mark
    sizes = (z.sum((1, 2)) + z.square().sum((1, 2)), q.sum((1, 2, 3)) + q.square().sum((1, 2, 3)))
    return torch.stack([*sizes, smooth(z), smooth(q).sum(1), overlay_loss], 1)


def attack_losses(logits: Tensor, labels: Tensor, kind: AttackLoss) -> Tensor:
    """Mean over N of the cross-entropy, or of C&W's max(largest other logit - that of the label, 0): (K, N, M) -> K."""
    count = logits.shape[1]
    wanted = labels[:, None].expand(-1, count)
    if kind == "ce":
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(-1, count).mean(1)
    own = logits.gather(2, wanted[..., None]).squeeze(2)
    others = logits.scatter(2, wanted[..., None], -torch.inf).amax(2)
    return (others - own).clamp_min(0).mean(1)


def tabor(
    model: nn.Module,
    labels: Tensor,
    mark: Tensor,
    mask: Tensor,
    base: Base,
    steps: int,
    *,
    attack_loss: AttackLoss = "ce",
    keep: Literal["last", "min"] = "last",
) -> Search:
    """Search a trigger for each label.

    Args:
        model: frozen and in eval mode; inputs (n, C, H, W) to logits.
        labels: (K,).
        mark, mask: unbounded starts, (K, C, H, W) and (K, H, W).
        base: step -> images to put the trigger on, (N, C, H, W) or (K, N, C, H, W).
        steps: of Adam; each also moves the costs.
        attack_loss: the code's cross-entropy or the C&W loss that the paper names.
        keep: the last success as in the released code, or that of the least mask. Without one: the trigger of step 1.

    Raises:
        ValueError: logits that are not finite.
    """
    mark, mask = (t.detach().clone().requires_grad_() for t in (mark, mask))
    optimizer = torch.optim.Adam([mark, mask], lr=LR, betas=BETAS)
    costs = torch.tensor(COSTS, dtype=mask.dtype, device=mask.device).repeat(len(labels), 1)
    up, down = (torch.zeros(len(labels), dtype=torch.long, device=mask.device) for _ in range(2))
    best = squashed(mark.detach(), mask.detach())
    least = torch.full((len(labels),), torch.inf, dtype=mask.dtype, device=mask.device)
    successes, used = [], []
    for step in range(steps):
        trigger = squashed(mark, mask)
        stamped = overlaid(base(step), trigger)
        alone = trigger.mask[:, None] * trigger.mark
        logits = model(torch.cat([stamped.flatten(0, 1), alone]))
        logits, logits_alone = logits[: -len(labels)].unflatten(0, stamped.shape[:2]), logits[-len(labels) :]
        terms = penalties(trigger, F.cross_entropy(logits_alone, labels, reduction="none"))
        loss = (attack_losses(logits, labels, attack_loss) + (costs * terms).sum(1)).sum()
        if not loss.isfinite():
            raise ValueError(f"logits of the model must be finite, got NaN or Inf at step {step}")
        mark.grad, mask.grad = torch.autograd.grad(loss, [mark, mask])
        optimizer.step()
        success = (logits.argmax(2) == labels[:, None]).to(mask.dtype).mean(1)
        good = success >= THRESHOLD
        now = squashed(mark.detach(), mask.detach())
        size = now.mask.sum((1, 2))
        stored = good & ((size < least) if keep == "min" else good)
        least = torch.where(stored, size, least)
        stored = stored | (step == 0)
        best = SoftTrigger(
            torch.where(stored[:, None, None, None], now.mark, best.mark),
            torch.where(stored[:, None, None], now.mask, best.mask),
        )
        successes.append(success)
        used.append(costs)
        costs, up, down = adjusted(costs, good, up, down)
    return Search(best, torch.stack(successes, 1), torch.stack(used, 1))


def adjusted(costs: Tensor, good: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Costs and counters after a step: 1.5 times after 5 successes in a row, divided by 1.5^1.5 after 5 failures."""
    up, down = torch.where(good, up + 1, 0), torch.where(good, 0, down + 1)
    raised, lowered = up == PATIENCE, down == PATIENCE
    costs = torch.where(raised[:, None], costs * UP, torch.where(lowered[:, None], costs / DOWN, costs))
    return costs, torch.where(raised, 0, up), torch.where(lowered, 0, down)
