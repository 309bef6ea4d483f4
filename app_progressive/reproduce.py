"""The study: python -m app_progressive.reproduce --scale demo   (or: make reproduce-app-progressive)

One cell is the arms of one part at one seed, each a run along the stream and a row.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from app_progressive.claims import claims
from app_progressive.configured import megabatches, network
from app_progressive.eval import evaluate
from app_progressive.figures import draw
from app_progressive.holm import judge_together
from app_progressive.images import pool_and_test
from app_progressive.settings import AnytimeStudy, Config, PartConfig, split_arm
from app_progressive.train import train
from common.claims import report
from common.config import command, dump, require
from common.study import Cell, run_study, study_config

HERE = Path(__file__).parent


def part_config(config: Config, part: PartConfig) -> Config:
    """The configuration of a part: its stream and length of training."""
    stream = replace(config.stream, states=part.states, size=part.size, noise=part.noise, shots=part.shots)
    epochs = replace(config.train, epochs=part.epochs, milestones=part.milestones)
    return replace(config, stream=stream, train=epochs, prune=replace(config.prune, q=part.q), study=AnytimeStudy())


def arm_config(config: Config, arm: str, densities: Sequence[float] = ()) -> Config:
    """The configuration of an arm of a part: only how it prunes and starts, and the replay, differ.

    Args:
        config: of the part.
        arm: see `PartConfig.arms`.
        densities: what `random` follows, the effective densities of `released`.
    """
    name, criterion, tau, replay = split_arm(arm)
    prune, options, stream = config.prune, config.train, config.stream
    prune = replace(prune, method="app", tau=tau or prune.tau, criterion=criterion or prune.criterion)  # type: ignore[arg-type]
    if name == "dense":
        prune = replace(prune, method="dense")
    elif name == "osp":
        prune = replace(prune, method="osp", schedule="exponential", densities=[], growth=0.0)  # one density alone
    elif name in ("shrink", "scratch"):
        prune, options = replace(prune, method="dense"), replace(options, start=name)  # type: ignore[arg-type]
    elif name == "released":
        prune = replace(prune, score_weights="fresh", update="intersect", subset="first", ties="threshold")
        options = replace(options, val_augment=True)
    elif name == "random":
        prune = replace(prune, criterion="random", densities=list(densities))
    elif name == "imp":
        prune, options = replace(prune, criterion="mag"), replace(options, start="rewind")
    elif name == "cubic":
        prune = replace(prune, schedule="cubic")
    elif name == "open":
        prune = replace(prune, growth=0.5)
    stream = replace(stream, replay=replay or stream.replay)  # type: ignore[arg-type]
    return replace(config, prune=prune, train=options, stream=stream)


def run_cell(config: Config, cell: Cell, folder: Path, progress: Callable[[float], None]) -> list[dict[str, Any]]:
    """The arms of one part at one seed: a row for each."""
    arms = cell.settings["arms"].split()
    wanted = (part for part in config.study.parts if (part.name, part.arms) == (cell.settings["part"], arms))
    one = replace(part_config(config, next(wanted)), seed=cell.seed)
    rows: list[dict[str, Any]] = []
    densities: list[float] = []
    for number, arm in enumerate(arms):

        def within(fraction: float, before: int = number) -> None:
            progress((before + fraction) / len(arms))

        home = folder / f"arm-{number}"
        train(arm_config(one, arm, densities), home, within)
        metrics = evaluate(home)
        if arm == "released":
            half = 0.5 / metrics["weights"]  # of a weight below, so that rounding down gives the very count
            densities = [max(density - half, half) for density in metrics["density"]]
        rows.append({"cell": {"arm": arm}, "metrics": metrics})
    return rows


def reproduce(arguments: Sequence[str] | None = None) -> int:
    """Run the study of a scale and report it; returns the exit status."""
    config = study_config(Config, HERE / "configs", arguments)
    require(len(config.study.parts) > 0, "study.parts", config.study.parts, "at least one part")
    for part in config.study.parts:  # once, before any cell: a data set that is not there, or too small, ends here
        one = part_config(config, part)
        pool, _ = pool_and_test(one)
        megabatches(one, pool)
        network(one, pool)
    seeds = config.study.seeds
    wanted = [(part, seed) for part in config.study.parts for seed in seeds[: part.seeds]]
    cells = [Cell({"part": part.name, "arms": " ".join(part.arms)}, seed) for part, seed in wanted]
    # Of the study only what a cell depends on: with more seeds or workers finished cells are found again.
    parts = [replace(part, seeds=1) for part in config.study.parts]
    one = replace(config, study=AnytimeStudy(parts=parts))
    folder = Path(config.study.runs) / "app_progressive" / config.study.scale
    study = run_study(cells, partial(run_cell, one), folder, dump(one), config.study)
    judged, place = claims(config), Path(config.study.results or HERE / "results")
    status = report("app_progressive", study, judged, partial(draw, claims=judged), place, judge_together)
    for arm, nominal, effective in densities_of(study.rows):
        print(f"{arm}: last density nominal {nominal:.4f}, effective {effective:.4f}")
    return status


def densities_of(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Part and arm, nominal and effective density after the last state, means over seeds."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        last = row["metrics"]["density_target"][-1], row["metrics"]["density"][-1]
        found.setdefault(f"{row['cell']['part']} {row['cell']['arm']}", []).append(last)
    return [(name, *(sum(each) / len(each) for each in zip(*pairs, strict=True))) for name, pairs in found.items()]


if __name__ == "__main__":
    command(lambda: reproduce(sys.argv[1:]))
