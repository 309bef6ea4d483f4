"""Symbolic regression by genetic programming: pyoperon, or gplearn (spec c.7).

Both give candidates: equations over columns of X, each ("z", column, 0), from short to accurate.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from symbolic_l2o.expr import Expr, evaluate, fold, node_count

Array = np.ndarray[Any, Any]
Backend = Literal["operon", "gplearn"]
OPERON_SYMBOLS = "add,mul,sub,aq,tanh,exp,square,sqrtabs,constant,variable"
KNEE = 0.01  # a shorter equation may explain this much less


@dataclass(frozen=True)
class Search:
    """How long to search; with `evaluations` the result depends on the seed alone."""

    seconds: int = 0
    """largest processor time; 0: until the other limits"""
    evaluations: int = 1_000_000
    generations: int = 60
    population: int = 500
    length: int = 40
    """most nodes of an equation, before its scale and intercept"""
    symbols: str = OPERON_SYMBOLS
    """of pyoperon"""


@dataclass(frozen=True)
class Candidate:
    """An equation over columns, scale and intercept included, and its R2 on the rows it was found on."""

    expr: Expr
    r2: float

    @property
    def complexity(self) -> int:
        """Its nodes."""
        return node_count(self.expr)


def predict(expr: Expr, X: Tensor) -> Tensor:
    """Values (N,) of an equation over columns X (N, C)."""

    def column(name: Any, tap: int) -> Tensor:
        return X[:, name]

    return evaluate(expr, column, _no_trace, {}) + torch.zeros_like(X[:, 0])


def _no_trace(node: Any) -> Any:
    raise AssertionError("regression makes no traces")


def symbolic_regression(
    X: Array, y: Array, backend: Backend = "operon", search: Search | None = None, seed: int = 0
) -> list[Candidate]:
    """Candidates for y (N,) from X (N, C), by rising complexity.

    Raises:
        ImportError: if the package of `backend` is missing, naming how to get it.
        ValueError: for an unknown backend, or data that are not finite.
    """
    if backend not in ("operon", "gplearn"):
        raise ValueError(f"backend must be operon or gplearn, got {backend!r}")
    X, y = np.asarray(X, np.float64), np.asarray(y, np.float64)
    if X.ndim != 2 or y.shape != (len(X),) or not (np.isfinite(X).all() and np.isfinite(y).all()):
        raise ValueError(f"X and y must be finite, (N, C) and (N,), got {X.shape} and {y.shape}")
    search = search or Search()
    raw = _operon(X, y, search, seed) if backend == "operon" else _gplearn(X, y, search, seed)
    inputs, target = torch.from_numpy(X), torch.from_numpy(y)
    total = float(((target - target.mean()) ** 2).sum()) or 1.0
    found = []
    for expr in raw:
        values = predict(expr, inputs)
        if not bool(torch.isfinite(values).all()):
            continue
        scale, shift = line_fit(values, target)
        full = fold(("add", ("mul", scale, expr), shift), {})
        found.append(Candidate(full, 1 - float(((target - predict(full, inputs)) ** 2).sum()) / total))
    return sorted(found, key=lambda candidate: (candidate.complexity, -candidate.r2))


def line_fit(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Scale and shift of the least squares line through (N,) points; scale 0 where x is constant to rounding.

    Written out: LAPACK's solver rounds by where its arrays lie in memory, so that two searches would differ.
    """
    centred = x - x.mean()
    constant = centred.norm() <= len(x) * torch.finfo(x.dtype).eps * x.norm()
    scale = 0.0 if constant else float((centred * (y - y.mean())).sum() / centred.square().sum())
    return scale, float(y.mean()) - scale * float(x.mean())


def knee(candidates: Sequence[Candidate], scores: Iterable[float]) -> Candidate:
    """The shortest candidate whose score (held-out R2) is within 0.01 of the best. Raises ValueError without any."""
    pairs = [(score, c) for score, c in zip(scores, candidates, strict=True) if math.isfinite(score)]
    if not pairs:
        raise ValueError("symbolic regression must find at least one finite equation, got none")
    best = max(score for score, _ in pairs)
    return min((c for score, c in pairs if score >= best - KNEE), key=lambda c: c.complexity)


def _operon(X: Array, y: Array, search: Search, seed: int) -> list[Expr]:
    try:
        from pyoperon.sklearn import SymbolicRegressor  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("backend 'operon' needs the package pyoperon: pip install pyoperon") from error
    regressor = SymbolicRegressor(
        allowed_symbols=search.symbols,
        objectives=["r2", "length"],
        optimizer_iterations=5,
        max_length=search.length,
        population_size=search.population,
        generations=search.generations,
        max_evaluations=search.evaluations,
        max_time=search.seconds or None,
        n_threads=1,
        random_state=seed,
    )
    regressor.fit(X, y)
    columns = {key: int(name[1:]) - 1 for key, name in regressor.variables_.items()}  # X1 is column 0
    return [_from_operon(list(entry["tree"].Nodes), columns) for entry in regressor.pareto_front_]


OPERON_NAMES = {"Add": "add", "Sub": "sub", "Mul": "mul", "Aq": "aq", "Tanh": "tanh", "Exp": "exp"}
OPERON_NAMES |= {"Square": "square", "Sqrtabs": "sqrt", "Div": "div"}


def _from_operon(nodes: list[Any], columns: dict[int, int]) -> Expr:
    """Operon's postfix list, in which the first operand is the one next to its operator."""

    def read(end: int) -> tuple[Expr, int]:
        node = nodes[end]
        if node.IsConstant:
            return float(node.Value), end - 1
        if node.IsVariable:
            return ("mul", float(node.Value), ("z", columns[node.HashValue], 0)), end - 1
        operands, place = [], end - 1
        for _ in range(node.Arity):
            operand, place = read(place)
            operands.append(operand)
        return (OPERON_NAMES[str(node.Type).rpartition(".")[2]], *operands), place

    expr, rest = read(len(nodes) - 1)
    assert rest == -1
    return expr


def _gplearn(X: Array, y: Array, search: Search, seed: int) -> list[Expr]:
    """gplearn optimises no constants and keeps no front: its last population by length."""
    try:
        from gplearn.genetic import SymbolicRegressor  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("backend 'gplearn' needs the package gplearn: pip install gplearn") from error
    regressor = SymbolicRegressor(
        population_size=search.population,
        generations=search.generations,
        function_set=("add", "sub", "mul", "sqrt", "neg", "abs", _gplearn_tanh()),
        parsimony_coefficient=1e-4,
        max_samples=0.9,
        n_jobs=1,
        random_state=seed,
    )
    regressor.fit(X, y)
    best: dict[int, Any] = {}
    for program in regressor._programs[-1]:
        if program is not None and program.length_ <= search.length:
            kept = best.get(program.length_)
            if kept is None or program.raw_fitness_ < kept.raw_fitness_:
                best[program.length_] = program
    return [_from_gplearn(best[length].program) for length in sorted(best)]


def _gplearn_tanh() -> Any:
    from gplearn.functions import make_function  # type: ignore[import-untyped]

    return make_function(function=np.tanh, name="tanh", arity=1)


def _from_gplearn(program: list[Any]) -> Expr:
    """gplearn's prefix list."""
    items = iter(program)

    def read() -> Expr:
        item = next(items)
        if isinstance(item, int | np.integer):
            return ("z", int(item), 0)
        if isinstance(item, float | np.floating):
            return float(item)
        return (item.name, *(read() for _ in range(item.arity)))

    return read()
