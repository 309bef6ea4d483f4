"""The choice policy: an LSTM that mixes the pool's updates, coordinate by coordinate (Sec. 3.3; spec c3)."""

import torch
from torch import Tensor

from optimizer_amalgamation.lstm import UNITS, dense, glorot, init_lstm, lstm_shapes, lstm_stack, zero_lstm
from optimizer_amalgamation.pool import LARGE_CHOICE, Pool
from optimizer_amalgamation.rule import Context, State, Weights, init_replicates

TIME_SCALE = 2000.0
LAYERS = 2


class ChoiceRule:
    """u = sum_j c_j u_j, c = exp(l) / (sum exp(l) + 1e-10), l of an LSTM 2 x 20 that sees u_1 ... u_k, time and rank.

    State of a coordinate: the pool's averages, and h, c (20 each) of both layers; of all: time (..., 1), steps so far.

    Args:
        pool: its k members; 5,482 weights for the small one, 5,886 for the large one.
        hardness: 0 a soft choice; else exp(hardness (l + noise)) normalised with the context's Gumbel noise, and the
            likeliest member alone without it.
        multiplier: s; 0 none, else each member's update is also multiplied by exp(s tanh(.)) of a second layer.

    Raises:
        ValueError: for a pool that is no `Pool`, hardness < 0 or multiplier < 0. `step` without a context.
    """

    def __init__(self, pool: Pool = LARGE_CHOICE, hardness: float = 0.0, multiplier: float = 0.0) -> None:
        for name, value in (("hardness", hardness), ("multiplier", multiplier)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        if not isinstance(pool, Pool):
            raise ValueError(f"pool must be a Pool, got {pool!r}")
        self.pool, self.hardness, self.multiplier, self.layers = pool, hardness, multiplier, LAYERS
        self.shapes = {
            **lstm_shapes("lstm0", len(pool) + 4),
            **lstm_shapes("lstm1", UNITS),
            **{f"{head}_{part}": shape for head in self.heads for part, shape in self._head_shapes().items()},
        }

    @property
    def heads(self) -> tuple[str, ...]:
        """Layers on top of the LSTM."""
        return ("choice", "multiplier") if self.multiplier else ("choice",)

    def _head_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"kernel": (UNITS, len(self.pool)), "bias": (len(self.pool),)}

    def init(self, generator: torch.Generator | None = None, replicates: int | None = None) -> Weights:
        """See `Rule`."""

        def draw() -> Weights:
            weights = {
                **init_lstm("lstm0", len(self.pool) + 4, generator),
                **init_lstm("lstm1", UNITS, generator),
            }
            for head in self.heads:
                weights[f"{head}_kernel"] = glorot(self.shapes[f"{head}_kernel"], generator)
                weights[f"{head}_bias"] = torch.zeros(len(self.pool))
            return weights

        return init_replicates(draw, replicates)

    def zero_state(self, like: Tensor, context: Context | None = None) -> State:
        """See `Rule`."""
        time = like.new_zeros(*like.shape[:-1], 1)
        return {**self.pool.zero_state(like), "time": time, **zero_lstm(LAYERS, like)}

    def warmup(self, state: State, grad: Tensor) -> State:
        """See `Rule`."""
        return {**state, **self.pool.advance(state, grad), "time": state["time"] + 1}

    @property
    def largest_update(self) -> float:
        """What no update exceeds, for gradients below 1e18 and their state; inf where that is not known.

        A member's is at most 1e18 times its rate, times 1e10 for the smallest root of an epsilon and 1e3 for decays and
        signs; and up to e^4 of a multiplier.
        """
        tame = all(t.lr <= 1e3 and t.epsilon >= 1e-20 for t in self.pool.teachers) and self.multiplier <= 4
        return 1e36 if tame else float("inf")

    def step(
        self, weights: Weights, state: State, grad: Tensor, context: Context | None = None
    ) -> tuple[Tensor, State]:
        """See `Rule`."""
        update, _, state = self.choose(weights, state, grad, context)
        return update, state

    def choose(
        self, weights: Weights, state: State, grad: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor, State]:
        """As `step`, with the choice c (..., n, k) in the middle."""
        if context is None:
            raise ValueError("context must be given to a choice policy, got None")
        updates, averages = self.pool.step(state, grad)
        updates = updates.movedim(0, -1)
        h, new = lstm_stack(LAYERS, weights, state, self.inputs(updates, state["time"], context))
        choice = self.soft_choice(dense(weights, "choice", h), context.gumbel)
        if self.multiplier:
            updates = updates * (self.multiplier * torch.tanh(dense(weights, "multiplier", h))).exp()
        return (choice * updates).sum(-1), choice, {**averages, "time": state["time"] + 1, **new}

    @staticmethod
    def inputs(updates: Tensor, time: Tensor, context: Context) -> Tensor:
        """(..., n, k + 4): the members' updates (..., n, k), time / 2000 not clipped, and the three rank flags."""
        clock = (time / TIME_SCALE).unsqueeze(-1).expand(*updates.shape[:-1], 1)
        return torch.cat([updates.mT, clock.mT, context.ranks.expand(*updates.shape[:-1], 3).mT], -2).mT

    def soft_choice(self, logits: Tensor, gumbel: Tensor | None) -> Tensor:
        """c (..., n, k), nearly of sum 1, for logits (..., n, k)."""
        if self.hardness:
            if gumbel is None:
                return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
            logits = self.hardness * (logits + gumbel)
        # The released exp(l) / (sum exp(l) + 1e-10), with its largest term taken out so that nothing overflows.
        top = logits.detach().amax(-1, keepdim=True)
        shifted = (logits - top).exp()
        return shifted / (shifted.sum(-1, keepdim=True) + 1e-10 * (-top).exp())
