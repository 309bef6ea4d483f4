"""What a learnt optimiser sees of a gradient: scale-free moments and raw ones, coordinate by coordinate (spec c.2).

All features are functions of the history of one coordinate's gradient; coordinates never mix.
"""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOMENTS = {"mom5": 0.5, "mom9": 0.9, "mom99": 0.99}
# Columns come in this order whatever order is asked for, as in the released code.
KNOWN = ("mt", "gt", "AdamUp_unNorm", "AdamUp_Norm", "AdamDn_Norm", "g", *MOMENTS, "t", "nt", "log", "sgn")
SETS = {
    "RP": ("mt", "gt"),
    "RP_s": ("mt", "gt"),
    "RP_si": ("mt", "gt", "nt"),
    "RP_5": ("mt", "g", "mom5", "mom9", "mom99"),
    "DM": ("log", "sgn"),
}
LOG_SCALE = 5.0  # k of the log features
State = dict[str, Tensor]


def feature_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """The columns of a feature set, in the fixed order.

    Args:
        names: a list of KNOWN names and `magic<p>`; or one string of them joined by "+", the name of a set (SETS), or
            "magic:2,2.5,3".

    Raises:
        ValueError: for a name that is not known, listing those that are.
    """
    if isinstance(names, str):
        powers = names.removeprefix("magic:").split(",") if names.startswith("magic:") else []
        names = [f"magic{power}" for power in powers] or SETS.get(names) or names.split("+")
    unknown = [name for name in names if name not in KNOWN and _power(name) is None]
    if unknown or not names:
        allowed = f"{', '.join(KNOWN)}, magic<p>, or a set: {', '.join(SETS)}"
        raise ValueError(f"features must be of {allowed}; got {unknown[0] if unknown else 'none'!r}")
    magic = sorted((name for name in set(names) if name not in KNOWN), key=lambda name: _power(name) or 0.0)
    return (*(name for name in KNOWN if name in names), *magic)


def _power(name: str) -> float | None:
    """p of "magic<p>"; None for any other name."""
    found = re.fullmatch(r"magic(\d{1,3}(?:\.\d{1,3})?)", name)
    return float(found[1]) if found and float(found[1]) > 0 else None


class GradFeatures:
    """Features of a stream of gradients.

    Args:
        names: see `feature_names`.
        beta1: decay of the first moment m.
        beta2: of the second moment v (and of |g|^p for magic p).
        eps: added to the root of v; the released torch code has 1e-12, the TF code 1e-8.

    Raises:
        ValueError: for unknown names, a decay outside [0, 1) or eps < 0.
    """

    def __init__(self, names: str | Sequence[str], beta1: float = 0.95, beta2: float = 0.95, eps: float = 1e-8) -> None:
        self.names = feature_names(names)
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if not 0 <= eps <= sys.float_info.max:
            raise ValueError(f"eps must be at least 0, got {eps}")
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        wanted = set(self.names)
        self.powers = {name: power for name in self.names if (power := _power(name)) is not None}
        needs_m = bool(wanted & {"mt", "AdamUp_unNorm", "AdamUp_Norm"}) or bool(self.powers)
        needs_v = bool(wanted & {"mt", "gt", "AdamDn_Norm", "nt"})
        moments = [name for name in MOMENTS if name in wanted or (name == "mom5" and "nt" in wanted)]
        # What is kept between steps, one float a coordinate each.
        self.buffers = ("m",) * needs_m + ("v",) * needs_v + tuple(moments) + tuple(self.powers)

    def init(self, like: Tensor) -> State:
        """State before the first step, for gradients of the shape, type and device of `like`."""
        zeros = {name: torch.zeros_like(like, requires_grad=False) for name in self.buffers}
        return {"step": torch.zeros((), device=like.device), **zeros}

    def rest(self, name: str) -> float:
        """A feature's value where all gradients were zero, and before the first step."""
        return {"log": -1.0, "AdamDn_Norm": self.eps}.get(name, 0.0)

    def columns(self, g: Tensor, state: State) -> dict[str, Tensor]:
        """Features by name, each of g's shape; `state` goes one step on, in place."""
        step = state["step"].add_(1)
        self.update(g, state)
        return self.values(g, state, *self.debias(step))

    def update(self, g: Any, state: Mapping[str, Any]) -> None:
        """Moments one step on, in place; of a tensor or a `TensorList`, like `values`."""
        if "m" in state:
            state["m"].mul_(self.beta1).add_(g, alpha=1 - self.beta1)
        if "v" in state:
            state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        for name, beta in MOMENTS.items():
            if name in state:
                state[name].mul_(beta).add_(g, alpha=1 - beta)
        for name, power in self.powers.items():
            state[name].mul_(self.beta2).add_(g.abs().pow(power), alpha=1 - self.beta2)

    def debias(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """1 / (1 - beta^t) of the two moments, 0-d."""
        return 1 / (1 - self.beta1**step), 1 / (1 - self.beta2**step)

    def values(self, g: Any, state: Mapping[str, Any], debias1: Tensor, debias2: Tensor) -> dict[str, Any]:
        """Features by name for moments just updated; see `debias`."""
        found: dict[str, Any] = {}
        if "v" in state:
            d = (state["v"] * debias2).sqrt() + self.eps
            inverse = d.reciprocal()
        for name in self.names:
            if name == "mt":
                found[name] = state["m"] * debias1 * inverse
            elif name == "gt":
                found[name] = g * inverse
            elif name == "AdamUp_unNorm":
                found[name] = state["m"].clone()
            elif name == "AdamUp_Norm":
                found[name] = state["m"] * debias1
            elif name == "AdamDn_Norm":
                found[name] = d
            elif name == "g":
                found[name] = g
            elif name in MOMENTS:
                found[name] = state[name].clone()
            elif name == "t":
                found[name] = g * 0 + state["step"].to(g.dtype) / 1000
            elif name == "nt":
                found[name] = state["mom5"] / (1 - 0.5 ** state["step"]).to(g.dtype) * inverse
            elif name == "log":
                found[name] = ((g.abs() + 1.19e-7).log() / LOG_SCALE).clamp(min=-1)
            elif name == "sgn":
                found[name] = (g * math.exp(LOG_SCALE)).clamp(-1, 1)
            else:
                power = self.powers[name]
                found[name] = state["m"] / ((state[name] * debias2).pow(1 / power) + 1e-8)
        return found

    def __call__(self, g: Tensor, state: State) -> Tensor:
        """Features (P, F) of the gradient g (P,), in the order of `names`; `state` goes one step on, in place."""
        return torch.stack(list(self.columns(g.detach(), state).values()), -1)
