"""The pool of analytical teachers and its shared state (Sec. 3.1; spec c1).

An update u is subtracted: p <- p - u. With m, v, r the moving averages of g, g^2 (beta2), g^2 (rho):

    sgd  lr g        momentum  lr m         rmsprop  lr g / sqrt(r + eps)
    adam  lr (m / (1 - beta1)) / sqrt(v / (1 - beta2) + eps)
    powersign  lr e^a g        addsign  lr (1 + a) g,        a = tanh(g / q) tanh(m / q), q = sqrt(v + eps)

adapowersign and adaaddsign divide the last two by q. The released code corrects Adam by constants, not by 1 - beta^t,
so that its step rises and then decays: students learn that schedule.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEEDS = {
    "sgd": "",
    "momentum": "m",
    "rmsprop": "r",
    "adam": "mv",
    "powersign": "mv",
    "addsign": "mv",
    "adapowersign": "mv",
    "adaaddsign": "mv",
}
"""Averages that each optimiser reads."""
State = dict[str, Tensor]


@dataclass(frozen=True)
class Teacher:
    """One analytical optimiser.

    Args:
        name: of `NEEDS`.
        lr: its rate.
        epsilon: inside the root.
        beta1, beta2, rho: decays of m, v, r.

    Raises:
        ValueError: for another name, lr < 0, epsilon <= 0 or a decay outside [0, 1).
    """

    name: str
    lr: float
    epsilon: float = 1e-10
    beta1: float = 0.9
    beta2: float = 0.999
    rho: float = 0.9

    def __post_init__(self) -> None:
        if self.name not in NEEDS:
            raise ValueError(f"teacher must be one of {', '.join(NEEDS)}, got {self.name!r}")
        if not 0 <= self.lr < float("inf"):
            raise ValueError(f"lr of {self.name} must be at least 0 and finite, got {self.lr}")
        if not 0 < self.epsilon < float("inf"):
            raise ValueError(f"epsilon of {self.name} must be positive and finite, got {self.epsilon}")
        for decay in ("beta1", "beta2", "rho"):
            if not 0 <= getattr(self, decay) < 1:
                raise ValueError(f"{decay} of {self.name} must be in [0, 1), got {getattr(self, decay)}")

    def zero_state(self, like: Tensor) -> State:
        """Averages before the first step, each like `like` (..., n)."""
        return Pool((self,)).zero_state(like)

    def step(self, state: State, grad: Tensor) -> tuple[Tensor, State]:
        """Update (..., n) for a gradient (..., n), and the next state."""
        updates, state = Pool((self,)).step(state, grad)
        return updates[0], state


class Pool:
    """Teachers in a fixed order that share one m, v and r: the large pool keeps 3 floats a coordinate instead of 8.

    Args:
        teachers: at least one; all with the same beta1, beta2 and rho.

    Raises:
        ValueError: for none, for what is no `Teacher`, or for different decays.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.teachers = tuple(teachers)
        if not self.teachers:
            raise ValueError("a pool must have at least one teacher, got none")
        for teacher in self.teachers:
            if not isinstance(teacher, Teacher):
                raise ValueError(f"a pool must have teachers such as Teacher('adam', 0.005), got {teacher!r}")
        decays = {(t.beta1, t.beta2, t.rho) for t in self.teachers}
        if len(decays) > 1:
            raise ValueError(f"the teachers of a pool must have the same (beta1, beta2, rho), got {sorted(decays)}")
        self.beta1, self.beta2, self.rho = decays.pop()
        self.averages = sorted({average for t in self.teachers for average in NEEDS[t.name]})

    def __len__(self) -> int:
        return len(self.teachers)

    def __repr__(self) -> str:
        return f"Pool({', '.join(f'{t.name} {t.lr:g}' for t in self.teachers)})"

    def zero_state(self, like: Tensor) -> State:
        """The averages before the first step, each like `like` (..., n)."""
        return {average: torch.zeros_like(like) for average in self.averages}

    def advance(self, state: State, grad: Tensor) -> State:
        """The averages after one more gradient (..., n); other entries of `state` are left out."""
        new = {}
        for average in self.averages:
            decay = {"m": self.beta1, "v": self.beta2, "r": self.rho}[average]
            new[average] = decay * state[average] + (1 - decay) * (grad if average == "m" else grad.square())
        return new

    def step(self, state: State, grad: Tensor) -> tuple[Tensor, State]:
        """Updates (k, ..., n) of the k teachers for a gradient (..., n), and the next state."""
        state = self.advance(state, grad)
        return self.updates(state, grad), state

    def updates(self, state: State, grad: Tensor) -> Tensor:
        """Updates (k, ..., n) by averages that have seen `grad` (..., n)."""
        agreement: dict[float, tuple[Tensor, Tensor]] = {}  # by epsilon: q and a, which the four sign rules share
        found = []
        for t in self.teachers:
            if t.name == "sgd":
                update = grad
            elif t.name == "momentum":
                update = state["m"]
            elif t.name == "rmsprop":
                update = grad / (state["r"] + t.epsilon).sqrt()
            elif t.name == "adam":
                update = state["m"] / (1 - t.beta1) / (state["v"] / (1 - t.beta2) + t.epsilon).sqrt()
            else:
                if t.epsilon not in agreement:
                    q = (state["v"] + t.epsilon).sqrt()
                    agreement[t.epsilon] = q, torch.tanh(grad / q) * torch.tanh(state["m"] / q)
                q, a = agreement[t.epsilon]
                update = a.exp() * grad if t.name.endswith("powersign") else (1 + a) * grad
                update = update / q if t.name.startswith("ada") else update
            found.append(t.lr * update)
        return torch.stack(found)


# Rates of the released presets: searched on Train by validation loss after 5 epochs.
SMALL_TEACHERS = Pool((Teacher("rmsprop", 0.005), Teacher("adam", 0.005)))
LARGE_TEACHERS = Pool(
    (
        Teacher("sgd", 0.2),
        Teacher("momentum", 0.5),
        Teacher("rmsprop", 0.005),
        Teacher("adam", 0.005),
        Teacher("powersign", 0.1),
        Teacher("addsign", 0.1),
    )
)
# Inside the choice policy the released code has other rates, and another epsilon for RMSProp.
SMALL_CHOICE = Pool((Teacher("rmsprop", 0.005, epsilon=1e-7), Teacher("adam", 0.02)))
LARGE_CHOICE = Pool(
    (
        Teacher("sgd", 2.0),
        Teacher("momentum", 2.0),
        Teacher("rmsprop", 0.005, epsilon=1e-7),
        Teacher("adam", 0.02),
        Teacher("powersign", 1.0),
        Teacher("addsign", 1.0),
    )
)
