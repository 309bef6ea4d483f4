"""Scale: the hierarchical optimiser of Wichrowska et al. that the paper compares with (spec c10)."""

import math

import torch
from torch import Tensor

from optimizer_amalgamation.lstm import glorot, gru, orthonormal
from optimizer_amalgamation.rule import Context, State, Weights, init_replicates

TIMESCALES = 4
UNITS = {"param_rnn": 20, "tensor_rnn": 10, "global_rnn": 10}
INPUTS = {"param_rnn": 2 * TIMESCALES + 1 + 10 + 10, "tensor_rnn": 20 + 10, "global_rnn": 10}
HEADS = ("d_theta", "delta_nu", "beta_g", "beta_lambda")
BIASES = {"beta_g": 2.197, "beta_lambda": 6.907}  # logits of 0.9 and 0.999
GAMMA = 3.2
EPSILON, OFFSET, START = 1e-10, 1e-2, math.log(1e-3)


class ScaleRule:
    """One GRU a coordinate, one a tensor, one for all; decays, rate, direction are heads of the first. 5,070 weights.

    State of a coordinate: averages g, lambda (..., n, 4) at four time scales, h (..., n, 20), the rate's running mean
    eta_bar and its relative value eta_rel (..., n); of a tensor: tensor_h (..., T, 10); of all: global_h (..., 1, 10).
    """

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, units in UNITS.items():
            self.shapes[f"{name}.kernel"] = (INPUTS[name], 3 * units)
            self.shapes[f"{name}.recurrent_kernel"] = (units, 3 * units)
            self.shapes[f"{name}.bias"] = (2, 3 * units)
        for head in HEADS:
            self.shapes |= {f"{head}.kernel": (20, 1), f"{head}.bias": (1,)}
        self.shapes |= {"gradient_shortcut.kernel": (TIMESCALES, 1), "gradient_shortcut.bias": (1,), "gamma": ()}

    def init(self, generator: torch.Generator | None = None, replicates: int | None = None) -> Weights:
        """See `Rule`: the GRUs as the LSTMs, all heads zero but for the biases of the decays."""

        def draw() -> Weights:
            weights = {name: torch.zeros(shape) for name, shape in self.shapes.items()}
            for name in UNITS:
                weights[f"{name}.kernel"] = glorot(self.shapes[f"{name}.kernel"], generator)
                weights[f"{name}.recurrent_kernel"] = orthonormal(self.shapes[f"{name}.recurrent_kernel"], generator)
            weights |= {f"{head}.bias": torch.full((1,), bias) for head, bias in BIASES.items()}
            return {**weights, "gamma": torch.tensor(GAMMA)}

        return init_replicates(draw, replicates)

    def zero_state(self, like: Tensor, context: Context | None = None) -> State:
        """See `Rule`. Raises ValueError without a context."""
        if context is None:
            raise ValueError("context must be given to the Scale optimizer, got None")
        lead, tensors = like.shape[:-1], int(context.tensors[-1]) + 1
        averages = like.new_zeros(*like.shape, TIMESCALES)
        return {
            "g": averages,
            "lambda": averages.clone(),
            "h": like.new_zeros(*like.shape, UNITS["param_rnn"]),
            "eta_bar": torch.full_like(like, START),
            "eta_rel": torch.zeros_like(like),
            "tensor_h": like.new_zeros(*lead, tensors, UNITS["tensor_rnn"]),
            "global_h": like.new_zeros(*lead, 1, UNITS["global_rnn"]),
        }

    def warmup(self, state: State, grad: Tensor) -> State:
        """See `Rule`; its averages have learnt decays, so none of them is analytical: the state is as before."""
        return state

    def step(
        self, weights: Weights, state: State, grad: Tensor, context: Context | None = None
    ) -> tuple[Tensor, State]:
        """See `Rule`. Raises ValueError without a context."""
        if context is None:
            raise ValueError("context must be given to the Scale optimizer, got None")
        tensors = context.tensors

        def head(name: str, x: Tensor) -> Tensor:
            kernel, bias = weights[f"{name}.kernel"], weights[f"{name}.bias"]
            return x @ kernel + bias.unsqueeze(-2)

        def cell(name: str, x: Tensor, h: Tensor) -> Tensor:
            kernel, recurrent = weights[f"{name}.kernel"], weights[f"{name}.recurrent_kernel"]
            return gru(kernel, recurrent, weights[f"{name}.bias"], x, h)

        powers = 2.0 ** -torch.arange(TIMESCALES, device=grad.device, dtype=grad.dtype)
        decay_g = torch.sigmoid(head("beta_g", state["h"])) ** powers
        decay_lambda = torch.sigmoid(head("beta_lambda", state["h"])) ** powers
        g, squares = grad.unsqueeze(-1), grad.square().unsqueeze(-1)
        mean_g = decay_g * state["g"] + (1 - decay_g) * g
        mean_lambda = decay_lambda * state["lambda"] + (1 - decay_lambda) * squares
        m = mean_g * (mean_lambda + EPSILON).rsqrt()
        gamma = (mean_lambda + EPSILON).log()
        gamma = gamma - gamma.mean(-1, keepdim=True)

        tensor_h = state["tensor_h"].index_select(-2, tensors)
        global_h = state["global_h"].expand_as(tensor_h)
        inputs = torch.cat([m, gamma, state["eta_rel"].unsqueeze(-1), tensor_h, global_h], -1)
        h = cell("param_rnn", inputs, state["h"])
        in_tensors = torch.cat([self._means(h, tensors, state), state["global_h"].expand_as(state["tensor_h"])], -1)
        new_tensor_h = cell("tensor_rnn", in_tensors, state["tensor_h"])

        eta = head("delta_nu", h).squeeze(-1) + state["eta_bar"]
        keep = torch.sigmoid(weights["gamma"]).unsqueeze(-1)
        direction = head("d_theta", h) + head("gradient_shortcut", m)
        means = self._means(eta.unsqueeze(-1), tensors, state).index_select(-2, tensors)
        return (eta.exp() + OFFSET) * direction.squeeze(-1), {
            "g": mean_g,
            "lambda": mean_lambda,
            "h": h,
            "eta_bar": keep * state["eta_bar"] + (1 - keep) * eta,
            "eta_rel": eta - means.squeeze(-1),
            "tensor_h": new_tensor_h,
            "global_h": cell("global_rnn", new_tensor_h.mean(-2, keepdim=True), state["global_h"]),
        }

    @staticmethod
    def _means(x: Tensor, tensors: Tensor, state: State) -> Tensor:
        """Mean over each tensor's coordinates: (..., n, d) -> (..., T, d)."""
        total = x.new_zeros(*x.shape[:-2], state["tensor_h"].shape[-2], x.shape[-1])
        total = total.index_add(-2, tensors, x)
        return total / torch.bincount(tensors).unsqueeze(-1)
