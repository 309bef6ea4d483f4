"""Measure a finished run: python symbolic_l2o/eval.py --folder runs/symbolic_l2o/teacher-rp_s-seed0

Of a teacher: its records, the equations found in them with fidelity, temporal perception and complexity (eval.json,
rule-<backend>.json). Of a tuned rule: its loss before and after. Of a network: test accuracy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.config import UserError, command
from common.data import load
from common.experiment import Progress, eval_command, load_weights, measurement
from common.runs import load_checkpoint, read_json, write_atomically
from symbolic_l2o.distill import Distilled, distill
from symbolic_l2o.records import SRData, collect
from symbolic_l2o.regression import Search
from symbolic_l2o.rule import SymbolicRule, drop_small_taps, tap_importance, temporal_perception
from symbolic_l2o.settings import Config
from symbolic_l2o.teachers import LSTMTeacher
from symbolic_l2o.train import accuracy_of, meta_problems, network

Metrics = dict[str, Any]
ROWS_OF_IMPORTANCE = 1000


class TeacherError(UserError):
    """A teacher whose records say nothing: its outputs do not vary, or are not finite."""

    status = 1


@dataclass(frozen=True)
class Equations:
    """What was found in a teacher's records."""

    found: dict[str, Distilled]
    """by backend: template, template_tanh, pole, operon-<search>"""
    test: SRData


def load_teacher(folder: Path, config: Config) -> LSTMTeacher:
    """The trained teacher of a run. Raises `CheckpointError`."""
    path, teacher = folder / "model.pt", LSTMTeacher(config.teacher)
    load_weights(teacher, load_checkpoint(path), path)
    return teacher.eval().requires_grad_(False)


def distilled(teacher: LSTMTeacher, config: Config, progress: Progress | None = None) -> Equations:
    """All equations of a teacher. Raises `TeacherError` where its records hold nothing to explain."""
    options, (problem, _) = config.records, meta_problems(config, load(config.data).train, torch.device("cpu"))
    data = collect(
        teacher, problem, options.length, options.steps, options.runs, config.seed, options.per_tensor, config.meta.eta
    )
    if not (bool(data.X.isfinite().all()) and bool(data.y.isfinite().all()) and len(data) > 10 and data.y.std() > 0):
        raise TeacherError("the teacher's records must be finite and vary; train it longer or with a smaller meta.lr")
    _, test = data.split(config.seed)
    search = Search(evaluations=options.evaluations, population=options.population, generations=options.generations)
    plan = ["template", "template_tanh", "pole", *(f"operon-{number}" for number in range(options.searches))]
    found = {}
    for done, name in enumerate(plan):
        backend, _, number = name.partition("-")
        seed = config.seed + 1000 * int(number or 0)
        # Every search has its own seed, but all are judged on the same held-out groups.
        found[name] = distill(
            data,
            teacher.features.names,
            backend,  # type: ignore[arg-type]
            seed=config.seed,
            search_seed=seed,
            rows=options.rows,
            search=search,
        )
        if progress is not None:
            progress((done + 1) / len(plan))
    return Equations(found, test)


def measures(equations: Equations) -> dict[str, Metrics]:
    """By backend: r2 (held out), r2_train, front_r2, tpf by feature, complexity, latex of the equation; the rule."""
    windows = equations.test.X[:ROWS_OF_IMPORTANCE].double()
    rows = {}
    for name, one in equations.found.items():
        shown = one.equation
        if name.startswith("template"):
            shown = drop_small_taps(one.equation, windows)
        rows[name] = {
            "r2": one.r2,
            "r2_train": one.r2_train,
            "front_r2": one.front_r2,
            "tpf": temporal_perception(tap_importance(one.equation, windows)),
            "complexity": shown.complexity(),
            "latex": shown.latex(),
            "rule": one.rule.to_json(),
        }
    return rows


@measurement(Config)
def evaluate(config: Config, folder: Path, progress: Progress) -> Metrics:
    """A network's accuracy, a tuning's losses and rule, or a teacher's equations, which it writes beside them."""
    metrics: Metrics
    if config.task == "network":
        splits = load(config.data)
        path, model = folder / "model.pt", network(config, splits.train)
        load_weights(model, load_checkpoint(path), path)
        metrics = {"test_accuracy": accuracy_of(config, model, splits.test)}
        if len(splits.val):
            metrics["val_accuracy"] = accuracy_of(config, model, splits.val)
    elif config.task == "tune":
        done = read_json(folder / "done.json")
        metrics = {name: done[name] for name in ("start_loss", "loss")}
        metrics["latex"] = SymbolicRule.from_json(done["rule"]).latex()
    else:
        teacher = load_teacher(folder, config)
        equations = distilled(teacher, config, progress)
        metrics = {"equations": measures(equations), "rows": len(equations.test)}
        for name, one in equations.found.items():
            write_atomically(folder / f"rule-{name}.json", one.rule.to_json().encode())
    return metrics


def main() -> None:
    """The command line."""

    def summary(metrics: Metrics, config: Config) -> str:
        if "test_accuracy" in metrics:
            return f"test accuracy {metrics['test_accuracy']:.2f} %"
        if "latex" in metrics:
            return f"loss {metrics['start_loss']:.3f} before, {metrics['loss']:.3f} after\n{metrics['latex']}"
        lines = ["equation        R2    looks back       nodes"]
        for name, row in metrics["equations"].items():
            steps = ", ".join(f"{value:.1f}" for value in row["tpf"])
            lines += [f"{name:13s} {row['r2']:.3f}  {steps:15s} {row['complexity']:5d}", f"  {row['latex']}"]
        return "\n".join(lines)

    eval_command(__file__, Config, evaluate, summary)


if __name__ == "__main__":
    command(main)
