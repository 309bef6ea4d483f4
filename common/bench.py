"""What benchmarks share: fair timing of forms against each other, ratios with their targets, one table of them all.

python -m common.bench TABLE.md */benchmarks/*.py   (or: make bench)
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from common.config import command, require
from common.runs import environment, read_json, write_atomically

RATIOS = "BENCH_RATIOS"  # environment variable: the file in which `conclude` leaves its ratios
Times = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Ratio:
    """A measured ratio and the least or the most it should be; with neither it is only shown."""

    what: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def target(self) -> str:
        """In words; nothing where there is none."""
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}" if self.most is not None else ""

    @property
    def verdict(self) -> str:
        """met, missed, or nothing."""
        fits = (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)
        return "" if not self.target else "met" if fits else "missed"


def now() -> float:
    """Seconds of this process's work: on a processor without those that other processes take from it."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    works: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = now
) -> dict[str, list[float]]:
    """Seconds of each work in each repeat: in turning order, so that all see the same machine; one call each untimed.

    With one thread the default clock gives the wall time of an idle machine; give `time.perf_counter` with more.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for repeat in range(repeats):
        for name in list(works)[:: -1 if repeat % 2 else 1]:
            start = clock()
            works[name]()
            times[name].append(clock() - start)
    return times


def ratio(times: Times, one: str, other: str) -> float:
    """Median over the repeats of the time of `one` over that of `other` in the same repeat."""
    return median(a / b for a, b in zip(times[one], times[other], strict=True))


def conclude(ratios: Sequence[Ratio]) -> int:
    """Print the ratios with their targets, leave them for `main`; returns the exit status, 1 for a miss."""
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    table = Table("what", "ratio", "target", "", title=f"ratios of one run, {load}")
    for found in ratios:
        table.add_row(found.what, f"{found.value:.4g}", found.target, found.verdict)
    Console(width=None if Console().is_terminal else 140).print(table)
    if RATIOS in os.environ:
        Path(os.environ[RATIOS]).write_text(json.dumps([asdict(found) for found in ratios]))
    return 1 if any(found.verdict == "missed" for found in ratios) else 0


def table_of(measured: Mapping[str, Sequence[Ratio]]) -> str:
    """The ratios by script as Markdown, with machine, versions and date."""
    facts = environment()
    machine, versions = facts["machine"], ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        "# Efficient forms against plain ones",
        "",
        f"Measured {facts['date']} on {machine['cores']} cores ({machine['cpu']}), {versions}, revision "
        f"{facts['revision']}. Each row is a ratio of one run; the forms and sizes are said in the script.",
        "",
        "| script | what | ratio | target | |",
        "|---|---|---|---|---|",
    ]
    for script, ratios in measured.items():
        lines += [f"| {script} | {r.what} | {r.value:.4g} | {r.target} | {r.verdict} |" for r in ratios]
        lines += [] if ratios else [f"| {script} | ended without a ratio | | | failed |"]
    return "\n".join([*lines, ""])


def run(script: Path) -> tuple[int, list[Ratio]]:
    """Exit status of a benchmark script and its ratios: none, and not 0, where it failed before it had them."""
    with tempfile.TemporaryDirectory() as folder:
        left = Path(folder) / "ratios.json"
        done = subprocess.run([sys.executable, script], env={**os.environ, RATIOS: str(left)}, check=False)
        ratios = [Ratio(**found) for found in read_json(left)] if left.exists() else []
    return done.returncode or int(not ratios), ratios


def main() -> int:
    """Run the scripts named after the table, one after another, and write the table; 1 where one missed or failed."""
    page, *scripts = map(Path, sys.argv[1:])
    require(bool(scripts), "the benchmarks", "none", "the paths of scripts, after that of the table")
    measured, failed = dict[str, list[Ratio]](), False
    for script in scripts:
        print(f"== {script}", flush=True)
        status, measured[f"{script.parents[1].name}/{script.stem}"] = run(script)
        failed = failed or status != 0
    write_atomically(page, table_of(measured).encode())
    print(page)
    return 1 if failed else 0


if __name__ == "__main__":
    command(main)
