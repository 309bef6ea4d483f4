"""The three regimes of pre-training, and of transfer: what happens to a batch before its loss is taken (spec c).

The loss is the mean cross-entropy of the perturbed batch alone: no regime has a clean term.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from double_win_lth.pgd import check_attack, pgd_linf


@dataclass(frozen=True)
class Regime:
    """A perturbation: none (`steps` 0), or `steps` of PGD within eps. Raises ValueError on impossible values."""

    name: str
    eps: float = 0.0
    step_size: float = 0.0
    steps: int = 0
    random_start: bool = True

    def __post_init__(self) -> None:
        check_attack(self.eps, self.step_size, self.steps)

    @classmethod
    def std(cls) -> "Regime":
        """Standard training: clean images."""
        return cls("std")

    @classmethod
    def fast(cls, eps: float) -> "Regime":
        """One step of 1.25 eps from a uniform start (Wong et al. 2020), the start clipped to the image box too."""
        return cls("fast", eps, 1.25 * eps, 1)

    @classmethod
    def adv(cls, eps: float, steps: int = 3, step_size: float | None = None) -> "Regime":
        """PGD from a uniform start; steps of 2 eps / steps, the released 16/765 at eps 8/255 and 3 steps."""
        return cls("adv", eps, 2 * eps / max(steps, 1) if step_size is None else step_size, steps)

    def perturb(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """x (N, ...) in [0, 1] as this regime trains on it; arguments and errors are those of `pgd_linf`."""
        if not self.steps:
            return x
        attack = {"eps": self.eps, "step_size": self.step_size, "steps": self.steps}
        return pgd_linf(model, x, y, random_start=self.random_start, start=start, generator=generator, **attack)  # type: ignore[arg-type]
