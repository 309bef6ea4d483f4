"""Alpha-CROWN by closed-form gradients against auto_LiRPA 0.3 (repaired), 20 steps from the same intermediate bounds.

Fails where cnn_s with 72 rows (8 images, 9 targets) is less than 8 times as fast, or where a bound is worse than the
library's by more than 2e-3. Rows, depth and width then grow one at a time from there.

python certified_pruning/benchmarks/alpha_loop.py
"""

import sys
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from certified_pruning.alpha_beta import optimize_alpha_beta
from certified_pruning.auto_lirpa import bounded, lirpa_margins
from certified_pruning.bench import operations, peak
from certified_pruning.chain import ChainNet
from certified_pruning.crown import crown_intermediate
from certified_pruning.ibp import input_box, margin_spec
from common.bench import Ratio, conclude, interleaved, ratio

THREADS = 1
STEPS = 20
LEAST = 8.0
BASE = {"images": 8, "depth": 2, "width": 1}
GROWTH = {"images": (1, 32), "depth": (1, 4), "width": (2, 4)}
REPEATS = 11


def conv_net(depth: int, width: int) -> nn.Sequential:
    """cnn_s without batch norm for depth 2, width 1; further convolutions keep the 7x7 map."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 8 * width, 4, 2, 1), nn.ReLU()]
    for i in range(1, depth):
        kernel, stride = (4, 2) if i == 1 else (3, 1)
        layers += [nn.Conv2d((8 if i == 1 else 16) * width, 16 * width, kernel, stride, 1), nn.ReLU()]
    features = 16 * width * 49 if depth > 1 else 8 * width * 196
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 50), nn.ReLU(), nn.Linear(50, 10)).eval()


def measure(images: int, depth: int, width: int, repeats: int) -> tuple[float, float, float, float, int]:
    """Median seconds of ours and the library's, their ratio, the worst shortfall of our bounds, operations a row."""
    model = conv_net(depth, width)
    net = ChainNet.from_module(model, (1, 28, 28))
    x = torch.rand(images, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    C, _ = margin_spec(net.forward(x).argmax(1), 10)
    box = input_box(x, 0.05)
    pre = crown_intermediate(net, *box)
    library = bounded(model, (1, 28, 28), steps=STEPS)
    works = {
        "ours": lambda: optimize_alpha_beta(net, C, *box, pre, steps=STEPS).lb,
        "library": lambda: lirpa_margins(library, *box, C, "alpha-crown", pre=pre),
    }
    times = interleaved(works, repeats)
    shortfall = float((works["library"]() - works["ours"]()).max())
    return median(times["ours"]), median(times["library"]), ratio(times, "library", "ours"), shortfall, operations(net)


def main() -> int:
    """Print the table; 1 where the ratio of the base case is below the least allowed, or a bound is worse."""
    torch.set_num_threads(THREADS)
    limit = peak()
    title = f"alpha-CROWN, {STEPS} steps, {THREADS} thread"
    table = Table("varied", "rows", "convs", "width", "ours, ms", "auto_LiRPA, ms", "ratio", "of peak", title=title)
    table.caption = (
        f"CPU time, medians of {REPEATS} (first row, judged) or 3 interleaved repeats; "
        f"of peak: 2 passes a step against {limit / 1e9:.0f} GFLOP/s of a matrix product in this run"
    )
    cases = [("-", BASE)] + [(name, BASE | {name: value}) for name in GROWTH for value in GROWTH[name]]
    ratios, worst = [], 0.0
    for varied, case in cases:
        repeats = REPEATS if varied == "-" else 3
        ours, theirs, times, shortfall, work = measure(**case, repeats=repeats)
        rows = 9 * case["images"]
        share = 2 * work * rows * (STEPS + 1) / ours / limit
        sizes = (str(rows), str(case["depth"]), f"x{case['width']}")
        table.add_row(varied, *sizes, f"{1e3 * ours:.1f}", f"{1e3 * theirs:.0f}", f"{times:.1f}", f"{share:.0%}")
        ratios.append(times)
        worst = max(worst, shortfall)
    Console().print(table)
    return conclude(
        [
            Ratio(f"alpha-CROWN, {STEPS} steps: auto_LiRPA / ours", ratios[0], LEAST),
            Ratio("the same: largest shortfall of our bounds", worst, most=2e-3),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
