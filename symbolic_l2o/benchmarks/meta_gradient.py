"""The suffix-sum meta-gradient against autograd through the unroll, and the rule's step against Adam's and a teacher's.

Ratios of one run: python symbolic_l2o/benchmarks/meta_gradient.py   (about a minute)
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from symbolic_l2o import SymbolicOptimizer, meta_gradient, presets
from symbolic_l2o.baselines import LearnerOptimizer
from symbolic_l2o.cost import best_time
from symbolic_l2o.inner import begin, run_window
from symbolic_l2o.models import mlp
from symbolic_l2o.problems import Problem
from symbolic_l2o.teachers import LSTMTeacher


def problem() -> Problem:
    """The paper's optimizee, 784-30-20-10, on random images: P = 24,380."""
    rng = torch.Generator().manual_seed(0)
    images, labels = torch.randn(512, 784, generator=rng), torch.randint(10, (512,), generator=rng)
    return Problem(mlp([784, 30, 20, 10], nn.ReLU), images, labels, 0.05)


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


def main() -> None:
    """Print the ratios."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher, task = LSTMTeacher("rp_s"), problem()
    for unroll in (20, 40):
        times = {
            "released": best_time(lambda u=unroll: released(teacher, task, u), 2),
            "unrolled, one backward": best_time(lambda u=unroll: unrolled(teacher, task, u), 2),
            "suffix sums": best_time(lambda u=unroll: ours(teacher, task, u), 3),
            "on 2,000 coordinates": best_time(lambda u=unroll: ours(teacher, task, u, 2000), 3),
        }
        words = ", ".join(f"{name} {times['released'] / value:.1f}x" for name, value in times.items())
        print(f"meta-gradient, U={unroll}, P={task.size:,}: {words}")
    for size in (200_000, 2_000_000):
        p = nn.Parameter(torch.zeros(size))
        p.grad = torch.randn(size)
        rule = presets("rp_pole_mnist5k")
        copy, source = torch.empty(size), torch.ones(size)
        per_word = best_time(lambda to=copy, there=source: to.copy_(there)) / 2  # one word read, one written
        times = {
            "fused Adam": best_time(torch.optim.Adam([p], fused=True).step),
            "rule compiled": best_time(SymbolicOptimizer([p], rule, compiled=True).step),
            "rule eager": best_time(SymbolicOptimizer([p], rule).step),
            "RP_s teacher": best_time(LearnerOptimizer([p], teacher).step, 1),
        }
        base = times["fused Adam"]
        words = ", ".join(f"{name} {value / base:.1f}" for name, value in times.items())
        print(f"step, {size:,} weights, times of fused Adam: {words}")
        print(
            f"  compiled rule over 11 words a weight at copying speed: {times['rule compiled'] / (11 * per_word):.1f}"
        )


if __name__ == "__main__":
    main()
