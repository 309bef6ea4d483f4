"""The study: python -m diverse_vit.reproduce --scale demo   (or: make reproduce-diverse-vit)

One cell is one arm at one seed, trained into one row.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from common.claims import report
from common.config import command, dump
from common.data import in_order, load, pixels
from common.runs import seed_everything
from common.study import Cell, Progress, run_study, study_config
from common.vit import build_vit
from diverse_vit.claims import CLAIMS, judge_at
from diverse_vit.cost import cost_ratios
from diverse_vit.eval import evaluate, trained_network
from diverse_vit.figures import draw
from diverse_vit.settings import Config, DiverseStudy, ObjectiveConfig
from diverse_vit.train import train

HERE = Path(__file__).parent


def run_cell(config: Config, cell: Cell, folder: Path, progress: Progress) -> list[dict[str, Any]]:
    """One arm at one seed: its row. `*_ratio` are times, the only numbers that do not come out equal every time."""
    settings = {key: value for key, value in cell.settings.items() if key != "arm"}
    config = replace(config, seed=cell.seed, objective=ObjectiveConfig(**settings))
    train(config, folder, lambda fraction: progress(0.95 * fraction))
    metrics = evaluate(folder)
    if settings:
        metrics = {**metrics, **cost(config, folder)}
    return [{"metrics": metrics}]


def cost(config: Config, folder: Path) -> dict[str, float]:
    """What the objective of the finished run in `folder` costs."""
    splits = load(config.data)
    trained, _ = trained_network(folder, config, splits)
    seed_everything(config.seed)
    plain = build_vit(config.model, splits.train).to(next(trained.parameters()).device)
    count = config.train.batch_size
    ((images, labels),) = islice(in_order(splits.train, count), 1)
    place = next(plain.parameters()).device
    inputs = config.model.normalize(pixels(images.to(place)))
    return dict(cost_ratios(config, trained, plain, inputs, labels.to(place)))


def reproduce(arguments: Sequence[str] | None = None) -> int:
    """Run the study of a scale and report it; returns the exit status."""
    config = study_config(Config, HERE / "configs", arguments)
    load(config.data)  # once, before any cell: a download happens here, a data set that is not there ends here
    study = config.study
    for arm in study.arms:
        config.check_mix(study.objective(arm), f"study.arms.{arm}")
    cells = [Cell({"arm": arm, **study.arms[arm]}, seed) for seed in study.seeds for arm in study.arms]
    # Nothing of the study but the cell itself: with more arms, seeds or workers finished cells are found again.
    one = replace(config, study=DiverseStudy())
    folder = Path(study.runs) / "diverse_vit" / study.scale
    result = run_study(cells, partial(run_cell, one), folder, dump(one), study)
    place, judging = Path(study.results or HERE / "results"), partial(judge_at, study.scale)
    return report("diverse_vit", result, CLAIMS, draw, place, judging)


if __name__ == "__main__":
    command(lambda: reproduce(sys.argv[1:]))
