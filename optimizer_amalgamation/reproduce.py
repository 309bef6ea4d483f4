"""The study: python -m optimizer_amalgamation.reproduce --scale demo   (or: make reproduce-optimizer-amalgamation)

One cell is one arm at one seed: it meta-trains replicates of a learnt optimizer and races them; or tunes and races the
pool on one problem; or meta-trains under one noise; or measures memory; or races the weights that are shipped.
"""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.claims import report
from common.config import command, dump, require
from common.data import load
from common.study import Cell, run_study, study_config
from optimizer_amalgamation.claims import CLAIMS
from optimizer_amalgamation.eval import evaluate, race_all
from optimizer_amalgamation.figures import draw
from optimizer_amalgamation.memory import peak_bytes, plain_step
from optimizer_amalgamation.pool_search import choose, measure, members, oracle
from optimizer_amalgamation.race import outcome
from optimizer_amalgamation.schedules import ScheduleConfig
from optimizer_amalgamation.settings import AmalgamationStudy, Config, split_problem
from optimizer_amalgamation.students import StudentRule
from optimizer_amalgamation.train import check_batches, raced_problem, train
from optimizer_amalgamation.weights import PRESETS, load_weights, shipped

HERE = Path(__file__).parent
MEMORY_STEPS = 50
Progress = Callable[[float], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class ShippedCell(Cell):
    """A cell that depends on the weights that are shipped: with others it is another."""

    weights: str
    """digest"""


def part(progress: Progress, first: float, last: float) -> Progress:
    """Progress of a part of the work that takes it from `first` to `last`."""
    return lambda fraction: progress(first + (last - first) * fraction)


def arm_config(config: Config, arm: str, seed: int, **changes: Any) -> Config:
    """The run that an arm meta-trains."""
    adam = [entry for entry in config.method.teachers if entry.startswith("adam:")]
    methods: dict[str, dict[str, Any]] = {
        "minmax": {"reduce": "max"},
        "mean": {"reduce": "mean"},
        "rnnprop": {"teachers": []},
        "stronger": {"teachers": adam},
        "original": {"student": "original", "teachers": []},
        "scale": {"student": "scale", "teachers": []},
        "choice-large": {"student": "choice", "teachers": [], "pool": "large"},
        "choice-small": {"student": "choice", "teachers": [], "pool": "small"},
    }
    schedule = config.study.choice_schedule if arm.startswith("choice") else config.schedule
    found = replace(config, seed=seed, method=replace(config.method, **methods[arm]), schedule=schedule)
    return replace(found, study=AmalgamationStudy(), **changes)


def races(by: str, measured: Mapping[str, Any]) -> list[Row]:
    """One row a problem."""
    return [
        {"cell": {"what": "race", "by": by, "problem": problem}, "metrics": metrics}
        for problem, metrics in measured.items()
    ]


def trained(by: str, config: Config, folder: Path, progress: Progress, race: bool = True) -> list[Row]:
    """Meta-train, and race on all problems."""
    done = train(config, folder, part(progress, 0, 0.9 if race else 1))
    rows: list[Row] = [{"cell": {"what": "training", "by": by}, "metrics": done}]
    return rows + (races(by, evaluate(folder, part(progress, 0.9, 1))) if race else [])


def method_cell(config: Config, cell: Cell, folder: Path, progress: Progress) -> list[Row]:
    """A learnt optimizer; of a choice policy its student too, where the study distils."""
    arm = cell.settings["arm"]
    own = arm_config(config, arm, cell.seed)
    distil = arm.startswith("choice") and config.study.distill
    rows = trained(arm, own, folder / "run", part(progress, 0, 0.4 if distil else 1))
    if distil:
        method = replace(config.method, teachers=[], policy=str(folder / "run"))
        student = replace(own, method=method, schedule=config.schedule)
        rows += trained(f"{arm}-student", student, folder / "student", part(progress, 0.4, 1))
    return rows


def pool_cell(config: Config, cell: Cell, progress: Progress) -> list[Row]:
    """Each member at its best rate on one problem; the oracle is the best on the starts of that choice."""
    entry, study, options = cell.settings["problem"], config.study, config.evaluation
    problem = raced_problem(config, entry)
    found = []
    for number, member in enumerate(members()):
        found.append(choose(problem, member, study.factors, study.tuning_repeats, options.epochs, options.seed + 1))
        progress(0.7 * (number + 1) / len(members()))
    best, rows = oracle(found), []
    starts = list(range(study.pool_repeats))
    # The learnt optimizers begin with SGD, the pool does not: its best member is shown with that too (spec f14).
    entries = [(one, (0, 0.0)) for one in found]
    entries += [(best, (options.warmup, options.warmup_rate))] if options.warmup else []
    for number, (one, warmup) in enumerate(entries):
        curves = measure(problem, one.name, [one.rate] * len(starts), starts, options.epochs, options.seed, warmup)
        metrics = {**outcome(curves, 1), "tuning_loss": one.loss, "at_edge": float(one.at_edge)}
        settings: Row = {"what": "race", "by": one.name, "rate": one.rate, "oracle": one is best}
        if warmup[0]:
            settings |= {"by": f"{one.name} after SGD", "oracle": False, "warmup": warmup[0]}
        rows.append({"cell": settings, "metrics": metrics})
        progress(0.7 + 0.3 * (number + 1) / len(entries))
    return rows


def noise_cell(config: Config, cell: Cell, folder: Path, progress: Progress) -> list[Row]:
    """Min-max, or in the arm nearest the mean, under noise: a short training, or a whole one with races."""
    kind, magnitude = cell.settings.get("kind", "none"), cell.settings.get("magnitude", 0.0)
    steps = config.study.noise_steps
    noise = replace(config.perturbation, kind=kind if magnitude else "none", magnitude=magnitude)
    changes: dict[str, Any] = {"perturbation": noise}
    if count := config.study.noise_replicates:
        changes["meta"] = replace(config.meta, replicates=list(range(count)))
    own = arm_config(config, cell.settings.get("reduce", "minmax"), cell.seed)
    if steps:
        first = config.schedule.imitation[:1]
        changes["schedule"] = ScheduleConfig("repeat", [1], first, episodes=steps, periods=1, validation_episodes=1)
    return trained("noise", replace(own, **changes), folder / "run", progress, race=not steps)


def shipped_cell(config: Config, progress: Progress) -> list[Row]:
    """All shipped weights on all problems, each from the starts of the pool."""
    names, rule = shipped(), StudentRule()
    if not names:
        return []
    loaded = [load_weights(name, rule.shapes) for name in names]
    stacked = {key: torch.stack([weights[key] for weights in loaded]) for key in rule.shapes}
    rows = []
    own_starts = replace(config, evaluation=replace(config.evaluation, repeats=config.study.pool_repeats))
    for problem, metrics in race_all(own_starts, rule, stacked, progress, alike=True).items():
        for number, name in enumerate(names):
            own: Row = {key: [values[number]] for key, values in metrics.items() if key != "curve"}
            rows += races(f"shipped-{name}", {problem: own})
    return rows


def memory_cell(config: Config, progress: Progress) -> list[Row]:
    """Peak memory of a meta-step with one, two and six teachers."""
    rows: list[Row] = []
    for number, teachers in enumerate((1, 2, 6)):
        megabytes = peak_bytes(plain_step, "small14", MEMORY_STEPS, teachers, 4) / 1e6
        cell: Row = {"what": "memory", "teachers": teachers}
        rows.append({"cell": cell, "metrics": {"megabytes": megabytes}})
        progress((number + 1) / 3)
    return rows


def run_cell(config: Config, cell: Cell, folder: Path, progress: Progress) -> list[Row]:
    """The rows of one cell."""
    arm = cell.settings["arm"]
    if arm == "pool":
        return pool_cell(config, cell, progress)
    if arm == "shipped":
        return shipped_cell(config, progress)
    if arm == "memory":
        return memory_cell(config, progress)
    if arm in ("noise", "nearest"):
        return noise_cell(config, cell, folder, progress)
    return method_cell(config, cell, folder, progress)


def cells_of(config: Config) -> list[Cell]:
    """Of the study, in the order of its arms."""
    study = config.study
    settings: list[dict[str, Any]] = []
    for arm in study.arms:
        if arm == "pool":
            settings += [{"arm": arm, "problem": p} for p in config.evaluation.problems if not split_problem(p).private]
        elif arm == "noise":
            each = [(kind, size) for kind in study.noise_kinds for size in study.noise]
            once = [(kind, size) for kind, size in each if size or kind == study.noise_kinds[0]]  # no noise has no kind
            settings += [{"arm": arm, "kind": kind, "magnitude": size} for kind, size in once]
        elif arm == "nearest":
            settings.append({"arm": arm, "reduce": "mean"})
        else:
            settings.append({"arm": arm})
    files = [PRESETS / f"{name}.pt" for name in shipped()]
    digest = hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()
    return [
        ShippedCell(one, seed, digest) if one["arm"] == "shipped" else Cell(one, seed)
        for seed in study.seeds
        for one in settings
    ]


def check_arms(config: Config) -> None:
    """Raise `ConfigError` where an arm would not be what it is named after."""
    method, arms = config.method, config.study.arms
    learnt = [arm for arm in arms if arm not in ("pool", "shipped", "memory")]
    if not learnt:
        return
    require(method.policy == "", "method.policy", method.policy, f"empty for the arms {', '.join(learnt)}")
    plain = [arm for arm in learnt if not arm.startswith("choice") and arm not in ("original", "scale")]
    if config.study.distill:
        plain = learnt
    fits = method.student == "rnnprop" or not plain
    require(fits, "method.student", method.student, f"rnnprop for the arms {', '.join(plain)}")
    taught = [arm for arm in arms if arm in ("minmax", "mean", "noise", "nearest")]
    wanted = "one or more such as adam:0.005 for the arms"
    require(bool(method.teachers) or not taught, "method.teachers", method.teachers, f"{wanted} {', '.join(taught)}")
    adam = any(entry.startswith("adam:") for entry in method.teachers)
    there = adam or "stronger" not in arms
    require(there, "method.teachers", method.teachers, "with one such as adam:0.005 for the arm stronger")


def reproduce(arguments: Sequence[str] | None = None) -> int:
    """Run the study of a scale and report it; returns the exit status."""
    config = study_config(Config, HERE / "configs", arguments)
    check_arms(config)
    splits = load(config.data)  # once, before any cell: a download happens here, a data set that is not there ends here
    for entry in (config.problem.name, *config.evaluation.problems):
        if not split_problem(entry).data:
            check_batches(config, entry, len(splits.train))
    study = config.study
    starts = len(config.meta.replicates) * config.evaluation.repeats
    fits = "pool" not in study.arms or study.pool_repeats >= starts
    require(fits, "study.pool_repeats", study.pool_repeats, f"at least {starts}, the starts of the learnt optimizers")
    # Of the study only what a cell depends on: with more seeds, arms or workers finished cells are found again.
    plain = AmalgamationStudy()
    names = ("scale", "seeds", "workers", "backend", "runs", "results", "arms", "noise", "noise_kinds")
    one = replace(config, study=replace(study, **{name: getattr(plain, name) for name in names}))
    folder = Path(study.runs) / "optimizer_amalgamation" / study.scale
    result = run_study(cells_of(config), partial(run_cell, one), folder, dump(one), study)
    return report("optimizer_amalgamation", result, CLAIMS, draw, Path(study.results or HERE / "results"))


if __name__ == "__main__":
    command(lambda: reproduce(sys.argv[1:]))
