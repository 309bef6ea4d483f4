"""A step of the learnt optimisers against a plain port of the policy, and against Adam as the network grows.

Processor seconds of one thread. Fails where AmalgamatedOptimizer is less than 2 times as fast as a port that calls two
`nn.LSTMCell`s tensor by tensor, on the network of Train (18,122 weights). Takes a minute and 4 GiB.

python optimizer_amalgamation/benchmarks/optimizer_step.py
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.bench import Ratio, conclude, interleaved, ratio
from optimizer_amalgamation.choice import ChoiceRule
from optimizer_amalgamation.lstm import Cell, init_lstm
from optimizer_amalgamation.optimizers import AmalgamatedOptimizer, ChoiceOptimizer
from optimizer_amalgamation.students import StudentRule

THREADS = 1
REPEATS = 9
TRAIN = [(16, 1, 3, 3), (16,), (32, 16, 5, 5), (32,), (10, 512), (10,)]
SIZES = (10**4, 10**5, 10**6, 10**7)
LEAST = 2.0


class PlainPort:
    """The policy as one would write it down: modules, tensor by tensor."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.cells = [nn.LSTMCell(2, 20), nn.LSTMCell(20, 20)]
        self.head = nn.Linear(20, 1)
        self.state = [
            (torch.zeros(p.numel()), torch.zeros(p.numel()), [(torch.zeros(p.numel(), 20),) * 2 for _ in range(2)])
            for p in params
        ]

    def load(self, weights: dict[str, Tensor]) -> None:
        """Weights of a student."""
        for layer, cell in enumerate(self.cells):
            cell.weight_ih.data = weights[f"lstm{layer}_kernel"].T.contiguous()
            cell.weight_hh.data = weights[f"lstm{layer}_recurrent"].T.contiguous()
            cell.bias_ih.data, cell.bias_hh.data = weights[f"lstm{layer}_bias"].clone(), torch.zeros(80)
        self.head.weight.data, self.head.bias.data = weights["out_kernel"].T.contiguous(), weights["out_bias"].clone()

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        for index, p in enumerate(self.params):
            m, v, hidden = self.state[index]
            g = p.grad.flatten()  # type: ignore[union-attr]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            d = 1 / torch.sqrt(v / 0.001 + 1e-10)
            x, new = torch.stack([m / 0.1 * d, g * d], 1), []
            for cell, kept in zip(self.cells, hidden, strict=True):
                x, c = cell(x, kept)
                new.append((x, c))
            self.state[index] = m, v, new
            p -= 0.1 * torch.tanh(self.head(x)).view_as(p)


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    """Parameters with gradients."""
    rng, found = torch.Generator().manual_seed(0), []
    for shape in shapes:
        p = nn.Parameter(0.1 * torch.randn(shape, generator=rng))
        p.grad = 0.01 * torch.randn(shape, generator=rng)
        found.append(p)
    return found


def train_network() -> list[Ratio]:
    """A step on the network of Train."""
    weights = StudentRule().init(torch.Generator().manual_seed(0))
    ours, theirs = parameters(TRAIN), parameters(TRAIN)
    optimizer, port = AmalgamatedOptimizer(ours, weights, warmup=0), PlainPort(theirs)
    port.load(weights)
    for _ in range(5):
        optimizer.step()
        port.step()
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(ours, theirs, strict=True))
    choice = ChoiceRule()
    forms: dict[str, Any] = {
        "plain port": port,
        "in blocks": optimizer,
        "flat": AmalgamatedOptimizer(parameters(TRAIN), weights, warmup=0, impl="flat"),
        "choice policy": ChoiceOptimizer(parameters(TRAIN), choice.init(torch.Generator().manual_seed(0)), warmup=0),
        "Adam": torch.optim.Adam(parameters(TRAIN)),
    }
    times = interleaved({name: form.step for name, form in forms.items()}, 5 * REPEATS)
    what = f"step on {sum(p.numel() for p in ours):,} weights"
    return [
        Ratio(f"{what}: plain port / in blocks", ratio(times, "plain port", "in blocks"), least=LEAST),
        Ratio(f"{what}: plain port / flat, made for GPUs", ratio(times, "plain port", "flat")),
        Ratio(f"{what}: choice policy / student", ratio(times, "choice policy", "in blocks")),
        Ratio(f"{what}: student / torch's Adam", ratio(times, "in blocks", "Adam")),
    ]


def growing() -> list[Ratio]:
    """A step over the number of weights."""
    weights = StudentRule().init(torch.Generator().manual_seed(0))
    found = []
    for size in SIZES:
        optimizers: dict[str, Any] = {
            "student": AmalgamatedOptimizer(parameters([(size,)]), weights, warmup=0),
            "Adam": torch.optim.Adam(parameters([(size,)])),
            "fused Adam": torch.optim.Adam(parameters([(size,)]), fused=True),
        }
        repeats = REPEATS if size < SIZES[-1] else 3
        times = interleaved({name: one.step for name, one in optimizers.items()}, repeats)
        for other in ("Adam", "fused Adam"):
            found.append(Ratio(f"step on {size:,} weights: student / torch's {other}", ratio(times, "student", other)))
    return found


def pull_back() -> list[Ratio]:
    """One LSTM layer 20 -> 20 forward and back, as meta-training calls it."""
    found = []
    for shape in ((666,), (4, 666), (18122,)):
        weights = init_lstm("lstm", 20, torch.Generator().manual_seed(0))
        leaves = [torch.randn(*shape[:-1], 20, shape[-1]).requires_grad_() for _ in range(3)]
        leaves += [w.requires_grad_() for w in weights.values()]
        ways = [torch.randn_like(leaves[0]) for _ in range(2)]

        def plain(leaves: list[Tensor] = leaves) -> tuple[Tensor, Tensor]:
            x, h, c, kernel, recurrent, bias = leaves
            i, f, s, o = F.linear(x.mT, kernel.T, bias).add(h.mT @ recurrent).mT.chunk(4, -2)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(s)
            return torch.sigmoid(o) * torch.tanh(c), c

        def by_hand(leaves: list[Tensor] = leaves) -> tuple[Tensor, Tensor]:
            return Cell.apply(*leaves)[:2]  # type: ignore[return-value]

        def back(form: Callable[[], tuple[Tensor, Tensor]], leaves: list[Tensor], ways: list[Tensor]) -> None:
            torch.autograd.grad(form(), leaves, ways)

        times = interleaved(
            {
                "autograd": lambda form=plain, at=leaves, to=ways: back(form, at, to),  # type: ignore[misc]
                "by hand": lambda form=by_hand, at=leaves, to=ways: back(form, at, to),  # type: ignore[misc]
            },
            3 * REPEATS,
        )
        what = f"pull-back of an LSTM layer, {' x '.join(map(str, shape))} coordinates"
        found.append(Ratio(f"{what}: autograd / by hand", ratio(times, "autograd", "by hand")))
    return found


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    sys.exit(conclude([*train_network(), *growing(), *pull_back()]))
