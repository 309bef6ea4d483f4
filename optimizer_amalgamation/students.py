"""The student of the amalgamation, RNNProp (spec c2), and the older learnt optimiser it is compared with (spec c10)."""

import torch
from torch import Tensor

from optimizer_amalgamation.lstm import UNITS, dense, glorot, init_lstm, lstm_shapes, lstm_stack, zero_lstm
from optimizer_amalgamation.rule import Context, State, Weights, init_replicates

HEADS = ("free", "adam", "rmsprop")


class StudentRule:
    """RNNProp: u = alpha tanh(w h + b), h of an LSTM 2 x 20 that sees Adam's and RMSProp's directions.

    d = 1 / sqrt(v / (1 - beta2) + eps), inputs [m d / (1 - beta1), g d], |.| at most 2.3 and 1. 5,141 weights. State of
    a coordinate: m, v, and h, c (20 each) of each layer.

    Args:
        alpha: largest update.
        betas: decays of m and v.
        eps: inside the root.
        layers: 2; 1 is the ablation `half_depth`.
        head: free as above; adam or rmsprop: u = alpha exp(tanh(w h + b)) times the first or second input.

    Raises:
        ValueError: for alpha <= 0, a beta outside [0, 1), eps <= 0, layers < 1 or another head.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-10,
        layers: int = 2,
        head: str = "free",
    ) -> None:
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha must be positive and finite, got {alpha}")
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        if not 0 < eps < float("inf"):
            raise ValueError(f"eps must be positive and finite, got {eps}")
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        self.alpha, self.betas, self.eps, self.layers, self.head = alpha, betas, eps, layers, head
        self.shapes = _recurrent_shapes(2, layers)

    def init(self, generator: torch.Generator | None = None, replicates: int | None = None) -> Weights:
        """See `Rule`."""
        return init_replicates(lambda: _init_recurrent(2, self.layers, generator), replicates)

    def zero_state(self, like: Tensor, context: Context | None = None) -> State:
        """See `Rule`."""
        return {"m": torch.zeros_like(like), "v": torch.zeros_like(like), **zero_lstm(self.layers, like)}

    def warmup(self, state: State, grad: Tensor) -> State:
        """See `Rule`."""
        beta1, beta2 = self.betas
        m, v = beta1 * state["m"] + (1 - beta1) * grad, beta2 * state["v"] + (1 - beta2) * grad.square()
        return {**state, "m": m, "v": v}

    @property
    def largest_update(self) -> float:
        """What no update exceeds, for a finite state and gradients below 1e18; inf where that is not known."""
        return self.alpha if self.head == "free" and self.eps >= 1e-20 else float("inf")

    def step(
        self, weights: Weights, state: State, grad: Tensor, context: Context | None = None
    ) -> tuple[Tensor, State]:
        """See `Rule`."""
        state = self.warmup(state, grad)
        d = (state["v"] / (1 - self.betas[1]) + self.eps).rsqrt()
        inputs = torch.stack([state["m"] / (1 - self.betas[0]) * d, grad * d], -2).mT
        h, new = lstm_stack(self.layers, weights, state, inputs)
        out = torch.tanh(dense(weights, "out", h).squeeze(-1))
        if self.head != "free":
            out = out.exp() * inputs[..., HEADS.index(self.head) - 1]
        return self.alpha * out, {**state, **new}


class OriginalRule:
    """The first learnt optimiser (Andrychowicz et al.): an LSTM 2 x 20 on the raw gradient, u = alpha (w h + b).

    5,061 weights. Raises ValueError for alpha <= 0.
    """

    def __init__(self, alpha: float = 0.1) -> None:
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha must be positive and finite, got {alpha}")
        self.alpha, self.layers = alpha, 2
        self.shapes = _recurrent_shapes(1, self.layers)

    def init(self, generator: torch.Generator | None = None, replicates: int | None = None) -> Weights:
        """See `Rule`."""
        return init_replicates(lambda: _init_recurrent(1, self.layers, generator), replicates)

    def zero_state(self, like: Tensor, context: Context | None = None) -> State:
        """See `Rule`."""
        return zero_lstm(self.layers, like)

    def warmup(self, state: State, grad: Tensor) -> State:
        """See `Rule`; it keeps no averages, so the state is as before."""
        return state

    @property
    def largest_update(self) -> float:
        """What no update exceeds: 20 hidden values of at most 1 and a bias, weights of at most 1e6."""
        return self.alpha * 21e6

    def step(
        self, weights: Weights, state: State, grad: Tensor, context: Context | None = None
    ) -> tuple[Tensor, State]:
        """See `Rule`."""
        h, new = lstm_stack(self.layers, weights, state, grad.unsqueeze(-1))
        return self.alpha * dense(weights, "out", h).squeeze(-1), new


def _recurrent_shapes(inputs: int, layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        shapes |= lstm_shapes(f"lstm{layer}", UNITS if layer else inputs)
    return {**shapes, "out_kernel": (UNITS, 1), "out_bias": (1,)}


def _init_recurrent(inputs: int, layers: int, generator: torch.Generator | None) -> Weights:
    weights: Weights = {}
    for layer in range(layers):
        weights |= init_lstm(f"lstm{layer}", UNITS if layer else inputs, generator)
    return {**weights, "out_kernel": glorot((UNITS, 1), generator), "out_bias": torch.zeros(1)}
