"""CROWN bounds of all ReLU inputs and all margins against auto_LiRPA 0.3 in its patches mode.

Ours bounds (image, unstable neuron) pairs on their receptive fields; the library the neurons unstable in any image of
the batch. Fails where a batch of 8 images on a net like the demo's is less than twice as fast, or where a margin is
worse by more than 1e-4. The batch then grows.

python certified_pruning/benchmarks/intermediate_bounds.py
"""

import sys
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from certified_pruning.auto_lirpa import bounded, lirpa_margins
from certified_pruning.bench import SHAPE, demo_net
from certified_pruning.chain import ChainNet
from certified_pruning.crown import crown_intermediate, crown_lower
from certified_pruning.ibp import input_box, margin_spec
from common.bench import Ratio, conclude, interleaved, ratio

THREADS = 1
BATCHES = (8, 1, 4, 16, 32)
EPS = 0.1
LEAST = 2.0
REPEATS = 5


def main() -> int:
    """Print the table; 1 where the ratio at the first batch size is below the least allowed, or a margin is worse."""
    torch.set_num_threads(THREADS)
    model, x, y = demo_net(epochs=3, eps=EPS)
    net = ChainNet.from_module(model, SHAPE)
    library = bounded(model, SHAPE)
    title = f"CROWN bounds, cnn_s, eps {EPS}, {THREADS} thread, {REPEATS} interleaved repeats, CPU time"
    columns = ("images", "unstable", "ours, ms", "a row, us", "auto_LiRPA, ms", "ratio")
    table = Table(*columns, title=title)
    table.caption = "a row: one bound, lower or upper, of one unstable neuron, or one margin; the first ratio is judged"
    ratios, worst = [], 0.0
    for batch in BATCHES:
        box = input_box(x[:batch], EPS)
        C, _ = margin_spec(y[:batch], net.n_out)

        def ours(box: tuple[Tensor, Tensor] = box, C: Tensor = C) -> Tensor:
            return crown_lower(net, C, *box, crown_intermediate(net, *box))

        def theirs(box: tuple[Tensor, Tensor] = box, C: Tensor = C) -> Tensor:
            return lirpa_margins(library, *box, C, "crown")

        times = interleaved({"ours": ours, "library": theirs}, REPEATS)
        worst = max(worst, float((theirs() - ours()).max()))
        unstable = [(lower < 0) & (upper > 0) for lower, upper in crown_intermediate(net, *box)]
        rows = 2 * sum(int(layer.sum()) for layer in unstable[1:]) + C[:, :, 0].numel()
        share = torch.cat(unstable, 1).float().mean()
        own, other = median(times["ours"]), median(times["library"])
        ratios.append(ratio(times, "library", "ours"))
        cells = (f"{1e3 * own:.1f}", f"{1e6 * own / rows:.1f}", f"{1e3 * other:.0f}", f"{ratios[-1]:.1f}")
        table.add_row(str(batch), f"{share:.0%}", *cells)
    Console().print(table)
    return conclude(
        [
            Ratio(f"CROWN bounds of {BATCHES[0]} images: auto_LiRPA / ours", ratios[0], LEAST),
            Ratio("the same: largest shortfall of our margins", worst, most=1e-4),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
