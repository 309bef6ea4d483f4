"""Neural Cleanse's inversion as TrojanZoo and the released code have it (Wang et al. 2019; spec c8)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_lth.tabor import BETAS, LR, Base, Search, SoftTrigger, overlaid, squashed


@dataclass(frozen=True)
class CleanseConfig:
    """Settings of one search; the defaults are the released ones."""

    cost: float = 1e-3
    threshold: float = 0.99
    patience: int = 10
    early_stop: bool = True
    early_stop_patience: int = 20
    up: float = 1.5
    down: float = 1.5**1.5


class _Cost:
    """The weight of the mask's size, and the counters that move it."""

    def __init__(self, config: CleanseConfig) -> None:
        self.config, self.value = config, config.cost
        self.set_counter = self.up = self.down = 0
        self.raised = self.lowered = False

    def adjust(self, success: float) -> None:
        config, good = self.config, success >= self.config.threshold
        if self.value == 0 and good:
            self.set_counter += 1
            if self.set_counter >= config.patience:
                self.value, self.up, self.down = config.cost, 0, 0
                self.raised = self.lowered = False
        else:
            self.set_counter = 0
        self.up, self.down = (self.up + 1, 0) if good else (0, self.down + 1)
        if self.up >= config.patience:
            self.up, self.raised = 0, True
            self.value *= config.up
        elif self.down >= config.patience:
            self.down, self.lowered = 0, True
            self.value /= config.down


def neural_cleanse(
    model: nn.Module,
    label: Tensor,
    mark: Tensor,
    mask: Tensor,
    base: Base,
    steps: int = 200,
    config: CleanseConfig | None = None,
) -> Search:
    """Search the trigger of one label: `label` (1,), `mark` (1, C, H, W), `mask` (1, H, W); else as `tabor`.

    Keeps the success of the least mask and may stop early; the columns of `success` and `costs` end there.
    """
    config = config or CleanseConfig()
    mark, mask = (t.detach().clone().requires_grad_() for t in (mark, mask))
    optimizer = torch.optim.Adam([mark, mask], lr=LR, betas=BETAS)
    cost = _Cost(config)
    best = math.inf
    found: SoftTrigger | None = None
    stop_best, stop_counter = math.inf, 0
    successes, used = [], []
    for step in range(steps):
        trigger = squashed(mark, mask)
        logits = model(overlaid(base(step), trigger)[0])
        norm = trigger.mask.sum()
        loss = F.cross_entropy(logits, label.expand(len(logits))) + cost.value * norm
        if not loss.isfinite():
            raise ValueError(f"logits of the model must be finite, got NaN or Inf at step {step}")
        mark.grad, mask.grad = torch.autograd.grad(loss, [mark, mask])
        optimizer.step()
        success, size = float((logits.argmax(1) == label).to(mask.dtype).mean()), float(norm.detach())
        successes.append(success)
        used.append(cost.value)
        if success >= config.threshold and size < best:
            best, found = size, squashed(mark.detach(), mask.detach())
        if config.early_stop:
            if best < math.inf:
                stop_counter = stop_counter + 1 if best >= 0.99 * stop_best else 0
            stop_best = min(best, stop_best)
            if cost.raised and cost.lowered and stop_counter >= config.early_stop_patience:
                break
        cost.adjust(success)
        if found is None:  # the random start then has to be undercut, as in the released code
            best, found = size, squashed(mark.detach(), mask.detach())
    assert found is not None  # one step at least
    return Search(found, mask.new_tensor([successes]), mask.new_tensor([used])[..., None])
