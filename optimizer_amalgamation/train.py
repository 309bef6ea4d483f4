"""One run: python optimizer_amalgamation/train.py --config optimizer_amalgamation/configs/demo.yaml

Meta-trains replicates of one rule (weights.pt). Under torchrun each process trains its own share of the replicates:
torchrun --nproc_per_node=N optimizer_amalgamation/train.py ...
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import command, require
from common.data import load
from common.experiment import device, finished_run, progress_bar, train_command
from common.runs import CheckpointError, Run, load_checkpoint, read_json, save_checkpoint
from optimizer_amalgamation.choice import ChoiceRule
from optimizer_amalgamation.episode import Trained
from optimizer_amalgamation.meta_training import MetaTraining, Teaching
from optimizer_amalgamation.networks import image_problem
from optimizer_amalgamation.pool import LARGE_CHOICE, LARGE_TEACHERS, SMALL_CHOICE, SMALL_TEACHERS
from optimizer_amalgamation.problems import Problem
from optimizer_amalgamation.rule import Context, Rule, Weights
from optimizer_amalgamation.scale import ScaleRule
from optimizer_amalgamation.settings import Config, MethodConfig, parse_teacher, split_problem
from optimizer_amalgamation.students import OriginalRule, StudentRule
from optimizer_amalgamation.unroll import Guide
from optimizer_amalgamation.weights import check_weights, load_weights

POOLS = {
    ("small", "choice"): SMALL_CHOICE,
    ("large", "choice"): LARGE_CHOICE,
    ("small", "teachers"): SMALL_TEACHERS,
    ("large", "teachers"): LARGE_TEACHERS,
}
EPISODES = 10**9  # more than any schedule has
RECENT = 20  # of a replicate's training episodes, whose mean meta loss is reported
Progress = Callable[[float], None]


def train(config: Config, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run `config` in `folder`, from where it stands; returns and leaves in done.json the final metrics.

    Args:
        config: of the run.
        folder: the run's.
        progress: called with the finished fraction instead of drawing a progress bar.
    """
    if progress is None:
        with progress_bar("meta-training") as bar:
            return train(config, folder, bar)
    policies = _policies(config)
    problem = raced_problem(config, config.problem.name)
    rule = make_rule(config.method)
    teaching = _teaching(config.method, policies, Context.of(problem.shapes, problem.inputs))
    run = Run(
        folder,
        config,
        total_steps=config.schedule.least_episodes(),
        checkpoint_every=config.run.checkpoint_every,
        progress=lambda _: progress(training.fraction),
    )
    if run.finished:
        return read_json(folder / "done.json")
    with run:
        training = MetaTraining(
            problem,
            rule,
            config.meta,
            config.schedule,
            config.seed,
            teaching,
            config.method.reduce,
            config.perturbation,
        )
        start = 0
        if saved := run.restore():
            try:
                training.load_state_dict(saved["training"])
            except ValueError as error:
                raise CheckpointError(f"{folder / 'checkpoint.pt'}: {error}") from None
            start = saved["episode"]
        done = start

        def snapshot() -> dict[str, Any]:
            return {"training": training.state_dict(), "episode": done}

        for episode in run.steps(start, EPISODES, snapshot):
            if training.finished:
                break
            found = training.episode()
            done = episode + 1
            run.log(done, "train", **found)
        metrics = {
            "replicates": config.meta.replicates,
            "validations": [one.best for one in training.replicates],
            "meta_steps": [one.moments["t"] for one in training.replicates],
            "all_meta_steps": [one.meta_steps for one in training.replicates],
            "recent": [_mean(one.history[-RECENT:])[0] for one in training.replicates],
            "nearest": [_mean(one.history)[1:] for one in training.replicates],
            "skipped": [one.skipped for one in training.replicates],
            "episodes": done,
        }
        if run.writes:
            save_checkpoint(folder / "weights.pt", {"weights": training.weights()})
        run.finish(metrics)
    return metrics


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def share(config: Config, folder: Path) -> tuple[Config, Path]:
    """This process's replicates and folder, where torchrun started several."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return config, folder
    numbers = config.meta.replicates
    require(len(numbers) >= world, "meta.replicates", numbers, f"one or more for each of the {world} processes")
    own = replace(config.meta, replicates=numbers[rank::world])
    return replace(config, meta=own), folder / f"share-{rank}-of-{world}"


def raced_problem(config: Config, entry: str) -> Problem:
    """A problem of evaluation.problems; its data are loaded. Raises `ConfigError` for minibatches of more than all."""
    network, data, batch_size, _ = split_problem(entry)
    own = replace(config.data, name=data, path="") if data else config.data  # type: ignore[arg-type]
    options = config.problem
    splits = load(own)
    check_batches(config, entry, len(splits.train))
    return image_problem(network, splits, batch_size or options.batch_size, options.shrink, device())


def check_batches(config: Config, entry: str, most: int) -> None:
    """Raise `ConfigError` where an entry of evaluation.problems has minibatches of more than all `most` images."""
    own = split_problem(entry).batch_size
    key, value = ("evaluation.problems", entry) if own else ("problem.batch_size", config.problem.batch_size)
    require((own or config.problem.batch_size) <= most, key, value, f"at most {most}, the training images")


def make_rule(options: MethodConfig) -> Rule:
    """What is meta-trained."""
    if options.student == "choice":
        return ChoiceRule(POOLS[options.pool, options.pool_rates], options.hardness)
    if options.student == "original":
        return OriginalRule()
    if options.student == "scale":
        return ScaleRule()
    return StudentRule(layers=options.layers, head=options.head)


Policies = tuple[ChoiceRule, Weights, list[int]]


def _policies(config: Config) -> Policies | None:
    """That of method.policy. Raises `ConfigError` where it is not there, `CheckpointError` where damaged."""
    if not config.method.policy:
        return None
    found = read_policy(config.method)
    wanted, known = config.meta.replicates, found[2]
    fits = config.method.policy_replicate >= 0 or set(wanted) <= set(known)
    require(fits, "meta.replicates", wanted, f"of the policy's replicates {known}")
    return found


def _teaching(options: MethodConfig, found: Policies | None, context: Context) -> Teaching | None:
    """Teachers by replicate."""
    analytical: list[Guide] = [parse_teacher(entry) for entry in options.teachers]
    if not analytical and found is None:
        return None
    if found is None:
        return lambda numbers: analytical
    rule, policies, known = found
    own = options.policy_replicate == -1

    def teaching(numbers: Sequence[int]) -> Sequence[Guide]:
        at = [known.index(number) for number in numbers] if own else options.policy_replicate
        chosen = {name: value[at] for name, value in policies.items()}
        return [*analytical, Trained(rule, {name: value.to(device()) for name, value in chosen.items()}, context)]

    return teaching


def read_policy(options: MethodConfig) -> Policies:
    """The choice policy of method.policy, its weights stacked over replicates, and their numbers.

    Nothing in the file is executed.
    """
    path = Path(options.policy)
    if path.is_dir():
        source = finished_run(path, Config)
        require(source.method.student == "choice", "method.policy", options.policy, "the run of a choice policy")
        rule = make_rule(source.method)
        weights, numbers = run_weights(path, source), source.meta.replicates
    else:
        numbers = [0]
        rule = ChoiceRule(POOLS[options.pool, options.pool_rates])
        try:
            weights = {name: value[None] for name, value in load_weights(path, rule.shapes).items()}
        except ValueError as error:
            require(False, "method.policy", options.policy, f"a run of a choice policy or its weights ({error})")
    count = len(numbers)
    require(options.policy_replicate < count, "method.policy_replicate", options.policy_replicate, f"below {count}")
    return rule, weights, numbers  # type: ignore[return-value]


def run_weights(folder: Path, config: Config) -> Weights:
    """The weights (R, *shape) of a finished run. Raises `CheckpointError`."""
    path, rule = folder / "weights.pt", make_rule(config.method)
    count = len(config.meta.replicates)
    try:
        content = load_checkpoint(path)["weights"]
        return check_weights(content, {name: (count, *shape) for name, shape in rule.shapes.items()}, str(path))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: not the weights of this run's network") from error


def run_name(config: Config) -> str:
    """Of the run's folder where run.folder is empty."""
    taught = [*(entry.partition(":")[0] for entry in config.method.teachers), *["policy"][: bool(config.method.policy)]]
    reduce = [config.method.reduce] if len(taught) > 1 else []
    return "-".join([config.method.student, *reduce, *taught, f"seed{config.seed}"])


def main() -> None:
    """The command line."""

    def summary(metrics: Mapping[str, Any]) -> str:
        losses = ", ".join(f"{value:.3f}" for value in metrics["validations"])
        return f"validation meta loss {losses} after {', '.join(map(str, metrics['meta_steps']))} meta-steps"

    train_command(__file__, Config, train, run_name, summary, share)


if __name__ == "__main__":
    command(main)
