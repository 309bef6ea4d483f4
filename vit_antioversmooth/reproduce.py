"""The study: python -m vit_antioversmooth.reproduce --scale demo   (or: make reproduce-vit-antioversmooth)

One cell is one arm at one seed. Most train one network into one row; plain also fine-tunes its network with fresh
scales (rows tuned-*), and init measures untrained networks and what the scales cost.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.claims import report
from common.config import ConfigError, command, dump
from common.data import load
from common.experiment import device
from common.runs import seed_everything
from common.study import Cell, run_study, study_config
from vit_antioversmooth.claims import claims_of
from vit_antioversmooth.cost import PAPER_COUNTS, added_parameters, step_time_ratios
from vit_antioversmooth.eval import evaluate, first_images, probed
from vit_antioversmooth.figures import draw
from vit_antioversmooth.holm import judge_together
from vit_antioversmooth.settings import Config, ScaleStudy
from vit_antioversmooth.train import network, train

HERE = Path(__file__).parent
CELL_FIELDS = ("omegas", "noskip_depth", "noskip_epochs", "noskip_init", "tune_epochs", "tune_lr")
TIMED = 128  # images at most: the smallest batch a GPU of the paper's recipes
TUNED = {"tuned-plain": "plain", "tuned-attnscale": "attnscale", "tuned-featscale": "featscale"}


def arm_config(config: Config, arm: str) -> Config:
    """The configuration of one trained arm: all but its scales (and, for noskip, its skip and size) stays."""
    method, _, control = arm.removeprefix("noskip-").partition("-")
    scales = replace(config.scales, method=method, blind=bool(control))  # type: ignore[arg-type]
    if not arm.startswith("noskip-"):
        return replace(config, scales=scales)
    study = config.study
    return replace(
        config,
        model=replace(config.model, skip=False, depth=study.noskip_depth),
        train=replace(config.train, epochs=study.noskip_epochs, warmup=min(config.train.warmup, study.noskip_epochs)),
        scales=replace(scales, init=study.noskip_init if method == "attnscale" else 0.0),
    )


def tuned_config(config: Config, method: str, weights: Path) -> Config:
    """The configuration of fine-tuning the plain network saved at `weights` with fresh scales of `method`, or none."""
    study = config.study
    brief = replace(
        config.train,
        epochs=study.tune_epochs,
        lr=study.tune_lr,
        min_lr=0,
        warmup=min(config.train.warmup, study.tune_epochs / 2),
        warmup_lr=0,
        schedule="steps",  # by epochs, lagging one behind, the first of two would train at 0 and the second too
    )
    model = replace(config.model, pretrained=False, weights=str(weights))
    return replace(arm_config(config, method), model=model, train=brief)


def require_arms(config: Config) -> None:
    """Build the configuration of every network of the study. ConfigError, naming the arm, where one cannot be."""
    arms = dict.fromkeys(config.study.arms)
    if "init" in arms:
        arms |= dict.fromkeys(("attnscale", "featscale"))  # beside plain, which every study has, they are timed
        del arms["init"]
    for arm in arms:
        try:
            arm_config(config, arm)
            if arm == "plain" and config.study.tune_epochs:
                for method in TUNED.values():
                    tuned_config(config, method, Path("model.pt"))
        except ConfigError as error:
            raise ConfigError(f"arm {arm}: {error}") from error


def run_cell(config: Config, cell: Cell, folder: Path, progress: Callable[[float], None]) -> list[dict[str, Any]]:
    """One arm at one seed: a row for each network."""
    arm = cell.settings["arm"]
    config = replace(config, seed=cell.seed)
    if arm == "init":
        return [{"metrics": measure_untrained(config)}]
    tuned = TUNED if arm == "plain" and config.study.tune_epochs else {}
    whole = config.train.epochs + len(tuned) * config.study.tune_epochs
    share = config.train.epochs / whole
    train(arm_config(config, arm), folder, lambda fraction: progress(share * fraction))
    rows: list[dict[str, Any]] = [{"metrics": evaluate(folder)}]
    for number, (name, method) in enumerate(tuned.items()):

        def within(fraction: float, before: int = number) -> None:
            progress(share + (1 - share) * (before + fraction) / len(tuned))

        train(tuned_config(config, method, folder / "model.pt"), folder / name, within)
        rows.append({"cell": {"arm": name}, "metrics": evaluate(folder / name)})
    return rows


def measure_untrained(config: Config) -> dict[str, Any]:
    """Dose response of HC/DC to omega in the untrained network, without and with its attention skip; what scales cost.

    A network with LayerScale has no dose response: its branches start at next to nothing, whatever omega.
    `*_step_ratio` are times: the only numbers of a row that do not come out equal every time.
    """
    config = replace(config, model=replace(config.model, pretrained=False, weights=""))
    splits = load(config.data)
    doses: dict[str, list[float]] = {}
    noskip = config.model.name == "vit"
    for omega in config.study.omegas:
        for name, skip in (("dose_hc_over_dc", True), ("dose_noskip_hc_over_dc", False)):
            if skip or noskip:
                scales = replace(config.scales, method="attnscale", blind=False, init=omega)
                seed_everything(config.seed)
                model = network(replace(config, model=replace(config.model, skip=skip), scales=scales), splits.train)
                if any("gamma" in parameter for parameter, _ in model.named_parameters()):
                    continue
                ratios = probed(model.eval().to(device()), splits.test, config, ("hc",))["hc_over_dc"]
                doses.setdefault(name, []).append(ratios[-1])
    models = {}
    for method in ("plain", "attnscale", "featscale"):
        seed_everything(config.seed)
        models[method] = network(arm_config(config, method), splits.train).to(device())
    with torch.no_grad():
        images = first_images(models["plain"], splits.test, config, min(config.train.batch_size, TIMED))
    times = step_time_ratios(models, images, splits.train.classes, amp=config.train.amp)
    counts = {name: list(added_parameters(timm_name, depth)) for name, (timm_name, depth, *_) in PAPER_COUNTS.items()}
    return {
        **doses,
        "added_parameters": counts,
        "attnscale_step_ratio": times["attnscale"],
        "featscale_step_ratio": times["featscale"],
    }


def reproduce(arguments: Sequence[str] | None = None) -> int:
    """Run the study of a scale and report it; returns the exit status."""
    config = study_config(Config, HERE / "configs", arguments)
    require_arms(config)
    load(config.data)  # once, before any cell: a download happens here, a data set that is not there ends here
    cells = [Cell({"arm": arm}, seed) for seed in config.study.seeds for arm in config.study.arms]
    # Of the study only what a cell depends on: with more seeds or workers finished cells are found again.
    kept = {field: getattr(config.study, field) for field in CELL_FIELDS}
    one = replace(config, study=ScaleStudy(**kept))
    folder = Path(config.study.runs) / "vit_antioversmooth" / config.study.scale
    study = run_study(cells, partial(run_cell, one), folder, dump(one), config.study)
    results = Path(config.study.results or HERE / "results")
    return report("vit_antioversmooth", study, claims_of(config.study), draw, results, judging=judge_together)


if __name__ == "__main__":
    command(lambda: reproduce(sys.argv[1:]))
