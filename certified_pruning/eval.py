"""Verify every round of a finished chain: python certified_pruning/eval.py --folder runs/certified_pruning/imp-seed0

Writes eval.json into the run's folder: per round, on the first images of the test split, clean and verified
accuracy, falsified share, bound tightness and branch-and-bound effort; on validation images what a round is chosen
by. Pruned channels are removed first, so that the small network is what is verified.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certified_pruning.chain import ChainNet
from certified_pruning.compress import compress_channels
from certified_pruning.crown import crown_intermediate
from certified_pruning.ibp import ibp, input_box, margin_spec
from certified_pruning.precision import full_precision
from certified_pruning.settings import Config
from certified_pruning.train import network
from certified_pruning.verdicts import VerifyReport
from certified_pruning.verifier import CompleteVerifier
from common.config import command
from common.data import ImageSet, in_order, load, pixels
from common.experiment import Progress, accuracy, device, eval_command, finished_run, load_weights
from common.runs import load_checkpoint, read_json, write_json

Metrics = dict[str, Any]


def evaluate(folder: Path, progress: Progress | None = None) -> list[Metrics]:
    """Metrics of each round of the finished run in `folder`, from its tickets; kept in eval.json and read from there.

    Rounds before eval.first_round are left out.

    Args:
        folder: of the run.
        progress: called with the finished fraction in [0, 1].

    Raises:
        ConfigError: if the run is not there or not finished; CheckpointError: if a ticket is damaged.
    """
    config = finished_run(folder, Config)
    finished = read_json(folder / "eval.json") if (folder / "eval.json").exists() else []
    splits = load(config.data)
    model = network(config, splits.train).to(device())
    first, rounds = config.eval.first_round, config.prune.rounds
    for round_number in range(first + len(finished), rounds):
        path = folder / "tickets" / f"{round_number}.pt"
        ticket = load_checkpoint(path)
        load_weights(model, ticket, path)

        def within_round(fraction: float, done: int = len(finished)) -> None:
            if progress is not None:
                progress((done + fraction) / (rounds - first))

        metrics = evaluate_network(compress_channels(model), splits.val, splits.test, config, within_round)
        finished.append({"density": ticket["density"], **metrics})
        write_json(folder / "eval.json", finished)
    return finished


def evaluate_network(model: nn.Module, val: ImageSet, test: ImageSet, config: Config, progress: Progress) -> Metrics:
    """All metrics of one network; accuracies in percent, the verified ones of all images, misclassified included."""
    val_accuracy, test_accuracy = (accuracy(model, split, config.model.normalize) for split in (val, test))
    place = next(model.parameters()).device
    incomplete = replace(config.verify, root_steps=config.eval.val_root_steps, max_nodes=0)
    val_report = _verify(model, val, config, incomplete, lambda fraction: progress(0.2 * fraction))
    report = _verify(model, test, config, config.verify, lambda fraction: progress(0.2 + 0.8 * fraction))
    images = len(report.images)
    return {
        "val_accuracy": val_accuracy,
        "test_accuracy": test_accuracy,
        "val_verified": val_report.verified_accuracy,
        "val_ibp_verified": ibp_verified(model, val, config),
        "verified": report.verified_accuracy,
        "ibp_verified": ibp_verified(model, test, config),
        "falsified": 100 * report.counts["falsified"] / images,
        "unknown": 100 * report.counts["unknown"] / images,
        "alpha_verified": 100 * sum(report.stages.get(f"verified/{s}", 0) for s in ("ibp", "crown", "alpha")) / images,
        "nodes": report.nodes,
        "seconds": sum(verdict.seconds for verdict in report.images),
        **stability(model, _first(test, config)[0].to(place), config),
    }


@full_precision()
@torch.no_grad()
def stability(model: nn.Module, raw: Tensor, config: Config) -> dict[str, float]:
    """How much the ReLUs of a network loosen its bounds on the box of radius eps, by CROWN bounds [l, u].

    Args:
        model: in eval mode.
        raw: pixels in [0, 1], (batch, channels, height, width).
        config: eps and normalisation.

    Returns:
        unstable: share of (image, ReLU) pairs with l < 0 < u (a bound within 1e-5 of 0 counts as 0).
        gap_1, gap_2, ...: of each ReLU layer the mean of -l u / (u - l), the largest distance between ReLU and the
        upper line of its triangle; 0 for a stable ReLU.
    """
    net = ChainNet.from_module(model, tuple(raw.shape[1:]))
    bounds = crown_intermediate(net, *input_box(raw, config.train.eps, config.model.mean, config.model.std))
    unstable = sum(int(((lower < -1e-5) & (upper > 1e-5)).sum()) for lower, upper in bounds)
    found = {"unstable": unstable / sum(lower.numel() for lower, _ in bounds)}
    for number, (lower, upper) in enumerate(bounds, start=1):
        area = -lower.clamp(max=0) * upper.clamp(min=0)
        found[f"gap_{number}"] = float((area / (upper - lower).clamp(min=1e-12)).mean())
    return found


@full_precision()
@torch.no_grad()
def ibp_verified(model: nn.Module, data: ImageSet, config: Config) -> float:
    """Percent of *all* images of a split that float64 interval bounds alone verify: the aim of certified training."""
    assert isinstance(data.images, Tensor)
    place = next(model.parameters()).device
    net = ChainNet.from_module(model, tuple(data.images.shape[1:]), torch.float64)
    verified = 0
    for images, labels in in_order(data, 500):
        box = input_box(pixels(images.to(place)).double(), config.train.eps, config.model.mean, config.model.std)
        margins = ibp(net, *box, C=margin_spec(labels.to(place), data.classes, net.dtype)[0]).out[0]
        verified += int((margins > 0).all(dim=1).sum())
    return 100 * verified / max(len(data), 1)


def _first(split: ImageSet, config: Config) -> tuple[Tensor, Tensor]:
    assert isinstance(split.images, Tensor)
    return pixels(split.images[: config.eval.images]), split.labels[: config.eval.images]


def _verify(model: nn.Module, split: ImageSet, config: Config, budget: Any, progress: Progress) -> VerifyReport:
    raw, labels = _first(split, config)
    normalize = (config.model.mean, config.model.std)
    shape = tuple(raw.shape[1:])
    verifier = CompleteVerifier(model, shape, config.train.eps, split.classes, budget, normalize=normalize)
    return verifier.verify(raw, labels, progress)


def main() -> None:
    """The command line."""

    def summary(rounds: list[Metrics], config: Config) -> str:
        return "\n".join(
            f"round {number}: density {metrics['density']:.4f}, test {metrics['test_accuracy']:.1f} %, verified "
            f"{metrics['verified']:.0f} %, falsified {metrics['falsified']:.0f} %, unknown {metrics['unknown']:.0f} %, "
            f"unstable {metrics['unstable']:.3f}, {metrics['nodes']} nodes"
            for number, metrics in enumerate(rounds, config.eval.first_round)
        )

    eval_command(__file__, Config, evaluate, summary)


if __name__ == "__main__":
    command(main)
