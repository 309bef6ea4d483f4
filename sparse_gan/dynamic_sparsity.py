"""Sparse training whose topology moves: STU-GAN's exploration of the generator, on any module (spec c).

After each optimiser step inactive weights are set to zero; every so many steps each sparse layer drops its smallest
weights and grows as many new ones from zero.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn, optim

from common.masks import Masks
from common.runs import generator
from sparse_gan.masked_adam import MaskedAdam
from sparse_gan.topology import cosine_drop_fraction, drop_and_grow


class DynamicSparsity:
    """Keeps `module` under `masks` and moves them; call `step()` after each `optimizer.step()`, gradients still there.

    Args:
        module: its weights are masked at once, in place.
        optimizer: Adam, SGD or the like over its parameters, or a `MaskedAdam`, which masks by itself.
        masks: at least one; changed in place as the topology moves, so that whoever shares them sees the present ones.
        update_every: steps between two moves (Delta T).
        total_steps: of the training (T); no move at its end.
        drop_fraction, drop_end: of the active weights, at the start and, along half a cosine, at the end.
        growth: "gradient" where the dense gradient is largest; "random" uniformly (SET).
        regrown: a weight that is dropped and grown in the same move starts from "zero" like all grown ones, or may
            "keep" its value and moments, as in the authors' code.
        moments: "sparse" holds the optimiser's state of inactive weights at zero; "dense" lets it follow the dense
            gradient, as the authors' code does.
        seed: of random growth.

    Raises:
        ValueError: on an argument that is not allowed, or masks that do not fit the module.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: optim.Optimizer,
        masks: Masks,
        *,
        update_every: int,
        total_steps: int,
        drop_fraction: float = 0.5,
        drop_end: float = 0.005,
        growth: Literal["gradient", "random"] = "gradient",
        regrown: Literal["zero", "keep"] = "zero",
        moments: Literal["sparse", "dense"] = "sparse",
        seed: int = 0,
    ) -> None:
        if update_every < 1:
            raise ValueError(f"update_every must be at least 1, got {update_every}")
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        if not 0 <= drop_end <= drop_fraction <= 1:
            raise ValueError(f"drop_end <= drop_fraction must be in [0, 1], got {drop_end} and {drop_fraction}")
        if growth not in ("gradient", "random"):
            raise ValueError(f"growth must be gradient or random, got {growth!r}")
        if regrown not in ("zero", "keep"):
            raise ValueError(f"regrown must be zero or keep, got {regrown!r}")
        if moments not in ("sparse", "dense"):
            raise ValueError(f"moments must be sparse or dense, got {moments!r}")
        if moments == "dense" and isinstance(optimizer, MaskedAdam):
            raise ValueError("moments must be sparse with a MaskedAdam, got 'dense'")
        if not masks:
            raise ValueError("masks must hold at least one mask, got none")
        masks.apply_(module)
        self.masks, self.steps, self.moves = masks, 0, 0
        self._optimizer, self._moments, self._seed = optimizer, moments, seed
        self._growth, self._regrown = growth, regrown
        self._every, self._total, self._drop = update_every, total_steps, (drop_fraction, drop_end)
        self._weights = {name: module.get_parameter(name) for name in masks}
        self._ever = {name: mask.clone() for name, mask in masks.items()}
        self._multipliers = {name: masks[name].to(weight) for name, weight in self._weights.items()}

    @torch.no_grad()
    def step(self) -> bool:
        """Mask what the optimiser has just changed; move the topology where it is due. Returns whether it moved."""
        if not isinstance(self._optimizer, MaskedAdam):
            pairs = [(t, self._multipliers[name]) for name in self._weights for t in self._masked(name)]
            torch._foreach_mul_(*map(list, zip(*pairs, strict=True)))  # one fused call over weights and moments
        self.steps += 1
        if self.steps % self._every or self.steps >= self._total:
            return False
        fraction = cosine_drop_fraction(self.steps, self._total, *self._drop)
        for number, name in enumerate(self._weights):
            if not self.masks[name].all():
                self._move(name, fraction, number)
        self.moves += 1
        return True

    def explored_fraction(self) -> float:
        """Share of the weights under masks that have ever been active (in-time over-parametrisation rate)."""
        return sum(int(ever.sum()) for ever in self._ever.values()) / self.masks.total

    def state_dict(self) -> dict[str, Any]:
        """Masks, all that was ever active, and the counters, as plain data; optimiser and module are saved apart."""
        return {"masks": self.masks.state_dict(), "ever": dict(self._ever), "steps": self.steps, "moves": self.moves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set back to a `state_dict`; load those of optimiser and module too, in any order."""
        self.masks.update({name: mask.to(self._weights[name].device) for name, mask in state["masks"].items()})
        self._ever = {name: ever.to(self._weights[name].device) for name, ever in state["ever"].items()}
        self._multipliers = {name: self.masks[name].to(weight) for name, weight in self._weights.items()}
        self.steps, self.moves = state["steps"], state["moves"]

    def _masked(self, name: str) -> list[Tensor]:
        """The weight and, with sparse moments, the optimiser's state of its shape."""
        weight = self._weights[name]
        if self._moments == "dense":
            return [weight]
        state = self._optimizer.state.get(weight, {}).values()
        return [weight, *(t for t in state if isinstance(t, Tensor) and t.shape == weight.shape)]

    def _move(self, name: str, fraction: float, number: int) -> None:
        weight, mask = self._weights[name], self.masks[name]
        if self._growth == "random":
            draws = torch.rand(weight.shape, generator=generator(self._seed, self.steps, number))
            scores = draws.to(weight.device)
        elif weight.grad is None:
            raise ValueError(f"{name} must have a gradient when step() is called, got none")
        else:
            scores = weight.grad.abs()
        survivors, new = drop_and_grow(weight, mask, scores, fraction)
        if self._regrown == "keep":
            survivors = mask & new
        if isinstance(self._optimizer, MaskedAdam):
            self._optimizer.set_mask(weight, new, survivors)
        else:
            for tensor in self._masked(name):
                tensor.mul_(survivors)
        self.masks[name] = new
        self._ever[name] |= new
        self._multipliers[name] = new.to(weight)
