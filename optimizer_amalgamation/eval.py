"""Measure a finished run: python optimizer_amalgamation/eval.py --folder runs/optimizer_amalgamation/rnnprop-seed0

Every replicate trains the networks of evaluation.problems, several times each (eval.json).
"""

from pathlib import Path
from statistics import mean
from typing import Any

from common.config import command
from common.experiment import Progress, eval_command, measurement
from optimizer_amalgamation.measures import random_effects
from optimizer_amalgamation.race import outcome, race_learnt
from optimizer_amalgamation.rule import Rule, Weights
from optimizer_amalgamation.settings import Config, split_problem
from optimizer_amalgamation.train import make_rule, raced_problem, run_weights

Metrics = dict[str, Any]


@measurement(Config)
def evaluate(config: Config, folder: Path, progress: Progress) -> Metrics:
    """By problem the measures of `race.outcome`."""
    weights = run_weights(folder, config)
    return race_all(config, make_rule(config.method), weights, progress)


def race_all(
    config: Config, rule: Rule, weights: Weights, progress: Progress | None = None, alike: bool = False
) -> Metrics:
    """By problem of evaluation.problems, the measures of a rule with weights (R, *shape); alike: see `race_learnt`."""
    problems, metrics = config.evaluation.problems, {}
    for number, entry in enumerate(problems):
        private = split_problem(entry).private

        def part(fraction: float, number: int = number) -> None:
            if progress is not None:
                progress((number + fraction) / len(problems))

        problem = raced_problem(config, entry)
        curves = race_learnt(problem, rule, weights, config.evaluation, private, part, alike)
        metrics[entry] = outcome(curves, config.evaluation.repeats)
    return metrics


def main() -> None:
    """The command line."""

    def summary(metrics: Metrics, config: Config) -> str:
        lines = ["problem       log best held-out loss, by replicate"]
        for entry, found in metrics.items():
            values = found["val_best"]
            means = ", ".join(f"{mean(row):.3f}" for row in values)
            spread = ""
            if len(values) > 1:
                effects = random_effects(values)
                low, high = effects.interval()
                spread = f"   mean {effects.mean:.3f} [{low:.3f}, {high:.3f}], meta-stability {effects.meta_sd:.3f}"
            lines.append(f"{entry:13s} {means}{spread}")
        return "\n".join(lines)

    eval_command(__file__, Config, evaluate, summary)


if __name__ == "__main__":
    command(main)
