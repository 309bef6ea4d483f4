"""The study: python -m double_win_lth.reproduce --scale demo   (or: make reproduce-double-win-lth)

One cell is one regime at one seed: pre-training, all tickets, all their transfers. Afterwards the masks of different
regimes are compared.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

from common.claims import report
from common.config import command, dump, require
from common.data import load
from common.study import Cell, run_study, study_config
from double_win_lth.claims import claims
from double_win_lth.figures import draw, extremes
from double_win_lth.recipes import SgdConfig
from double_win_lth.settings import (
    REGIMES,
    Config,
    EvalConfig,
    RegimeName,
    SchemeConfig,
    TicketStudy,
    TransferConfig,
    ticket_kind,
)
from double_win_lth.similarity import chance_iou, iou, layerwise_chance_iou
from double_win_lth.tickets import TicketBook
from double_win_lth.train import train

HERE = Path(__file__).parent
FINDING = 0.3  # its share of a cell's time, for the progress bar


def tickets_config(config: Config, regime: RegimeName, seed: int) -> Config:
    """The run that finds tickets: only what it depends on, so that schemes can change without finding them again."""
    plain = Config()
    return replace(
        config,
        task="tickets",
        regime=regime,
        seed=seed,
        finetune=plain.finetune,
        attack=plain.attack,
        transfer=TransferConfig(),
        eval=EvalConfig(),
        study=TicketStudy(),
    )


def tickets_home(root: Path, config: Config) -> Path:
    """Where a study keeps the tickets of one regime and seed, beside its cells."""
    digest = hashlib.sha256(dump(config).encode()).hexdigest()[:8]
    return root / f"tickets-{config.regime}-seed{config.seed}-{digest}"


def transfers(config: Config, regime: RegimeName) -> list[Config]:
    """All transfers of one regime's tickets; a scheme that is not grouped trains each ticket on its own."""
    found = []
    for scheme in config.study.schemes:
        names = getattr(scheme, regime)
        groups = [names] if scheme.grouped and names else [[name] for name in names]
        shared = replace(config, task="transfer", regime=regime, finetune=_finetune(config, scheme))
        few = replace(config.eval, images=config.study.std_images)
        for number, (kind, judge), group in product(range(scheme.draws), (("adv", config.eval), ("std", few)), groups):
            chosen = replace(config.transfer, kind=kind, fraction=scheme.fraction, draw=number, tickets=group)
            found.append(replace(shared, transfer=chosen, eval=judge))
    return found


def _finetune(config: Config, scheme: SchemeConfig) -> SgdConfig:
    sgd = config.finetune
    if scheme.steps or scheme.epochs:
        sgd = replace(sgd, steps=scheme.steps, epochs=scheme.epochs)
    return replace(sgd, batch_size=scheme.batch_size or sgd.batch_size)


def run_cell(config: Config, cell: Cell, folder: Path, progress: Callable[[float], None]) -> list[dict[str, Any]]:
    """Find the tickets of one regime at one seed and transfer them: a row for each."""
    regime = cell.settings["regime"]
    finding = tickets_config(config, regime, cell.seed)
    home = tickets_home(folder.parent, finding)
    train(finding, home, lambda fraction: progress(FINDING * fraction))
    rows = []
    work = transfers(replace(config, seed=cell.seed), regime)
    for number, one in enumerate(work):
        chosen = replace(one.transfer, run=str(home))

        def within(fraction: float, before: int = number) -> None:
            progress(FINDING + (1 - FINDING) * (before + fraction) / len(work))

        metrics = train(replace(one, transfer=chosen, study=TicketStudy()), folder / f"transfer-{number}", within)
        for ticket, values in metrics["tickets"].items():
            kind, level = ticket_kind(ticket)
            place = {"fraction": chosen.fraction, "draw": chosen.draw, "transfer": chosen.kind}
            settings = {**place, "ticket": kind, "level": level, "sparsity": metrics["sparsity"][ticket]}
            rows.append({"cell": settings, "metrics": values})
    return rows


def similarity_rows(config: Config, regimes: Sequence[RegimeName], root: Path) -> list[dict[str, Any]]:
    """One row for each pair of regimes, seed and judged level whose tickets are there: IoU and its chance levels.

    `iou_across` compares with the masks of the next seed, which was initialised differently.
    """
    books = {}
    for seed in config.study.seeds:
        for regime in regimes:
            path = tickets_home(root, tickets_config(config, regime, seed)) / "tickets.safetensors"
            if path.exists():
                books[regime, seed] = TicketBook.load(path)
    rows = []
    following = dict(zip(config.study.seeds, [*config.study.seeds[1:], config.study.seeds[0]], strict=True))
    for seed in config.study.seeds:
        for one, other in combinations(regimes, 2):
            if (one, seed) not in books or (other, seed) not in books:
                continue
            for level in dict.fromkeys((config.study.middle, config.study.high)):
                mask, its = books[one, seed].mask(level), books[other, seed].mask(level)
                metrics = {
                    "iou": iou(mask, its),
                    "chance": chance_iou(mask.density),
                    "layerwise_chance": layerwise_chance_iou(mask, its),
                }
                if following[seed] != seed and (other, following[seed]) in books:
                    metrics["iou_across"] = iou(mask, books[other, following[seed]].mask(level))
                rows.append({"cell": {"pair": f"{one}-{other}", "level": level}, "seed": seed, "metrics": metrics})
    return rows


def reproduce(arguments: Sequence[str] | None = None) -> int:
    """Run the study of a scale and report it; returns the exit status."""
    config = study_config(Config, HERE / "configs", arguments)
    scale = config.study.scale
    require(not scale.startswith("paper"), "study.scale", scale, "a study: those files configure one run of train.py")
    for data in (config.source, config.target):
        load(data)  # once, before any cell: a download happens here, a data set that is not there ends here
    config.require_apart()
    regimes = [regime for regime in REGIMES if transfers(config, regime)]
    tickets = [ticket for regime in regimes for one in transfers(config, regime) for ticket in one.transfer.tickets]
    highest = max(ticket_kind(ticket)[1] for ticket in ["dense", *tickets])
    for name, level in (("study.schemes", highest), ("study.high", config.study.high)):
        require(level <= config.prune.rounds, name, level, f"of levels up to prune.rounds, {config.prune.rounds}")
    # The dearest cells first, so that no worker is left with one of them at the end.
    by_cost = sorted(regimes, key=("adv", "std", "fast").index)
    cells = [Cell({"regime": regime}, seed) for regime in by_cost for seed in config.study.seeds]
    # Of the study only what a cell depends on: with more seeds or workers finished cells are found again.
    kept = TicketStudy(schemes=config.study.schemes, std_images=config.study.std_images)
    one = replace(config, study=kept)
    root = Path(config.study.runs) / "double_win_lth" / config.study.scale
    study = run_study(cells, partial(run_cell, one), root, dump(one), config.study)
    study = replace(study, rows=[*study.rows, *similarity_rows(config, regimes, root)])
    place = Path(config.study.results or HERE / "results")
    status = report("double_win_lth", study, claims(config), draw, place)
    for line in extremes(study.rows, config.study.margin):
        print(line)
    return status


if __name__ == "__main__":
    command(lambda: reproduce(sys.argv[1:]))
