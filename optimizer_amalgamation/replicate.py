"""One replicate of meta-training: its weights, its meta-optimizer, its schedule (Sec. 3; spec c4, c6)."""

import copy
from typing import Any

import torch
from torch import Tensor

from optimizer_amalgamation.clip import clip_adaptive
from optimizer_amalgamation.rule import Weights
from optimizer_amalgamation.schedules import Schedule, ScheduleConfig

PARTS = (
    *("validating", "episode", "episodes", "losses", "history", "training", "best", "meta_steps", "skipped"),
    *("weights", "moments", "kept"),
)
"""of a snapshot, beside the schedule"""
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-7  # of the meta-optimizer Adam


class Replicate:
    """One replicate: what is trained, and where it stands."""

    def __init__(self, number: int, weights: Weights, schedule: ScheduleConfig) -> None:
        self.number, self.weights, self.schedule = number, weights, Schedule(schedule)
        zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
        self.moments: dict[str, Any] = {"m": zeros, "v": copy.deepcopy(zeros), "t": 0}
        self.kept: dict[str, Any] = {}
        """checkpoints that the schedule may ask for"""
        self.validating, self.episode, self.episodes = False, 0, 0
        """of the present period: its part, the number within it; training episodes so far"""
        self.losses: list[float] = []
        self.history: list[list[float]] = []
        """of each training episode: meta loss, and the share of steps in which each teacher is the nearest"""
        self.training, self.best = float("nan"), float("nan")
        self.meta_steps, self.skipped = 0, 0

    def saved(self) -> dict[str, Any]:
        """Weights and the meta-optimizer's state, to be changed no more."""
        return {"weights": dict(self.weights), "moments": dict(self.moments)}

    @torch.no_grad()
    def descend(self, grads: Weights, lr: float) -> None:
        """One step of Adam; skipped and counted where the gradient is not finite."""
        if not all(bool(value.isfinite().all()) for value in grads.values()):
            self.skipped += 1
            return
        t = self.moments["t"] + 1
        rate = lr / (1 - BETA1**t)
        m, v, weights = {}, {}, {}
        for name, g in clip_adaptive(grads, self.weights).items():
            m[name] = BETA1 * self.moments["m"][name] + (1 - BETA1) * g
            v[name] = BETA2 * self.moments["v"][name] + (1 - BETA2) * g.square()
            weights[name] = self.weights[name] - rate * m[name] / ((v[name] / (1 - BETA2**t)).sqrt() + EPSILON)
        self.weights, self.moments = weights, {"m": m, "v": v, "t": t}
        self.meta_steps += 1

    def finish_period(self) -> float:
        """Save, and go where the schedule says; returns the period's validation loss."""
        validation = sum(self.losses) / len(self.losses)
        for kind, name in self.schedule.record(self.training, validation):
            if kind == "save":
                self.kept[name] = self.saved()
            else:
                self.weights, self.moments = self.kept[name]["weights"], self.kept[name]["moments"]
        reference = self.schedule.reference
        self.best = reference[1] if self.schedule.finished and reference else validation
        self.kept = {name: self.kept[name] for name in self.schedule.loadable}
        return validation

    def state_dict(self) -> dict[str, Any]:
        """All that its next episode depends on, as plain data."""
        found = {name: getattr(self, name) for name in PARTS}
        return {**found, "schedule": self.schedule.state_dict()}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError where `state` is none of a replicate of this rule."""
        if lacking := sorted({*PARTS, "schedule"} - state.keys()):
            raise ValueError(f"a snapshot of replicate {self.number} must have {', '.join(lacking)}, got none")
        wanted = {name: tuple(value.shape) for name, value in self.weights.items()}
        for part in (state, *state["kept"].values()):
            for where in (part["weights"], part["moments"]["m"], part["moments"]["v"]):
                got = {name: tuple(value.shape) for name, value in where.items()}
                if got != wanted:
                    odd = next(name for name in {**wanted, **got} if got.get(name) != wanted.get(name))
                    what = f"a snapshot of replicate {self.number} must have {odd} of shape {wanted.get(odd, 'none')}"
                    raise ValueError(f"{what}, got {got.get(odd, 'none')}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, on the device of the present weights."""
        device = next(iter(self.weights.values())).device
        for name, value in state.items():
            if name == "schedule":
                self.schedule.load_state_dict(value)
            else:
                setattr(self, name, _moved(value, device))


def _moved(value: Any, device: torch.device) -> Any:
    """Plain data with its tensors on a device."""
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
