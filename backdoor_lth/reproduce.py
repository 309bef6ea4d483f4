"""The study: python -m backdoor_lth.reproduce --scale demo   (or: make reproduce-backdoor-lth, SEEDS=full)

One cell is one arm (the attack, or a control) at one seed: the chain of tickets, their scores, the scans.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from backdoor_lth.claims import claims
from backdoor_lth.eval import evaluate
from backdoor_lth.figures import draw, summary
from backdoor_lth.settings import ArmConfig, Config, TrojanStudy
from backdoor_lth.train import Chain, train
from backdoor_lth.victim import network, victim
from common.claims import report
from common.config import command, dump, require
from common.study import Cell, run_study, study_config

HERE = Path(__file__).parent
TRAINING = 0.6  # its share of a cell's time, for the progress bar


@dataclass(frozen=True)
class ArmCell(Cell):
    """A cell that depends on its own arm alone."""

    arm: ArmConfig


def arm_config(config: Config, arm: ArmConfig) -> Config:
    """The run of an arm."""
    attack = replace(config.attack, kind=arm.kind, equalise=arm.equalise, place=arm.place or config.attack.place)
    rounds, rate = arm.rounds or config.prune.rounds, arm.rate or config.prune.rate
    return replace(config, attack=attack, prune=replace(config.prune, method=arm.method, rate=rate, rounds=rounds))


def cells_of(study: TrojanStudy) -> list[ArmCell]:
    """Every arm with each of its seeds."""
    pairs = [(arm, seed) for arm in study.arms for seed in study.seeds[: arm.seeds or None]]
    return [ArmCell({"arm": arm.name}, seed, replace(arm, seeds=0, full=0)) for arm, seed in pairs]


def run_cell(config: Config, cell: Cell, folder: Path, progress: Callable[[float], None]) -> list[dict[str, Any]]:
    """One arm at one seed: a row for the dense network, for every ticket and for every scan."""
    assert isinstance(cell, ArmCell)
    config = arm_config(replace(config, seed=cell.seed), cell.arm)
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
    if full:  # --study.seeds [full]
        at = arguments.index("[full]")
        del arguments[at - 1 : at + 1]
    config = study_config(Config, HERE / "configs", arguments)
    if full:
        arms = [replace(arm, seeds=arm.full or arm.seeds) for arm in config.study.arms]
        seeds = config.study.full or config.study.seeds
        config = replace(config, study=replace(config.study, arms=arms, seeds=seeds))
    require(config.task == "chain", "task", config.task, "chain in a study")
    for arm in config.study.arms:  # a download, or data that is not there, or what does not fit them
        own = arm_config(config, arm)
        data = victim(own).train
        Chain(own, data, network(own, data, torch.device("cpu")))
    # Of the study only what a cell depends on: with more arms, seeds or workers finished cells are found again.
    one = replace(config, study=TrojanStudy())
    folder = Path(config.study.runs) / "backdoor_lth" / config.study.scale
    study = run_study(cells_of(config.study), partial(run_cell, one), folder, dump(one), config.study)
    if full and config.study.full:  # beside the report of the smaller study, whose cells it has too
        study = replace(study, scale=f"{study.scale}_full")
    place = Path(config.study.results or HERE / "results")
    status = report("backdoor_lth", study, claims(config), draw, place)
    for line in summary(study.rows, {arm.name: arm.kind for arm in config.study.arms}):
        print(line)
    return status


if __name__ == "__main__":
    command(lambda: reproduce(sys.argv[1:]))
