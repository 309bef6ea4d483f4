"""APP on any network and any optimiser: score, mask, keep the masked weights at zero (spec c; d_t = base^delta_t).

pruner = AnytimePruner(model, n_states=8, tau=4.5)
pruner.attach(optimizer)
for megabatch in stream:
    pruner.step(score_batches)   # before training on it
    ...                          # train as usual
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from app_progressive.prunable import inner, prunable
from app_progressive.schedules import Schedule, open_delta, state_targets
from app_progressive.scores import BLIND, CRITERIA, Batches, Loss, scores
from app_progressive.threshold import SCOPES, TIES, UPDATES, threshold
from common.masks import Masks


def fresh_weights(weights: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """New U(-1/sqrt(fan_in), 1/sqrt(fan_in)) weights: what the released code scores from state 2 on (spec f.1)."""

    def draw(weight: Tensor) -> Tensor:
        uniform = torch.rand(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
        return (2 * uniform - 1) / weight[0].numel() ** 0.5

    return {name: draw(weight) for name, weight in weights.items()}


class AnytimePruner:
    """Anytime Progressive Pruning of a network along a stream of `n_states` megabatches.

    Args:
        model: any network; DDP-wrapped or compiled ones are pruned inside, under the inner names.
        n_states: S; None for a stream of unknown length, whose exponent is min(tau, 1 + growth (t - 1)).
        tau: last exponent; the last density is base^tau.
        criterion: see `scores`.
        base: density of the first state.
        scope, ties, update: see `threshold`.
        include, exclude: see `prunable`.
        schedule: exponential (the paper's), cubic (gradual pruning), or the densities themselves, one a state.
        growth: of the exponent a state where n_states is None.
        score_weights: current; or fresh, the released code's fault: from state 2 on random weights are scored.
        keep_stored: keep the values behind the masks, which then decay as under the usual mask * weight; needed where
            weights may come back (replace) or dead ones are scored (intersect of current weights).

    Raises:
        ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        n_states: int | None,
        tau: float,
        criterion: str = "snip",
        base: float = 0.8,
        scope: str = "global",
        ties: str = "rank",
        update: str = "nested",
        include: tuple[type[nn.Module], ...] = (nn.Conv2d,),
        exclude: str | Sequence[str] = (),
        schedule: Schedule = "exponential",
        growth: float = 0.5,
        score_weights: str = "current",
        keep_stored: bool = False,
    ) -> None:
        choices: dict[str, tuple[str, tuple[str, ...]]] = {
            "criterion": (criterion, CRITERIA),
            "scope": (scope, SCOPES),
            "ties": (ties, TIES),
            "update": (update, UPDATES),
            "score_weights": (score_weights, ("current", "fresh")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 < base < 1:
            raise ValueError(f"base must be in (0, 1), got {base}")
        needs_stored = update == "replace" or (update == "intersect" and score_weights == "current")
        if needs_stored and not keep_stored:
            raise ValueError(f"update {update} must have keep_stored=True: projected weights score 0, got False")
        if n_states is None:
            open_delta(1, tau, growth)  # checks
        self._targets = None if n_states is None else state_targets(n_states, tau, base, schedule)
        self.model, self.tau, self.base, self.growth = inner(model), tau, base, growth
        self.criterion, self.scope, self.ties, self.update = criterion, scope, ties, update
        self.score_weights, self.keep_stored = score_weights, keep_stored
        self.names = list(prunable(model, include, exclude))
        self._owners = {name: self.model.get_submodule(name.rpartition(".")[0]) for name in self.names}
        self.masks = Masks.ones_like(self._weights())
        self.stored = {name: weight.detach().clone() for name, weight in self._weights().items()} if keep_stored else {}
        self.state = 0
        self._multipliers: dict[str, Tensor] = {}
        self._attached: WeakSet[Optimizer] = WeakSet()

    def _weights(self) -> dict[str, nn.Parameter]:
        return {name: owner.get_parameter("weight") for name, owner in self._owners.items()}

    def target(self, state: int) -> tuple[float, float]:
        """Exponent and density wanted in a state, counted from 1. Raises RuntimeError past the last one."""
        if self._targets is None:
            delta = open_delta(state, self.tau, self.growth)
            return delta, self.base**delta
        if not 1 <= state <= len(self._targets):
            raise RuntimeError(f"state must be in [1, {len(self._targets)}], got {state}: the stream was to end there")
        return self._targets[state - 1]

    def step(
        self,
        batches: Batches | None,
        state: int | None = None,
        loss_fn: Loss = F.cross_entropy,
        generator: torch.Generator | None = None,
        reduce: Callable[[list[Tensor]], None] | None = None,
    ) -> dict[str, Any]:
        """Score the weights on `batches`, mask, and set the masked weights to zero: before training on a megabatch.

        Args:
            batches: (x, y) of the data at hand; None for mag and random.
            state: t = 1, 2, ...; the next one if None.
            loss_fn: see `scores`.
            generator: of random scores, GraSP's samples and fresh weights; seeded with the state if None.
            reduce: see `scores`: makes one mask of the batches of all ranks of a data-parallel run.

        Returns:
            state, delta, density_target, density (effective) and per_layer densities by name.

        Raises:
            RuntimeError: past the last state. ValueError: see `scores` and `threshold`.
        """
        state = self.state + 1 if state is None else state
        delta, target = self.target(state)
        generator = generator or torch.Generator().manual_seed(state)
        self._store()
        weights: Mapping[str, Tensor] = self.stored or self._weights()
        if self.score_weights == "fresh" and state > 1:
            weights = fresh_weights(weights, generator)
        found = scores(
            self.model,
            None if self.criterion in BLIND else batches,
            self.criterion,
            loss_fn,
            weights,
            {name: mask.to(weights[name].device) for name, mask in self.masks.items()},
            generator=generator,
            reduce=reduce,
        )
        self.masks = Masks(threshold(found, target, self.scope, self.ties, self.masks, self.update))
        self._multipliers = {}
        self.state = state
        with torch.no_grad():
            for name, stored in self.stored.items():
                self.model.get_parameter(name).copy_(stored)
        self.project()
        targets = {"state": state, "delta": delta, "density_target": target}
        return {**targets, "density": self.density(), "per_layer": self.per_layer()}

    def _factor(self, name: str, weight: Tensor) -> Tensor:
        """A mask as numbers of its weight's dtype, device and strides: equal strides multiply fastest."""
        there, wanted = self._multipliers.get(name), (weight.device, weight.dtype, weight.stride())
        if there is None or (there.device, there.dtype, there.stride()) != wanted:
            there = self._multipliers[name] = torch.empty_like(weight.detach()).copy_(self.masks[name])
        return there

    @torch.no_grad()
    def _store(self) -> None:
        """Take over the live weights as they are now; what is behind the masks stays as stored."""
        for name, stored in self.stored.items():
            stored.copy_(torch.where(self.masks[name].to(stored.device), self.model.get_parameter(name), stored))

    @torch.no_grad()
    def project(self) -> None:
        """Set the masked weights to zero; after loading weights, and after each optimiser step (`attach`).

        It is a product with the mask: a masked weight that is NaN or infinite becomes, or stays, NaN.
        """
        for name, weight in self._weights().items():
            weight.mul_(self._factor(name, weight))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it the weights, with those stored behind the masks, can be changed as an unpruned network's."""
        self._reveal()
        try:
            yield
        finally:
            self._conceal()

    @torch.no_grad()
    def _reveal(self) -> None:
        """Put the stored values behind the masks in place."""
        for name, stored in self.stored.items():
            weight = self.model.get_parameter(name)
            weight.copy_(torch.where(self.masks[name].to(weight.device), weight, stored))

    @torch.no_grad()
    def _conceal(self) -> None:
        """Store all weights as they are, and project."""
        for name, stored in self.stored.items():
            stored.copy_(self.model.get_parameter(name))
        self.project()

    def attach(self, optimizer: Optimizer) -> Callable[[], None]:
        """Project after every step of `optimizer` from now on; returns a function that ends it.

        Live weights then train, bit for bit, as under mask * weight: they see the same gradients, momentum and decay.
        Gradients of masked weights are zeroed as `backward` accumulates them, before clipping looks at their norm.

        Raises:
            ValueError: at once for an optimiser that is attached, or holds no weight that is pruned; at a step with a
                closure under `keep_stored`, whose forward would see the stored values.
        """
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        owned = {name: weight for name, weight in self._weights().items() if weight in held}
        if optimizer in self._attached or not owned:
            wanted = "one that is not attached yet and holds a weight that is pruned"
            raise ValueError(f"optimizer must be {wanted}, got {type(optimizer).__name__}")

        def before(_: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
            if self.keep_stored and closure is not None:
                raise ValueError(f"closure must be None with keep_stored, got {closure!r}")
            self._reveal()

        def after(*_: Any) -> None:
            self._conceal()

        def mask_gradient(weight: Tensor, name: str) -> None:
            if weight.grad is not None:
                weight.grad.mul_(self._factor(name, weight))

        hooks = [
            weight.register_post_accumulate_grad_hook(partial(mask_gradient, name=n)) for n, weight in owned.items()
        ]
        hooks += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        self._attached.add(optimizer)

        def detach() -> None:
            self._attached.discard(optimizer)
            for hook in hooks:
                hook.remove()

        return detach

    def density(self) -> float:
        """Part of the prunable weights that is kept: the effective density."""
        return self.masks.density

    def per_layer(self) -> dict[str, float]:
        """Effective density of each prunable tensor."""
        return {name: mask.double().mean().item() for name, mask in self.masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """State, masks and stored values, as plain data apart from the model's own state dict."""
        return {"state": self.state, "masks": self.masks.state_dict(), "stored": dict(self.stored)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, and project.

        Raises ValueError, and changes nothing, where it is that of another network, length of stream or keep_stored.
        """
        if lacking := sorted({"state", "masks", "stored"} - saved.keys()):
            raise ValueError(f"saved must be the state of a pruner, got one without {lacking[0]}")
        weights = self._weights()
        shapes = {name: weight.shape for name, weight in weights.items()}
        for part, wanted in (("masks", shapes), ("stored", shapes if self.keep_stored else {})):
            if {name: value.shape for name, value in saved[part].items()} != wanted:
                raise ValueError(f"{part} must be those of this network and keep_stored={self.keep_stored}, got others")
        if self._targets is not None and not 0 <= saved["state"] <= len(self._targets):
            raise ValueError(f"state must be in [0, {len(self._targets)}], got {saved['state']}")
        self.masks = Masks({name: mask.clone() for name, mask in saved["masks"].items()})
        self.state, self._multipliers = int(saved["state"]), {}
        self.stored = {name: value.to(weights[name].device, copy=True) for name, value in saved["stored"].items()}
        self.project()

    def export(self) -> dict[str, Tensor]:
        """The network's state dict with zeros where it is masked; loads strictly into an unpruned network."""
        self.project()
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}


class OneShotPruner(AnytimePruner):
    """Anytime one-shot pruning: one mask of density base^tau before the first megabatch, kept for ever.

    Call `step` once, with data of the first megabatch; options as of `AnytimePruner`.
    """

    def __init__(self, model: nn.Module, tau: float, **options: Any) -> None:
        super().__init__(model, 1, tau, **options)
