"""Measure a finished run: python double_win_lth/eval.py --folder RUN [--attack pgd20|worst|autoattack] [...]

A run that found tickets: SA and RA of its pre-trained network on the source task. A transfer: those of each ticket
on the target task, with transfer.select also of the weights that were best in validation. All that was measured is
kept in eval.json and read from there.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.config import ConfigError, UserError, command, parse, require
from common.data import ImageSet, in_order, load, pixels
from common.experiment import FolderArguments, Progress, device, finished_run, load_weights, progress_bar
from common.runs import generator, load_checkpoint, read_json, write_json
from double_win_lth.accuracy import CLEAN, accuracies
from double_win_lth.corruptions import CORRUPTIONS, corrupted
from double_win_lth.grouped import TicketBatch
from double_win_lth.regimes import Regime
from double_win_lth.settings import Config
from double_win_lth.slices import loss_slice
from double_win_lth.training import network
from double_win_lth.transfer import target_images
from double_win_lth.views import centre_crop

DISTANCES = [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0]
SEVERITY = 3
Metrics = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class EvalArguments(FolderArguments):
    """Which run to measure, and how."""

    attack: Literal["pgd20", "worst", "autoattack"] = "pgd20"
    """last of 20 steps; any of 20 steps; or AutoAttack, where the package autoattack is installed"""
    images: int = 0
    """attacked images, the first ones; 0: all"""
    corruptions: bool = False
    """also accuracy under noise, blur, contrast and brightness"""
    slices: bool = False
    """also the loss along a random line through the weights"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.images >= 0, "images", self.images, "at least 0")


def evaluate(arguments: EvalArguments, progress: Progress | None = None) -> Metrics:
    """Network -> measure -> percent (slices: losses) of the finished run in arguments.folder.

    Raises:
        ConfigError: if the run is not there or not finished; CheckpointError: if its weights are damaged.
        UserError: AutoAttack is asked for and not installed.
    """
    folder = Path(arguments.folder)
    config = finished_run(folder, Config)
    kept = folder / "eval.json"
    metrics: Metrics = read_json(kept) if kept.exists() else {}
    attack = f"ra_{arguments.attack}" + (f"_{arguments.images}" if arguments.images else "")
    wanted = ["sa", attack, *(["slice"] if arguments.slices else [])]
    wanted += [f"sa_{name}" for name in CORRUPTIONS] if arguments.corruptions else []
    if metrics and all(name in each for each in metrics.values() for name in wanted):
        return metrics
    networks, data = _networks(config, folder)
    for number, (ticket, model) in enumerate(networks.items()):
        there = metrics.setdefault(ticket, {})
        for name in wanted:
            if name not in there:
                there[name] = _measure(name, model, data, config, arguments)
        if progress is not None:
            progress((number + 1) / len(networks))
    write_json(kept, metrics)
    return metrics


def _networks(config: Config, folder: Path) -> tuple[dict[str, nn.Module], ImageSet]:
    """The networks of a run, one a ticket, and the images to judge them on."""
    if config.task == "tickets":
        splits = load(config.source)
        model = network(config, splits.train, device())
        load_weights(model, load_checkpoint(folder / "pretrained.pt"), folder / "pretrained.pt")
        return {"dense": model}, splits.test
    train_set, val, test = target_images(config)
    tickets = config.transfer.tickets
    models = [network(config, train_set, device()) for _ in tickets]
    path = folder / "model.pt"
    content = load_checkpoint(path)
    if len(tickets) > 1:
        batch = TicketBatch(models)
        load_weights(batch, content, path)
        for index, model in enumerate(models):
            model.load_state_dict(batch.ticket_state(index))
    else:
        load_weights(models[0], content, path)
    networks = dict(zip(tickets, models, strict=True))
    for measure in ("sa", "ra"):
        if measure in content:
            best = networks[f"{tickets[0]}, best {measure}"] = network(config, train_set, device())
            load_weights(best, {"model": content[measure]}, path)
    return networks, val if config.eval.split == "val" else test


def _measure(name: str, model: nn.Module, data: ImageSet, config: Config, arguments: EvalArguments) -> Any:
    options: dict[str, Any] = {"size": config.model.size, "batch_size": config.eval.batch_size, "seed": config.seed}
    if name == "sa":
        return accuracies(model, data, CLEAN, **options)[0]
    first = data.subset(torch.arange(min(arguments.images or len(data), len(data))))
    if name == "slice":
        raw, labels = next(in_order(first, config.eval.batch_size))
        x = centre_crop(pixels(raw), config.model.size).to(device())
        return loss_slice(model, x, labels.to(device()), DISTANCES, generator(config.seed))
    if name.removeprefix("sa_") in CORRUPTIONS:
        try:
            changed = corrupted(data, name.removeprefix("sa_"), SEVERITY)
        except ValueError as error:
            raise ConfigError(f"corruptions: {error}") from error
        return accuracies(model, changed, CLEAN, **options)[0]
    limits = config.eval.attack
    if arguments.attack == "autoattack":
        return _auto_attack(model, first, limits.eps, config)
    attack = Regime("pgd", limits.eps, limits.step_size, 20, limits.random_start)
    return accuracies(model, first, attack, worst=arguments.attack == "worst", **options)[0]


def _auto_attack(model: nn.Module, data: ImageSet, eps: float, config: Config) -> float:
    """Accuracy in percent under AutoAttack's standard ensemble."""
    try:
        judges = importlib.import_module("autoattack")
    except ImportError:
        raise UserError("attack autoattack needs the package autoattack, which is not installed") from None
    model.eval()
    judge = judges.AutoAttack(model, norm="Linf", eps=eps, version="standard", device=str(device()), verbose=False)
    right = 0
    for raw, labels in in_order(data, config.eval.batch_size):
        x: Tensor = centre_crop(pixels(raw), config.model.size).to(device())
        y = labels.to(device())
        broken = judge.run_standard_evaluation(x, y, bs=len(x))
        with torch.no_grad():
            right += int((model(broken).argmax(1) == y).sum())
    return 100 * right / len(data)


def main() -> None:
    """The command line."""
    about = "double_win_lth: measure a finished run"
    arguments = parse(EvalArguments, prog="python double_win_lth/eval.py", description=about)
    with progress_bar("measuring") as progress:
        metrics = evaluate(arguments, progress)
    for ticket, values in metrics.items():
        numbers = [f"{name} {value:.2f} %" for name, value in values.items() if isinstance(value, float)]
        print(f"{ticket}: {', '.join(numbers)}")
        if "slice" in values:
            print(f"{ticket}: loss at {DISTANCES[0]:g} ... {DISTANCES[-1]:g} along a random line: ", end="")
            print(" ".join(f"{loss:.3f}" for loss in values["slice"]))


if __name__ == "__main__":
    command(main)
