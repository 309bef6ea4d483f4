"""Any update rule as a torch optimiser (spec g): what all optimisers of this package share."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optimizer_amalgamation.blocks import MEMORY, InPlace, in_place, turned
from optimizer_amalgamation.rule import Context, Rule, State, Weights
from optimizer_amalgamation.stepping import CLOCK, SHARED, Pairs, step_blocks, step_flat, wide_type

IMPLS = ("auto", "blocks", "flat")
CONTEXTS = 64


class RuleOptimizer(Optimizer):
    """p <- p (1 - lr weight_decay alpha) - lr alpha rule(gradients so far), rule(.) warmup_lr / alpha g at first.

    State of a parameter: `step`, and the rule's, coordinates last. Single precision at least, double for parameters
    in double precision. A parameter without gradient is left alone and does not age; so is one whose gradient is not
    finite, or so large that its square is not (from 1e18), or to which something would be added that is not finite in
    its type: it counts in `skipped`, and the first is warned of.

    Args:
        params: parameters or groups, with their own lr, alpha, weight_decay, warmup and warmup_lr.
        rule: with alpha 1 where it has one.
        weights: of the rule; they are not trained.
        lr: of every step, those of the warm-up too: what a scheduler changes.
        alpha: scale of the rule's update, and of the decay.
        warmup: first steps of a parameter, which are SGD of rate `warmup_lr` and fill the rule's averages.
        weight_decay: decoupled.
        state_dtype: of the recurrent states.
        impl: blocks: in place, block by block in the cache; flat: all coordinates at once, without a wait for the
            device; auto: blocks on processors.
        maximize: climb.

    Raises:
        ValueError: for lr, warmup_lr or weight_decay < 0, alpha <= 0, warmup no integer >= 0, another impl, a
            state_dtype that is not floating-point. TypeError for complex parameters. RuntimeError in `step` for sparse
            gradients.
    """

    def __init__(
        self,
        params: Any,
        rule: Rule,
        weights: Weights,
        *,
        lr: float = 1.0,
        alpha: float = 1.0,
        warmup: int = 100,
        warmup_lr: float = 0.05,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | None = None,
        impl: str = "auto",
        maximize: bool = False,
    ) -> None:
        if impl not in IMPLS:
            raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
        if state_dtype is not None and not state_dtype.is_floating_point:
            raise ValueError(f"state_dtype must be a floating-point type, got {state_dtype}")
        self._configure(rule, weights, state_dtype, impl, 0)
        defaults = {"lr": lr, "alpha": alpha, "warmup": warmup, "warmup_lr": warmup_lr, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "maximize": maximize})

    def _configure(
        self, rule: Rule, weights: Weights, state_dtype: torch.dtype | None, impl: str, skipped: int
    ) -> None:
        self.rule, self.weights, self.state_dtype, self.impl = rule, weights, state_dtype, impl
        self._skipped, self._skipped_there = skipped, {}  # type: tuple[int, dict[torch.device, Tensor]]
        self._made: dict[Any, Any] = {}  # what is made once: weights elsewhere, blocks
        self._contexts: dict[Any, Context] = {}

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("rule", "weights", "state_dtype", "impl", "skipped")}
        return {**super().__getstate__(), "own": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "own" in state:  # a copy; load_state_dict has none
            self._configure(**state.pop("own"))
        super().__setstate__(state)

    @property
    def skipped(self) -> int:
        """How often a parameter was left alone for its gradient; on a GPU this waits for the device."""
        return self._skipped + sum(int(count) for count in self._skipped_there.values())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises as the class."""
        values = {**self.defaults, **param_group}
        for name in ("lr", "warmup_lr", "weight_decay"):
            if not 0 <= values[name] < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {values[name]}")
        if not 0 < values["alpha"] < math.inf:
            raise ValueError(f"alpha must be positive and finite, got {values['alpha']}")
        if not isinstance(values["warmup"], int) or isinstance(values["warmup"], bool) or values["warmup"] < 0:
            raise ValueError(f"warmup must be an integer of at least 0, got {values['warmup']}")
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                self.param_groups.pop()
                raise TypeError(f"parameters must be real floating-point tensors, got {p.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in found:
            if p.grad.layout != torch.strided:
                raise RuntimeError(f"{type(self).__name__} must have dense gradients, got {p.grad.layout}")
        kinds: dict[tuple[torch.device, torch.dtype], Pairs] = {}
        for p, group in found:
            if p.numel():
                if not self.state[p]:
                    self.state[p].update(self._zero_state(p))
                kinds.setdefault((p.device, wide_type(p)), []).append((p, group))
        for (device, wide), pairs in kinds.items():
            blocks = self.impl == "blocks" or (self.impl == "auto" and device.type == "cpu")
            (step_blocks if blocks else step_flat)(self, pairs, device, wide)
        return loss

    def _zero_state(self, p: Tensor) -> State:
        like = torch.zeros(p.numel(), dtype=wide_type(p), device=p.device)
        state: State = {"step": torch.zeros((), dtype=torch.int64, device=p.device)}
        for name, tensor in self.rule.zero_state(like, self.context([p])).items():
            if name in MEMORY and self.state_dtype is not None:
                tensor = tensor.to(self.state_dtype)
            if name != CLOCK:
                state[name] = turned(tensor).contiguous()
        for its in self.state.values():
            if SHARED in its:
                state[SHARED] = its[SHARED]
        return state

    def count_skipped(self, missed: Tensor | int) -> None:
        """Add to `skipped`, and warn of the first where that is known at once."""
        if isinstance(missed, Tensor) and missed.device.type != "cpu":
            self._skipped_there[missed.device] = self._skipped_there.get(missed.device, 0) + missed
        elif int(missed):
            self._skipped += int(missed)
            if "warned" not in self._made:
                self._made["warned"] = True
                text = "a gradient or update was not finite, or a gradient beyond 1e18: its parameter was left alone"
                warnings.warn(f"{type(self).__name__}: {text}; see `skipped`", stacklevel=2)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def constants(self, values: list[Any], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Numbers as a tensor, made once."""
        return self._once((tuple(values), device, dtype), lambda: torch.tensor(values, dtype=dtype, device=device))

    def context(self, params: list[Tensor]) -> Context:
        """Of parameters of one device and type; the last few are kept."""
        like = torch.empty(0, dtype=wide_type(params[0]), device=params[0].device)
        shapes = tuple(tuple(p.shape) for p in params)
        key = (shapes, like.device, like.dtype)
        if key not in self._contexts:
            if len(self._contexts) == CONTEXTS:
                del self._contexts[next(iter(self._contexts))]
            self._contexts[key] = Context.of(shapes, like)
        return self._contexts[key]

    def weights_on(self, device: torch.device, dtype: torch.dtype) -> Weights:
        """The rule's weights there."""
        return self._once((device, dtype), lambda: {name: w.to(device, dtype) for name, w in self.weights.items()})

    def in_place(self, device: torch.device, dtype: torch.dtype) -> InPlace:
        """The rule on coordinates-last state."""
        weights = self.weights_on(device, dtype)
        return self._once((device, dtype, "blocks"), lambda: in_place(self.rule, weights))

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with `skipped`."""
        return {**super().state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but with the types that this optimiser's state has, and with `skipped` where it was saved.

        Raises RuntimeError, changing nothing, for another layout or what is not finite.
        """
        groups = state_dict["param_groups"]
        for group in groups:
            if lacking := sorted(self.defaults.keys() - group.keys()):
                raise RuntimeError(f"the state's groups must have {', '.join(lacking)}, got {', '.join(group)}")
        theirs, ours = [len(g["params"]) for g in groups], [len(g["params"]) for g in self.param_groups]
        if theirs != ours:
            raise RuntimeError(f"the state's groups must have {ours} parameters, got {theirs}")
        numbers = [number for group in groups for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, parameters, strict=True):
            if its := state_dict["state"].get(number):
                wanted = {name: tuple(tensor.shape) for name, tensor in self._zero_state(p).items()}
                got = {name: tuple(getattr(tensor, "shape", ["no tensor"])) for name, tensor in its.items()}
                if wanted != got:
                    raise RuntimeError(f"state of parameter {number} must have {wanted}, got {got}")
                if wrong := [name for name, tensor in its.items() if not tensor.isfinite().all()]:
                    raise RuntimeError(f"state of parameter {number} must be finite, got NaN or Inf in {wrong[0]}")
        super().load_state_dict(state_dict)
        for number, p in zip(numbers, parameters, strict=True):
            types = {name: tensor.dtype for name, tensor in self._zero_state(p).items()}
            for name, tensor in state_dict["state"].get(number, {}).items():
                self.state[p][name] = tensor.detach().to(p.device, types[name], copy=True)
        self._skipped, self._skipped_there = int(state_dict.get("skipped", self.skipped)), {}
