"""The study: python -m sparse_gan.reproduce --scale demo   (or: make reproduce-sparse-gan)

One cell trains and measures one GAN: one arm, which is a method with two densities, at one seed.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from common.claims import report
from common.config import command, dump, require
from common.data import load
from common.study import Cell, run_study, study_config
from sparse_gan.claims import CLAIMS
from sparse_gan.eval import evaluate
from sparse_gan.figures import draw
from sparse_gan.game import rounds_to
from sparse_gan.settings import Config, GanStudy
from sparse_gan.train import train

HERE = Path(__file__).parent
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "static": {"method": "static"},
    "static-uniform": {"method": "static", "distribution": "uniform"},
    "stu": {"method": "dynamic"},
    "stu-dense-moments": {"method": "dynamic", "moments": "dense"},
    "set": {"method": "dynamic", "growth_g": "random"},
    "only-d": {"method": "dynamic", "explore": "d"},
    "both": {"method": "dynamic", "explore": "both"},
    "balanced": {"method": "dynamic", "balance": 0.05},
    "snip": {"method": "snip"},
    "gmp": {"method": "gmp"},
    "oneshot-global-g": {"method": "oneshot", "scope": "global", "prune": "g"},
    "oneshot-uniform-g": {"method": "oneshot", "scope": "uniform", "prune": "g"},
    "oneshot-global-both": {"method": "oneshot", "scope": "global", "prune": "both"},
    "oneshot-uniform-both": {"method": "oneshot", "scope": "uniform", "prune": "both"},
    "imp": {"method": "imp"},
}


def arm_config(config: Config, settings: dict[str, Any], seed: int) -> Config:
    """The configuration of one cell. Raises `ConfigError` where it cannot be, or would end at other densities."""
    densities = {name: settings[name] for name in ("density_g", "density_d")}
    sparsity = replace(config.sparsity, **METHODS[settings["arm"]], **densities)
    if sparsity.method == "imp":
        pruned = [sparsity.density_g, *([sparsity.density_d] if sparsity.prune == "both" else [])]
        rounds = max(map(rounds_to, pruned))
        allowed = f"{rounds} for the arm imp {sparsity.density_g} {sparsity.density_d}"
        require(sparsity.rounds == rounds, "sparsity.rounds", sparsity.rounds, allowed)
    return replace(config, seed=seed, sparsity=sparsity)


def run_cell(config: Config, cell: Cell, folder: Path, progress: Callable[[float], None]) -> list[dict[str, Any]]:
    """One arm at one seed: one row."""
    train(arm_config(config, cell.settings, cell.seed), folder, lambda fraction: progress(0.9 * fraction))
    return [{"metrics": evaluate(folder, lambda fraction: progress(0.9 + 0.1 * fraction))}]


def reproduce(arguments: Sequence[str] | None = None) -> int:
    """Run the study of a scale and report it; returns the exit status."""
    config = study_config(Config, HERE / "configs", arguments)
    cells = [
        Cell({"arm": arm.name, "density_g": arm.density_g, "density_d": arm.density_d}, seed)
        for seed in config.study.seeds
        for arm in config.study.parsed()
    ]
    for cell in cells:  # one that cannot be ends here, not after hours
        arm_config(config, cell.settings, cell.seed)
    load(config.data)  # once, before any cell: a download happens here, a data set that is not there ends here
    one = replace(config, study=GanStudy())  # with more arms, seeds or workers finished cells are found again
    folder = Path(config.study.runs) / "sparse_gan" / config.study.scale
    study = run_study(cells, partial(run_cell, one), folder, dump(one), config.study)
    return report("sparse_gan", study, CLAIMS, draw, Path(config.study.results or HERE / "results"))


if __name__ == "__main__":
    command(lambda: reproduce(sys.argv[1:]))
