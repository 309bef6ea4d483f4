"""The program that lazy pixels leave, and how a network becomes one: a weight costs a shifted sum, nothing else costs.

New rows = relu(constant + matrix @ earlier rows), step after step; images are columns, side by side in memory.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from backdoor_lth.lazy_pixels import Lazy, Matrix, Pixels, bounded, csr
from backdoor_lth.traced import Traced, UnsupportedError, called, normalization

MOST_PIXELS = 4096
"""of a channel in a mean or a slice, whose matrix is read off all of them at once"""


@dataclass(frozen=True)
class Step:
    """New rows = constant + matrix @ rows from `first` on; `transposed` is for the gradient."""

    first: int
    constant: Tensor
    matrix: Tensor
    transposed: Tensor

    @staticmethod
    def of(matrix: Matrix, constant: np.ndarray, like: Tensor) -> "Step":
        """In the type of `like`."""
        first = int(matrix.indices.min(initial=matrix.shape[1] - 1))
        matrix = csr(matrix[:, first:])
        both = (_tensor(matrix, like), _tensor(csr(matrix.T), like))
        return Step(first, torch.from_numpy(constant).to(like)[:, None], *both)


class PixelProgram(nn.Module):
    """Runs the steps, on the CPU. Eval only; the gradient reaches the input alone. `rows` are the pixels computed."""

    def __init__(self, steps: list[Step], like: Tensor) -> None:
        super().__init__()
        self.register_buffer("anchor", like.new_zeros(()), persistent=False)
        self.steps, self.training = steps, False
        self.rows = sum(len(step.constant) for step in steps)

    def train(self, mode: bool = True) -> "PixelProgram":
        """Only `eval()` is allowed. Raises RuntimeError."""
        if mode:
            raise RuntimeError("a compacted network must stay in eval mode: its batch norm is folded")
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the network it was made of: (n, ...) -> (n, classes)."""
        logits: Tensor = _Steps.apply(x.flatten(1).t(), self.steps)
        return logits.t()


class _Steps(torch.autograd.Function):
    """All rows in one tensor, (rows, n), filled step after step; backwards the same with transposed matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: list[Step]) -> Tensor:
        start = len(x)
        rows = x.new_empty(start + sum(len(step.constant) for step in steps), x.shape[1])
        rows[:start] = x
        for step in steps:
            new = rows[start : start + len(step.constant)]
            torch.addmm(step.constant.expand_as(new), step.matrix, rows[step.first : start], out=new)
            if step is not steps[-1]:
                new.relu_()
            start += len(new)
        ctx.save_for_backward(rows)
        ctx.steps, ctx.inputs = steps, len(x)
        return new.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        gradients = torch.zeros_like(rows)
        end = len(rows)
        gradients[end - len(gradient) :] = gradient
        for step in reversed(ctx.steps):
            start = end - len(step.constant)
            own, before = gradients[start:end], gradients[step.first : start]
            if step is not ctx.steps[-1]:
                torch.ops.aten.threshold_backward.grad_input(own, rows[start:end], 0, grad_input=own)
            torch.addmm(before, step.transposed, own, out=before)
            end = start
        return gradients[: ctx.inputs], None


def pixel_program(graph: Traced, shape: tuple[int, ...]) -> PixelProgram:
    """The network as such a program, for images (channels, height, width) = shape.

    Raises:
        UnsupportedError: an operation that is neither linear nor a ReLU, or too many entries of matrices.
    """
    for node in graph.nodes:
        if graph.kind(node) == "channelwise":
            raise UnsupportedError(called(node))
    pixels = Pixels(shape)
    values: dict[fx.Node, Lazy] = {}
    for node in graph.nodes:
        sources = [values[each] for each in node.all_input_nodes]
        values[node] = _value(graph, node, pixels, sources) if sources else pixels.input
    steps = pixels.program(values[graph.nodes[-1]])
    return PixelProgram([Step.of(matrix, constant, graph.like) for matrix, constant in steps], graph.like)


def _value(graph: Traced, node: fx.Node, pixels: Pixels, sources: list[Lazy]) -> Lazy:
    x, kind = sources[0], graph.kind(node)
    module: Any = graph.module(node) if node.op == "call_module" else None
    count, size = len(x.const), int(np.prod(x.shape[1:]))
    if kind in ("output", "same"):
        return x
    if kind == "relu":
        return pixels.relu(x)
    if kind == "add":
        return pixels.add(x, sources[1])
    if kind == "cat":
        return pixels.cat(sources)
    if kind == "conv":
        shape, weight = convolution(module, x.shape[1:])
        return pixels.linear(x, shape, weight, _numbers(module.bias, shape[0]).repeat(weight.shape[0] // shape[0]))
    if kind == "linear" and len(x.shape) == 1:
        weight, outputs = csr(_numbers(module.weight, 0)), module.out_features
        return pixels.linear(x, (outputs,), weight, _numbers(module.bias, outputs))
    if kind == "norm":
        scale, shift = (_numbers(numbers, 0).repeat(size) for numbers in normalization(module))
        return pixels.linear(x, x.shape, csr(sparse.diags_array(scale)), shift)
    if kind == "flatten":
        return pixels.linear(x, (count,), csr(sparse.eye_array(count)))
    if kind == "pad":
        padding: Any = node.args[1]
        channels = x.shape[0] + sum(padding[4:])
        put = csr(sparse.eye_array(channels * size, count, k=-padding[4] * size))
        return pixels.linear(x, (channels, *x.shape[1:]), put)
    if kind == "pixels":
        return pixels.linear(x, *channelwise(graph.function(node), x.shape))
    raise UnsupportedError(called(node))


def convolution(module: nn.Conv2d, size: tuple[int, ...]) -> tuple[tuple[int, ...], Matrix]:
    """Shape of the output and matrix (outputs, inputs) of an ungrouped convolution on (in, *size)."""
    weight = module.weight.detach().double().cpu()
    taps = torch.eye(weight[0, 0].numel(), dtype=torch.float64).view(-1, 1, *weight.shape[2:])
    pixels = int(np.prod(size))
    places = torch.arange(1.0, pixels + 1, dtype=torch.float64).view(1, 1, *size)  # 0 is what lies outside
    read = F.conv2d(places, taps, None, module.stride, module.padding, module.dilation)[0].long()
    shape, read = (len(weight), *read.shape[1:]), read.flatten(1)
    count = read.shape[1]
    out, source, tap = weight.flatten(2).nonzero().T
    bounded(len(out) * count)
    inside = read[tap] > 0
    rows = (out[:, None] * count + torch.arange(count))[inside]
    columns = (source[:, None] * pixels + read[tap] - 1)[inside]
    values = weight.flatten(2)[out, source, tap][:, None].expand(-1, count)[inside]
    entries = (values.numpy(), (rows.numpy(), columns.numpy()))
    return shape, csr(sparse.csr_array(entries, shape=(len(weight) * count, weight.shape[1] * pixels)))


def channelwise(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[tuple[int, ...], Matrix]:
    """The same of a function that is linear in the pixels of each channel alone: a slice, a mean."""
    pixels = int(np.prod(shape[1:]))
    if pixels > MOST_PIXELS:
        raise UnsupportedError(f"{pixels} pixels at once")
    answers = function(torch.eye(pixels, dtype=torch.float64).view(pixels, 1, *shape[1:]))
    one = csr(answers.flatten(1).T.numpy())
    return (shape[0], *answers.shape[2:]), csr(sparse.kron(sparse.eye_array(shape[0]), one))


def _numbers(values: Tensor | None, count: int) -> np.ndarray:
    """As float64; this many zeros for None."""
    return np.zeros(count) if values is None else values.detach().double().cpu().numpy()


def _tensor(matrix: Matrix, like: Tensor) -> Tensor:
    rows, columns = (torch.from_numpy(part.astype(np.int32)) for part in (matrix.indptr, matrix.indices))
    values = torch.from_numpy(matrix.data).to(like.dtype)  # 32-bit places are the kernel's own: no copy at each call
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(rows, columns, values, matrix.shape, check_invariants=False)
