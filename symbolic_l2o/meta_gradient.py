"""The meta-gradient without an unrolled graph (spec h.1, h.2).

With gradients detached, x_u = x_0 + eta sum_{s<u} o_s, so for M = sum_{u=0}^U f_u(x_u)

    dM/dphi = eta sum_{s=0}^{U-1} <c_s, do_s/dphi>,   c_s = sum_{u>s} g_u:

suffix sums of gradients that the inner loop computed anyway, against which the update rule alone is differentiated.
Equal to backpropagation through the unrolled optimizee with second-order terms dropped.
"""

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import jvp, vmap

State = list[Tensor]
UpdateFn = Callable[[Tensor, State], tuple[Tensor, State]]
TunedFn = Callable[[Tensor, Tensor, State], tuple[Tensor, State]]


def suffix_sums(gradients: Tensor, stale_tail: Tensor | None = None) -> Tensor:
    """c_s = sum_{u>s} g_u, (U, P), of gradients (U + 1, P).

    Args:
        gradients: g_0 to g_U.
        stale_tail: the released code takes its last loss at x_{U-1}; its gradient there (P,) then replaces g_U.
    """
    if stale_tail is None:
        return gradients[1:].flip(0).cumsum(0).flip(0)
    own = gradients[1:-1].flip(0).cumsum(0).flip(0)
    return torch.cat([own + stale_tail, torch.zeros_like(gradients[:1])])


def meta_gradient(
    update_fn: UpdateFn,
    parameters: Sequence[Tensor],
    gradients: Tensor,
    features: Tensor,
    state: State,
    *,
    eta: float = 0.01,
    coords: Tensor | None = None,
    chunk: int = 0,
    stale_tail: Tensor | None = None,
) -> list[Tensor]:
    """dM/dphi of one window, one tensor for each of `parameters`.

    Args:
        update_fn: (features (n, F), state) -> (output (n,), next state); coordinates are independent.
        parameters: phi.
        gradients: (U + 1, P), at x_0 to x_U.
        features: (U, P, F) as the rule saw them.
        state: at the window's start, tensors with coordinates first.
        eta: step of x.
        coords: indices (S,) of coordinates drawn uniformly without replacement: an unbiased estimate, scaled by P / S.
        chunk: coordinates at a time; 0: all. Exact, saves memory.
        stale_tail: see `suffix_sums`.

    Raises:
        ValueError: where gradients are not one more than features, or U < 1.
    """
    if len(features) < 1 or len(gradients) != len(features) + 1:
        raise ValueError(f"gradients must be one more than features, got {len(gradients)} and {len(features)}")
    cotangents = suffix_sums(gradients, stale_tail)
    scale = eta
    if coords is not None:
        scale *= gradients.shape[1] / len(coords)
        cotangents, features = cotangents[:, coords], features[:, coords]
        state = [tensor[coords] for tensor in state]
    total = [torch.zeros_like(parameter) for parameter in parameters]
    size = chunk or cotangents.shape[1]
    for first in range(0, cotangents.shape[1], size):
        part = slice(first, first + size)
        kept = [tensor[part] for tensor in state]
        with torch.enable_grad():
            value = torch.zeros((), dtype=cotangents.dtype, device=cotangents.device)
            for z, c in zip(features[:, part], cotangents[:, part], strict=True):
                out, kept = update_fn(z, kept)
                value = value + (c * out).sum()
            found = torch.autograd.grad(scale * value, list(parameters), allow_unused=True)
        for sum_, gradient in zip(total, found, strict=True):
            if gradient is not None:
                sum_ += gradient
    return total


class ForwardMode:
    """dM/dtheta while the inner loop runs, with memory that does not depend on the window's length (spec h.2).

    S_u = dx_u/dtheta is carried along, one vector (P,) for each of the K parameters: dM/dtheta = sum_u <g_u, S_u>.

    Args:
        tuned_fn: (theta (K,), features (P, F), state) -> (output (P,), next state).
        theta: (K,).
        like: a vector (P,).
        state: at the start.
        eta: step of x.
    """

    def __init__(self, tuned_fn: TunedFn, theta: Tensor, like: Tensor, state: State, eta: float = 0.01) -> None:
        self.tuned_fn, self.eta = tuned_fn, eta
        self.basis = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
        self.state = state
        self.restart(theta, like)

    def restart(self, theta: Tensor, like: Tensor) -> None:
        """Start a window at theta: what came before counts as given; the state stays."""
        self.theta = theta.detach()
        count = len(theta)
        self.total = torch.zeros_like(self.theta)
        self.sensitivity = like.new_zeros(count, len(like))
        self.tangents = [tensor.new_zeros(count, *tensor.shape) for tensor in self.state]

    def see(self, gradient: Tensor) -> None:
        """Account for the loss at the present x, given its gradient (P,)."""
        self.total += (self.sensitivity @ gradient).to(self.total.dtype)

    def step(self, z: Tensor) -> Tensor:
        """Output (P,) for features (P, F); state and sensitivities go one step on."""

        def function(theta: Tensor, state: State) -> tuple[Tensor, State]:
            return self.tuned_fn(theta, z, state)

        def along(direction: Tensor, tangents: State) -> tuple[Tensor, State]:
            return jvp(function, (self.theta, self.state), (direction, tangents))[1]

        moved, self.tangents = vmap(along)(self.basis, self.tangents)
        with torch.no_grad():
            out, self.state = function(self.theta, self.state)
        self.sensitivity += self.eta * moved
        del moved
        gc.collect(1)  # closures of torch.func and of the rule refer to themselves and hold tensors of this step
        return out
