"""SymbolicOptimizer: a distilled rule as an ordinary torch optimiser (spec g)."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from symbolic_l2o.expr import evaluate
from symbolic_l2o.kernel import FASTER, fused
from symbolic_l2o.rule import SymbolicRule
from symbolic_l2o.tensorlist import TensorList

BLOCK = 2**16  # weights at a time without compilation, so that what an operator leaves is in the cache for the next


def local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor (FSDP2), sharing its memory; any other tensor itself.

    A rule is elementwise, so each rank moves its own part.
    """
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


def _gradient(p: Any) -> Tensor:
    """The gradient of a parameter, laid out as the parameter is."""
    g = p.grad
    if hasattr(p, "placements") and g.placements != p.placements:
        g = g.redistribute(p.device_mesh, p.placements)
    return local(g)


class SymbolicOptimizer(Optimizer):
    """p <- p (1 - lr weight_decay) + lr rule(gradients so far); the rule is negative for descent.

    State of a parameter: `step`, the moments that the rule's features need, one tensor for each trace and for each step
    back that it reads; for a pole rule over mt and gt four floats a weight. A parameter without gradient is left alone
    and its step does not advance. A gradient that is not finite goes into parameter and state as it is. What lies
    before the first step counts as the feature's value at rest (0, but -1 for `log`). Parameters may be DTensors.

    Args:
        params: parameters or groups of them, with their own lr and weight_decay.
        rule: its `eta` is this optimiser's lr, 0.01 in the paper.
        lr: of all groups that have none.
        weight_decay: decoupled.
        foreach: one kernel for all parameters of a device and type; the default on GPUs.
        compiled: one fused kernel a parameter, by torch.compile: several times faster, after seconds of building it.
        state_dtype: of the traces only; moments stay float32 at least.
        maximize: climb instead.

    Raises:
        ValueError: for lr < 0, weight_decay < 0, no parameters, or foreach beside compiled. RuntimeError in `step` for
            sparse and complex gradients.
    """

    def __init__(
        self,
        params: Any,
        rule: SymbolicRule,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        compiled: bool = False,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
    ) -> None:
        if not isinstance(rule, SymbolicRule):
            raise ValueError(f"rule must be a SymbolicRule, got {type(rule).__name__}")
        if foreach and compiled:
            raise ValueError("foreach must not be True beside compiled=True")
        if state_dtype is not None and not state_dtype.is_floating_point:
            raise ValueError(f"state_dtype must be a floating-point type, got {state_dtype}")
        self._configure(rule, foreach, compiled, state_dtype)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})

    def _configure(
        self, rule: SymbolicRule, foreach: bool | None, compiled: bool, state_dtype: torch.dtype | None
    ) -> None:
        self.rule, self.foreach, self.compiled, self.state_dtype = rule, foreach, compiled, state_dtype
        self._features = rule.gradient_features()
        self._delays: dict[str, int] = {}
        for name, tap in rule.taps():
            if tap:
                self._delays[name] = max(self._delays.get(name, 0), tap)
        self._faster = FASTER if compiled else {}
        self._kernel = fused(self._advance) if compiled else self._advance

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("rule", "foreach", "compiled", "state_dtype")}
        return {**super().__getstate__(), "own": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "own" in state:  # a copy; load_state_dict has none
            self._configure(**state.pop("own"))
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises ValueError for lr < 0 or weight_decay < 0."""
        for name in ("lr", "weight_decay"):
            value = param_group.get(name, self.defaults[name])
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                self._prepare(p)
            many = self.foreach if self.foreach is not None else any(p.is_cuda for p in parameters)
            if many and not self.compiled:
                for bucket in self._buckets(parameters):
                    self._step_together(bucket, group)
            else:
                for p in parameters:
                    self._step_one(p, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every state tensor keeps its own type. Raises ValueError for another rule's state."""
        wanted = {"step", *self._features.buffers, *self._trace_names(), *self._delay_names()}
        for number, state in state_dict["state"].items():
            if set(state) != wanted:
                raise ValueError(f"state of parameter {number} must have {sorted(wanted)}, got {sorted(state)}")
        super().load_state_dict(state_dict)
        saved = [state_dict["state"].get(number) for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p, its in zip(parameters, saved, strict=True):
            for name, tensor in (its or {}).items():
                device = "cpu" if name == "step" else p.device
                self.state[p][name] = tensor.detach().to(device, copy=True)

    def _trace_names(self) -> list[str]:
        return [f"trace_{number}" for number in range(len(self.rule.traces))]

    def _delay_names(self) -> list[str]:
        return [f"{name}_{tap}" for name, most in self._delays.items() for tap in range(1, most + 1)]

    def _prepare(self, p: Tensor) -> None:
        if p.grad.is_sparse or p.grad.is_complex():  # type: ignore[union-attr]
            raise RuntimeError("SymbolicOptimizer must have dense real gradients, got sparse or complex ones")
        if self.state[p]:
            return
        wide = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        state = self.state[p]
        state.update(self._features.init(wide))
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in self._trace_names():
            state[name] = torch.zeros_like(wide, dtype=self.state_dtype or wide.dtype)
        for name, most in self._delays.items():
            for tap in range(1, most + 1):
                state[f"{name}_{tap}"] = torch.full_like(wide, self._features.rest(name))

    def _step_one(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        state["step"] += 1
        rate = float(group["lr"])
        wide = torch.promote_types(p.dtype, torch.float32)  # 1 - lr weight_decay would be 1 in a narrower type
        lr, decay = (torch.tensor(x, dtype=wide, device="cpu") for x in (rate, 1 - rate * group["weight_decay"]))
        step = state["step"]
        tensors = {name: local(tensor) for name, tensor in state.items() if name != "step"}
        debias = self._features.debias(step)
        p, g = local(p), _gradient(p)
        g = -g if group["maximize"] else g
        numbers = (lr, decay, step, *debias)
        if not all(t.is_contiguous() for t in (p, g, *tensors.values())):
            self._kernel(p, g, tensors, *numbers)
        else:
            size = max(p.numel(), 1) if self.compiled or p.is_cuda else BLOCK
            parts = [tensor.view(-1).split(size) for tensor in (p, g, *tensors.values())]
            for its, slope, *kept in zip(*parts, strict=True):
                self._kernel(its, slope, dict(zip(tensors, kept, strict=True)), *numbers)
        self._rotate(state)

    def _step_together(self, bucket: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in bucket]
        torch._foreach_add_([state["step"] for state in states], 1)
        step = states[0]["step"]
        tensors = {name: TensorList([local(s[name]) for s in states]) for name in states[0] if name != "step"}
        lr = float(group["lr"])
        debias = self._features.debias(step)
        g, weights = TensorList([_gradient(p) for p in bucket]), TensorList([local(p) for p in bucket])
        decay = 1 - lr * group["weight_decay"]
        self._advance(weights, g.neg() if group["maximize"] else g, tensors, lr, decay, step, *debias)
        for state in states:
            self._rotate(state)

    def _buckets(self, parameters: Iterable[Tensor]) -> list[list[Tensor]]:
        found: dict[Any, list[Tensor]] = {}
        for p in parameters:
            found.setdefault((p.device, p.dtype, self.state[p]["step"].item()), []).append(p)
        return list(found.values())

    def _advance(
        self, p: Any, g: Any, state: dict[str, Any], lr: Any, decay: Any, step: Tensor, debias1: Tensor, debias2: Tensor
    ) -> None:
        """Moments, traces, delayed features and parameter(s) one step on, in place."""
        wide = torch.promote_types(p.dtype, torch.float32)
        g = g.to(wide)
        self._features.update(g, state)
        now = self._features.values(g, {**state, "step": step}, debias1, debias2)
        new: dict[Any, Any] = {}
        known: dict[Any, Any] = {}

        def feature(name: str, tap: int) -> Any:
            return state[f"{name}_{tap}"] if tap else now[name]

        values = self.rule.coefficients
        for key, node in zip(self._trace_names(), self.rule.traces, strict=True):
            rho = values[node[1]] if isinstance(node[1], str) else node[1]
            new[node] = state[key].to(wide) * rho + evaluate(
                node[2], feature, new.__getitem__, values, self._faster, known
            )
        update = evaluate(self.rule.expr, feature, new.__getitem__, values, self._faster, known)
        p.copy_((p * decay + update * lr).to(p.dtype))
        for key, value in zip(self._trace_names(), new.values(), strict=True):
            state[key].copy_(value.to(state[key].dtype))
        for name, most in self._delays.items():
            state[f"{name}_{most}"].copy_(now[name])  # the oldest, which this step was the last to read

    def _rotate(self, state: dict[str, Tensor]) -> None:
        """The buffer just written becomes the newest of its delay line: no tensor is moved."""
        for name, most in self._delays.items():
            line = [state[f"{name}_{tap}"] for tap in range(1, most + 1)]
            for tap, tensor in enumerate([line[-1], *line[:-1]], 1):
                state[f"{name}_{tap}"] = tensor
