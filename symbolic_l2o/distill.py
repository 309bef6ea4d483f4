"""From a teacher's records to an update rule (spec c.7, c.8)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from symbolic_l2o.expr import Expr, fold
from symbolic_l2o.features import feature_names
from symbolic_l2o.records import SRData
from symbolic_l2o.regression import Candidate, Search, knee, predict, symbolic_regression
from symbolic_l2o.rule import SymbolicRule, r2_score, silent_at_rest
from symbolic_l2o.template import fit_fir, fit_pole

Backend = Literal["operon", "gplearn", "template", "template_tanh", "pole"]


@dataclass(frozen=True)
class Distilled:
    """An equation and how well it says what the teacher did, on other runs and coordinates than it was fitted on."""

    equation: SymbolicRule
    """as found, with its intercept: what is judged and measured"""
    rule: SymbolicRule
    """the same, but 0 for coordinates that never had a gradient: what is deployed, see `silent_at_rest`"""
    r2: float
    """of the equation, held out"""
    r2_train: float
    candidates: int = 1
    front_r2: float = float("-inf")
    """the best of all candidates, held out; the equation is the shortest within 0.01 of it"""


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
    """The equation that a backend finds in a teacher's records.

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
    note, scores = f"{backend}, {len(train)} rows, seed {seed}", []
    if backend == "pole":
        equation, count = fit_pole(train, names, provenance=note), 1
    elif backend == "template" or backend == "template_tanh":
        equation, count = fit_fir(train, names, backend == "template_tanh", provenance=note), 1
    else:
        spread = train.X.reshape(-1, len(names)).std(0).clamp(min=1e-30)  # raw gradients are ~5e-4
        flat, held = ((rows_.X / spread).flatten(1).double() for rows_ in (train, test))
        own = seed if search_seed is None else search_seed
        found = symbolic_regression(flat.numpy(), train.y.double().numpy(), backend, search, own)
        scores = [_score(candidate, held, test.y) for candidate in found]
        equation, count = _equation(knee(found, scores).expr, names, spread, note), len(found)
    r2 = fidelity(equation, test)
    front = max([r2, *scores])
    return Distilled(equation, silent_at_rest(equation), r2, fidelity(equation, train), count, front)


def _score(candidate: Candidate, X: Tensor, y: Tensor) -> float:
    values = predict(candidate.expr, X)
    return r2_score(y, values) if bool(torch.isfinite(values).all()) else float("-inf")


def _equation(expr: Expr, names: tuple[str, ...], spread: Tensor, note: str) -> SymbolicRule:
    """Columns become features and taps, the scale of the features goes into the equation."""

    def placed(node: Expr) -> Expr:
        if not isinstance(node, tuple):
            return node
        if node[0] == "z":
            tap, column = divmod(node[1], len(names))
            return ("mul", 1 / float(spread[column]), ("z", names[column], tap))
        return (node[0], *(placed(operand) for operand in node[1:]))

    return SymbolicRule(names, fold(placed(expr), {}), provenance=note)
