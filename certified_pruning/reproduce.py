"""The study: python -m certified_pruning.reproduce --scale demo   (or: make reproduce-certified-pruning)

One cell is one method at one seed: a chain of lottery rounds, each verified. It gives one row a round.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from certified_pruning.claims import CLAIMS, draw
from certified_pruning.eval import evaluate
from certified_pruning.settings import Config, PruningStudy
from certified_pruning.train import train
from common.claims import report
from common.config import command, dump, parse
from common.study import Cell, run_study, scale_arguments

HERE = Path(__file__).parent
TRAINING = 0.2  # its share of a cell's time, for the progress bar


def run_cell(config: Config, cell: Cell, folder: Path, progress: Callable[[float], None]) -> list[dict[str, Any]]:
    """Train and verify one chain; one row a round."""
    chain = replace(config, seed=cell.seed, prune=replace(config.prune, method=cell.settings["method"]))
    train(chain, folder, lambda fraction: progress(TRAINING * fraction))
    rounds = evaluate(folder, lambda fraction: progress(TRAINING + (1 - TRAINING) * fraction))
    # Seconds stay in the run's eval.json: a row holds only what comes out equal every time.
    kept = [
        {name: value for name, value in metrics.items() if name not in ("density", "seconds")} for metrics in rounds
    ]
    cells = [{"round": number, "density": metrics["density"]} for number, metrics in enumerate(rounds)]
    return [{"cell": cell, "metrics": metrics} for cell, metrics in zip(cells, kept, strict=True)]


def reproduce(arguments: Sequence[str] | None = None) -> int:
    """Run the study of a scale and report it; returns the exit status."""
    prog = "python -m certified_pruning.reproduce"
    description = "Run the study of one scale: --scale smoke|demo|cifar (its YAML in configs/), then any option below."
    config = parse(Config, scale_arguments(HERE / "configs", arguments), prog=prog, description=description)
    cells = [Cell({"method": method}, seed) for seed in config.study.seeds for method in config.study.methods]
    chain = replace(config, study=PruningStudy())
    folder = Path(config.study.runs) / "certified_pruning" / config.study.scale
    study = run_study(cells, partial(run_cell, chain), folder, dump(chain), config.study)
    return report("certified_pruning", study, CLAIMS, draw, Path(config.study.results or HERE / "results"))


if __name__ == "__main__":
    command(lambda: reproduce(sys.argv[1:]))
