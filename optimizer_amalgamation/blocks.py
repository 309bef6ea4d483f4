"""The LSTM of a learnt rule in place, for an optimiser's step: the numbers of `lstm_stack` to rounding, faster.

What it gains, on a processor (benchmarks/optimizer_step.py): blocks of coordinates stay in the cache from the inputs to
the update; coordinates lie along the last axis, so that a gate is a contiguous run; inputs, both outputs and a row of
ones for the biases lie one behind the other, so that a layer is one product; and every tanh is 2 sigmoid(2 x) - 1, the
doubling put into the weights, as torch's sigmoid takes a sixth of the time of its tanh.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from optimizer_amalgamation.choice import TIME_SCALE, ChoiceRule
from optimizer_amalgamation.lstm import UNITS
from optimizer_amalgamation.rule import Context, Rule, State, Weights
from optimizer_amalgamation.students import HEADS, OriginalRule, StudentRule

BLOCK = 4096
MEMORY = ("h0", "c0", "h1", "c1")


class LSTMBlocks:
    """Two layers and a linear head on coordinates-last state.

    Args:
        weights: on the device and in the type to compute in.
        heads: names of the last layers; their outputs lie one behind the other.
    """

    def __init__(self, weights: Weights, *heads: str) -> None:
        self.inputs = inputs = len(weights["lstm0_kernel"])
        doubled = torch.ones_like(weights["lstm0_bias"])
        doubled[2 * UNITS : 3 * UNITS] = 2
        # Rows of a block: inputs, h0, one, h1.
        self.layers = [
            (doubled * torch.cat(self._parts(weights, layer, order))).T.contiguous()
            for layer, order in (("lstm0", ("kernel", "recurrent", "bias")), ("lstm1", ("kernel", "bias", "recurrent")))
        ]
        kernel = torch.cat([weights[f"{head}_kernel"] for head in heads], 1)
        bias = torch.cat([weights[f"{head}_bias"] for head in heads])
        self.head = torch.cat([bias.unsqueeze(0), kernel]).T.contiguous()
        self.rows = kernel.new_ones(inputs + 2 * UNITS + 1, BLOCK)
        self.gates = kernel.new_empty(4 * UNITS, BLOCK)
        self.spare = kernel.new_empty(UNITS, BLOCK)
        self.memory = kernel.new_empty(UNITS, BLOCK)
        self.out = kernel.new_empty(len(self.head), BLOCK)

    @staticmethod
    def _parts(weights: Weights, layer: str, order: tuple[str, ...]) -> list[Tensor]:
        return [weights[f"{layer}_{part}"].reshape(-1, 4 * UNITS) for part in order]

    def run(self, state: State, fill: Callable[[slice, Tensor], None]) -> Iterator[tuple[slice, Tensor]]:
        """Advance h0, c0, h1, c1 (units, n) in place, block by block.

        Args:
            fill: writes the inputs of a slice of coordinates into (inputs, length).

        Yields:
            the slice and the head's output (outputs, length), valid until the next.
        """
        n = state["h0"].shape[-1]
        for start in range(0, n, BLOCK):
            at = slice(start, min(start + BLOCK, n))
            length = at.stop - start
            rows, gates, out = self.rows[:, :length], self.gates[:, :length], self.out[:, :length]
            end0 = self.inputs + UNITS
            h0, h1 = rows[self.inputs : end0], rows[end0 + 1 :]
            h0.copy_(state["h0"][:, at])
            h1.copy_(state["h1"][:, at])
            fill(at, rows[: self.inputs])
            torch.mm(self.layers[0], rows[: end0 + 1], out=gates)
            self._cell(gates, state["c0"][:, at], h0)
            state["h0"][:, at].copy_(h0)
            torch.mm(self.layers[1], rows[self.inputs :], out=gates)
            self._cell(gates, state["c1"][:, at], h1)
            state["h1"][:, at].copy_(h1)
            torch.mm(self.head, rows[end0:], out=out)
            yield at, out

    def _cell(self, gates: Tensor, kept: Tensor, h: Tensor) -> None:
        """c <- f c + i (2 s - 1) in place; h = o (2 sigmoid(2 c) - 1), where s is the candidate's sigmoid."""
        i, f, s, o = gates.sigmoid_().split(UNITS)
        spare = self.spare[:, : h.shape[1]]
        c = kept if kept.dtype == gates.dtype else self.memory[:, : h.shape[1]].copy_(kept)
        c.mul_(f).addcmul_(i, s, value=2).sub_(i)
        torch.add(c, c, out=spare).sigmoid_()
        torch.neg(o, out=h).addcmul_(o, spare, value=2)
        if c is not kept:
            kept.copy_(c)


def turned(x: Tensor) -> Tensor:
    """Coordinates last instead of first, or back: (n, units) and (units, n)."""
    return x.mT if x.dim() > 1 else x


InPlace = Callable[[State, Tensor, Context], Tensor]
"""Update (n,) for a gradient (n,); the state, coordinates last, is advanced: tensors in place, or others put there."""


def in_place(rule: Rule, weights: Weights) -> InPlace:
    """The rule on coordinates-last state (n,) or (units, n), its LSTM by blocks where it has one of two layers.

    Args:
        weights: on the device and in the type to compute in.
    """
    if isinstance(rule, StudentRule) and rule.layers == 2:
        return _student(rule, LSTMBlocks(weights, "out"))
    if isinstance(rule, OriginalRule):
        return _original(rule, LSTMBlocks(weights, "out"))
    if isinstance(rule, ChoiceRule):
        return _choice(rule, LSTMBlocks(weights, *rule.heads))

    def step(state: State, grad: Tensor, context: Context) -> Tensor:
        update, new = rule.step(weights, {name: turned(tensor) for name, tensor in state.items()}, grad, context)
        for name, tensor in new.items():
            state[name] = turned(tensor)
        return update

    return step


def _student(rule: StudentRule, blocks: LSTMBlocks) -> InPlace:
    beta1, beta2 = rule.betas

    def step(state: State, grad: Tensor, context: Context) -> Tensor:
        update = torch.empty_like(grad)

        def fill(at: slice, rows: Tensor) -> None:
            g = grad[at]
            m = state["m"][at].mul_(beta1).add_(g, alpha=1 - beta1)
            v = state["v"][at].mul_(beta2).addcmul_(g, g, value=1 - beta2)
            d = (v / (1 - beta2)).add_(rule.eps).rsqrt_()
            torch.div(m, 1 - beta1, out=rows[0]).mul_(d)
            torch.mul(g, d, out=rows[1])
            if rule.head != "free":
                update[at] = rows[HEADS.index(rule.head) - 1]

        for at, (out,) in blocks.run(state, fill):
            out.tanh_()
            update[at] = rule.alpha * (out if rule.head == "free" else out.exp() * update[at])
        return update

    return step


def _original(rule: OriginalRule, blocks: LSTMBlocks) -> InPlace:
    def step(state: State, grad: Tensor, context: Context) -> Tensor:
        update = torch.empty_like(grad)

        def fill(at: slice, rows: Tensor) -> None:
            rows[0] = grad[at]

        for at, (out,) in blocks.run(state, fill):
            torch.mul(out, rule.alpha, out=update[at])
        return update

    return step


def _choice(rule: ChoiceRule, blocks: LSTMBlocks) -> InPlace:
    members = len(rule.pool)

    def step(state: State, grad: Tensor, context: Context) -> Tensor:
        update = torch.empty_like(grad)

        def fill(at: slice, rows: Tensor) -> None:
            new = rule.pool.advance({name: state[name][at] for name in rule.pool.averages}, grad[at])
            for name, average in new.items():
                state[name][at] = average
            rows[:members] = rule.pool.updates(new, grad[at])
            torch.div(state["time"][at], TIME_SCALE, out=rows[members])
            rows[members + 1 :] = context.ranks[at].T

        for at, out in blocks.run(state, fill):
            choice = rule.soft_choice(out[:members].T, None).T
            updates = blocks.rows[:members, : at.stop - at.start]
            if rule.multiplier:
                updates = updates * (rule.multiplier * torch.tanh(out[members:])).exp()
            torch.sum(choice * updates, 0, out=update[at])
        return update

    return step
