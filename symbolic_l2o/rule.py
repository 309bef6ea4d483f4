"""A distilled update rule: an equation with named coefficients over gradient features (spec c.8, g).

x <- x + eta * rule: the rule is the signed update, negative for descent.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from symbolic_l2o.expr import Expr, evaluate, finite, fold, latex, node_count, read_expr, traces, walk
from symbolic_l2o.features import GradFeatures, feature_names

FORMAT = "symbolic-l2o-rule-1"
State = list[Tensor]
Coefficients = Mapping[str, Any]


@dataclass(frozen=True)
class SymbolicRule:
    """An update rule.

    Args:
        features: what it sees; put into the fixed order.
        expr: see `expr.py`.
        coefficients: by name; they are what meta-tuning trains.
        beta1: decays of the features' moments, and `eps`: see `GradFeatures`.
        provenance: where it comes from.

    Raises:
        ValueError: as `read_expr` and `GradFeatures`; for coefficients that are not finite, or a gamma (a coefficient
            named gamma...) that is not positive.
    """

    features: tuple[str, ...]
    expr: Expr
    coefficients: Mapping[str, float] = field(default_factory=dict)
    beta1: float = 0.95
    beta2: float = 0.95
    eps: float = 1e-8
    provenance: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", feature_names(self.features))
        GradFeatures(self.features, self.beta1, self.beta2, self.eps)
        if not finite(self.coefficients):
            raise ValueError(f"coefficients must be finite numbers, got {dict(self.coefficients)}")
        for name, value in self.coefficients.items():
            if name.startswith("gamma") and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        object.__setattr__(self, "coefficients", {name: float(value) for name, value in self.coefficients.items()})
        object.__setattr__(self, "expr", read_expr(self.expr, self.features, self.coefficients))

    # As text

    def to_json(self) -> str:
        """The rule as JSON, for `from_json`."""
        names = ("features", "expr", "coefficients", "beta1", "beta2", "eps", "provenance")
        return json.dumps({"format": FORMAT, **{name: getattr(self, name) for name in names}})

    @classmethod
    def from_json(cls, text: str) -> "SymbolicRule":
        """The rule in `text`, which is read through a whitelist and never executed. Raises ValueError."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not a rule: {error}") from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"not a rule: format must be {FORMAT!r}")
        kinds: dict[str, type | tuple[type, ...]] = {"features": list, "expr": (list, str, int, float)}
        kinds |= {"coefficients": dict, "provenance": str}
        kinds |= dict.fromkeys(("beta1", "beta2", "eps"), (int, float))
        if data.keys() != kinds.keys():
            raise ValueError(f"a rule must have {', '.join(kinds)}; got {', '.join(map(str, data))}")
        for name, kind in kinds.items():
            if not isinstance(data[name], kind) or isinstance(data[name], bool):
                raise ValueError(f"rule: {name} must not be {data[name]!r:.60}")
        if not all(isinstance(name, str) for name in data["features"]):
            raise ValueError("rule: features must be names")
        return cls(**data)

    def latex(self) -> str:
        """The equation in LaTeX."""
        return latex(fold(self.expr, self.coefficients), {})

    # What it is

    @cached_property
    def memory(self) -> int:
        """Steps that it looks back through explicit taps."""
        return max((node[2] for node in walk(self.expr) if isinstance(node, tuple) and node[0] == "z"), default=0)

    @cached_property
    def traces(self) -> list[tuple[Any, ...]]:
        """Its running sums, inner ones first."""
        return traces(self.expr)

    def taps(self) -> list[tuple[str, int]]:
        """The (feature, tap) pairs that it reads."""
        return sorted({(n[1], n[2]) for n in walk(self.expr) if isinstance(n, tuple) and n[0] == "z"})

    def complexity(self) -> int:
        """Mapping complexity: nodes of the equation with its constants folded."""
        return node_count(fold(self.expr, self.coefficients))

    def with_coefficients(self, values: Mapping[str, float]) -> "SymbolicRule":
        """The same form with other numbers."""
        return replace(self, coefficients={**self.coefficients, **values})

    def gradient_features(self) -> GradFeatures:
        """What computes its features."""
        return GradFeatures(self.features, self.beta1, self.beta2, self.eps)

    # Its values

    def init_state(self, like: Tensor) -> State:
        """State before the first step for coordinates (P,): delayed features (P, F, memory), then one trace each (P,).

        Every tensor has the coordinates first. Delayed features start at rest, traces at 0.
        """
        delay = [self._rest(like)[:, None].repeat(len(like), 1, self.memory)] if self.memory else []
        return [*delay, *(torch.zeros_like(like) for _ in self.traces)]

    def _rest(self, like: Tensor) -> Tensor:
        """Its features' values at rest (F,)."""
        known = self.gradient_features()
        return like.new_tensor([known.rest(name) for name in self.features])

    @cached_property
    def at_rest(self) -> float:
        """Its output at the first step of a coordinate whose gradient is zero."""
        z = self._rest(torch.zeros(1, dtype=torch.float64))[None]
        return float(self.step(z, self.init_state(z[:, 0]))[0])

    def step(self, z: Tensor, state: State, coefficients: Coefficients | None = None) -> tuple[Tensor, State]:
        """Output (P,) for features z (P, F), and the next state; differentiable in coefficients and state."""
        values = self.coefficients if coefficients is None else coefficients
        delay, old = (state[0], state[1:]) if self.memory else (None, state)
        new: dict[Any, Tensor] = {}
        known: dict[Any, Any] = {}

        def feature(name: str, tap: int) -> Tensor:
            column = self.features.index(name)
            return z[:, column] if tap == 0 else delay[:, column, tap - 1]  # type: ignore[index]

        for before, node in zip(old, self.traces, strict=True):
            decay = values[node[1]] if isinstance(node[1], str) else node[1]
            new[node] = decay * before + evaluate(node[2], feature, new.__getitem__, values, known=known)
        out = evaluate(self.expr, feature, new.__getitem__, values, known=known)
        kept = [torch.cat([z[:, :, None], delay[:, :, :-1]], 2)] if delay is not None else []
        return out + torch.zeros_like(z[:, 0]), [*kept, *new.values()]

    def __call__(self, history: Tensor, coefficients: Coefficients | None = None) -> Tensor:
        """Output (P,) from a window of features (L, P, F), history[0] now.

        Before the window features count as at rest, and traces as 0.
        """
        values = self.coefficients if coefficients is None else coefficients
        length, rest = len(history), self._rest(history)

        def at(node: Expr, offset: int) -> Any:
            def feature(name: str, tap: int) -> Tensor:
                column = self.features.index(name)
                if tap + offset >= length:
                    return torch.zeros_like(history[0, :, 0]) + rest[column]
                return history[tap + offset, :, column]

            def trace(inner: tuple[Any, ...]) -> Any:
                decay = values[inner[1]] if isinstance(inner[1], str) else inner[1]
                total = torch.zeros_like(history[0, :, 0])
                for back in reversed(range(offset, length)):
                    total = decay * total + at(inner[2], back)
                return total

            return evaluate(node, feature, trace, values)

        return at(self.expr, 0) + torch.zeros_like(history[0, :, 0])


def r2_score(target: Tensor, predicted: Tensor) -> float:
    """1 - sum (y - p)^2 / sum (y - mean y)^2. Raises ValueError where y does not vary."""
    spread = float(((target - target.mean()) ** 2).sum())
    if not spread > 0:
        raise ValueError("R2 must have targets that vary, got constant ones")
    return 1 - float(((target - predicted) ** 2).sum()) / spread


def temporal_perception(importance: Tensor) -> list[float]:
    """Mean step back, sum tau I / sum I, of each feature, for importances (L, F); 0 for a feature without any."""
    steps = torch.arange(len(importance), dtype=importance.dtype)
    total = importance.sum(0)
    return ((steps[:, None] * importance).sum(0) / total.clamp(min=1e-300)).tolist()


def tap_importance(rule: SymbolicRule, X: Tensor) -> Tensor:
    """std(z_g) times the mean |d o / d z_g,t-tau| over windows X (N, L, F); (L, F)."""
    history = X.transpose(0, 1).clone().requires_grad_()
    out = rule(history)
    if not out.requires_grad:
        return torch.zeros(X.shape[1:], dtype=X.dtype)
    (slope,) = torch.autograd.grad(out.sum(), history)
    spread = X.reshape(-1, X.shape[-1]).std(0)
    return (spread * slope.abs().nan_to_num(0, 0, 0).mean(1)).detach()


def drop_small_taps(rule: SymbolicRule, X: Tensor, share: float = 0.01) -> SymbolicRule:
    """The rule without the taps whose importance on X (N, L, F) is below `share` of the largest."""
    importance = tap_importance(rule, X)
    least = share * importance.max()
    gone = {
        ("z", name, tap)
        for name, tap in rule.taps()
        if tap < len(importance) and importance[tap, rule.features.index(name)] < least
    }

    def without(node: Expr) -> Expr:
        if not isinstance(node, tuple):
            return node
        if node[0] == "z":
            return 0.0 if node in gone else node
        return (node[0], *(without(operand) for operand in node[1:]))

    return replace(rule, expr=_tidy(without(fold(rule.expr, rule.coefficients))), coefficients={})


def _tidy(expr: Expr) -> Expr:
    """Fold once more until nothing changes: a tap that became 0 takes its function with it."""
    while (folded := fold(expr, {})) != expr:
        expr = folded
    return expr


REMEMBERING = ("mt", "AdamUp_unNorm", "AdamUp_Norm", "mom5", "mom9", "mom99", "nt")  # not 0 after any gradient but 0
FORGETTING = 0.99  # decay of the trace that does so for the others; it leaves single precision after 8,000 zeros


def silent_at_rest(rule: SymbolicRule) -> SymbolicRule:
    """The rule, but 0 for a coordinate that never had a gradient but 0; the rule itself where it is 0 there already.

    An equation with a value at rest (an intercept; DM's log, which rests at -1) would move dead weights for ever. Taken
    off everywhere that value would move all others; so a factor [|z| > 0] turns the rule on with the first gradient. A
    coordinate that was alive once and then has zero gradients is left to the equation, whatever it says there.
    """
    if abs(rule.at_rest) < 1e-12 and "log" not in rule.features:
        return rule
    witness = next((name for name in REMEMBERING if name in rule.features), None)
    if witness is not None:
        seen: Expr = ("abs", ("z", witness, 0))
    else:
        name = next((n for n in ("sgn", "g", "gt") if n in rule.features), rule.features[0])
        rest, z = rule.gradient_features().rest(name), ("z", name, 0)
        seen = ("trace", FORGETTING, ("abs", ("sub", z, rest) if rest else z))
    return replace(rule, expr=("mul", ("greater", seen, 0.0), rule.expr))


def sum_of(terms: Sequence[Expr]) -> Expr:
    """Their sum as an equation of small depth. Raises ValueError without any."""
    if not terms:
        raise ValueError("a sum must have at least one term, got none")
    if len(terms) == 1:
        return terms[0]
    middle = len(terms) // 2
    return ("add", sum_of(terms[:middle]), sum_of(terms[middle:]))


def soft_clip(name: str, tap: int, gamma: str) -> Expr:
    """gamma tanh(z / gamma): the feature, at most gamma."""
    return ("mul", gamma, ("tanh", ("div", ("z", name, tap), gamma)))


def fir_rule(features: Sequence[str], weights: Tensor, gamma: Sequence[float], **options: Any) -> SymbolicRule:
    """The form that captures the paper's equations: psi = -sum_g sum_tau W_g,tau gamma_g tanh(z_g,t-tau / gamma_g).

    Args:
        features: in the fixed order.
        weights: W (L, F).
        gamma: by feature.
        options: of `SymbolicRule`; outer_tanh=True for tanh(psi).
    """
    outer = options.pop("outer_tanh", False)
    coefficients = {f"gamma_{name}": float(value) for name, value in zip(features, gamma, strict=True)}
    terms: list[Expr] = []
    for column, name in enumerate(features):
        for tap in range(len(weights)):
            key = f"W_{name}_{tap}"
            coefficients[key] = float(weights[tap, column])
            terms.append(("mul", key, soft_clip(name, tap, f"gamma_{name}")))
    psi: Expr = ("neg", sum_of(terms))
    return SymbolicRule(tuple(features), ("tanh", psi) if outer else psi, coefficients, **options)


def pole_rule(
    features: Sequence[str],
    w: Sequence[float],
    a: Sequence[float],
    rho: Sequence[float],
    gamma: Sequence[float],
    **options: Any,
) -> SymbolicRule:
    """psi with W_g,tau = a_g rho_g^tau + w_g [tau = 0]: phi = gamma tanh(z/gamma), e <- rho e + phi, -(w phi + a e).

    One running sum a feature is all it keeps. Raises ValueError as `SymbolicRule`.
    """
    coefficients: dict[str, float] = {}
    terms: list[Expr] = []
    for name, *numbers in zip(features, w, a, rho, gamma, strict=True):
        for key, number in zip(("w", "a", "rho", "gamma"), numbers, strict=True):
            coefficients[f"{key}_{name}"] = float(number)
        phi = soft_clip(name, 0, f"gamma_{name}")
        terms += [("mul", f"w_{name}", phi), ("mul", f"a_{name}", ("trace", f"rho_{name}", phi))]
    for key, number in coefficients.items():
        if key.startswith("rho") and not 0 <= number < 1:
            raise ValueError(f"{key} must be in [0, 1), got {number}")
    return SymbolicRule(tuple(features), ("neg", sum_of(terms)), coefficients, **options)


def pole_weights(a: float, w: float, rho: float, length: int) -> Tensor:
    """W_tau, tau < length, of one feature of a pole rule (float64)."""
    weights = a * rho ** torch.arange(length, dtype=torch.float64)
    weights[0] += w
    return weights
