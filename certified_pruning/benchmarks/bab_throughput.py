"""Branch and bound over many images at once against one image at a time; its share of the machine; its memory.

Fails where the nodes a second of 100 images together are less than 3 times those of the same images one by one, where
verdicts or node counts differ, or where a stored domain is larger than 8 bytes an unstable neuron, 64 a split and 1 kB.

python certified_pruning/benchmarks/bab_throughput.py
"""

import resource
import sys
import time
from statistics import median
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from certified_pruning import stages
from certified_pruning.bench import SHAPE, demo_net, operations, peak
from certified_pruning.chain import ChainNet
from certified_pruning.frontier import Domains, Frontier
from certified_pruning.verdicts import VerifyConfig, VerifyReport
from certified_pruning.verifier import CompleteVerifier
from common.bench import Ratio, conclude

THREADS = 1
IMAGES, EPS = 100, 0.1
CONFIG = VerifyConfig(root_steps=10, bab_steps=10, max_nodes=100, pgd_restarts=0)  # demo.yaml, attack left out
REPEATS = 3
LEAST = 3.0
DOMAINS, DEPTH = 50_000, 16


class Timed:
    """Verification of groups of images; CPU seconds spent in branch and bound, and in all."""

    def __init__(self, verifier: CompleteVerifier) -> None:
        self.verifier, self.branching, self.all = verifier, 0.0, 0.0

    def run(self, x: Tensor, y: Tensor, group: int) -> list[tuple[str, int]]:
        """Status and nodes of each image, `group` images a call."""
        self.branching, start, reports = 0.0, time.process_time(), list[VerifyReport]()
        branch_and_bound = stages.branch_and_bound

        def timed(*arguments) -> None:  # type: ignore[no-untyped-def]
            before = time.process_time()
            branch_and_bound(*arguments)
            self.branching += time.process_time() - before

        with patch.object(stages, "branch_and_bound", timed):
            for i in range(0, len(x), group):
                reports.append(self.verifier.verify(x[i : i + group], y[i : i + group]))
        self.all = time.process_time() - start
        return [(v.status, v.nodes) for report in reports for v in report.images]


def stored_domains(unstable: int, n_neurons: int) -> tuple[int, float]:
    """Bytes of a domain, and the growth in MB of the process' largest resident size, from 50,000 of them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    frontier, n = None, 1000
    for start in range(0, DOMAINS, n):
        part = Domains(
            torch.arange(start, start + n) % IMAGES,
            torch.zeros(n, dtype=torch.long),
            torch.rand(n),
            torch.rand(n, unstable).half(),
            torch.randint(n_neurons, (n, DEPTH), dtype=torch.int32),
            torch.ones(n, DEPTH, dtype=torch.int8),
            torch.rand(n, DEPTH),
            torch.randint(n_neurons, (n, 7), dtype=torch.int32),
        )
        frontier = frontier or Frontier(part)
        frontier.push(part)
    assert frontier is not None
    frontier.pop(frontier.choose(CONFIG.max_rows, torch.full((IMAGES,), 1000)))
    return frontier.bytes_per_domain, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> int:
    """Print the table; 1 where a target is missed."""
    torch.set_num_threads(THREADS)
    limit = peak()
    model, x, y = demo_net(epochs=5, eps=EPS)
    x, y = x[:IMAGES], y[:IMAGES]
    timed = Timed(CompleteVerifier(model, SHAPE, EPS, 10, CONFIG))
    net = ChainNet.from_module(model, SHAPE)
    results, branching, whole = {}, {1: [], IMAGES: []}, {1: [], IMAGES: []}
    for _ in range(REPEATS):
        for group in branching:
            results[group] = timed.run(x, y, group)
            branching[group].append(timed.branching)
            whole[group].append(timed.all)
    nodes = sum(n for _, n in results[IMAGES])
    # A node: steps updates with a transposed and a forward pass each, one more bound, and up to k candidate children.
    passes = 2 * CONFIG.bab_steps + 1 + 2 * CONFIG.kfsb_k
    title = f"{IMAGES} images, {nodes:,} nodes, cnn_s, eps {EPS}, {THREADS} thread"
    table = Table(
        "images at once", "branching, s", "nodes/s", "ratio", "of peak", "all stages, s", "ratio", title=title
    )
    table.caption = (
        f"CPU time, medians of {REPEATS} interleaved repeats; "
        f"of peak: at most {passes} passes a node against {limit / 1e9:.0f} GFLOP/s of a matrix product in this run"
    )
    gain = median(a / b for a, b in zip(branching[1], branching[IMAGES], strict=True))
    for group in branching:
        seconds, total = median(branching[group]), median(whole[group])
        share = nodes * passes * operations(net) / seconds / limit
        ratios = (median(a / b for a, b in zip(t[1], t[group], strict=True)) for t in (branching, whole))
        first, second = (f"{r:.1f}" for r in ratios)
        table.add_row(
            str(group), f"{seconds:.2f}", f"{nodes / seconds:,.0f}", first, f"{share:.0%}", f"{total:.2f}", second
        )
    Console().print(table)
    unstable = net.n_neurons // 2
    size, grown = stored_domains(unstable, net.n_neurons)
    allowed = 8 * unstable + 64 * DEPTH + 1024
    memory = Table(
        "domains", "unstable", "splits", "bytes a domain", "allowed", "peak RSS grew by, MB", title="Frontier"
    )
    memory.add_row(f"{DOMAINS:,}", f"{unstable:,}", str(DEPTH), f"{size:,}", f"{allowed:,}", f"{grown:,.0f}")
    Console().print(memory)
    not_same = sum(a != b for a, b in zip(results[1], results[IMAGES], strict=True))
    return conclude(
        [
            Ratio(f"branch and bound, nodes a second: {IMAGES} images together / one by one", gain, LEAST),
            Ratio("the same: verdicts or numbers of nodes that differ", not_same, most=0),
            Ratio("bytes of a stored domain / allowed", size / allowed, most=1),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
