"""A list of tensors that adds, divides, saturates as one: torch's foreach kernels behind a tensor's operators.

A rule and its features are written once, for a tensor; on a TensorList the same lines launch one kernel for all
parameters instead of one for each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class TensorList:
    """Tensors of one device and dtype; operands are other lists of the same shapes, numbers, or 0-d tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.dtype = self.tensors[0].dtype

    def _with(self, kernel: Callable[..., Any], other: Any) -> "TensorList":
        return TensorList(kernel(self.tensors, _plain(other)))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "TensorList":
        return TensorList([function(tensor) for tensor in self.tensors])

    def __add__(self, other: Any) -> "TensorList":
        return self._with(torch._foreach_add, other)

    __radd__ = __add__

    def __mul__(self, other: Any) -> "TensorList":
        return self._with(torch._foreach_mul, other)

    __rmul__ = __mul__

    def __sub__(self, other: Any) -> "TensorList":
        return self._with(torch._foreach_sub, other)

    def __rsub__(self, other: Any) -> "TensorList":
        return self.neg() + other

    def __truediv__(self, other: Any) -> "TensorList":
        return self._with(torch._foreach_div, other)

    def __rtruediv__(self, other: Any) -> "TensorList":
        return self.reciprocal() * other

    def __pow__(self, other: Any) -> "TensorList":
        return self._with(torch._foreach_pow, other)

    def __rpow__(self, other: Any) -> "TensorList":
        return TensorList(torch._foreach_pow(_plain(other), self.tensors))

    def __gt__(self, other: Any) -> "TensorList":
        others = other.tensors if isinstance(other, TensorList) else [_plain(other)] * len(self.tensors)
        return TensorList([tensor > its for tensor, its in zip(self.tensors, others, strict=True)])

    pow = __pow__

    def mul_(self, factor: float) -> "TensorList":
        """In place."""
        torch._foreach_mul_(self.tensors, factor)
        return self

    def add_(self, other: "TensorList", alpha: float = 1.0) -> "TensorList":
        """In place: + alpha * other."""
        torch._foreach_add_(self.tensors, other.tensors, alpha=alpha)
        return self

    def addcmul_(self, one: "TensorList", other: "TensorList", value: float) -> "TensorList":
        """In place: + value * one * other."""
        torch._foreach_addcmul_(self.tensors, one.tensors, other.tensors, value)
        return self

    def copy_(self, other: "TensorList") -> "TensorList":
        """In place."""
        torch._foreach_copy_(self.tensors, other.tensors)
        return self

    def to(self, dtype: torch.dtype) -> "TensorList":
        """In another dtype."""
        return self._map(lambda tensor: tensor.to(dtype))

    def clone(self) -> "TensorList":
        """A copy."""
        return self._map(torch.clone)

    def clamp(self, min: float | None = None, max: float | None = None) -> "TensorList":
        """Within bounds."""
        return self._map(lambda tensor: tensor.clamp(min, max))

    def neg(self) -> "TensorList":
        """Minus it."""
        return TensorList(torch._foreach_neg(self.tensors))

    def reciprocal(self) -> "TensorList":
        """One over it."""
        return TensorList(torch._foreach_reciprocal(self.tensors))

    def abs(self) -> "TensorList":
        """Absolute values."""
        return TensorList(torch._foreach_abs(self.tensors))

    def sqrt(self) -> "TensorList":
        """Roots."""
        return TensorList(torch._foreach_sqrt(self.tensors))

    def exp(self) -> "TensorList":
        """Exponentials."""
        return TensorList(torch._foreach_exp(self.tensors))

    def log(self) -> "TensorList":
        """Logarithms."""
        return TensorList(torch._foreach_log(self.tensors))

    def sign(self) -> "TensorList":
        """Signs."""
        return TensorList(torch._foreach_sign(self.tensors))

    def tanh(self) -> "TensorList":
        """Hyperbolic tangents."""
        return TensorList(torch._foreach_tanh(self.tensors))

    def sinh(self) -> "TensorList":
        """Hyperbolic sines."""
        return TensorList(torch._foreach_sinh(self.tensors))

    def asinh(self) -> "TensorList":
        """Their inverse."""
        return self._map(torch.asinh)

    def erfc(self) -> "TensorList":
        """Complementary error functions."""
        return TensorList(torch._foreach_erfc(self.tensors))

    def square(self) -> "TensorList":
        """Squares."""
        return self * self

    def relu(self) -> "TensorList":
        """Positive parts."""
        return self._map(torch.relu)


def _plain(other: Any) -> Any:
    if isinstance(other, TensorList):
        return other.tensors
    return other.item() if isinstance(other, Tensor) else other
