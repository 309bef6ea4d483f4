"""The study: python -m uvc_vit.reproduce --scale demo   (or: make reproduce-uvc-vit)

One cell is one seed: a dense network is trained, then every arm compresses it, with equal epochs; one row an arm and
budget. Arms of a seed share network, order and augmentation.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from common.claims import report
from common.config import command, dump, require
from common.data import ImageSet, Splits, in_order, load, pixels, steps_per_epoch
from common.experiment import device
from common.study import Cell, run_study, study_config
from uvc_vit.adapter import ViTAdapter
from uvc_vit.audit import skipped_share
from uvc_vit.choose import build, controller, network
from uvc_vit.claims import CLAIMS
from uvc_vit.cost import latency_ratio, training_ratio
from uvc_vit.eval import evaluate, read_plan
from uvc_vit.figures import draw
from uvc_vit.settings import UNSTRUCTURED, CompressionStudy, Config
from uvc_vit.train import train

HERE = Path(__file__).parent
KEPT = 2**28  # bytes of the teacher's logits at most, for images in memory
CELL_FIELDS = ("arms", "budget", "wide_arms", "wide_budget", "dense_epochs", "dense_lr", "dense_warmup")
ONE_SHOT = ("dense", "magnitude", "random", "gradient", "drop-last", *UNSTRUCTURED)


def arm_config(config: Config, name: str, budget: float) -> Config:
    """The configuration of one arm at one budget: all else stays."""
    method = replace(config.method, budget=budget)
    if name in ONE_SHOT:
        return replace(config, arm=name, method=method)  # type: ignore[arg-type]
    config = replace(config, arm="uvc")
    if name == "prune-only":
        method = replace(method, skip=False)
    elif name == "skip-only":
        method = replace(method, prune=False)
    elif name == "no-kd":
        config = replace(config, kd=replace(config.kd, kind="none"))
    elif name == "kd-numel":
        config = replace(config, kd=replace(config.kd, reduction="numel"))
    elif name == "released":
        method = replace(method, mode="released", accounting="released", table="")
    return replace(config, method=method)


def run_cell(config: Config, cell: Cell, folder: Path, progress: Callable[[float], None]) -> list[dict[str, Any]]:
    """One seed: a row for the dense network and one for every arm at every budget."""
    config, study = replace(config, seed=cell.seed), config.study
    splits = load(config.data)
    pairs = study.pairs()
    epochs = config.search.epochs + config.train.epochs
    whole = study.dense_epochs + len(pairs) * epochs
    dense = replace(
        config,
        arm="dense",
        kd=replace(config.kd, kind="none"),
        search=replace(config.search, epochs=0),
        train=replace(config.train, epochs=study.dense_epochs, lr=study.dense_lr, warmup=study.dense_warmup),
    )
    train(dense, folder / "start", lambda fraction: progress(fraction * study.dense_epochs / whole))
    rows = [{"cell": {"arm": "start", "budget": 1.0}, "metrics": evaluate(folder / "start")}]
    config = replace(config, model=replace(config.model, weights=str(folder / "start" / "model.pt")))
    logits = shared_logits(config, splits.train)
    for number, (name, budget) in enumerate(pairs):
        given = whole_blocks(config, splits, budget) if name in ("skip-only", "drop-last") else budget
        home = folder / f"{name}-{budget}"

        def within(fraction: float, before: int = number) -> None:
            progress((study.dense_epochs + (before + fraction) * epochs) / whole)

        train(arm_config(config, name, given), home, within, logits)
        metrics = evaluate(home) | audited(config, splits, home, trained=name == "uvc") | trajectory(home)
        rows.append({"cell": {"arm": name, "budget": budget}, "metrics": metrics})
    return rows


def shared_logits(config: Config, data: ImageSet) -> dict[int, torch.Tensor] | None:
    """Where arms keep the teacher's logits, which all ask about the same images; None where they would not be small."""
    steps = (config.search.epochs + config.train.epochs) * steps_per_epoch(data, config.train.batch_size)
    size = 4 * steps * config.train.batch_size * data.classes
    return {} if isinstance(data.images, torch.Tensor) and size <= KEPT else None


def whole_blocks(config: Config, splits: Splits, budget: float) -> float:
    """R of the fewest whole blocks that cost at least the budget: what arms of whole blocks are given."""
    config = replace(config, method=replace(config.method, budget=1.0))
    there = controller(config, build(config, splits.train), splits.train)
    dense, blocks = there.costs.dense.item(), len(there.adapter.dims)
    block = (dense - there.costs.embed) / blocks
    left = [(there.costs.embed + block * count) / dense for count in range(1, blocks + 1)]
    return min(1.0, *(share + 1e-9 for share in left if share >= budget - 1e-9))


def audited(config: Config, splits: Splits, home: Path, trained: bool) -> dict[str, Any]:
    """Where the plan of a run saves, and times of its network, in training too where asked for.

    The ratios of times are the only numbers of a study that may differ between two runs of it.
    """
    plan, model = read_plan(home / "plan.json"), network(config, splits.train).to(device())
    _, size = config.model.image_shape(splits.train)
    adapter = ViTAdapter(model)
    found = {"skipped_share": skipped_share(plan, adapter.tokens((size, size)), adapter.embed_macs((size, size)))}
    raw = torch.cat([images for images, _ in islice(in_order(splits.test, 64), 1)])
    images = config.model.normalize(pixels(raw)).to(device())
    found["latency_ratio"] = latency_ratio(model, plan, config.layout, images)
    if trained:
        found["stage2_ratio"] = training_ratio(model, plan, config.layout, images)
    return found


def trajectory(home: Path, points: int = 60) -> dict[str, list[float]]:
    """R, z and R's target over stage 1, at most `points` of each, with their steps; nothing without a stage 1."""
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] == "search"]
    lines = lines[:: max(1, -(-len(lines) // points))]
    return {f"search_{key}": [line[key] for line in lines] for key in ("step", "R", "z", "target")} if lines else {}


def whole_grid(arguments: Sequence[str]) -> list[str]:
    """The arguments with the seeds `full`, of `make ... SEEDS=full`, put as the scale demo_full."""
    there = list(arguments)
    if "--study.seeds" in there and there[there.index("--study.seeds") + 1 :][:1] == ["[full]"]:
        place = there.index("--study.seeds")
        del there[place : place + 2]
        if "--scale" in there:
            place = there.index("--scale")
            scale = "".join(there[place + 1 : place + 2])
            require(scale == "demo", "--scale", scale, "demo with seeds full, the only larger study")
            del there[place : place + 2]
        there += ["--scale", "demo_full"]
    return there


def reproduce(arguments: Sequence[str] | None = None) -> int:
    """Run the study of a scale and report it; returns the exit status."""
    config = study_config(Config, HERE / "configs", whole_grid(sys.argv[1:] if arguments is None else arguments))
    load(config.data)  # once, before any cell: a download happens here, a data set that is not there ends here
    for name, budget in config.study.pairs():
        arm_config(config, name, budget)  # what cannot be is refused before any cell
    cells = [Cell({}, seed) for seed in config.study.seeds]
    kept = {field: getattr(config.study, field) for field in CELL_FIELDS}
    one = replace(config, study=CompressionStudy(**kept))
    folder = Path(config.study.runs) / "uvc_vit" / config.study.scale
    study = run_study(cells, partial(run_cell, one), folder, dump(one), config.study)
    return report("uvc_vit", study, CLAIMS, draw, Path(config.study.results or HERE / "results"))


if __name__ == "__main__":
    command(lambda: reproduce(sys.argv[1:]))
