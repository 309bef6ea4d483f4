"""Operators that let a compiled rule run at the speed of memory: few divisions, no calls of a mathematical library."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# tanh x = x P(x^2) / Q(x^2) for |x| <= EDGE, beyond which it is 1 in float32; relative error 2e-8 before rounding.
# Least squares with Lawson's weights on Chebyshev points of the relative error.
EDGE = 9.01
P = (0.9999999792463049, 0.13380372970605503, 0.003494812586398408, 2.0596295117201246e-05, 1.3336869840762814e-08)
Q = (1.0, 0.46713688391622454, 0.02587403284903986, 0.0003284365564191878, 7.769293518828065e-07)


def polynomial(x: Any, coefficients: tuple[float, ...]) -> Any:
    """sum_k c_k x^k."""
    found = x * coefficients[-1] + coefficients[-2]
    for c in coefficients[-3::-1]:
        found = found * x + c
    return found


def rational_tanh(x: Any) -> Any:
    """tanh to a relative error of 4e-7, for float32; torch's own for other types and for numbers."""
    if x.dtype != torch.float32:
        return x.tanh()
    x = x.clamp(-EDGE, EDGE)
    square = x * x
    return x * polynomial(square, P) / polynomial(square, Q)


def divide(x: Any, y: Any) -> Any:
    """x / y; by a number as a product."""
    return x * (1 / y) if isinstance(y, float) and abs(y) > 1e-30 else x / y


FASTER: dict[str, Callable[..., Any]] = {"tanh": rational_tanh, "div": divide}


def fused(function: Callable[..., None]) -> Callable[..., None]:
    """`function(p, g, state, *numbers)`, pointwise and in place, as one loop that serves all sizes.

    Only sizes are left open: open numbers, as with dynamic=True, would be read again for every 16 weights.
    """

    def body(p: Tensor, g: Tensor, state: dict[str, Tensor], *numbers: Tensor) -> None:
        function(p, g, state, *numbers)

    body.__code__ = body.__code__.replace()  # torch allows a code object eight compilations, of all optimisers together
    options: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
    kernel = torch.compile(body, dynamic=False, fullgraph=True, options=options)

    def call(p: Tensor, g: Tensor, state: dict[str, Tensor], *numbers: Tensor) -> None:
        if p.numel() == 1:  # a size that torch would compile once more
            return function(p, g, state, *numbers)
        for tensor in (p, g, *state.values()):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return kernel(p, g, state, *numbers)

    return call
