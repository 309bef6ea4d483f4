"""Ship a run's best replicate: python -m optimizer_amalgamation.export --folder runs/... --name choice-large

Writes presets/<name>.pt and <name>.json, which says which run the weights come from. The best replicate is that with
the best races on the problem of its meta-training, from starts that no evaluation has (as the pool's rates are chosen).
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from common.config import ConfigError, command, parse, require
from common.experiment import finished_run, progress_bar
from common.runs import read_json
from optimizer_amalgamation.eval import race_all
from optimizer_amalgamation.rule import Weights
from optimizer_amalgamation.settings import Config
from optimizer_amalgamation.train import make_rule, run_weights
from optimizer_amalgamation.weights import PRESETS, save_weights

NAMES = ("mean", "minmax", "choice-small", "choice-large", "rnnprop", "stronger")


@dataclass(frozen=True)
class Arguments:
    """Which run, and under which name."""

    folder: str = ""
    """of a finished run of train.py"""
    name: str = ""
    """of the weights"""
    replicate: int = -1
    """its place in meta.replicates; -1: the best in races"""
    to: str = str(PRESETS)
    """folder that is written to"""
    overwrite: bool = False
    """replace weights of this name that are there"""

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder", self.folder, "the folder of a run")
        require(self.name in NAMES, "name", self.name, f"one of {', '.join(NAMES)}")


def export(arguments: Arguments) -> Path:
    """Write the weights and their provenance; returns their path. Raises `ConfigError`, `CheckpointError`."""
    folder = Path(arguments.folder)
    config = finished_run(folder, Config)
    student = config.method.student
    require(student == "rnnprop", "folder", arguments.folder, f"the run of a student rnnprop, not of {student}")
    plain = (config.method.layers, config.method.head) == (2, "free")
    require(plain, "folder", arguments.folder, "the run of a student of two layers with the head free")
    done, environment = read_json(folder / "done.json"), read_json(folder / "environment.json")
    fitting = names_of(config)
    require(
        arguments.name in fitting, "name", arguments.name, f"{' or '.join(fitting)}, as this run's method is called"
    )
    path = Path(arguments.to) / f"{arguments.name}.pt"
    free = arguments.overwrite or not path.exists()
    require(free, "overwrite", arguments.overwrite, f"true to replace {path}, which is there")
    count = len(config.meta.replicates)
    require(-1 <= arguments.replicate < count, "replicate", arguments.replicate, f"in [-1, {count})")
    weights = run_weights(folder, config)
    raced = races(config, weights) if arguments.replicate < 0 else None
    chosen = raced["losses"].index(min(raced["losses"])) if raced else arguments.replicate
    own = {name: value[chosen] for name, value in weights.items()}
    save_weights(path, own, {**_provenance(config, done, environment, chosen), "races": raced})
    return path


def names_of(config: Config) -> list[str]:
    """What the students of a run may be called: those of a policy that is no longer there, after either pool."""
    method = config.method
    if method.policy and not method.teachers:
        policy = Path(method.policy)
        try:
            pool = finished_run(policy, Config).method.pool if policy.is_dir() else ""
        except ConfigError:
            pool = ""
        return [f"choice-{pool}"] if pool else ["choice-large", "choice-small"]
    several = {"max": "minmax", "mean": "mean"}[method.reduce]
    return [("rnnprop", "stronger", several)[min(len(method.teachers) + bool(method.policy), 2)]]


def races(config: Config, weights: Weights) -> dict[str, Any]:
    """Mean log of each replicate's best held-out loss on the problem of its meta-training, all from the same starts.

    The numbers are under "losses", beside what they were measured with.
    """
    name = config.problem.name
    options = replace(config.evaluation, problems=[name], seed=config.evaluation.seed + 1)
    with progress_bar("races") as progress:
        found = race_all(replace(config, evaluation=options), make_rule(config.method), weights, progress, alike=True)
    return {**asdict(options), "losses": [mean(values) for values in found[name]["val_best"]]}


def _provenance(config: Config, done: dict[str, Any], environment: dict[str, Any], chosen: int) -> dict[str, Any]:
    sections = asdict(config)
    for name in ("run", "study", "evaluation"):
        del sections[name]
    sections["method"]["policy"] = Path(config.method.policy).name  # a path of the machine that trained
    return {
        "rule": config.method.student,
        "config": sections,
        "revision": environment["revision"],
        "data": config.data.name,
        "meta_steps": done["meta_steps"][chosen],
        "replicate": config.meta.replicates[chosen],
        "validation": done["validations"][chosen],
        "validations": done["validations"],
        "versions": environment["versions"],
        "date": environment["date"],
    }


def main() -> None:
    """The command line."""
    about = "optimizer_amalgamation: ship the weights of a finished run"
    path = export(parse(Arguments, prog="python -m optimizer_amalgamation.export", description=about))
    print(f"written: {path}, {path.with_suffix('.json').name}")


if __name__ == "__main__":
    command(main)
