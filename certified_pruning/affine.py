"""Affine maps between ReLUs, with the three products that bounds need: W x, W^T rows, |W| r.

All act on flattened activations (rows, features); convolutions know the shapes of their maps. `linear` adds a bias on
the way where one is given, which saves a pass over the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]
Pair = tuple[int, int]

FEW_CHANNELS, SOME_CHANNELS = 4, 16
"""Numbers of input channels up to which another form beats conv_transpose2d on the CPU, see `Conv.spread`."""


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

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x, plus a bias (out channels,)."""
        x = x.reshape(-1, *self.in_shape)
        return F.conv2d(x, self.weight, bias, self.stride, self.padding, self.dilation, self.groups).flatten(1)

    def radius(self, r: Tensor) -> Tensor:
        return replace(self, weight=self.weight.abs()).linear(r)

    def transposed(self, rows: Tensor) -> Tensor:
        return self.spread(rows.reshape(-1, *self.out_shape), self.padding, self.in_shape[1:]).flatten(1)

    def spread(self, maps: Tensor, padding: Pair, size: Shape) -> Tensor:
        """Transposed convolution of maps (rows, out channels, h, w) to (rows, in channels, *size).

        Pixels of the input that the stride never reached get zero. Three forms of one sum: conv_transpose2d, and on the
        CPU where there are few input channels a convolution at the resolution of `maps` with one channel for each of
        the stride x stride phases (2.5 to 5 times as fast, measured), or a matrix product and fold.
        """
        kernel, stride, channels = self.weight.shape[2:], self.stride, self.in_shape[0]
        plain = self.groups == 1 and maps.device.type == "cpu"
        whole = self.dilation == (1, 1) and all(k % s == 0 for k, s in zip(kernel, stride, strict=True))
        if plain and channels <= SOME_CHANNELS and max(stride) > 1 and whole:
            # One more pixel of zeros around the phases where the stride leaves pixels of the input out.
            more = [int((size[i] + 2 * padding[i]) % stride[i] > 0) for i in (0, 1)]
            taps = self._phases.shape[2:]
            phases = F.conv2d(maps, self._phases, None, 1, (taps[0] - 1 + more[0], taps[1] - 1 + more[1]))
            before = (padding[0] + more[0] * stride[0], padding[1] + more[1] * stride[1])
            places = _interleaved(channels, tuple(phases.shape[2:]), stride, before, tuple(size)).to(phases.device)
            return phases.flatten(1).index_select(1, places).unflatten(1, (channels, *size))
        if plain and channels <= FEW_CHANNELS:
            columns = self.weight.flatten(1).T @ maps.flatten(2)
            return F.fold(columns, size, kernel, self.dilation, padding, stride)
        extra = [
            size[i] - ((maps.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + self.dilation[i] * (kernel[i] - 1) + 1)
            for i in (0, 1)
        ]
        return F.conv_transpose2d(maps, self.weight, None, stride, padding, extra, self.groups, self.dilation)

    @cached_property
    def _phases(self) -> Tensor:
        """Kernel (in channels * stride * stride, out channels, kernel / stride, ...), taps reversed."""
        (out, channels, *kernel), (a, b) = self.weight.shape, self.stride
        taps = self.weight.view(out, channels, kernel[0] // a, a, kernel[1] // b, b)
        return taps.flip(2, 4).permute(1, 3, 5, 0, 2, 4).flatten(0, 2).contiguous()


@lru_cache(maxsize=256)
def _interleaved(channels: int, shape: Shape, stride: Pair, padding: Pair, size: Shape) -> Tensor:
    """Where in phases (channels * stride * stride, *shape) each pixel of maps (channels, *size) comes from, flattened.

    One `index_select` does what fold does in three times as long, which would add up blocks that never overlap.
    """
    numbers = torch.arange(channels * prod(stride) * prod(shape), dtype=torch.float64)
    return F.fold(numbers.view(1, -1, prod(shape)), size, stride, 1, padding, stride).flatten().long()


@dataclass(frozen=True)
class Dense:
    """Matrix product without bias."""

    weight: Tensor  # (out, in)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def radius(self, r: Tensor) -> Tensor:
        return r @ self.weight.abs().T

    def transposed(self, rows: Tensor) -> Tensor:
        return rows @ self.weight


@dataclass(frozen=True)
class Scale:
    """Elementwise factor: a batch normalisation that has no convolution or linear layer right before it."""

    weight: Tensor  # (n,)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x * self.weight if bias is None else torch.addcmul(bias, x, self.weight)

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
        if self._fused is None:
            for op in self.ops:
                x = op.linear(x)
            return x + self.bias
        for op in self.ops[:-1]:
            x = op.linear(x)
        return self.ops[-1].linear(x, self._fused)

    @cached_property
    def _fused(self) -> Tensor | None:
        """`bias` as the last op can add it: for a convolution one number a channel. None where it cannot."""
        last = self.ops[-1] if self.ops else None
        if not isinstance(last, Conv):
            return None if last is None else self.bias
        channels = self.bias.view(last.out_shape[0], -1)
        return channels[:, 0].contiguous() if bool((channels == channels[:, :1]).all()) else None

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
