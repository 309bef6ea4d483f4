"""Unstructured baselines: scores of single weights, and the gradual schedule. They save no FLOPs of dense kernels."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn, optim

from common import distributed
from common.masks import Masks, keep_top, prunable_weights, saliency_scores

PRUNINGS = 20  # of gradual pruning, from a sixth of training to its half: steps 62,500 to 187,500 of 375,000


def magnitude_mask(weights: Mapping[str, Tensor], density: float) -> Masks:
    """Keep the largest of all weights together."""
    return top_share({name: weight.detach().abs() for name, weight in weights.items()}, density)


def taylor_scores(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """|weight times its gradient summed over the batches|: the first-order change of the loss without it.

    Of a data-parallel run `batches` are this rank's part of them.
    """
    model.zero_grad()
    for inputs, targets in batches:
        loss(model(inputs), targets).backward()
    distributed.synchronize(model)
    gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
    model.zero_grad()
    return saliency_scores(weights, gradients)


def top_share(scores: Mapping[str, Tensor], density: float) -> Masks:
    """Keep the share `density` with the largest scores; floor((1 - density) * number) go, as in the authors' code."""
    total = sum(score.numel() for score in scores.values())
    return keep_top(scores, total - int((1 - density) * total))


def gradual_sparsity(step: int, final: float, start: int, every: int, times: int) -> float:
    """Of gradual magnitude pruning at `step`, which rises as a cubic from 0 to `final`.

    Args:
        step: of training.
        final: sparsity at the end.
        start: step at which pruning starts.
        every: steps between two prunings.
        times: number of prunings.
    """
    done = min(max((step - start) / (every * times), 0), 1)
    return final * (1 - (1 - done) ** 3)


@dataclass
class Pruning:
    """Masks on a model in training, fixed, or from `start` on, `times` times, ever sparser down to `density`."""

    model: nn.Module
    masks: Masks
    density: float = 1.0
    start: int = 0
    every: int = 0
    """steps between two prunings; 0: none"""
    times: int = 0
    detach: Callable[[], None] = lambda: None

    @classmethod
    def gradual(cls, model: nn.Module, density: float, steps: int) -> "Pruning":
        """By magnitude down to `density` in `steps` steps of training."""
        weights = prunable_weights(model, (nn.Linear, nn.Conv2d))
        times = max(min(PRUNINGS, steps // 3), 1)
        return cls(model, Masks.ones_like(weights), density, steps // 6, max(steps // 3 // times, 1), times)

    def attach(self, optimizer: optim.Optimizer) -> None:
        """Hold what is masked at zero from now on; again after the masks have changed."""
        self.detach()
        self.detach = self.masks.attach(self.model, optimizer)

    def after(self, step: int, optimizer: optim.Optimizer) -> None:
        """Prune further if it is due after so many steps."""
        done = step - self.start
        if self.every and done > 0 and done % self.every == 0 and done <= self.every * self.times:
            sparsity = gradual_sparsity(step, 1 - self.density, self.start, self.every, self.times)
            weights: Mapping[str, Any] = {name: self.model.get_parameter(name) for name in self.masks}
            self.masks = magnitude_mask(weights, 1 - sparsity)
            self.attach(optimizer)
