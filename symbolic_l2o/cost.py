"""What a rule costs beside its teacher: floats a weight, time of a step, memory of meta-tuning (claim C7)."""

import gc
import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from common.data import ImageSet
from symbolic_l2o.baselines import LearnerOptimizer
from symbolic_l2o.meta_training import MetaTraining
from symbolic_l2o.optimizer import SymbolicOptimizer
from symbolic_l2o.presets import presets
from symbolic_l2o.problems import make_problem
from symbolic_l2o.settings import MetaConfig
from symbolic_l2o.teachers import LSTMTeacher
from symbolic_l2o.tuning import TunedRule

REPEATS = 5


def best_times(functions: Mapping[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Least seconds of one call of each, taken in turns, after first calls that do not count."""
    for function in functions.values():
        function()
    found = dict.fromkeys(functions, math.inf)
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            found[name] = min(found[name], time.perf_counter() - start)
    return found


def state_floats(optimizer: torch.optim.Optimizer, size: int) -> float:
    """Numbers kept a weight after a step, step counts left out."""
    return sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.numel() > 1) / size


def step_costs(size: int) -> dict[str, float]:
    """Floats a weight of the pole rule and the smallest teacher, and teacher's time over the rule's: *_ratio."""
    p = nn.Parameter(torch.zeros(size))
    p.grad = torch.randn(size, generator=torch.Generator().manual_seed(0))
    pole = SymbolicOptimizer([p], presets("rp_pole_mnist5k"), lr=1e-4)
    teachers = {kind: LearnerOptimizer([p], LSTMTeacher(kind), lr=1e-4) for kind in ("rp_s", "rp", "dm")}
    times = best_times({"pole": pole.step, **{kind: optimizer.step for kind, optimizer in teachers.items()}})
    found = {f"{kind}_step_ratio": times[kind] / times["pole"] for kind in teachers}
    teacher_floats = {f"{kind}_floats": float(opt.learner.state_floats) for kind, opt in teachers.items()}  # type: ignore[attr-defined]
    return {**found, **teacher_floats, "pole_floats": state_floats(pole, size)}


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that one call of `work` holds at a time above what it found, in tensors on the processor."""
    gc.collect()  # what was garbage before must not be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def tuning_peak(name: str, side: int, batch_size: int = 128, unroll: int = 3) -> float:
    """Peak memory of meta-tuning the pole rule in forward mode over that of a step of Adam, both on network `name`.

    On images (3, side, side) of noise, states, gradients and activations counted, parameters not.
    """
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch_size, 3, side, side), generator=rng, dtype=torch.uint8)
    labels = torch.randint(0, 10, (batch_size,), generator=rng)
    problem = make_problem(name, ImageSet(images, labels, 10), batch_size, shrink=False)
    window = {"epochs": 1, "horizon": unroll, "unroll": unroll, "mode": "forward"}
    once = {"evaluate_every": 2, "evaluation_horizon": 1, "evaluation_runs": 1}
    tuning = MetaTraining(TunedRule(presets("rp_pole_mnist5k")), problem, MetaConfig(**window, **once), 0)  # type: ignore[arg-type]
    x = problem.init(rng)

    def adam() -> None:
        weights = nn.Parameter(x)
        weights.grad = problem.gradient(weights, problem.batch(0))[1]
        torch.optim.Adam([weights]).step()

    return peak_bytes(tuning.epoch) / peak_bytes(adam)


def tuning_floats(unroll: int, parameters: int, features: int) -> dict[str, float]:
    """Floats a weight that meta-tuning a pole rule keeps beside ordinary training, by mode (counted, not measured).

    Both keep two moments and a trace a feature. Suffix sums: gradients and features of the window, and the traces at
    its start. Forward mode: the derivatives of x and of every trace by every parameter.
    """
    kept = 2 + features
    return {
        "suffix": unroll + 1 + unroll * features + features + kept,
        "forward": parameters * (1 + features) + kept,
    }
