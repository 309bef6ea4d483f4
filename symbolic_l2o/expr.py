"""Equations as plain data: a tree of tuples, read through a whitelist, never evaluated as code (spec g, c.7, c.10).

An equation is a number; the name of a coefficient; ("z", feature, tap), a feature `tap` steps ago;
("trace", rho, x), the running sum e <- rho e + x; or (operator, operand, ...) with an operator of OPERATORS.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from operator import add, mul, sub, truediv
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from symbolic_l2o.features import feature_names

Expr = float | str | tuple[Any, ...]
Value = Any  # a tensor, a list of tensors or a number: whatever the operators take


class Operator(NamedTuple):
    """Number of operands, meaning on tensors, and LaTeX with {0}, {1} for the operands."""

    arity: int
    apply: Callable[..., Any]
    latex: str


def spow(x: Tensor | float, y: Tensor | float) -> Tensor:
    """sign(x) |x|^y."""
    x = torch.as_tensor(x) if isinstance(x, float) else x
    return x.sign() * x.abs() ** y


def aq(x: Tensor, y: Tensor) -> Tensor:
    """The analytic quotient x / sqrt(1 + y^2)."""
    return x / (1 + y * y) ** 0.5


def greater(x: Tensor | float, y: Tensor | float) -> Tensor:
    """1 where x > y, else 0."""
    return (x - y > 0).to((x - y).dtype)  # type: ignore[union-attr]


OPERATORS = {
    "add": Operator(2, add, "{0}+{1}"),
    "sub": Operator(2, sub, "{0}-\\left({1}\\right)"),
    "mul": Operator(2, mul, "{0}\\,{1}"),
    "div": Operator(2, truediv, "\\frac{{{0}}}{{{1}}}"),
    "pow": Operator(2, spow, "\\operatorname{{spow}}\\left({0},{1}\\right)"),
    "aq": Operator(2, aq, "\\frac{{{0}}}{{\\sqrt{{1+\\left({1}\\right)^2}}}}"),
    "greater": Operator(2, greater, "\\left[{0}>{1}\\right]"),
    "neg": Operator(1, lambda x: x.neg(), "-\\left({0}\\right)"),
    "abs": Operator(1, lambda x: x.abs(), "\\left|{0}\\right|"),
    "sign": Operator(1, lambda x: x.sign(), "\\operatorname{{sign}}\\left({0}\\right)"),
    "relu": Operator(1, lambda x: x.relu(), "\\max\\left(0,{0}\\right)"),
    "exp": Operator(1, lambda x: x.exp(), "e^{{{0}}}"),
    "log": Operator(1, lambda x: (x.abs() + 1e-8).log(), "\\ln\\left|{0}\\right|"),
    "sqrt": Operator(1, lambda x: x.abs().sqrt(), "\\sqrt{{\\left|{0}\\right|}}"),
    "square": Operator(1, lambda x: x.square(), "\\left({0}\\right)^2"),
    "cube": Operator(1, lambda x: x * x * x, "\\left({0}\\right)^3"),
    "tanh": Operator(1, lambda x: x.tanh(), "\\tanh\\left({0}\\right)"),
    "sinh": Operator(1, lambda x: x.sinh(), "\\sinh\\left({0}\\right)"),
    "asinh": Operator(1, lambda x: x.asinh(), "\\operatorname{{asinh}}\\left({0}\\right)"),
    "erfc": Operator(1, lambda x: x.erfc(), "\\operatorname{{erfc}}\\left({0}\\right)"),
}
MOST_NODES, MOST_DEPTH, MOST_TAP = 5000, 200, 1000
SUMS, INDICES = ("add", "sub", "neg"), "jkli"
SYMBOLS = {"mt": "\\tilde m", "gt": "\\tilde g", "nt": "\\tilde n", "AdamUp_unNorm": "m", "AdamUp_Norm": "\\hat m"}
SYMBOLS |= {"AdamDn_Norm": "d", "t": "\\bar t"}


def read_expr(data: Any, features: tuple[str, ...], coefficients: Mapping[str, float]) -> Expr:
    """The equation in JSON data (lists, strings, numbers).

    Raises:
        ValueError: for an unknown operator, feature or coefficient, a wrong number of operands, a tap that is not an
            integer in [0, 1000], a number that is not finite, a decay that is no coefficient or number in [0, 1), or
            more than 5,000 nodes.
    """
    count = 0

    def read(item: Any, depth: int) -> Expr:
        nonlocal count
        count += 1
        if count > MOST_NODES or depth > MOST_DEPTH:
            raise ValueError(f"equation must have at most {MOST_NODES} nodes, {MOST_DEPTH} deep")
        if isinstance(item, str):
            if item not in coefficients:
                raise ValueError(f"coefficient must be one of {', '.join(coefficients) or 'none'}, got {item!r}")
            return item
        if isinstance(item, int | float) and not isinstance(item, bool):
            if not abs(item) < 1e300:
                raise ValueError(f"constants must be finite, got {item}")
            return float(item)
        if not isinstance(item, list | tuple) or not item or not isinstance(item[0], str):
            raise ValueError(f"equation must be made of numbers, names and [operator, ...], got {item!r:.60}")
        kind, *operands = item
        if kind == "z":
            return _read_feature(operands, features)
        if kind == "trace":
            _need(kind, operands, 2)
            decay = read(operands[0], depth + 1)
            if isinstance(decay, tuple) or not 0 <= (coefficients[decay] if isinstance(decay, str) else decay) < 1:
                raise ValueError(f"the decay of a trace must be a coefficient or number in [0, 1), got {operands[0]!r}")
            return (kind, decay, read(operands[1], depth + 1))
        if kind not in OPERATORS:
            raise ValueError(f"operator must be one of z, trace, {', '.join(OPERATORS)}; got {kind!r:.60}")
        _need(kind, operands, OPERATORS[kind].arity)
        return (kind, *(read(operand, depth + 1) for operand in operands))

    return read(data, 0)


def _need(kind: str, operands: list[Any], arity: int) -> None:
    if len(operands) != arity:
        raise ValueError(f"operator {kind} must have {arity} operands, got {len(operands)}")


def _read_feature(operands: list[Any], features: tuple[str, ...]) -> Expr:
    _need("z", operands, 2)
    name, tap = operands
    if name not in features:
        feature_names([str(name)])  # says which there are, if it is none at all
        raise ValueError(f"feature must be one of the rule's {', '.join(features)}, got {name!r}")
    if not isinstance(tap, int) or isinstance(tap, bool) or not 0 <= tap <= MOST_TAP:
        raise ValueError(f"tap must be an integer in [0, {MOST_TAP}], got {tap!r}")
    return ("z", name, tap)


def walk(expr: Expr) -> Iterator[Expr]:
    """All nodes, a parent before its operands; a feature is one node."""
    yield expr
    if isinstance(expr, tuple) and expr[0] != "z":
        for operand in expr[1:]:
            yield from walk(operand)


def node_count(expr: Expr) -> int:
    """Complexity: each operator, variable, constant counts 1 (a coefficient times a variable: 3)."""
    return sum(1 for _ in walk(expr))


def traces(expr: Expr) -> list[tuple[Any, ...]]:
    """The different traces, inner ones first."""
    found: dict[tuple[Any, ...], None] = {}
    for node in reversed(list(walk(expr))):
        if isinstance(node, tuple) and node[0] == "trace":
            found[node] = None
    return list(found)


def evaluate(
    expr: Expr,
    feature: Callable[[str, int], Value],
    trace: Callable[[tuple[Any, ...]], Value],
    coefficients: Mapping[str, Value],
    faster: Mapping[str, Callable[..., Value]] = MappingProxyType({}),
    known: dict[Expr, Value] | None = None,
) -> Value:
    """The equation's value.

    Args:
        expr: the equation.
        feature: (name, tap) -> value.
        trace: the whole trace node -> value.
        coefficients: by name.
        faster: operators to be taken in place of those of OPERATORS.
        known: values of parts, which is added to; calls that share it compute a part that they share once.
    """
    known = {} if known is None else known

    def value(node: Expr) -> Value:
        if isinstance(node, str):
            return coefficients[node]
        if not isinstance(node, tuple):
            return node
        if node[0] == "z":
            return feature(node[1], node[2])
        if node[0] == "trace":
            return trace(node)
        if node not in known:
            operands = [value(operand) for operand in node[1:]]
            if all(isinstance(operand, int | float) for operand in operands):
                operands[0] = torch.tensor(operands[0], dtype=torch.float64)
            known[node] = faster.get(node[0], OPERATORS[node[0]].apply)(*operands)
        return known[node]

    return value(expr)


def fold(expr: Expr, values: Mapping[str, float]) -> Expr:
    """The equation with numbers for its coefficients, constants multiplied out and signs drawn into them."""
    if isinstance(expr, str):
        return float(values[expr])
    if not isinstance(expr, tuple) or expr[0] == "z":
        return expr
    kind, *operands = expr
    x, *rest = [fold(operand, values) for operand in operands]
    if kind == "trace":
        return (kind, x, *rest)
    if not any(isinstance(operand, tuple) for operand in (x, *rest)):
        return _number(evaluate((kind, x, *rest), _no_feature, _no_feature, {}))
    if kind == "neg":
        return _scaled(-1.0, x)
    if kind == "mul" and not isinstance(x, tuple):
        return _scaled(float(x), rest[0])
    if kind == "mul" and not isinstance(rest[0], tuple):
        return _scaled(float(rest[0]), x)
    if kind == "div" and not isinstance(rest[0], tuple) and float(rest[0]):
        return _scaled(1 / float(rest[0]), x)
    if kind in ("add", "sub") and not isinstance(rest[0], tuple) and float(rest[0]) == 0:
        return x
    if kind == "add" and x == 0:
        return rest[0]
    return (kind, x, *rest)


def _number(value: Tensor) -> float:
    return float(value)


def _scaled(factor: float, x: Expr) -> Expr:
    """factor * x with as few nodes as its form allows."""
    if not isinstance(x, tuple):
        return factor * float(x)
    if factor == 0:
        return 0.0
    if factor == 1:
        return x
    if x[0] == "mul" and not isinstance(x[1], tuple):
        return _scaled(factor * x[1], x[2])
    if x[0] in ("add", "sub") and factor == -1:
        return (x[0], _scaled(factor, x[1]), _scaled(factor, x[2]))
    return ("mul", factor, x)


def _no_feature(*_: Any) -> Any:
    raise AssertionError("a constant has no feature")


def latex(expr: Expr, values: Mapping[str, float]) -> str:
    """The equation in LaTeX, numbers with three digits.

    A trace is a sum over the past, with j for the step back; a trace within it has k, and so on.
    """

    def text(node: Expr, offset: str = "", depth: int = 0) -> str:
        if not isinstance(node, tuple):
            return _digits(values[node] if isinstance(node, str) else node)
        if node[0] == "z":
            when = ("t" if node[2] == 0 else f"t-{node[2]}") + offset
            return SYMBOLS.get(node[1], "\\mathrm{" + node[1] + "}") + f"_{{{when}}}"
        if node[0] == "trace":
            index, decay = INDICES[depth] if depth < len(INDICES) else f"j_{{{depth}}}", text(node[1])
            base = f"\\left({decay}\\right)" if "cdot" in decay else decay
            term = enclosed(node[2], text(node[2], f"{offset}-{index}", depth + 1), SUMS)
            return f"\\sum_{{{index}\\geq 0}}{base}^{{{index}}}\\,{term}"
        operands = [text(operand, offset, depth) for operand in node[1:]]
        if node[0] == "mul":  # a sum over the past takes all that follows it
            operands = [
                enclosed(operand, words, bound)
                for operand, words, bound in zip(node[1:], operands, ((*SUMS, "trace"), SUMS), strict=True)
            ]
        if node[0] == "add":
            operands[1] = enclosed(node[2], operands[1], ("neg",))
        return OPERATORS[node[0]].latex.format(*operands)

    def enclosed(node: Expr, words: str, kinds: tuple[str, ...]) -> str:
        return f"\\left({words}\\right)" if isinstance(node, tuple) and node[0] in kinds else words

    return text(expr)


def _digits(number: float) -> str:
    mantissa, _, exponent = f"{number:.3g}".partition("e")
    words = f"{mantissa}\\cdot10^{{{int(exponent)}}}" if exponent else mantissa
    return f"\\left({words}\\right)" if number < 0 else words


def finite(values: Mapping[str, float]) -> bool:
    """Whether all coefficients are finite numbers that a float can hold."""
    numbers = (isinstance(v, int | float) and not isinstance(v, bool) for v in values.values())
    return all(numbers) and all(abs(v) <= sys.float_info.max for v in values.values())
