"""Times of the small network as ratios to the large one, in one process, turn about."""

import copy
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uvc_vit.masked import apply_plan
from uvc_vit.plan import Plan
from uvc_vit.slim import Layout, slim


def latency_ratio(model: nn.Module, plan: Plan, layout: Layout, images: Tensor, repeats: int = 20) -> float:
    """Processor time of the slim model's forward over the dense one's: median over interleaved repeats."""
    smaller, model = slim(model, plan, layout).eval(), model.eval()

    @torch.no_grad()
    def run(net: nn.Module) -> None:
        net(images)

    return _ratio(lambda: run(smaller), lambda: run(model), repeats)


def training_ratio(model: nn.Module, plan: Plan, layout: Layout, images: Tensor, repeats: int = 10) -> float:
    """Stage 2's speed on the slim model over that on the masked one, images a second."""
    masked, smaller = copy.deepcopy(model).train(), slim(model, plan, layout).train()
    apply_plan(masked, plan)

    def step(net: nn.Module) -> None:
        net.zero_grad()
        outputs = net(images)
        logits = torch.cat(outputs) if isinstance(outputs, tuple) else outputs  # those of a distillation token too
        F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long)).backward()

    def masked_step() -> None:
        apply_plan(masked, plan)
        step(masked)

    return _ratio(masked_step, lambda: step(smaller), repeats)


def _ratio(one: Callable[[], None], other: Callable[[], None], repeats: int) -> float:
    one()
    other()
    ratios = []
    for _ in range(repeats):
        times = []
        for work in (one, other):
            start = now()
            work()
            times.append(now() - start)
        ratios.append(times[0] / max(times[1], 1e-9))
    return median(ratios)


def now() -> float:
    """Seconds of this process's work: on a processor without those that others take from it."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
