"""What an update rule is: a pure function of flat coordinates; what it may know beside the gradient."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Context:
    """What the coordinates are.

    Args:
        ranks: flags (n, 3): whether the coordinate's tensor has one, two, three axes (kernels of convolutions: none).
        tensors: (n,), int64: the number of each coordinate's tensor, ascending from 0.
        gumbel: noise (..., n, k) for a hard choice policy in meta-training; None when it is used.
    """

    ranks: Tensor
    tensors: Tensor
    gumbel: Tensor | None = None

    @classmethod
    def of(cls, shapes: Iterable[Sequence[int]], like: Tensor | None = None) -> "Context":
        """Of tensors of these shapes laid one behind the other, on the device and in the type of `like`."""
        shapes = [tuple(shape) for shape in shapes]
        device = None if like is None else like.device
        sizes = torch.tensor([prod(shape) for shape in shapes], device=device)
        flags = torch.tensor([[float(len(shape) == rank) for rank in (1, 2, 3)] for shape in shapes], device=device)
        flags = flags if like is None else flags.to(like.dtype)
        if len(shapes) == 1:  # nothing is stored a coordinate
            return cls(flags.expand(prod(shapes[0]), 3), sizes.new_zeros(1).expand(prod(shapes[0])))
        tensors = torch.repeat_interleave(torch.arange(len(shapes), device=device), sizes)
        return cls(flags[tensors], tensors)


class Rule(Protocol):
    """An update rule with learnt weights; nothing in it is changed by a call, and no argument is.

    A leading axis of R replicates may stand before everything: weights (R, *shape), gradients (R, n).
    """

    shapes: dict[str, tuple[int, ...]]

    def init(self, generator: torch.Generator | None = None, replicates: int | None = None) -> Weights:
        """Fresh weights of `shapes`, float32; with `replicates` that many, drawn one after the other, stacked."""
        ...

    def zero_state(self, like: Tensor, context: Context | None = None) -> State:
        """State before the first step of coordinates like `like` (..., n)."""
        ...

    def step(
        self, weights: Weights, state: State, grad: Tensor, context: Context | None = None
    ) -> tuple[Tensor, State]:
        """Update (..., n), to be subtracted, for a gradient (..., n); and the next state."""
        ...

    def warmup(self, state: State, grad: Tensor) -> State:
        """State after a step of SGD in the rule's stead: averages and clock advance, recurrent states do not."""
        ...


def init_replicates(draw: "Draw", replicates: int | None) -> Weights:
    """One draw, or `replicates` of them stacked. Raises ValueError for replicates < 1."""
    if replicates is None:
        return draw()
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1, got {replicates}")
    drawn = [draw() for _ in range(replicates)]
    return {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}


class Draw(Protocol):
    """Draws weights."""

    def __call__(self) -> Weights: ...
