"""The suffix-sum meta-gradient against autograd through the unroll, and the rule's step against Adam's and a teacher's.

Ratios of one run: python symbolic_l2o/benchmarks/meta_gradient.py   (about two minutes)
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.bench import Ratio, conclude
from symbolic_l2o import SymbolicOptimizer, meta_gradient, presets
from symbolic_l2o.baselines import LearnerOptimizer
from symbolic_l2o.cost import best_times
from symbolic_l2o.inner import begin, run_window
from symbolic_l2o.models import mlp
from symbolic_l2o.problems import Problem
from symbolic_l2o.teachers import LSTMTeacher

LEAST = {20: 4.0, 40: 7.0}  # by U
LEAST_SUBSAMPLED, MOST_STEP, MOST_MEMORY = 10.0, 5.0, 1.5
JUDGED = 2_000_000


def problem() -> Problem:
    """The paper's optimizee, 784-30-20-10, on random images: P = 24,380."""
    rng = torch.Generator().manual_seed(0)
    images, labels = torch.randn(512, 784, generator=rng), torch.randint(10, (512,), generator=rng)
    return Problem(mlp([784, 30, 20, 10], nn.ReLU), images, labels, 0.05)


class LayerTeacher(LSTMTeacher):
    """The same function in torch's own layers, coordinates first, as released."""

    def step(self, z: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See `LSTMTeacher`; one LSTM layer."""
        h, c = self.cells[0](functional.elu(self.before(z)), (state[0], state[1]))  # type: ignore[misc]
        return torch.tanh(self.output(h).squeeze(-1)), [h, c]


def unrolled(teacher: LSTMTeacher, task: Problem, unroll: int) -> None:
    """As released: the loss at every step, kept in one graph, backpropagated at the window's end."""
    path = begin(teacher, task, torch.Generator().manual_seed(0))
    x, state, total = path.x, path.state, torch.zeros(())
    for step in range(unroll + 1):
        loss = task.loss(leaf := x.detach().requires_grad_(), task.batch(step, 0))
        (g,) = torch.autograd.grad(loss, leaf)
        total = total + task.loss(x, task.batch(step, 0))
        if step < unroll:
            out, state = teacher.step(teacher.features(g, path.moments), state)
            x = x + 0.01 * out
    torch.autograd.grad(total, list(teacher.parameters()))


def released(teacher: LSTMTeacher, task: Problem, unroll: int) -> None:
    """As released: one backward through the whole chain at each of the U steps."""
    path = begin(teacher, task, torch.Generator().manual_seed(0))
    x, state = path.x.requires_grad_(), path.state
    for step in range(unroll + 1):
        loss = task.loss(x, task.batch(step, 0))
        x.retain_grad()
        loss.backward(retain_graph=True)
        if step < unroll:
            out, state = teacher.step(teacher.features(x.grad.detach(), path.moments), state)
            x = x + 0.01 * out


def ours(teacher: LSTMTeacher, task: Problem, unroll: int, count: int = 0) -> None:
    """Suffix sums; with `count` on that many coordinates."""
    path = begin(teacher, task, torch.Generator().manual_seed(0))
    seen = run_window(teacher, task, path, unroll, ())
    coords = torch.randperm(task.size)[:count] if count else None
    meta_gradient(teacher.step, list(teacher.parameters()), seen.gradients, seen.features, seen.start, coords=coords)


def meta_gradients(unroll: int, least: float) -> list[Ratio]:
    """How many times faster than the released form each is."""
    torch.manual_seed(0)
    teacher, layers, task = LSTMTeacher("rp_s"), LayerTeacher("rp_s"), problem()
    layers.load_state_dict(teacher.state_dict())
    times = best_times(
        {
            "released": lambda: released(layers, task, unroll),
            "released with our LSTM step": lambda: released(teacher, task, unroll),
            "unrolled, one backward": lambda: unrolled(layers, task, unroll),
            "suffix sums in torch's layers": lambda: ours(layers, task, unroll),
            "suffix sums": lambda: ours(teacher, task, unroll),
            "on 2,000 coordinates": lambda: ours(teacher, task, unroll, 2000),
        },
        3,
    )
    targets = {"suffix sums": least, "on 2,000 coordinates": LEAST_SUBSAMPLED}
    words = f"meta-gradient, U = {unroll}, P = {task.size:,}: released"
    return [
        Ratio(f"{words} / {name}", times["released"] / spent, targets.get(name))
        for name, spent in times.items()
        if name != "released"
    ]


def steps(size: int) -> list[Ratio]:
    """How many times fused Adam's time each step takes, and the compiled rule's time over the memory's."""
    p = nn.Parameter(torch.zeros(size))
    p.grad = torch.randn(size)
    rule = presets("rp_pole_mnist5k")
    copy, source = torch.empty(size), torch.ones(size)
    optimizers = {
        "fused Adam": torch.optim.Adam([p], fused=True),
        "rule compiled": SymbolicOptimizer([p], rule, compiled=True),
        "rule eager": SymbolicOptimizer([p], rule),
    }
    functions: dict[str, Callable[[], object]] = {name: one.step for name, one in optimizers.items()}
    times = best_times({**functions, "copy": lambda: copy.copy_(source)}, 20)
    base, compiled = times["fused Adam"], times["rule compiled"]
    teacher = best_times({"": LearnerOptimizer([p], LSTMTeacher("rp_s")).step}, 2)[""]
    words = f"step, {size:,} weights:"
    judged = size == JUDGED
    return [
        Ratio(f"{words} rule, compiled / fused Adam", compiled / base, most=MOST_STEP if judged else None),
        Ratio(f"{words} rule, eager / fused Adam", times["rule eager"] / base),
        Ratio(f"{words} RP_s teacher / fused Adam", teacher / base),
        # The rule reads 6 words a weight and writes 5, Adam 4 and 3, a copy 1 and 1.
        Ratio(
            f"{words} rule, compiled / its 11 words a weight at fused Adam's speed",
            compiled / (11 / 7 * base),
            most=MOST_MEMORY if judged else None,
        ),
        Ratio(f"{words} the same at a copy's speed", compiled / (11 / 2 * times["copy"])),
    ]


def main() -> int:
    """Print the ratios; 1 where one is not as it should be."""
    torch.set_num_threads(1)
    ratios = [one for unroll, least in LEAST.items() for one in meta_gradients(unroll, least)]
    return conclude([*ratios, *(one for size in (200_000, JUDGED) for one in steps(size))])


if __name__ == "__main__":
    sys.exit(main())
