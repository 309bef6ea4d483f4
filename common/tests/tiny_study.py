"""A study of tiny training runs, for the tests that disturb it: python common/tests/tiny_study.py FOLDER"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from common.config import command
from common.runs import RunConfig, read_json
from common.study import Cell, Progress, StudyConfig, StudyResult, run_study
from common.tests.tiny_training import TinyConfig, train

CELLS = [Cell({"dropout": dropout}, seed) for seed in (0, 1) for dropout in (0.0, 0.3)]


def train_cell(cell: Cell, home: Path, progress: Progress) -> list[dict[str, Any]]:
    """One tiny run; leaves its process id in <folder>/pids."""
    with open(home.parent / "pids", "a") as pids:
        print(os.getpid(), file=pids)
    dropout = cell.settings["dropout"]
    run = RunConfig(str(home), checkpoint_every=5)
    train(TinyConfig(seed=cell.seed, steps=200 if dropout else 100, dropout=dropout, run=run))
    return [{"cell": {"part": 1}, "metrics": read_json(home / "done.json")}]


def study(folder: Path) -> StudyResult:
    """All cells, two at a time."""
    return run_study(CELLS, train_cell, folder, "tiny", StudyConfig(workers=2))


if __name__ == "__main__":
    command(lambda: len(study(Path(sys.argv[1])).failed))
