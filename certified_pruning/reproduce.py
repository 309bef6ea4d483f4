"""The study: python -m certified_pruning.reproduce --scale demo   (or: make reproduce-certified-pruning)

One cell is one regime and method at one seed: a chain of lottery rounds, each verified. It gives one row a round.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from certified_pruning.claims import claims
from certified_pruning.eval import evaluate
from certified_pruning.figures import draw
from certified_pruning.settings import Config, PruningStudy
from certified_pruning.train import train
from common.claims import report
from common.config import command, dump, require
from common.data import load
from common.study import Cell, run_study, study_config

HERE = Path(__file__).parent
TRAINING = 0.2  # its share of a cell's time, for the progress bar


def chain_config(config: Config, changes: Mapping[str, Any], seed: int) -> Config:
    """The configuration of one chain: `config` with the settings of a cell, each in the section that has it."""

    def part(section: Any) -> Any:
        return replace(section, **{name: value for name, value in changes.items() if hasattr(section, name)})

    sections = {"train": part(config.train), "prune": part(config.prune), "eval": part(config.eval)}
    return replace(config, seed=seed, **sections)


def run_cell(config: Config, cell: Cell, folder: Path, progress: Callable[[float], None]) -> list[dict[str, Any]]:
    """Train and verify one chain; one row a verified round."""
    chain = chain_config(config, cell.settings, cell.seed)
    train(chain, folder, lambda fraction: progress(TRAINING * fraction))
    rows = []
    rounds = evaluate(folder, lambda fraction: progress(TRAINING + (1 - TRAINING) * fraction))
    for number, metrics in enumerate(rounds, chain.eval.first_round):
        # Seconds stay in the run's eval.json: a row holds only what comes out equal every time.
        kept = {name: value for name, value in metrics.items() if name not in ("density", "seconds")}
        rows.append({"cell": {"round": number, "density": metrics["density"]}, "metrics": kept})
    return rows


def reproduce(arguments: Sequence[str] | None = None) -> int:
    """Run the study of a scale and report it; returns the exit status."""
    config = study_config(Config, HERE / "configs", arguments)
    load(config.data)  # once, before any cell: a download happens here, a data set that is not there ends here
    shared = replace(config, study=PruningStudy())
    cells = []
    for seed in config.study.seeds:
        for chosen in config.study.cells:
            regime = chosen.regime or config.train.regime
            changes = {name: value for name, value in asdict(chosen).items() if value is not None}
            cells.append(Cell({"regime": regime, "method": chosen.method, **changes}, seed))
            chain_config(shared, cells[-1].settings, seed)  # a cell that cannot be is refused before anything runs
    chains = [(cell.settings["method"], cell.settings["regime"], cell.seed) for cell in cells]
    twice = [chain for chain in chains if chain[0].startswith("imp") and chains.count(chain) > 1]
    require(not twice, "study.cells", " ".join(map(str, twice[:1])), "one chain of imp and of imp+nrs a regime")
    folder = Path(config.study.runs) / "certified_pruning" / config.study.scale
    study = run_study(cells, partial(run_cell, shared), folder, dump(shared), config.study)
    judged = claims(config.verify.max_nodes)
    return report("certified_pruning", study, judged, draw, Path(config.study.results or HERE / "results"))


if __name__ == "__main__":
    command(lambda: reproduce(sys.argv[1:]))
