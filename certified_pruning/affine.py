"""Affine maps between ReLUs, with the three products that bounds need: W x, W^T rows, |W| r.

All act on flattened activations (rows, features); convolutions know the shapes of their maps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]
Pair = tuple[int, int]

FEW_CHANNELS = 4
"""Up to so many input channels, matrix product and fold beat conv_transpose2d on the CPU (2 to 5 times, measured)."""


@dataclass(frozen=True)
class Conv:
    """Convolution without bias, on flattened maps; average pooling is one with groups = channels."""

    weight: Tensor  # (out channels, in channels / groups, kh, kw)
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    in_shape: Shape  # (channels, h, w)
    out_shape: Shape

    def linear(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, *self.in_shape)
        return F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups).flatten(1)

    def radius(self, r: Tensor) -> Tensor:
        return replace(self, weight=self.weight.abs()).linear(r)

    def transposed(self, rows: Tensor) -> Tensor:
        # Rows and columns that the stride never reached get coefficient zero by output_padding.
        extra = [
            size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
            for size, out, s, p, d, k in zip(
                self.in_shape[1:],
                self.out_shape[1:],
                self.stride,
                self.padding,
                self.dilation,
                self.weight.shape[2:],
                strict=True,
            )
        ]
        rows = rows.reshape(-1, *self.out_shape)
        if self.groups == 1 and self.in_shape[0] <= FEW_CHANNELS and rows.device.type == "cpu":
            columns = self.weight.flatten(1).T @ rows.flatten(2)
            size, kernel = self.in_shape[1:], self.weight.shape[2:]
            return F.fold(columns, size, kernel, self.dilation, self.padding, self.stride).flatten(1)
        return F.conv_transpose2d(
            rows, self.weight, None, self.stride, self.padding, extra, self.groups, self.dilation
        ).flatten(1)


@dataclass(frozen=True)
class Dense:
    """Matrix product without bias."""

    weight: Tensor  # (out, in)

    def linear(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    def radius(self, r: Tensor) -> Tensor:
        return r @ self.weight.abs().T

    def transposed(self, rows: Tensor) -> Tensor:
        return rows @ self.weight


@dataclass(frozen=True)
class Scale:
    """Elementwise factor: a batch normalisation that has no convolution or linear layer right before it."""

    weight: Tensor  # (n,)

    def linear(self, x: Tensor) -> Tensor:
        return x * self.weight

    def radius(self, r: Tensor) -> Tensor:
        return r * self.weight.abs()

    def transposed(self, rows: Tensor) -> Tensor:
        return rows * self.weight


@dataclass(frozen=True)
class Affine:
    """z = op_m(... op_1(x)) + bias on flattened activations; without ops it is the identity.

    `bias` (out,) is the bias of the whole map; `bn_beta` (out,) the shift of the batch normalisation folded last,
    or `bias` when there is none (the released BaBSR scores use it, spec c.8.8).
    """

    ops: tuple[Conv | Dense | Scale, ...]
    bias: Tensor
    bn_beta: Tensor
    in_shape: Shape
    out_shape: Shape

    def forward(self, x: Tensor) -> Tensor:
        """(rows, in) -> (rows, out)."""
        for op in self.ops:
            x = op.linear(x)
        return x + self.bias

    def transposed(self, rows: Tensor) -> Tensor:
        """Coefficients on the output, (rows, out), to coefficients on the input, (rows, in)."""
        for op in reversed(self.ops):
            rows = op.transposed(rows)
        return rows

    def radius(self, r: Tensor) -> Tensor:
        """|W| r for a non-negative radius r, (rows, in) -> (rows, out); op by op, exact for a single op (and Scale)."""
        for op in self.ops:
            r = op.radius(r)
        return r

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Affine:
        ops = tuple(replace(op, weight=op.weight.to(device, dtype)) for op in self.ops)
        return replace(self, ops=ops, bias=self.bias.to(device, dtype), bn_beta=self.bn_beta.to(device, dtype))
