"""The LSTM and GRU cells of the learnt rules, in Keras's layout (spec c2, c10).

An LSTM's kernel (in, 80), recurrent kernel (20, 80) and one bias (80,) hold the gates i, f, candidate, o along their
last axis. A GRU's hold z, r, h; its bias has two rows, for the input and for the recurrent part.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from optimizer_amalgamation.rule import State, Weights

UNITS = 20


def lstm_shapes(name: str, inputs: int, units: int = UNITS) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's weights by name."""
    gates = 4 * units
    return {f"{name}_kernel": (inputs, gates), f"{name}_recurrent": (units, gates), f"{name}_bias": (gates,)}


def glorot(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Uniform in +-sqrt(6 / (in + out)) for a kernel (in, out)."""
    return (6 / (shape[0] + shape[1])) ** 0.5 * (2 * torch.rand(shape, generator=generator) - 1)


def orthonormal(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Rows that are orthonormal, for a recurrent kernel (units, gates)."""
    return torch.nn.init.orthogonal_(torch.empty(shape), generator=generator)


def init_lstm(name: str, inputs: int, generator: torch.Generator | None, units: int = UNITS) -> Weights:
    """Fresh weights of one layer: Glorot, orthonormal, and a bias of 1 for the forget gate only."""
    shapes = lstm_shapes(name, inputs, units)
    bias = torch.zeros(4 * units)
    bias[units : 2 * units] = 1
    kernel = glorot(shapes[f"{name}_kernel"], generator)
    return {
        f"{name}_kernel": kernel,
        f"{name}_recurrent": orthonormal(shapes[f"{name}_recurrent"], generator),
        f"{name}_bias": bias,
    }


def zero_lstm(layers: int, like: Tensor, units: int = UNITS) -> State:
    """h and c (..., n, units) of each layer before the first step of coordinates like `like` (..., n)."""
    lead, n = like.shape[:-1], like.shape[-1]
    return {f"{part}{layer}": like.new_zeros(*lead, units, n).mT for layer in range(layers) for part in "hc"}


def lstm_stack(layers: int, weights: Weights, state: State, x: Tensor) -> tuple[Tensor, State]:
    """Output (..., n, units) of layers `lstm0`, `lstm1` ... for inputs (..., n, in), and their next states."""
    new: State = {}
    for layer in range(layers):
        parts = [weights[f"lstm{layer}_{part}"] for part in ("kernel", "recurrent", "bias")]
        h, c, *_ = Cell.apply(x.mT, state[f"h{layer}"].mT, state[f"c{layer}"].mT, *parts)
        x = h.mT
        new |= {f"h{layer}": x, f"c{layer}": c.mT}
    return x, new


class Cell(torch.autograd.Function):
    """One LSTM step, coordinates last, with its pull-back written out: up to twice as fast as autograd's.

    x (..., in, n), h and c (..., units, n) -> h, c. A coordinate's state lies in memory along n, so that a gate is a
    contiguous run. tanh(y) is 2 sigmoid(2 y) - 1, so that the four gates are one sigmoid, the candidate's rows doubled.
    """

    @staticmethod
    def forward(
        x: Tensor, h: Tensor, c: Tensor, kernel: Tensor, recurrent: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """h, c, and for the pull-back: the inputs with a row of ones, the joint weights, the gates, sigmoid(2 c)."""
        inputs = torch.cat([x, h, torch.ones_like(h[..., :1, :])], -2)
        joint = torch.cat([kernel, recurrent, bias.unsqueeze(-2)], -2).mT * _doubled(bias)
        gates = (joint @ inputs).sigmoid_()
        i, f, s, o = gates.chunk(4, -2)
        c = (f * c).addcmul_(i, s, value=2).sub_(i)
        saturated = (2 * c).sigmoid_()
        return o.neg().addcmul_(o, saturated, value=2), c, inputs, joint, gates, saturated

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """See `torch.autograd.Function`."""
        ctx.save_for_backward(inputs[2], *output[2:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # nobody asks for those of the last four
        ctx.sizes = [inputs[0].shape[-2], inputs[1].shape[-2], 1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_h: Tensor | None, of_c: Tensor | None, *_: None) -> tuple[Tensor, ...]:
        """Gradients with respect to x, h, c, kernel, recurrent, bias."""
        c, inputs, joint, gates, saturated = ctx.saved_tensors
        i, f, s, o = gates.chunk(4, -2)
        of_h = torch.zeros_like(c) if of_h is None else of_h.contiguous()
        of_c = torch.zeros_like(c) if of_c is None else of_c.contiguous()
        slope = torch.ops.aten.sigmoid_backward
        of_c = torch.add(of_c, slope(of_h * o, saturated), alpha=4)
        of_z = torch.empty_like(gates)
        of_i, of_f, of_s, of_o = of_z.chunk(4, -2)
        torch.mul(of_c, s, out=of_i).mul_(2).sub_(of_c)
        torch.mul(of_c, c, out=of_f)
        torch.mul(of_c, i, out=of_s).mul_(2)
        torch.mul(of_h, saturated, out=of_o).mul_(2).sub_(of_h)
        slope.grad_input(of_z, gates, grad_input=of_z)
        of_x, of_h, _ = (joint.mT @ of_z).split(ctx.sizes, -2)
        of_joint = ((of_z @ inputs.mT) * _doubled(gates[..., 0])).mT
        of_kernel, of_recurrent, of_bias = of_joint.split(ctx.sizes, -2)
        return of_x, of_h, of_c * f, of_kernel, of_recurrent, of_bias.squeeze(-2)  # torch sums over replicates


def _doubled(like: Tensor) -> Tensor:
    """Column (4 units, 1): 2 for the candidate, 1 for the gates."""
    units = like.shape[-1] // 4
    column = like.new_ones(4 * units, 1)
    column[2 * units : 3 * units] = 2
    return column


def dense(weights: Weights, name: str, x: Tensor) -> Tensor:
    """x (..., n, in) through `<name>_kernel` (in, out) and `<name>_bias` (out,)."""
    return (weights[f"{name}_kernel"].mT @ x.mT + weights[f"{name}_bias"].unsqueeze(-1)).mT


def gru(kernel: Tensor, recurrent: Tensor, bias: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """Next state (..., n, units): h' = z h + (1 - z) tanh(x_h + r (h R + b)_h), the reset applied after the product."""
    from_x = x @ kernel + bias[..., :1, :]
    from_h = h @ recurrent + bias[..., 1:, :]
    z_x, r_x, h_x = from_x.chunk(3, -1)
    z_h, r_h, h_h = from_h.chunk(3, -1)
    z = torch.sigmoid(z_x + z_h)
    return z * h + (1 - z) * torch.tanh(h_x + torch.sigmoid(r_x + r_h) * h_h)
