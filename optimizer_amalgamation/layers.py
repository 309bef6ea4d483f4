"""A layer of many copies of a network at once, written out: its columns, their transpose, its slope (spec h7).

z = W X + b, X the columns of its inputs (a convolution's: its patches, grouped by their place in the pool's window),
then y = max(z) over the window, then ReLU or sigmoid. Samples lie last in memory, so that columns are copied in runs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """A convolution without padding or a dense layer, and what follows it.

    Args:
        outputs, inputs: of its kernel as a matrix.
        kernel: side of a convolution's; 0: dense.
        stride: of a convolution.
        pool: side of the max-pool behind it; 1: none.
        activation: behind it.
        mean: dense: on the means over all positions.
    """

    outputs: int
    inputs: int
    kernel: int = 0
    stride: int = 1
    pool: int = 1
    activation: Literal["none", "relu", "sigmoid"] = "none"
    mean: bool = False

    def places(self, side: int) -> int:
        """Of the pool's window along a side of a convolution's inputs."""
        return ((side - self.kernel) // self.stride + 1) // self.pool

    def columns(self, x: Tensor) -> Tensor:
        """X (R, inputs, p p h w B) of x (R, C, H, W, B); of a dense layer (R, inputs, B), x may be that already."""
        if not self.kernel:
            x = x.mean((2, 3)) if self.mean else x
            return x.flatten(1, -2)
        k, p = self.kernel, self.pool
        found = x.unfold(2, k, self.stride).unfold(3, k, self.stride)  # (R, C, H', W', B, k, k)
        h, w = self.places(x.shape[2]), self.places(x.shape[3])
        found = found[:, :, : h * p, : w * p].unflatten(3, (w, p)).unflatten(2, (h, p))
        return found.permute(0, 1, 7, 8, 3, 5, 2, 4, 6).reshape(len(x), self.inputs, -1)

    def fold(self, columns: Tensor, shape: torch.Size) -> Tensor:
        """The transpose of `columns`: (..., inputs, L) to (..., *shape), shape (C, H, W, B) or (inputs, B)."""
        if len(shape) == 2:
            return columns
        lead, (channels, height, width, batch) = columns.shape[:-2], shape
        if self.mean:
            return (columns / (height * width))[..., None, None, :].expand(*lead, *shape)
        if not self.kernel:
            return columns.view(*lead, *shape)
        k, p, s = self.kernel, self.pool, self.stride
        h, w = self.places(height), self.places(width)
        parts = columns.reshape(-1, channels, k * k, p, p, h, w, batch).unbind(2)
        found = columns.new_zeros(len(parts[0]), *shape)
        size, (copy, channel, row, column, one) = parts[0].shape, found.stride()
        stride = (copy, channel, s * row, s * column, s * p * row, s * p * column, one)
        for number, part in enumerate(parts):
            found.as_strided(size, stride, number // k * row + number % k * column).add_(part)
        return found.view(*lead, *shape)

    def activated(self, z: Tensor) -> Tensor:
        """y (R, outputs, L / p²) for z (R, outputs, L)."""
        y = z.unflatten(2, (self.pool**2, -1)).amax(2) if self.pool > 1 else z
        return y.relu() if self.activation == "relu" else y.sigmoid() if self.activation == "sigmoid" else y

    def slope(self, z: Tensor, y: Tensor) -> Tensor | None:
        """dy/dz (R, outputs, p², L / p²), shared by equal largest ones; None: 1."""
        along = None
        if self.activation == "relu":
            along = y.sign()
        elif self.activation == "sigmoid":
            along = y * (1 - y)
        if self.pool == 1:
            return None if along is None else along.unsqueeze(2)
        z = z.unflatten(2, (self.pool**2, -1))
        largest = (z - z.amax(2, keepdim=True)).sign_().add_(1)  # no comparison: those are slower
        count = largest.sum(2)
        return largest.mul_((1 / count if along is None else along.div_(count)).unsqueeze(2))

    def placed(self, y: Tensor, x: Tensor) -> Tensor:
        """y as inputs of the next layer, (R, outputs, h, w, B) or (R, outputs, B), x the inputs of this one."""
        if not self.kernel:
            return y
        return y.unflatten(2, (self.places(x.shape[2]), self.places(x.shape[3]), -1))
