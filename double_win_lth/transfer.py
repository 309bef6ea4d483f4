"""Transfer: a new head on tickets, all surviving weights trained on the target images, clean or attacked (spec c).

Several tickets train on common batches as one network (grouped.py). The mask stays as it was found; weights, batch
norm and head learn.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import distributed
from common.config import ConfigError, require
from common.data import ImageSet, load, steps_per_epoch
from common.experiment import finished_run
from common.masks import Masks
from common.runs import CheckpointError, Run, generator, load_checkpoint, read_json, save_checkpoint, seed_everything
from common.study import Progress
from double_win_lth.accuracy import CLEAN, accuracies
from double_win_lth.convert import load_pretrained
from double_win_lth.grouped import TicketBatch
from double_win_lth.models import head_name
from double_win_lth.regimes import Regime
from double_win_lth.schemes import take
from double_win_lth.settings import Config, ticket_kind
from double_win_lth.tickets import TicketBook, one_shot_tickets, shuffled
from double_win_lth.training import adversarial_batches, checked_step, finite, network, require_finite_weights

REINIT, RANDOM, SHUFFLE, EVALUATION = 3, 4, 5, 6  # what a generator is for


def transfer(config: Config, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train the tickets in `folder`, from where the run stands; returns and leaves in done.json SA and RA of each.

    Those of the last weights; with transfer.select of the weights that were best in validation, and the last ones'
    as `last`.

    Raises:
        ConfigError: if the run that found the tickets is not there, not finished, of another network or of the target's
            classes, or if no epoch can be selected.
        CheckpointError: if its files are damaged.
        NonFiniteError: if the training diverges, its last step included.
    """
    with distributed.process_group() as device:
        train_set, val, test = target_images(config)
        source = Source.of(config)
        tickets = [ticket_network(config, train_set, ticket, source, device) for ticket in config.transfer.tickets]
        model, masks = together(tickets)
        per_epoch = steps_per_epoch(train_set, config.finetune.batch_size)
        total, every = config.steps("finetune", per_epoch), config.run.checkpoint_every
        chosen, epochs = config.transfer, total // per_epoch
        allowed = f"below the {epochs} whole epochs of finetune with transfer.select {chosen.select}"
        can_select = chosen.select == "last" or chosen.select_from < epochs
        require(can_select, "transfer.select_from", chosen.select_from, allowed)
        run = Run(folder, config, total_steps=total, checkpoint_every=every, progress=progress)
        if run.finished:
            return read_json(folder / "done.json")
        with run:
            best = _fit(config, run, model, masks, train_set, val, per_epoch)
            metrics: dict[str, Any] = {
                "sparsity": {t: m.sparsity for t, (_, m) in zip(config.transfer.tickets, tickets, strict=True)}
            }
            judged = val if config.eval.split == "val" else test
            weights = copy.deepcopy(model.state_dict())
            with finite(run, total):
                metrics["tickets"] = last = measured(config, model, judged)
                if best:  # SA of the weights of the best SA in validation, RA of those of the best RA where it counts
                    ticket, selected = chosen.tickets[0], {}
                    for name, (_, state) in best.items():
                        model.load_state_dict(state)
                        selected[name] = measured(config, model, judged)[ticket]
                    both = {"sa": selected["sa"]["sa"], "ra": selected.get("ra", selected["sa"])["ra"]}
                    metrics |= {"last": last, "selected": selected, "tickets": {ticket: both}}
            if run.writes:  # only now: what cannot be measured is not left behind
                states = {name: state for name, (_, state) in best.items()}
                save_checkpoint(folder / "model.pt", {"model": weights, **states})
            run.finish(metrics)
            return metrics


def target_images(config: Config) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Training, validation and test images of the configured scheme."""
    chosen, splits = config.transfer, load(config.target)
    keys = (config.target.split_seed, config.seed, chosen.draw)
    train_set, val = take(splits.train, chosen.fraction, val=chosen.val, subset=chosen.subset, keys=keys)
    if chosen.select == "val" and chosen.fraction < 1:  # else selection would use more labels than training
        val = val.subset(torch.arange(max(int(chosen.fraction * len(val)), 1)))
    return train_set, val, splits.test


@dataclass(frozen=True)
class Source:
    """What a run of task tickets left: pre-trained weights, the file they are from, and the tickets."""

    weights: Mapping[str, Tensor]
    path: Path
    book: TicketBook

    @classmethod
    def of(cls, config: Config) -> "Source":
        """As configured.

        Raises:
            ConfigError: no such run, an unfinished one, or one whose source shares classes with the target.
            CheckpointError: damaged.
        """
        place = config.transfer.run
        require(bool(place), "transfer.run", place, "the folder of a run that found tickets")
        folder, donor = Path(place), Path(config.transfer.weights or place)
        for each in dict.fromkeys((folder, donor)):
            finished = read_json(each / "done.json") if (each / "done.json").exists() else {}
            if "remaining" not in finished:
                raise ConfigError(f"{each}: must be the folder of a finished run of task tickets")
            config.require_apart(finished_run(each, Config).source, str(each))
        path = donor / "pretrained.pt"
        content = load_checkpoint(path)
        if not isinstance(content.get("model"), Mapping):
            raise CheckpointError(f"{path}: not pre-trained weights")
        return cls(content["model"], path, TicketBook.load(folder / "tickets.safetensors"))


def ticket_network(
    config: Config, data: ImageSet, ticket: str, source: Source, device: torch.device
) -> tuple[nn.Module, Masks]:
    """Pre-trained weights under the mask of this ticket with a new head, and the mask.

    All tickets of a seed get the same head: what a ticket draws is drawn after it.

    Raises:
        ConfigError, CheckpointError: where ticket, weights and network do not fit.
    """
    kind, level = ticket_kind(ticket)
    book = source.book
    require(level <= book.levels, "transfer.tickets", ticket, f"of a level up to {book.levels}")
    seed_everything(config.seed)
    model = network(config, data, device)
    head = head_name(model)
    model.get_submodule(head).reset_parameters()  # type: ignore[operator]
    load_pretrained(model, source.weights, source.path, without=head)
    try:
        if kind == "shuffled":
            book = shuffled(book, generator(config.seed, SHUFFLE))
        elif kind in ("omp", "random"):
            counts = [book.remaining(each) for each in range(1, level + 1)]
            score = "random" if kind == "random" else "magnitude"
            book = one_shot_tickets(model, counts, score=score, generator=generator(config.seed, RANDOM))  # type: ignore[arg-type]
        elif kind == "reinit":
            torch.manual_seed(generator(config.seed, REINIT).initial_seed())
            fresh = network(config, data, device)
            fresh.set_submodule(head, model.get_submodule(head))
            model = fresh
        book.apply_to(model, level)
    except ValueError as error:
        raise ConfigError(f"transfer.tickets {ticket}: {error}") from error
    return model, book.mask(level)


def together(tickets: list[tuple[nn.Module, Masks]]) -> tuple[nn.Module, Masks]:
    """One network to train, and its masks: the ticket itself where it is alone."""
    if len(tickets) == 1:
        return tickets[0]
    batch = TicketBatch([model for model, _ in tickets])
    return batch, batch.masks([masks for _, masks in tickets])


def measured(config: Config, model: nn.Module, data: ImageSet) -> dict[str, dict[str, float]]:
    """SA and RA of each ticket, percent; RA on the first eval.images."""
    options: dict[str, Any] = {"size": config.model.size, "batch_size": config.eval.batch_size}
    options["seed"] = generator(config.seed, EVALUATION).initial_seed() % 2**32
    attacked = data.subset(torch.arange(min(config.eval.images or len(data), len(data))))
    clean = accuracies(model, data, CLEAN, **options)
    robust = accuracies(model, attacked, config.eval.attack.regime("pgd"), **options)
    pairs = zip(config.transfer.tickets, clean, robust, strict=True)
    return {ticket: {"sa": sa, "ra": ra} for ticket, sa, ra in pairs}


Best = dict[str, tuple[float, dict[str, Tensor]]]


def _fit(
    config: Config, run: Run, model: nn.Module, masks: Masks, data: ImageSet, val: ImageSet, per_epoch: int
) -> Best:
    """Train to the end; returns the best weights by validation, empty with select last."""
    sgd, chosen = config.finetune, config.transfer
    regime = Regime.std() if chosen.kind == "std" else config.attack.regime("adv")
    optimizer, position = sgd.optimizer(model), 0
    best: Best = {}
    if saved := run.restore():
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        position, best = saved["position"], saved["best"]

    def snapshot() -> Mapping[str, Any]:
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return {**states, "position": position, "best": best}

    masks.attach(model, optimizer)
    stream = adversarial_batches(
        data, sgd.batch_size, config.target, regime, size=config.model.size, seed=config.seed, step=position
    )
    total = sgd.total(per_epoch)
    for step in run.steps(position, total, snapshot):
        lr = sgd.learning_rate(step, per_epoch)
        options = {"amp": config.model.amp, "attack_bn": chosen.attack_bn}
        loss, accuracy = checked_step(run, step, model, optimizer, next(stream), regime, lr, **options)
        position = step + 1
        if position % per_epoch == 0 and (per_epoch > 1 or position == total):
            run.log(position, "train", loss=distributed.mean(loss), accuracy=distributed.mean(accuracy))
        if position % per_epoch == 0 and chosen.select != "last" and step // per_epoch >= chosen.select_from:
            with finite(run, position):
                scores = measured(config, model, val)[chosen.tickets[0]]
            run.log(position, "val", **scores)
            names = ("sa",) if chosen.kind == "std" else ("sa", "ra")
            better = [name for name in names if name not in best or scores[name] > best[name][0]]
            state = copy.deepcopy(model.state_dict()) if better else {}
            best.update({name: (scores[name], state) for name in better})
    require_finite_weights(run, position, model)
    return best
