"""The study: python -m symbolic_l2o.reproduce --scale demo   (or: make reproduce-symbolic-l2o)

One cell is one arm at one seed: a teacher with its equations and their races; the tuned baselines of the same races;
meta-tuning; the sanity targets; costs; or, at the larger scales, one network trained by one optimiser.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.claims import report
from common.config import command, dump
from common.data import load
from common.study import Cell, run_study, study_config
from symbolic_l2o.baselines import LearnerOptimizer, baseline
from symbolic_l2o.claims import CLAIMS
from symbolic_l2o.cost import step_costs, tuning_floats, tuning_peak
from symbolic_l2o.eval import distilled, evaluate, load_teacher, measures
from symbolic_l2o.figures import draw
from symbolic_l2o.optimizer import SymbolicOptimizer
from symbolic_l2o.race import Choice, Result, choose, final_losses, race
from symbolic_l2o.regression import Search
from symbolic_l2o.rule import SymbolicRule
from symbolic_l2o.sanity import TARGETS, recovered
from symbolic_l2o.settings import ARMS, Config, L2OStudy, NetworkConfig, split_entry
from symbolic_l2o.train import race_problem, train, with_task

HERE = Path(__file__).parent
TEACHERS = ARMS[:4]
RACE, CHOICE = 10, 11  # first keys of the starts and batches of races, and of those that choose learning rates
POINTS = 60  # of a curve in the results
Progress = Callable[[float], None]
Row = dict[str, Any]


def part(progress: Progress, first: float, last: float) -> Progress:
    """Progress of a part of the work that takes it from `first` to `last`."""
    return lambda fraction: progress(first + (last - first) * fraction)


def steps_of(config: Config, problem: str) -> int:
    """Steps of a race."""
    return config.study.conv_steps if problem == "conv" else config.study.race_steps


def outcome(problem: Any, result: Result) -> Row:
    """Loss on all images and end loss of each start, and the mean curve."""
    curve = result.curve[:: max(len(result.curve) // POINTS, 1)].tolist()
    return {"final": final_losses(problem, result.x).tolist(), "end": result.end.tolist(), "curve": curve}


def teacher_config(config: Config, arm: str, seed: int) -> Config:
    """The run that meta-trains one teacher: DM on a problem that it can learn, with imitation and clipping."""
    place = TEACHERS.index(arm)  # type: ignore[arg-type]
    study, wide = config.study, arm in ("dm", "rp")
    changes: dict[str, Any] = {"epochs": study.epochs[place], "lr": study.lrs[place], "clip": 1.0 if wide else 0.0}
    changes["imitation"] = [0.1] if arm == "dm" else [0.0]
    problem = replace(config.problem, name="relu01") if arm == "dm" else config.problem
    return with_task(
        config, task="teacher", teacher=arm, seed=seed, problem=problem, meta=replace(config.meta, **changes)
    )


def teacher_cell(config: Config, cell: Cell, folder: Path, progress: Progress) -> list[Row]:
    """A teacher, its equations with fidelity, memory and complexity, and races of all on half B."""
    arm, study = cell.settings["arm"], config.study
    run = teacher_config(config, arm, cell.seed)
    done = train(run, folder, part(progress, 0, 0.5))
    teacher = load_teacher(folder, run)
    equations = distilled(teacher, run, part(progress, 0.5, 0.75))
    rows = [{"cell": {"what": "teacher"}, "metrics": {name: done[name] for name in ("start_loss", "loss")}}]
    for name, metrics in measures(equations).items():
        rows.append({"cell": {"what": "equation", "by": name}, "metrics": metrics})
    data = load(config.data).train
    eta = config.meta.eta

    def entrant(name: str, rule: SymbolicRule | None, problem_name: str, starts: int) -> Row:
        problem = race_problem(problem_name, config, data)

        def make(parameters: Any, lr: float) -> torch.optim.Optimizer:
            return (
                LearnerOptimizer(parameters, teacher, lr) if rule is None else SymbolicOptimizer(parameters, rule, lr)
            )

        steps = steps_of(config, problem_name)
        found = race(problem, make, eta, starts, steps, (cell.seed, RACE))
        return {"cell": {"what": "race", "problem": problem_name, "by": name}, "metrics": outcome(problem, found)}

    own = dict.fromkeys([config.problem.name, "relu01"])
    rules = {name: one.rule for name, one in equations.found.items() if name in ("template", "pole", "operon-0")}
    for number, problem in enumerate(own):
        rows.append(entrant("teacher", None, problem, study.teacher_inits))
        rows += [entrant(name, rule, problem, study.teacher_inits) for name, rule in rules.items()]
        progress(0.75 + 0.1 * (number + 1) / len(own))
    if arm == "rp_s":
        for problem in study.unseen:
            rows.append(entrant("pole", rules["pole"], problem, study.inits))
    return rows


def baselines_cell(config: Config, cell: Cell, progress: Progress) -> list[Row]:
    """Each hand-made optimiser at the best of its grid, chosen on other starts, on the unseen problems."""
    study, data, rows = config.study, load(config.data).train, []
    jobs = [(problem, name) for problem in study.unseen for name in study.baselines]
    for number, (problem_name, name) in enumerate(jobs):
        problem, steps = race_problem(problem_name, config, data), steps_of(config, problem_name)
        chosen: Choice = choose(problem, name, study.grid, study.tuning_inits, steps, (cell.seed, CHOICE))

        def make(parameters: Any, lr: float, name: str = name) -> torch.optim.Optimizer:
            return baseline(name, parameters, lr)

        found = race(problem, make, chosen.lr, study.inits, steps, (cell.seed, RACE), chosen.decays)
        settings = {"what": "race", "problem": problem_name, "by": name, "lr": chosen.lr, "cosine": chosen.decays}
        metrics = {**outcome(problem, found), "at_edge": float(chosen.at_edge)}
        rows.append({"cell": settings, "metrics": metrics})
        progress((number + 1) / len(jobs))
    return rows


def tune_cell(config: Config, cell: Cell, folder: Path, progress: Progress) -> list[Row]:
    """The preset, made too small, tuned on the convolutional network; and as it is."""
    study, rows = config.study, []
    for number, gain in enumerate((study.tune_gain, 1.0)):
        run = with_task(
            config,
            task="tune",
            seed=cell.seed,
            problem=replace(config.problem, name="conv"),
            rule=replace(config.rule, gain=gain),
            meta=replace(config.meta, epochs=study.tune_epochs, lr=study.tune_lr, coords=0, clip=0.0, evaluate_every=1),
        )
        done = train(run, folder / f"gain-{gain:g}", part(progress, number / 2, number / 2 + 0.5))
        rows.append({"cell": {"what": "tune", "gain": gain}, "metrics": done})
    return rows


def sanity_cell(config: Config, cell: Cell, progress: Progress) -> list[Row]:
    """R2 of symbolic regression on known update rules."""
    options, rows = config.records, []
    search = Search(evaluations=options.evaluations, population=options.population, generations=options.generations)
    for number, name in enumerate(TARGETS):
        rows.append({"cell": {"what": "sanity", "by": name}, "metrics": {"r2": recovered(name, search, cell.seed)}})
        progress((number + 1) / len(TARGETS))
    return rows


def network_cell(config: Config, cell: Cell, folder: Path, progress: Progress) -> list[Row]:
    """One network trained by one optimiser; "tuned" is the rule meta-tuned on this network first."""
    name, lr = split_entry(cell.settings["entry"])
    run = with_task(config, task="network", seed=cell.seed, network=_network(config.network, name, lr))
    if name == "tuned":
        tuning = with_task(config, task="tune", seed=cell.seed)
        train(tuning, folder / "tune", part(progress, 0, 0.3))
        run = replace(run, rule=replace(run.rule, source=str(folder / "tune" / "rule.json"), gain=1.0))
    train(run, folder / "network", part(progress, 0.3 if name == "tuned" else 0, 1))
    return [{"cell": {"what": "network", "by": name, "lr": lr}, "metrics": evaluate(folder / "network")}]


def _network(options: NetworkConfig, name: str, lr: float) -> NetworkConfig:
    return replace(options, optimizer="symbolic" if name == "tuned" else name, lr=lr)  # type: ignore[arg-type]


def run_cell(config: Config, cell: Cell, folder: Path, progress: Progress) -> list[Row]:
    """The rows of one cell."""
    arm = cell.settings.get("arm")
    if arm in TEACHERS:
        return teacher_cell(config, cell, folder, progress)
    if arm == "baselines":
        return baselines_cell(config, cell, progress)
    if arm == "tune":
        return tune_cell(config, cell, folder, progress)
    if arm == "sanity":
        return sanity_cell(config, cell, progress)
    if arm == "cost":
        memory = {**tuning_floats(config.meta.unroll, 8, 2), "tuning_peak_ratio": tuning_peak("resnet20", 32)}
        return [{"cell": {"what": "cost"}, "metrics": {**step_costs(200_000), **memory}}]
    return network_cell(config, cell, folder, progress)


def reproduce(arguments: Sequence[str] | None = None) -> int:
    """Run the study of a scale and report it; returns the exit status."""
    config = study_config(Config, HERE / "configs", arguments)
    load(config.data)  # once, before any cell: a download happens here, a data set that is not there ends here
    study = config.study
    cells = [Cell({"arm": arm}, seed) for seed in study.seeds for arm in study.arms]
    cells += [Cell({"entry": entry}, seed) for seed in study.seeds for entry in study.networks]
    # Of the study only what a cell depends on: with more seeds or workers finished cells are found again.
    plain = L2OStudy()
    apart = {name: getattr(plain, name) for name in ("scale", "seeds", "workers", "backend", "runs", "results")}
    one = replace(config, study=replace(study, **apart, arms=list(ARMS), networks=[]))
    folder = Path(study.runs) / "symbolic_l2o" / study.scale
    result = run_study(cells, partial(run_cell, one), folder, dump(one), study)
    return report("symbolic_l2o", result, CLAIMS, draw, Path(study.results or HERE / "results"))


if __name__ == "__main__":
    command(lambda: reproduce(sys.argv[1:]))
