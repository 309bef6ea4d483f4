"""The study: python -m backdoor_lth.reproduce --scale demo   (or: make reproduce-backdoor-lth, SEEDS=full)

One cell is one arm (the attack, or a control) at one seed: the chain of tickets, their scores, the scans.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from backdoor_lth.claims import claims
from backdoor_lth.eval import evaluate
from backdoor_lth.figures import draw, summary
from backdoor_lth.settings import ArmConfig, Config, TrojanStudy
from backdoor_lth.train import train
from backdoor_lth.victim import victim
from common.claims import report
from common.config import command, dump, require
from common.study import Cell, run_study, study_config

HERE = Path(__file__).parent
FULL = [10, 11, 12, 13, 14, 15, 16, 17]  # the seeds of SEEDS=full
TRAINING = 0.6  # its share of a cell's time, for the progress bar


def arm_config(config: Config, arm: ArmConfig) -> Config:
    """The run of an arm."""
    attack = replace(config.attack, kind=arm.kind, equalise=arm.equalise, place=arm.place or config.attack.place)
    prune = replace(config.prune, method=arm.method, rate=arm.rate or config.prune.rate)
    return replace(config, attack=attack, prune=prune)


def arms_seeds(study: TrojanStudy) -> list[tuple[ArmConfig, int]]:
    """Every arm with each of its seeds."""
    return [(arm, seed) for arm in study.arms for seed in study.seeds[: arm.seeds or None]]


def run_cell(config: Config, cell: Cell, folder: Path, progress: Callable[[float], None]) -> list[dict[str, Any]]:
    """One arm at one seed: a row for the dense network, for every ticket and for every scan."""
    (arm,) = (arm for arm in config.study.arms if arm.name == cell.settings["arm"])
    config = arm_config(replace(config, seed=cell.seed, study=TrojanStudy()), arm)
    train(config, folder, lambda fraction: progress(TRAINING * fraction))
    metrics = evaluate(folder, lambda fraction: progress(TRAINING + (1 - TRAINING) * fraction))
    rows: list[dict[str, Any]] = [{"cell": {"what": "dense"}, "metrics": metrics["dense"]}]
    for each in metrics["rounds"]:
        rows.append({"cell": {"what": "ticket", "round": each["round"]}, "metrics": each})
    for name, scan in metrics["scans"].items():
        rows.append({"cell": {"what": "scan", "network": name}, "metrics": scan})
    return rows


def reproduce(arguments: Sequence[str] | None = None) -> int:
    """Run the study of a scale and report it; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    full = "[full]" in arguments
    config = study_config(Config, HERE / "configs", [str(FULL) if each == "[full]" else each for each in arguments])
    if full:
        arms = [replace(arm, seeds=arm.full) for arm in config.study.arms]
        config = replace(config, study=replace(config.study, arms=arms))
    require(config.task == "chain", "task", config.task, "chain in a study")
    for arm in config.study.arms:
        victim(arm_config(config, arm))  # a download, or data that is not there, or an attack that does not fit
    cells = [Cell({"arm": arm.name}, seed) for arm, seed in arms_seeds(config.study)]
    # Of the study only what a cell depends on: with more seeds or workers finished cells are found again.
    one = replace(config, study=TrojanStudy(arms=[replace(arm, seeds=0, full=0) for arm in config.study.arms]))
    folder = Path(config.study.runs) / "backdoor_lth" / config.study.scale
    study = run_study(cells, partial(run_cell, one), folder, dump(one), config.study)
    place = Path(config.study.results or HERE / "results")
    status = report("backdoor_lth", study, claims(config), draw, place)
    for line in summary(study.rows):
        print(line)
    return status


if __name__ == "__main__":
    command(lambda: reproduce(sys.argv[1:]))
