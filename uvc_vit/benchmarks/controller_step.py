"""The controller's step against its loop form, stage 2 on the slim model against the masked one, and latency.

Processor time of one thread, as ratios in one run. Fails where the step is less than 25 times (DeiT-T) or 8 times
(DeiT-B) as fast as loops over columns, where stage 2 at half of the multiply-adds is less than 0.8 / R times as fast
as with masks, or where the slim DeiT-T takes more than R + 0.15 of the dense one's time. `--full` adds DeiT-S.

python uvc_vit/benchmarks/controller_step.py
"""

import copy
import sys
import time
from collections.abc import Callable
from statistics import median

import timm
import torch
from rich.console import Console
from rich.table import Table

from common.bench import Ratio, conclude
from uvc_vit.adapter import ViTAdapter
from uvc_vit.controller import UVCController
from uvc_vit.cost import latency_ratio, training_ratio
from uvc_vit.gate_values import gumbel
from uvc_vit.latency import measure
from uvc_vit.tests.plain import Loops
from uvc_vit.uvc_config import UVCConfig

SIZE = (224, 224)
LEAST = {"deit_tiny_patch16_224": 25.0, "deit_base_patch16_224": 8.0}
LEAST_STAGE2, MOST_LATENCY = 0.8, 0.15
STEPS, LOOP_STEPS, SEARCH = 25, 3, 60
CONSOLE = Console(width=None if sys.stdout.isatty() else 120)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median processor time of one call, after a warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return median(times[1:])


def step_row(table: Table, name: str) -> float:
    """Add the times of one model; returns how many times as fast as loops the released step is."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    released = UVCController(ViTAdapter(model), UVCConfig(mode="released", accounting="released"), SIZE)
    solve = UVCController(ViTAdapter(model), UVCConfig(), SIZE)
    loops, noise = Loops(ViTAdapter(model), released.costs, 0.5), gumbel((2, len(model.blocks), 2), None)
    task = torch.zeros_like(noise[0])
    looped = seconds(lambda: loops.step(1e-4, task, noise), LOOP_STEPS)
    spent = []
    for method in (released, solve):
        method.attach()
        spent.append(seconds(lambda method=method: method.step(1e-4), STEPS))
        method.detach()
    own, solved = spent
    times = (f"{1e3 * each:.1f} ms" for each in (looped, own, solved))
    table.add_row(name, *times, f"{looped / own:.0f}", f"{looped / solved:.0f}")
    return looped / own


def half() -> list[Ratio]:
    """DeiT-T at budget 0.5, of multiply-adds or of measured time, with plans of the method itself on random weights."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224")
    images = torch.randn(8, 3, *SIZE)
    measured = measure(model, images, 10)
    found = []
    title = f"DeiT-T at half, a block's time fitted within {measured.error:.0%}"
    table = Table("budget of", "R", "layout", "batch", "latency, slim / dense", "stage 2, slim / masked", title=title)
    for accounting in ("exact", "latency"):
        adapter = ViTAdapter(model)
        costs = measured.costs(adapter) if accounting == "latency" else None
        options = UVCConfig(stage1_steps=SEARCH, accounting=accounting)
        method = UVCController(adapter, options, SIZE, costs)
        weights = copy.deepcopy(model.state_dict())
        method.attach()
        for _ in range(SEARCH):
            method.step()
        method.detach()
        plan = method.finalise()
        model.load_state_dict(weights)
        share = method.resource(plan)
        for layout in ("grouped", "padded") if accounting == "exact" else ("grouped",):
            for batch, repeats in ((1, 20), (8, 10)):
                latency = latency_ratio(model, plan, layout, images[:batch], repeats)
                speed = training_ratio(model, plan, layout, images[:batch], repeats // 2)
                table.add_row(accounting, f"{share:.3f}", layout, str(batch), f"{latency:.2f}", f"{speed:.2f}")
                if layout == "padded":
                    continue
                words = f"DeiT-T at half of its {'MACs' if accounting == 'exact' else 'time'}, batch {batch}"
                allowed = MOST_LATENCY + (share if accounting == "exact" else 0.5)
                found.append(Ratio(f"{words}, latency: slim / dense", latency, most=round(allowed, 3)))
                least = LEAST_STAGE2 / share if accounting == "exact" and batch > 1 else None
                found.append(Ratio(f"{words}, steps a second of stage 2: slim / masked", speed, least))
    CONSOLE.print(table)
    return found


def main() -> int:
    """Print the tables; returns 1 where a bound is missed."""
    torch.set_num_threads(1)
    ratios = []
    names = [*LEAST, *(["deit_small_patch16_224"] if "--full" in sys.argv else [])]
    table = Table("model", "loops", "released", "solve", "loops / released", "loops / solve", title="controller's step")
    for name in names:
        ratios.append(
            Ratio(f"controller's step, {name}: loops / vectorised", step_row(table, name), LEAST.get(name, 1.0))
        )
    CONSOLE.print(table)
    return conclude([*ratios, *half()])


if __name__ == "__main__":
    sys.exit(main())
