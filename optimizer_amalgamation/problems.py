"""Optimizees: R copies of a problem at once, parameters flat (R, n), each with its own minibatch (spec c5, d, h7).

Losses of different copies never mix: a batch of copies equals separate runs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimizer_amalgamation.chains import Chain

Batch = tuple[Tensor, Tensor]
SAMPLES = 1024  # at most so many at once where no gradient is needed


@dataclass(frozen=True)
class Problem:
    """What an optimizer minimises.

    Args:
        name: of the network.
        sample_losses: (parameters (R, n), (inputs (R, B, ...), labels (R, B))) -> losses (R, B) of every sample.
        init: generator -> fresh parameters (n,).
        shapes: of the n parameters' tensors, in order.
        inputs, labels: to train on, (N, ...) and (N,).
        held_out: inputs and labels of the validation loss.
        batch_size: B.
        samplewise: whether a sample's loss does not depend on the others of its batch.
        set_training: called with whether batch norm shall use its batch's statistics.
        chain: the same losses with derivatives written out; None: autograd's.
    """

    name: str
    sample_losses: Callable[[Tensor, Batch], Tensor]
    init: Callable[[torch.Generator], Tensor]
    shapes: tuple[torch.Size, ...]
    inputs: Tensor
    labels: Tensor
    held_out: Batch
    batch_size: int = 128
    samplewise: bool = True
    set_training: Callable[[bool], Any] = bool
    chain: Chain | None = None

    @property
    def sizes(self) -> list[int]:
        """Coordinates of each tensor; their sum is n."""
        return [shape.numel() for shape in self.shapes]

    @property
    def size(self) -> int:
        """n."""
        return sum(self.sizes)

    def losses(self, params: Tensor, batch: Batch) -> Tensor:
        """Mean loss (R,) of each copy on its minibatch."""
        return self.sample_losses(params, batch).mean(1)

    def batch(self, rows: Tensor) -> Batch:
        """The minibatches of rows (R, B)."""
        flat = rows.reshape(-1)
        inputs, labels = self.inputs.index_select(0, flat), self.labels.index_select(0, flat)
        return inputs.view(*rows.shape, *inputs.shape[1:]), labels.view(rows.shape)

    def draw(self, unroll: int, generator: torch.Generator) -> Tensor:
        """Rows (unroll, B): without repetition, or permutation after permutation where there are fewer samples."""
        count, wanted = len(self.inputs), unroll * self.batch_size
        orders = [torch.randperm(count, generator=generator) for _ in range(math.ceil(wanted / count))]
        return torch.cat(orders)[:wanted].view(unroll, self.batch_size)


def gradients(problem: Problem, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses (R,) and their gradients (R, n) at params (R, n); no graph is left."""
    if problem.chain is not None:
        return problem.chain.gradients(params, *batch)
    leaf = params.detach().requires_grad_()
    with torch.enable_grad():
        losses = problem.losses(leaf, batch)
        (found,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), found


def curvature(problem: Problem, params: Tensor, batch: Batch, vectors: Tensor) -> Tensor:
    """Hessian of each copy's loss at params (R, n) times its vector (R, n)."""
    if problem.chain is not None:
        return problem.chain.curvature(params, *batch, vectors)
    leaf = params.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(problem.losses(leaf, batch).sum(), leaf, create_graph=True)
        if not found.requires_grad:  # a linear loss
            return torch.zeros_like(vectors)
        (product,) = torch.autograd.grad(found, leaf, vectors, allow_unused=True)
    return torch.zeros_like(vectors) if product is None else product


@torch.no_grad()
def sample_losses(problem: Problem, params: Tensor, batch: Batch) -> Tensor:
    """Losses (R, B) of every sample at params (R, n), without a graph."""
    return problem.sample_losses(params, batch) if problem.chain is None else problem.chain.losses(params, *batch)


@torch.no_grad()
def batch_losses(problem: Problem, params: Tensor, rows: Tensor) -> Tensor:
    """Losses (N, R) at params (R, n) on all minibatches of rows (N, R, B), by few forwards where that is exact."""
    if not problem.samplewise:
        return torch.stack([problem.losses(params, problem.batch(some)) for some in rows])
    _, copies, size = rows.shape
    found = []
    for some in rows.split(max(SAMPLES // (copies * size), 1)):
        joined = some.transpose(0, 1).reshape(copies, -1)
        losses = sample_losses(problem, params, problem.batch(joined))
        found.append(losses.view(copies, len(some), size).mean(2).t())
    return torch.cat(found)


@torch.no_grad()
def validation_losses(problem: Problem, params: Tensor) -> Tensor:
    """Mean loss (R,) of each copy on all held-out samples."""
    inputs, labels = problem.held_out
    problem.set_training(False)
    total = torch.zeros(len(params), dtype=torch.float64, device=params.device)
    size = max(SAMPLES // len(params), 1)
    for some, targets in zip(inputs.split(size), labels.split(size), strict=True):
        batch = (some.expand(len(params), *some.shape), targets.expand(len(params), -1))
        total += sample_losses(problem, params, batch).sum(1, dtype=torch.float64)
    problem.set_training(True)
    return total / len(labels)


# Functions without data


def quadratic(size: int, generator: torch.Generator) -> Problem:
    """½‖Ax − b‖² from x = 0, A and b standard normal."""
    a, b = torch.randn(size, size, generator=generator), torch.randn(size, generator=generator)
    return _analytic("quadratic", size, lambda x: 0.5 * (x @ a.to(x).t() - b.to(x)).square().sum(1))


def rastrigin(size: int, generator: torch.Generator) -> Problem:
    """‖Ax − b‖² − 10 Σ c cos(2πx) + 10 n from x = 0; A, b, c standard normal."""
    a, b = torch.randn(size, size, generator=generator), torch.randn(size, generator=generator)
    c = torch.randn(size, generator=generator)

    def value(x: Tensor) -> Tensor:
        waves = 10 * (c.to(x) * torch.cos(2 * math.pi * x)).sum(1)
        return (x @ a.to(x).t() - b.to(x)).square().sum(1) - waves + 10 * size

    return _analytic("rastrigin", size, value)


def _analytic(name: str, size: int, value: Callable[[Tensor], Tensor]) -> Problem:
    nothing = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)

    def sample_losses(params: Tensor, batch: Batch) -> Tensor:
        return value(params)[:, None].expand(-1, batch[1].shape[1])

    return Problem(name, sample_losses, lambda _: torch.zeros(size), (torch.Size([size]),), *nothing, nothing, 1)
