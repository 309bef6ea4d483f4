"""From a teacher's records to an update rule (spec c.7, c.8)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from symbolic_l2o.expr import Expr, fold, walk
from symbolic_l2o.features import GradFeatures, feature_names
from symbolic_l2o.records import SRData
from symbolic_l2o.regression import Candidate, Search, knee, predict, symbolic_regression
from symbolic_l2o.rule import SymbolicRule, r2_score
from symbolic_l2o.template import fit_fir, fit_pole

Backend = Literal["operon", "gplearn", "template", "template_tanh", "pole"]


@dataclass(frozen=True)
class Distilled:
    """A rule and how well it says what the teacher did, on rows of other runs and coordinates than it was fitted on."""

    rule: SymbolicRule
    r2: float
    """of the rule, held out"""
    r2_train: float
    candidates: int = 1


def fidelity(rule: SymbolicRule, data: SRData) -> float:
    """R2 of a rule's outputs on windows."""
    with torch.no_grad():
        return r2_score(data.y, rule(data.X.transpose(0, 1)))


def distill(
    data: SRData,
    features: str | Sequence[str],
    backend: Backend = "operon",
    *,
    seed: int = 0,
    search_seed: int | None = None,
    rows: int = 10_000,
    search: Search | None = None,
) -> Distilled:
    """The rule that a backend finds in a teacher's records.

    Args:
        data: of `collect`.
        features: the teacher's, in the order of the columns of data.X.
        backend: operon and gplearn search for any equation; template and pole fit a given form, template_tanh within
            an outer tanh.
        seed: of the split into training and held-out groups and of the rows drawn.
        search_seed: of operon and gplearn; `seed` if None.
        rows: most training rows.
        search: limits of operon and gplearn.

    Raises:
        ValueError: for an unknown backend or features that do not fit the data; ImportError for a missing package.
    """
    names = feature_names(features)
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if data.X.shape[2] != len(names):
        raise ValueError(f"features must be the {data.X.shape[2]} of the data, got {', '.join(names)}")
    train, test = data.split(seed)
    train = train.subsample(rows, seed)
    note = f"{backend}, {len(train)} rows, seed {seed}"
    if backend == "pole":
        rule, count = fit_pole(train, names, provenance=note), 1
    elif backend == "template" or backend == "template_tanh":
        rule, count = fit_fir(train, names, backend == "template_tanh", provenance=note), 1
    else:
        spread = train.X.reshape(-1, len(names)).std(0).clamp(min=1e-30)  # raw gradients are ~5e-4
        flat, held = ((rows_.X / spread).flatten(1).double() for rows_ in (train, test))
        own = seed if search_seed is None else search_seed
        found = symbolic_regression(flat.numpy(), train.y.double().numpy(), backend, search, own)
        best = knee(found, [_score(candidate, held, test.y) for candidate in found])
        rule, count = _rule(best.expr, names, spread, note), len(found)
    return Distilled(rule, fidelity(rule, test), fidelity(rule, train), count)


def _score(candidate: Candidate, X: Tensor, y: Tensor) -> float:
    values = predict(candidate.expr, X)
    return r2_score(y, values) if bool(torch.isfinite(values).all()) else float("-inf")


def _rule(expr: Expr, names: tuple[str, ...], spread: Tensor, note: str) -> SymbolicRule:
    """Columns become features and taps, the scale of the features goes into the equation, the intercept out of it.

    What is left at a gradient that was always zero is taken off, or a dead coordinate would drift.
    """

    def placed(node: Expr) -> Expr:
        if not isinstance(node, tuple):
            return node
        if node[0] == "z":
            tap, column = divmod(node[1], len(names))
            return ("mul", 1 / float(spread[column]), ("z", names[column], tap))
        return (node[0], *(placed(operand) for operand in node[1:]))

    full = fold(placed(expr), {})
    still = torch.tensor([[[resting(name) for name in names]]], dtype=torch.float64).expand(_reach(full) + 1, 1, -1)
    at_rest = float(SymbolicRule(names, full)(still))
    return SymbolicRule(names, _without(full, at_rest), provenance=note)


def _reach(expr: Expr) -> int:
    return max((node[2] for node in walk(expr) if isinstance(node, tuple) and node[0] == "z"), default=0)


def _without(expr: Expr, rest: float) -> Expr:
    """The equation minus its value at rest, drawn into its intercept where it has one."""
    if isinstance(expr, tuple) and expr[0] == "add" and isinstance(expr[2], float):
        left = expr[2] - rest
        return expr[1] if abs(left) < 1e-12 else ("add", expr[1], left)
    return expr if rest == 0 else ("sub", expr, rest)


def resting(name: str) -> float:
    """A feature's value where all gradients were zero."""
    zero = torch.zeros(1)
    features = GradFeatures([name])
    return float(features(zero, features.init(zero)))
