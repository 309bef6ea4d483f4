"""Ship the best rule of a study, or of a run, as a preset: presets/<name>.json with its provenance.

python symbolic_l2o/export.py --source symbolic_l2o/results/demo.json --name rp_pole_demo
python symbolic_l2o/export.py --source runs/teacher --name mine

Of several rules the one that does best in races on half A of the images is taken, from starts of a seed of their own:
neither the images nor the starts of the study's races have a part in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from common.config import ConfigError, command, parse, require
from common.config import load as load_config
from common.data import load
from common.experiment import finished_run
from common.runs import environment, read_json, write_atomically
from symbolic_l2o.eval import evaluate
from symbolic_l2o.optimizer import SymbolicOptimizer
from symbolic_l2o.presets import BUILT_IN, FOLDER
from symbolic_l2o.race import final_losses, race
from symbolic_l2o.reproduce import HERE, steps_of, teacher_config
from symbolic_l2o.rule import SymbolicRule
from symbolic_l2o.settings import Config, ProblemName
from symbolic_l2o.train import meta_problems

LEAST_SEED = 10  # smaller ones belong to studies
VALIDATION = 12  # first key of the starts and batches here


@dataclass(frozen=True)
class ExportConfig:
    """What is shipped, and how it is chosen."""

    source: str
    """results/<scale>.json of a study, or the folder of a finished run"""
    name: str
    """of the preset"""
    form: str = "pole"
    """of a teacher's equations"""
    problems: list[ProblemName] = field(default_factory=lambda: ["sig", "relu3", "tanh"])
    """of the races that choose among several rules"""
    starts: int = 3
    seed: int = 20
    """of those starts"""
    folder: str = ""
    """where the file goes; empty: with the package's presets"""
    overwrite: bool = False
    """a preset of this name that is there"""

    def __post_init__(self) -> None:
        allowed = f"a lower-case word of letters, digits and _ that is none of {', '.join(BUILT_IN)}"
        plain = self.name.isidentifier() and self.name == self.name.lower() and self.name not in BUILT_IN
        require(plain, "name", self.name, allowed)
        require(self.starts >= 1, "starts", self.starts, "at least 1")
        require(self.seed >= LEAST_SEED, "seed", self.seed, f"at least {LEAST_SEED}")
        require(bool(self.problems), "problems", self.problems, "at least one problem")


@dataclass(frozen=True)
class Candidate:
    """A rule and where it comes from."""

    rule: SymbolicRule
    origin: str


def recipe(config: Config) -> str:
    """Data, problem and amount of a meta-training, in words."""
    meta = config.meta
    steps = f"{meta.epochs * (meta.horizon // meta.unroll)} meta-steps"
    epochs = f"{meta.epochs} epochs of {meta.horizon} steps in windows of {meta.unroll}, lr {meta.lr:g}"
    return f"{config.data.name}, half A, {config.problem.name}, seed {config.seed}, {steps} ({epochs})"


def of_study(path: Path, form: str) -> tuple[Config, list[Candidate]]:
    """The rules of all teachers with scale-free features, and the study's configuration. Raises `ConfigError`."""
    try:
        results = read_json(path)
        config = load_config(Config, HERE / "configs" / f"{results['scale']}.yaml")
        origin = f"{results['scale']} study of {results['date'][:10]}, revision {results['revision']}"
        origin += f", recipe of {results['scale']}.yaml at revision {environment()['revision']}"
        rows = [row for row in results["rows"] if row["cell"].get("by") == form and "rule" in row["metrics"]]
        found = []
        for row in rows:
            arm, rule = row["cell"]["arm"], SymbolicRule.from_json(row["metrics"]["rule"])
            if arm != "dm":
                run = teacher_config(config, arm, row["seed"])
                found.append(Candidate(rule, f"{form} form of a {arm} teacher, {origin}: {recipe(run)}"))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"source must be a study's results or a run's folder, got {str(path)!r}") from error
    return config, found


def of_run(folder: Path, form: str) -> tuple[Config, list[Candidate]]:
    """The rule of a finished run of task teacher or tune. Raises `ConfigError`."""
    config = finished_run(folder, Config)
    require(config.task != "network", "source", str(folder), "a run of task teacher or tune")
    if config.task == "tune":
        rule = SymbolicRule.from_json(read_json(folder / "done.json")["rule"])
        words = f"{rule.provenance}: {recipe(config)}"
    else:
        equations = evaluate(folder)["equations"]
        require(form in equations, "form", form, f"one of {', '.join(equations)}")
        rule = SymbolicRule.from_json(equations[form]["rule"])
        words = f"{form} form of a {config.teacher} teacher: {recipe(config)}"
    return config, [Candidate(rule, f"{words}; exported at revision {environment()['revision']}")]


def score(rule: SymbolicRule, config: Config, options: ExportConfig) -> float:
    """Mean over the problems of the log of the mean final loss on half A."""
    total, data = 0.0, load(config.data).train
    for name in options.problems:
        problem, _ = meta_problems(
            replace(config, problem=replace(config.problem, name=name)), data, torch.device("cpu")
        )

        def make(parameters: Any, lr: float) -> torch.optim.Optimizer:
            return SymbolicOptimizer(parameters, rule, lr)

        keys = (options.seed, VALIDATION)
        result = race(problem, make, config.meta.eta, options.starts, steps_of(config, name), keys)
        total += math.log(float(final_losses(problem, result.x).mean()))
    return total / len(options.problems)


def export(options: ExportConfig, say: Callable[[str], None] = print) -> Path:
    """Write the preset; returns its path. Raises `ConfigError`."""
    source, path = Path(options.source), (Path(options.folder) if options.folder else FOLDER) / f"{options.name}.json"
    require(options.overwrite or not path.exists(), "name", options.name, "another than that of a preset, or overwrite")
    config, candidates = of_run(source, options.form) if source.is_dir() else of_study(source, options.form)
    require(bool(candidates), "form", options.form, f"one that {source} has rules of")
    chosen, how = candidates[0], ""
    if len(candidates) > 1:
        scores = [score(one.rule, config, options) for one in candidates]
        for one, value in zip(candidates, scores, strict=True):
            say(f"{value:7.3f}  {one.origin}")
        chosen = candidates[scores.index(min(scores))]
        races = f"{', '.join(options.problems)}, half A, {options.starts} starts of seed {options.seed}"
        how = f"; best of {len(candidates)} by mean log loss after races on {races}"
    rule = replace(chosen.rule, provenance=chosen.origin + how)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (rule.to_json() + "\n").encode())
    return path


def main() -> None:
    """The command line."""
    path = export(parse(ExportConfig, prog="export.py", description="ship a rule as a preset"))
    print(f"{path}\n{SymbolicRule.from_json(path.read_text()).latex()}")


if __name__ == "__main__":
    command(main)
