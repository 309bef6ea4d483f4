"""One step of an LSTM for many coordinates at once, with its backward pass written out (spec c.3).

Coordinates come last, (width, P): each gate is then contiguous memory, which vectorises, where `nn.LSTMCell` has rows
of 4 x 7 numbers. Every saturating function is a logistic one, tanh x = 2 sigmoid(2 x) - 1, several times cheaper and
equal up to the last digit of 1.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def _tanh_(x: Tensor) -> Tensor:
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


class _Cell(torch.autograd.Function):
    """(x (I, P), h (H, P), c (H, P), weight (4 H, I + H), bias (4 H,)) -> (h, c), gates in the order i, f, g, o."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        size = len(h)
        inputs = torch.cat([x, h])
        gates = torch.addmm(bias[:, None], weight, inputs)
        gates[2 * size : 3 * size].mul_(2)
        i, f, g, o = gates.sigmoid_().chunk(4)
        g.mul_(2).sub_(1)
        memory = (f * c).addcmul_(i, g)
        bent = _tanh_(memory.clone())
        ctx.save_for_backward(inputs, weight, gates, c, bent)
        return o * bent, memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dc: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        inputs, weight, gates, c, bent = ctx.saved_tensors
        size = len(c)
        i, f, g, o = gates.chunk(4)
        dc = torch.addcmul(dh, dh * bent, bent, value=-1).mul_(o).add_(dc)
        slopes = torch.addcmul(gates, gates, gates, value=-1)  # s (1 - s)
        slopes[2 * size : 3 * size].copy_(g).mul_(g).neg_().add_(1)  # 1 - g^2
        for part, by in zip(slopes.chunk(4), ((dc, g), (dc, c), (dc, i), (dh, bent)), strict=True):
            part.mul_(by[0]).mul_(by[1])
        dx, before = (weight.T @ slopes).split([len(inputs) - size, size])
        return dx, before, dc.mul_(f), slopes @ inputs.T, slopes.sum(1)


class _Elu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp(max=0).exp_().sub_(1).add_(x.clamp(min=0))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return y.clamp(max=0).add_(1).mul_(slope)


def affine(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer's output (width, P) for x (in, P)."""
    return torch.addmm(layer.bias[:, None], layer.weight, x)


def elu(x: Tensor) -> Tensor:
    """x where positive, else e^x - 1, to the last digit of 1."""
    return _Elu.apply(x)  # type: ignore[no-any-return]


def lstm_step(cell: nn.LSTMCell, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Next hidden and cell state (H, P) of `cell` for x (I, P); differentiable once in all of them and its weights."""
    weight = torch.cat([cell.weight_ih, cell.weight_hh], 1)
    return _Cell.apply(x, h, c, weight, cell.bias_ih + cell.bias_hh)  # type: ignore[no-any-return]
