"""One run: python symbolic_l2o/train.py --config symbolic_l2o/configs/demo.yaml

Task teacher meta-trains an LSTM (model.pt); task tune meta-trains the coefficients of a rule (rule.json); task network
trains a network with one optimiser (model.pt). Data-parallel: torchrun --nproc_per_node=N symbolic_l2o/train.py ...
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from common import distributed
from common.config import ConfigError, command, require
from common.data import ImageSet, Splits, batches, load, pixels, steps_per_epoch, stratified_order
from common.experiment import accuracy, train_command
from common.runs import Run, generator, read_json, save_checkpoint, seed_everything, write_atomically
from symbolic_l2o.baselines import baseline, cosine
from symbolic_l2o.meta_training import MetaTraining
from symbolic_l2o.optimizer import SymbolicOptimizer
from symbolic_l2o.presets import PRESETS, presets
from symbolic_l2o.problems import RECIPES, Problem, make_problem
from symbolic_l2o.rule import SymbolicRule
from symbolic_l2o.settings import Config, RuleConfig
from symbolic_l2o.teachers import LSTMTeacher
from symbolic_l2o.tuning import TunedRule

Progress = Callable[[float], None]
HALVES_SEED = 0  # of the split into images for meta-training (A) and for races (B)


def train(config: Config, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run `config` in `folder`, from where it stands; returns and leaves in done.json the final metrics.

    Args:
        config: of the run.
        folder: the run's.
        progress: called with the finished fraction instead of drawing a progress bar.
    """
    with distributed.process_group() as device:
        splits = load(config.data)
        seed_everything(config.seed)
        if config.task == "network":
            model = network(config, splits.train).to(device)
            per_epoch = steps_per_epoch(splits.train, config.problem.batch_size)
            total = config.network.epochs * per_epoch
        else:
            learner = make_learner(config).to(device)
            problems = meta_problems(config, splits.train, device)
            total = config.meta.epochs
        options = {"checkpoint_every": config.run.checkpoint_every, "progress": progress}
        run = Run(folder, config, total_steps=total, **options)  # type: ignore[arg-type]
        if run.finished:
            return read_json(folder / "done.json")
        with run:
            if config.task == "network":
                return _train_network(config, run, splits, model, per_epoch)
            return _meta_train(config, run, learner, *problems)


def _meta_train(config: Config, run: Run, learner: nn.Module, problem: Problem, validation: Problem) -> dict[str, Any]:
    training = MetaTraining(learner, problem, config.meta, config.seed, validation)
    start = 0
    if saved := run.restore():
        training.load_state_dict(saved)
        start = training.epochs
    for epoch in run.steps(start, config.meta.epochs, training.state_dict):
        if training.finished:  # the curriculum stopped
            break
        found = training.epoch()
        run.log(epoch + 1, "train", **found)
    best = training.keep_best()
    metrics = {"start_loss": training.history[0], "loss": best, "epochs": training.epochs}
    if isinstance(learner, TunedRule):
        rule = learner.tuned(f"meta-tuned on {config.problem.name}, {training.epochs} epochs, seed {config.seed}")
        metrics["rule"] = rule.to_json()  # type: ignore[assignment]
        if run.writes:
            write_atomically(run.folder / "rule.json", rule.to_json().encode())
    elif run.writes:
        save_checkpoint(run.folder / "model.pt", {"model": learner.state_dict()})
    run.finish(metrics)
    return metrics


def _train_network(config: Config, run: Run, splits: Splits, model: nn.Module, per_epoch: int) -> dict[str, Any]:
    options, device = config.network, next(model.parameters()).device
    optimizer = make_optimizer(config, list(model.parameters()))
    start, total = 0, options.epochs * per_epoch
    if saved := run.restore():
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    position, recent = start, 0.0

    def snapshot() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": position, "recent": recent}

    recent = saved["recent"] if saved else 0.0
    stream = batches(splits.train, config.problem.batch_size, config.data, seed=config.seed, step=start)
    model.train()
    for step in run.steps(start, total, snapshot):
        images, labels = (tensor.to(device, non_blocking=True) for tensor in next(stream))
        with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
            logits = model(inputs(config, images))
        loss = F.cross_entropy(logits.float(), labels)
        run.require_finite(step, loss=loss.item())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        distributed.synchronize(model)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * (cosine(step, total) if options.cosine else 1.0)
        optimizer.step()
        position, recent = step + 1, recent + distributed.mean(loss.item())
        if position % per_epoch == 0:
            run.log(position, "train", epoch=position // per_epoch, loss=recent / per_epoch)
            recent = 0.0
    metrics = {"test_accuracy": accuracy_of(config, model, splits.test)}
    if len(splits.val):
        metrics["val_accuracy"] = accuracy_of(config, model, splits.val)
    if run.writes:
        save_checkpoint(run.folder / "model.pt", {"model": model.state_dict()})
    run.finish(metrics)
    return metrics


def inputs(config: Config, images: torch.Tensor) -> torch.Tensor:
    """What the network sees of uint8 images: as in `make_problem`."""
    raw = pixels(images) - 0.5
    return F.avg_pool2d(raw, 2) if config.problem.shrink else raw


def accuracy_of(config: Config, model: nn.Module, data: ImageSet) -> float:
    """Top-1 accuracy in percent."""

    def normalize(raw: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(raw - 0.5, 2) if config.problem.shrink else raw - 0.5

    found = accuracy(model, data, normalize)
    model.train()
    return found


def network(config: Config, data: ImageSet) -> nn.Module:
    """The network of problem.name for these images. Raises `ConfigError` where they do not fit."""
    return _problem(config.problem.name, config, data).module


def make_optimizer(config: Config, parameters: Any) -> torch.optim.Optimizer:
    """Of network.optimizer."""
    options = config.network
    if options.optimizer == "symbolic":
        return SymbolicOptimizer(parameters, read_rule(config.rule), options.lr, options.weight_decay)
    return baseline(options.optimizer, parameters, options.lr, options.weight_decay)


def read_rule(options: RuleConfig) -> SymbolicRule:
    """The preset or file of rule.source, with its gain. Raises `ConfigError`; nothing in the file is executed."""
    if options.source in PRESETS:
        rule = presets(options.source)
    else:
        try:
            rule = SymbolicRule.from_json(Path(options.source).read_text())
        except OSError as error:
            allowed = f"one of {', '.join(PRESETS)} or a readable rule.json"
            raise ConfigError(f"rule.source must be {allowed}, got {options.source!r}") from error
        except ValueError as error:
            raise ConfigError(f"{options.source}: {error}") from error
    linear = {name: value for name, value in rule.coefficients.items() if name[:2] in ("w_", "a_", "W_")}
    require(options.gain == 1 or bool(linear), "rule.gain", options.gain, "1 for a rule without w, a or W")
    return rule.with_coefficients({name: options.gain * value for name, value in linear.items()})


def make_learner(config: Config) -> nn.Module:
    """What is meta-trained."""
    if config.task == "teacher":
        return LSTMTeacher(config.teacher)
    try:
        return TunedRule(read_rule(config.rule), config.rule.form)
    except ValueError as error:
        raise ConfigError(f"rule.source {config.rule.source}: {error}") from error


def halves(data: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Images for meta-training (A) and for races (B): two stratified halves."""
    order = stratified_order(data.labels, generator(HALVES_SEED))
    middle = len(data) // 2
    return data.subset(order[:middle].sort().values), data.subset(order[middle:].sort().values)


def meta_problems(config: Config, data: ImageSet, device: torch.device) -> tuple[Problem, Problem]:
    """The problem of meta-training and that of its evaluations: both on half A, with starts of their own."""
    half, _ = halves(data)
    found = []
    for _ in range(2):
        problem = _problem(config.problem.name, config, half)
        problem.module.to(device)
        problem.images, problem.labels = problem.images.to(device), problem.labels.to(device)
        found.append(problem)
    return found[0], found[1]


def race_problem(name: str, config: Config, data: ImageSet) -> Problem:
    """A problem on half B."""
    return _problem(name, config, halves(data)[1])


def _problem(name: str, config: Config, data: ImageSet) -> Problem:
    require(name in RECIPES, "problem.name", name, f"one of {', '.join(RECIPES)}")
    size = min(config.problem.batch_size, len(data))
    try:
        return make_problem(name, data, size, config.problem.shrink)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"problem.name {name} does not fit these images: {error}") from error


def run_name(config: Config) -> str:
    """Of the run's folder where run.folder is empty."""
    what = {"teacher": config.teacher, "tune": config.problem.name, "network": config.network.optimizer}[config.task]
    return f"{config.task}-{what}-seed{config.seed}"


def with_task(config: Config, **changes: Any) -> Config:
    """The configuration of one run of a study: without the study."""
    return replace(config, **{"study": type(config.study)(), **changes})


def main() -> None:
    """The command line."""

    def summary(metrics: Mapping[str, Any]) -> str:
        if "test_accuracy" in metrics:
            return f"test accuracy {metrics['test_accuracy']:.2f} %"
        return f"evaluation loss {metrics['start_loss']:.3f} at the start, {metrics['loss']:.3f} at best"

    train_command(__file__, Config, train, run_name, summary)


if __name__ == "__main__":
    command(main)
