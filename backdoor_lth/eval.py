"""Measure a finished run: python backdoor_lth/eval.py --folder RUN

Every ticket of a chain: accuracy, attack success, target rate without a trigger, Trojan score, rates fine-tuned. Then
the scans of the dense network, of the winning ticket (chosen by its score alone) and of its neighbours H and L. Kept in
eval.json. Of a surrogate: accuracy.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backdoor_lth.barrier import error_barrier, fine_tuned
from backdoor_lth.metrics import evaluate as metrics_of
from backdoor_lth.metrics import implanted
from backdoor_lth.pruning import disconnected, masked
from backdoor_lth.scanning import folded, inverted, judged
from backdoor_lth.settings import Config
from backdoor_lth.tickets import denser, sparser, winner
from backdoor_lth.train import round_path
from backdoor_lth.victim import Victim, clean, network, victim
from common.config import command, require
from common.data import batches, pixels
from common.experiment import Progress, accuracy, device, eval_command, load_weights, measurement
from common.masks import Masks
from common.runs import CheckpointError, generator, load_checkpoint

TUNING, SAMPLE = 1_000_003, 2_000_003  # added to the seed: orders apart from that of training
CLEAN = 1_000_019  # what a generator is for; no epoch's number
SCORING = 0.4  # its share of the time, for the progress bar
Metrics = dict[str, Any]


@measurement(Config)
def evaluate(config: Config, folder: Path, progress: Progress) -> Metrics:
    """Rounds, chosen tickets and scans, in percent where shares; of a surrogate its accuracy."""
    if config.task == "surrogate":
        train, test = clean(config)
        model = network(config, train, device())
        load_weights(model, load_checkpoint(folder / "model.pt"), folder / "model.pt")
        return {"sa": accuracy(model, test, config.model.normalize)}
    return _chain(config, folder, victim(config), progress)


def _chain(config: Config, folder: Path, there: Victim, progress: Progress) -> Metrics:
    model = network(config, there.train, device())
    shape = tuple(there.train.images[:1].shape[1:])  # type: ignore[union-attr, index]
    normalize, target = config.model.normalize, config.attack.target
    states = [read_round(folder, number, model)[0] for number in range(config.prune.rounds)]
    tickets = [read_round(folder, number, model)[1] for number in range(config.prune.rounds)]
    densities = [masks.density for masks in tickets]
    require(min(densities) <= config.score.extreme, "score.extreme", config.score.extreme, f"at least {min(densities)}")
    dense = network(config, there.train, device())
    dense.load_state_dict(states[0])
    dense.eval()
    rounds = []
    for number, (state, masks) in enumerate(zip(states, tickets, strict=True)):
        rounds.append({"round": number, **_round(config, there, model, state, masks, shape)})
        progress(SCORING * (number + 1) / len(states))
    sa, asr = ([each[name] for each in rounds] for name in ("sa", "asr"))
    dense_rates = metrics_of(dense, there.test, there.triggered, target, normalize)
    won = winner([each["score"] for each in rounds], densities, config.score.extreme)
    high, low = denser(sa, asr, dense_rates["sa"]), sparser(sa, asr, won, there.train.classes)
    scans: Metrics = {}
    chosen = {"dense": None, "winner": won, "H": high, "L": low}
    wanted = [name for name, at in chosen.items() if name == "dense" or at is not None]
    images = config.inversion.clean
    for name in [*wanted, *(["winner-clean"] if images else [])]:
        at = chosen[name.removesuffix("-clean")]
        net = dense if at is None else folded(model, masked(states[at], tickets[at]), shape)
        base = _clean_inputs(config, there, images) if name.endswith("-clean") else None
        found = inverted(net, shape, config.inversion, base, config.seed)
        args = (there.test, there.triggered, target, config.attack.size, normalize, config.inversion.norm)
        density = 1.0 if at is None else densities[at]
        scans[name] = {"round": at, "density": density, **judged(net, dense, found, *args)}
        progress(SCORING + (1 - SCORING) * len(scans) / (len(wanted) + bool(images)))
    return {"dense": dense_rates, "rounds": rounds, "winner": won, "scans": scans}


def read_round(folder: Path, number: int, model: nn.Module) -> tuple[dict[str, Tensor], Masks]:
    """Trained weights of a round and the masks found at its end, on the model's device. Raises `CheckpointError`."""
    path = round_path(folder, number)
    content = load_checkpoint(path)
    load_weights(model, content, path)
    where = next(model.parameters()).device
    try:
        masks = Masks(content["masks"])
        masks.apply_(model)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not the masks of this run's network") from error
    state = {name: value.to(where) for name, value in content["model"].items()}
    return state, Masks({name: mask.to(where) for name, mask in masks.items()})


def _round(
    config: Config, there: Victim, model: nn.Module, state: dict[str, Tensor], masks: Masks, shape: tuple[int, ...]
) -> Metrics:
    """One ticket: its rates, its Trojan score, its rates fine-tuned."""
    ticket = masked(state, masks)
    tuning = itertools.islice(_batches(config, there, TUNING), config.score.steps)
    sample = list(itertools.islice(_batches(config, there, SAMPLE), config.score.batches))
    tuned = fine_tuned(
        model,
        ticket,
        masks,
        tuning,
        lr=config.score.lr,
        momentum=config.train.momentum,
        weight_decay=config.train.weight_decay,
    )
    barrier = error_barrier(model, ticket, tuned, sample, points=config.score.points, compacted=masks.density < 0.05)
    rates, after = (
        metrics_of(
            folded(model, each, shape), there.test, there.triggered, config.attack.target, config.model.normalize
        )
        for each in (ticket, tuned)
    )
    return {
        "density": masks.density,
        "kept": masks.kept,
        **rates,
        "score": barrier.score_error,
        "score_loss": barrier.score_loss,
        **{f"tuned_{name}": after[name] for name in ("sa", "asr", "ctr")},
        "disconnected": disconnected(masks),
    }


def _batches(config: Config, there: Victim, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented batches of the poisoned training set in an order of their own, the same for every ticket."""
    size = min(config.score.batch_size, len(there.train))
    for images, labels in batches(there.train, size, config.data, seed=config.seed + seed):
        yield config.model.normalize(pixels(images.to(device()))), labels.to(device())


def _clean_inputs(config: Config, there: Victim, count: int) -> Tensor:
    """Inputs of `count` training images that were left alone, which only the attacker could tell."""
    rows = (~there.poisoned.is_poisoned).nonzero().squeeze(1)
    rows = rows[torch.randperm(len(rows), generator=generator(config.seed, CLEAN))[:count]]
    return config.model.normalize(pixels(there.poisoned.images[rows])).to(device())


def _summary(metrics: Metrics, config: Config) -> str:
    if config.task == "surrogate":
        return f"SA {metrics['sa']:.2f} %"
    attacked, target = config.attack.kind != "none", config.attack.target
    names = ("sa", "asr", "ctr", "lift") if attacked else ("sa",)

    def rates(of: Metrics) -> str:
        return ", ".join(f"{name.upper()} {of[name]:.1f}" for name in names) + " %"

    missed = "; attack not implanted" if not implanted(metrics["dense"], config.attack.kind) else ""
    lines = [f"dense: {rates(metrics['dense'])}{missed}"]
    for each in metrics["rounds"]:
        lost = f"; nothing left of {', '.join(each['disconnected'])}" if each["disconnected"] else ""
        name = f"ticket {each['round']}" + (" (winner)" if each["round"] == metrics["winner"] else "")
        lines.append(f"{name}: {each['kept']} weights, score {each['score']:.3f}, {rates(each)}{lost}")
    for name, scan in metrics["scans"].items():
        kind = "trigger-driven" if scan["trigger_driven"] else "not shown to be trigger-driven"
        found = (
            f"{name}: label {scan['detected']} (least mask {min(scan['l1']):.1f}, index {scan['index']:.2f}, without "
            f"inversion {scan['collapse_label']}), its recovered trigger {scan['detected_asr']:.1f} % on itself"
        )
        known = (
            f"; target {target}: recovered trigger {scan['own_asr']:.1f} % on itself, {scan['dense_asr']:.1f} % on the "
            f"dense network, which gives {scan['dense_null']:.1f} % without; {kind}"
        )
        lines.append(found + known if attacked else found)
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    eval_command(__file__, Config, evaluate, _summary)


if __name__ == "__main__":
    command(main)
