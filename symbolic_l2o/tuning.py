"""Meta-tuning: the coefficients of a rule become trainable (spec c.9)."""

import re
from typing import Any, Literal

import torch
from torch import Tensor, nn

from symbolic_l2o.inner import State
from symbolic_l2o.meta_training import meta_train
from symbolic_l2o.problems import Problem
from symbolic_l2o.rule import SymbolicRule
from symbolic_l2o.settings import MetaConfig

Form = Literal["log", "raw"]
LARGEST_DECAY, SMALLEST_GAMMA = 0.9999, 1e-4  # where free coefficients stop


class TunedRule(nn.Module):
    """A rule whose coefficients are functions of one vector `theta`, zero at the rule itself.

    Taps W_g_tau of one feature share a log gain s_g and a log decay d_g: W exp(s_g - d_g tau), because free taps get
    nearly the same gradient and their common gain runs away. Other coefficients are c exp(theta); decays of traces
    sigmoid(logit rho + theta). With form "raw" each is c + theta,
    but a decay stays in [0, .9999] and a gamma at least 1e-4, or what the rule itself has beyond that.

    Args:
        rule: with coefficients.
        form: see above.

    Raises:
        ValueError: for a rule without coefficients.
    """

    def __init__(self, rule: SymbolicRule, form: Form = "log") -> None:
        super().__init__()
        if not rule.coefficients:
            raise ValueError("a rule must have coefficients to be tuned, got none")
        self.rule, self.form = rule, form
        self.features = rule.gradient_features()
        self.decays = decays = {node[1] for node in rule.traces}
        names: list[str] = []
        self.plan: dict[str, tuple[str, Any]] = {}
        for name, value in rule.coefficients.items():
            tap = re.fullmatch(r"W_(.+)_(\d+)", name)
            if form == "raw":
                self.plan[name] = ("raw", name)
                names.append(name)
            elif tap:
                self.plan[name] = ("tap", (f"gain_{tap[1]}", f"decay_{tap[1]}", int(tap[2])))
                names += [f"gain_{tap[1]}", f"decay_{tap[1]}"]
            elif value != 0:
                self.plan[name] = ("logit" if name in decays else "log", name)
                names.append(name)
        self.names = list(dict.fromkeys(names))
        self.theta = nn.Parameter(torch.zeros(len(self.names)))

    def coefficients(self, theta: Tensor) -> dict[str, Any]:
        """By name, as functions of theta (K,)."""
        place = {name: theta[number] for number, name in enumerate(self.names)}
        found: dict[str, Any] = dict(self.rule.coefficients)
        for name, (kind, how) in self.plan.items():
            start = self.rule.coefficients[name]
            if kind == "raw":
                found[name] = start + place[how]
                if name in self.decays:
                    found[name] = found[name].clamp(0, max(start, LARGEST_DECAY))
                elif name.startswith("gamma"):
                    found[name] = found[name].clamp(min=min(start, SMALLEST_GAMMA))
            elif kind == "tap":
                found[name] = start * torch.exp(place[how[0]] - place[how[1]] * how[2])
            elif kind == "log":
                found[name] = start * torch.exp(place[how])
            else:
                found[name] = torch.sigmoid(torch.logit(torch.tensor(start)) + place[how])
        return found

    def init_state(self, like: Tensor) -> State:
        """As the rule's."""
        return self.rule.init_state(like)

    def step(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        """As the rule's, at the present theta."""
        return self.step_at(self.theta, z, state)

    def step_at(self, theta: Tensor, z: Tensor, state: State) -> tuple[Tensor, State]:
        """As the rule's, at theta (K,)."""
        return self.rule.step(z, state, self.coefficients(theta))

    def tuned(self, note: str = "") -> SymbolicRule:
        """The rule with the present coefficients."""
        values = {name: float(value) for name, value in self.coefficients(self.theta.detach()).items()}
        words = f"{self.rule.provenance}; {note}" if note else self.rule.provenance
        found = self.rule.with_coefficients(values)
        return SymbolicRule(found.features, found.expr, found.coefficients, found.beta1, found.beta2, found.eps, words)


def meta_tune(
    rule: SymbolicRule,
    problem: Problem,
    options: MetaConfig,
    seed: int = 0,
    validation: Problem | None = None,
    form: Form = "log",
) -> tuple[SymbolicRule, list[float]]:
    """The rule with coefficients tuned on `problem`, and the evaluation losses, the start's first.

    Never worse on the validation runs than its start, which counts as a candidate.
    """
    learner = TunedRule(rule, form)
    history = meta_train(learner, problem, options, seed, validation)
    return learner.tuned("meta-tuned"), history
