"""A meta-step against autograd through the whole unroll, over length and teachers; replicates at once against alone.

Processor seconds of one thread, peak memory of fresh processes. Fails where at N = 100 the peak is more than a quarter
of that of the whole graph, where it grows with the teachers, or where a replicate among eight is less than 1.4 times
as fast as one alone. Takes some minutes.

python optimizer_amalgamation/benchmarks/meta_step.py
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.bench import Ratio, conclude, interleaved, ratio
from optimizer_amalgamation.memory import MetaStep, peak_bytes, plain_step
from optimizer_amalgamation.unroll import EPSILON

NETWORK = "small14"
LENGTHS, POOLS = (20, 50, 100), (1, 2, 6)
SHARE, GROWTH, SPEEDUP = 0.25, 1.05, 1.4
REPEATS = 3
Step = Callable[[], Any]


def whole_graph(name: str, steps: int, teachers: int, replicates: int = 1) -> Step:
    """The same loss and gradient by one backward through the graph of all steps, the teachers' distances included."""
    case = MetaStep(name, steps, teachers, replicates)
    problem, scale, rows = case.problem, case.scale, case.rows

    def run() -> Any:
        weights = {key: value.clone().requires_grad_() for key, value in case.weights.items()}
        p, state = case.path.params.clone().requires_grad_(), case.path.state
        first, taught, states = p.detach(), list(case.path.taught), list(case.path.teacher_states)
        total = torch.zeros(len(p))
        for number in range(steps):
            batch = problem.batch(rows[number])
            losses = problem.losses(p * scale, batch)
            (g,) = torch.autograd.grad(losses.sum(), p, create_graph=True)
            update, state = case.policy(weights, state, g, number)
            p = p - update
            with torch.no_grad():
                start = problem.losses(first * scale, batch)
            total = total + ((losses + EPSILON).log() - (start + EPSILON).log()) / steps
            logs: list[Tensor] = []
            for index, teacher in enumerate(case.teachers):
                own = taught[index].requires_grad_()
                (true,) = torch.autograd.grad(problem.losses(own, batch).sum(), own)
                moved, states[index] = teacher.step(states[index], true)
                taught[index] = (own - moved).detach()
                squares = 0.5 * (p - taught[index] / scale).square().sum(1)
                logs.append((squares + EPSILON).log() - math.log(problem.size))
            total = total + 0.1 * torch.stack(logs).amax(0) / steps
        return dict(zip(weights, torch.autograd.grad(total.sum(), list(weights.values())), strict=True))

    return run


def main() -> int:
    """Print the ratios; returns the exit status."""
    torch.set_num_threads(1)
    ours, plain = MetaStep(NETWORK, 20, 2).run(), whole_graph(NETWORK, 20, 2)()
    apart = max(float((ours[name] - plain[name]).norm() / plain[name].norm()) for name in plain)
    found = [Ratio(f"{NETWORK}, N=20, 2 teachers: gradient apart from autograd's", apart, most=1e-4)]
    for steps in LENGTHS:
        for teachers in POOLS:
            case = f"{NETWORK}, N={steps}, teachers: {teachers}"
            peak, whole = (peak_bytes(make, NETWORK, steps, teachers) for make in (plain_step, whole_graph))
            limit = SHARE if steps == LENGTHS[-1] else None
            found.append(Ratio(f"{case}: peak, {peak / 1e6:.0f} MB / whole graph", peak / whole, most=limit))
            works = {"ours": MetaStep(NETWORK, steps, teachers).run, "whole": whole_graph(NETWORK, steps, teachers)}
            times = interleaved(works, REPEATS)
            each = 1e3 * min(times["ours"]) / steps
            found.append(Ratio(f"{case}: time, {each:.1f} ms a step / whole graph", ratio(times, "ours", "whole")))
    peaks = {teachers: peak_bytes(plain_step, NETWORK, LENGTHS[-1], teachers, 4) for teachers in POOLS}
    for teachers in POOLS[1:]:
        growth = peaks[teachers] / peaks[1]
        found.append(
            Ratio(f"{NETWORK}, N=100, 4 replicates: peak with {teachers} teachers / with one", growth, most=GROWTH)
        )
    for name in ("tiny14", NETWORK):
        works = {"alone": MetaStep(name, 20, 2, 1).run, "eight": MetaStep(name, 20, 2, 8).run}
        speedup = 8 * ratio(interleaved(works, 5), "alone", "eight")
        found.append(Ratio(f"{name}: speed of a replicate among 8 / alone", speedup, least=SPEEDUP))
    return conclude(found)


if __name__ == "__main__":
    sys.exit(main())
