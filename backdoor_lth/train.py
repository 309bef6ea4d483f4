"""Train one run: python backdoor_lth/train.py --config backdoor_lth/configs/demo.yaml

task chain: poison the training set, then train, prune and rewind, round by round; leaves round-00.pt, round-01.pt, ...,
each with the weights of its round and the masks found at its end. task surrogate: adversarial training of the network
that clean-label poison is made with. Data-parallel: torchrun --nproc_per_node=N backdoor_lth/train.py --config ...
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import all_gather

from backdoor_lth.pgd import EPS, perturbed, uniform_start
from backdoor_lth.pruning import (
    Round,
    disconnected,
    grasp_scores,
    magnitudes,
    prune_and_rewind,
    snip_scores,
    survivors,
)
from backdoor_lth.settings import Config
from backdoor_lth.victim import Normalized, Victim, clean, network, victim
from common import distributed
from common.config import command, require
from common.data import ImageSet, batches, pixels, steps_per_epoch
from common.experiment import train_command
from common.masks import Masks, prunable_weights, random_scores
from common.runs import Run, generator, load_checkpoint, read_json, save_checkpoint
from common.study import Progress

SCORES, STARTS = 1_000_013, 1_000_017  # what a generator is for; no epochs' numbers
ROBUST_STEPS = 7  # of PGD, for the surrogate


def train(config: Config, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Do the task in `folder`, from where the run stands; returns and leaves in done.json its final metrics."""
    with distributed.process_group() as device:
        there = victim(config) if config.task == "chain" else None
        data = there.train if there else clean(config)[0]
        model = network(config, data, device)
        chain = Chain(config, data, model)
        every = config.run.checkpoint_every
        run = Run(folder, config, total_steps=chain.total, checkpoint_every=every, progress=progress)
        if run.finished:
            return read_json(folder / "done.json")
        with run:
            return chain.go(run, there)


class Chain:
    """Rounds of training and pruning; a surrogate is one round without pruning."""

    def __init__(self, config: Config, data: ImageSet, model: nn.Module) -> None:
        self.config, self.data, self.model = config, data, model
        if config.train.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.per_epoch = steps_per_epoch(data, config.train.batch_size)
        rounds = config.prune.rounds if config.task == "chain" else 1
        lengths = [config.train.length(number) * self.per_epoch for number in range(rounds)]
        self.starts = [sum(lengths[:number]) for number in range(rounds + 1)]
        self.total = self.starts[-1]
        self.position = self.round = 0
        self.loss = 0.0
        self.masks = Masks.ones_like(prunable_weights(model))
        self.kept = weights_left(config, self.masks.total)
        self.rewind: dict[str, Tensor] | None = None
        self.saved: dict[str, Any] = {"position": 0}
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.SGD:
        sgd = self.config.train
        return torch.optim.SGD(self.model.parameters(), lr=sgd.lr, momentum=sgd.momentum, weight_decay=sgd.weight_decay)

    def state(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        return {
            "position": self.position,
            "round": self.round,
            "loss": self.loss,
            "masks": self.masks.state_dict(),
            "rewind": self.rewind,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def go(self, run: Run, there: Victim | None) -> dict[str, Any]:
        """All rounds, from where the run stands; a finished one is not trained again."""
        config, model = self.config, self.model
        if saved := run.restore():
            self.saved, self.position, self.round, self.loss = (
                saved,
                *(saved[key] for key in ("position", "round", "loss")),
            )
            self.masks, self.rewind = Masks(saved["masks"]), saved["rewind"]
        where = next(model.parameters()).device
        self.masks = Masks({name: mask.to(where) for name, mask in self.masks.items()})
        if there is None:
            self.fit(run, self.masks, 0)
            metrics: dict[str, Any] = {"loss": self.loss}
            if run.writes:
                save_checkpoint(run.folder / "model.pt", {"model": model.state_dict()})
        else:
            rank = self.ranking(run)
            rounds = prune_and_rewind(
                model,
                lambda _, masks, number: self.fit(run, masks, number),
                rounds=config.prune.rounds,
                fraction=config.prune.fraction,
                rank=rank,
                start=self.round,
                masks=self.masks,
                rewind=self.rewind,
            )
            for each in rounds:
                self.finish_round(run, each)
            poisoned = int(there.poisoned.is_poisoned.sum())
            metrics = {"kept": self.kept, "images": len(there.train), "poisoned": poisoned}
            metrics["disconnected"] = disconnected(self.masks)
        run.finish(metrics)
        return metrics

    def finish_round(self, run: Run, each: Round) -> None:
        """Keep the weights and masks of a round, and start the next one from there if killed."""
        self.masks, self.round = each.masks, each.number + 1
        if run.writes:
            content = {"model": each.trained, "masks": each.masks.state_dict()}
            save_checkpoint(round_path(run.folder, each.number), content)
        run.save(self.position, self.state())

    def ranking(self, run: Run) -> Any:
        """(trained model, round) -> scores of which the lowest are pruned."""
        method, model = self.config.prune.method, self.model
        if method == "imp":
            return lambda model, number: magnitudes(model)
        if method == "omp":
            return lambda model, number: magnitudes(model) if not number else _stored_magnitudes(run.folder)
        start = network(self.config, self.data, next(model.parameters()).device)
        if method == "random":
            fixed = random_scores(prunable_weights(start), generator(self.config.seed, SCORES))
        else:
            x, y = map(_whole, next(self.stream(0)))
            fixed = {"snip": snip_scores, "grasp": grasp_scores}[method](start, x, y)
            # Each GPU may round otherwise, and masks must be everywhere the same.
            distributed.average_(list(fixed.values()))
        return lambda model, number: fixed

    def stream(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches on the model's device from `step` on: inputs and labels."""
        device, config = next(self.model.parameters()).device, self.config
        for images, labels in batches(self.data, config.train.batch_size, config.data, seed=config.seed, step=step):
            yield config.model.normalize(pixels(images.to(device))), labels.to(device)

    def fit(self, run: Run, masks: Masks, number: int) -> dict[str, Tensor] | None:
        """Train one round under its masks; returns, of round 0, the state to rewind to."""
        config, model = self.config, self.model
        first, last = self.starts[number], self.starts[number + 1]
        self.optimizer, start = self._optimizer(), first
        if first < self.saved["position"] <= last:  # the interrupted round
            start = self.saved["position"]
            model.load_state_dict(self.saved["model"])
            self.optimizer.load_state_dict(self.saved["optimizer"])
        detach = masks.attach(model, self.optimizer)
        model.train()
        stream = self.stream(start)
        if number == self.position == 0 and not config.train.rewind_epoch:
            self.rewind = copy.deepcopy(model.state_dict())
        for step in run.steps(start, last, self.state):
            x, y = next(stream)
            if config.task == "surrogate":
                x = self.attacked(x, y, step)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=config.train.amp):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            distributed.synchronize(model)
            for group in self.optimizer.param_groups:
                group["lr"] = config.train.learning_rate(number, (step - first) / self.per_epoch)
            self.optimizer.step()
            self.loss = distributed.mean(loss.item())
            run.require_finite(step, **{f"loss of round {number}": self.loss})
            self.position = step + 1
            if not number and self.position == config.train.rewind_epoch * self.per_epoch:
                self.rewind = copy.deepcopy(model.state_dict())
            if self.position == last:
                run.log(self.position, "train", loss=self.loss, round=number, density=masks.density)
        detach()
        return self.rewind if not number else None

    def attacked(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        """The batch after PGD on pixels: adversarial training of the surrogate."""
        options, seed = self.config.model, self.config.seed
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(x) for values in (options.mean, options.std))
        raw = (x * std + mean).clamp(0, 1)
        shape = (len(x) * distributed.world_size(), *x.shape[1:])
        start = distributed.shard(uniform_start(shape, EPS, generator(seed, STARTS, step))).to(x)
        return options.normalize(
            perturbed(Normalized(self.model, options.normalize), raw, y, start, steps=ROBUST_STEPS)
        )


def weights_left(config: Config, total: int) -> list[int]:
    """Of `total`, after 0, 1, ... rounds. Raises `ConfigError` where the score would find no ticket sparse enough."""
    kept = [total]
    for number in range(config.prune.rounds):
        kept.append(survivors(kept[-1], config.prune.fraction(number), 1)[1])
    least, most = kept[-1] / total, config.score.extreme
    fits = config.task == "surrogate" or least <= most
    require(fits, "score.extreme", most, f"at least the last ticket's density, {least}")
    return kept


def round_path(folder: Path, number: int) -> Path:
    """Where a run keeps a round."""
    return folder / f"round-{number:02d}.pt"


def _whole(part: Tensor) -> Tensor:
    """The global batch of which every rank has its `shard`."""
    if distributed.world_size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(distributed.world_size())]
    all_gather(parts, part.contiguous())
    return torch.cat(parts)


def _stored_magnitudes(folder: Path) -> dict[str, Tensor]:
    content = load_checkpoint(round_path(folder, 0))
    return {name: content["model"][name].abs() for name in content["masks"]}


def main() -> None:
    """The command line."""

    def name(config: Config) -> str:
        if config.task == "surrogate":
            return f"surrogate-{config.model.name}-seed{config.seed}"
        return f"{config.attack.kind}-{config.prune.method}-{config.model.name}-seed{config.seed}"

    def summary(metrics: Mapping[str, Any]) -> str:
        if "kept" not in metrics:
            return f"surrogate: loss {metrics['loss']:.3f} on attacked images"
        kept = metrics["kept"]
        return (
            f"{metrics['poisoned']} of {metrics['images']} images poisoned; weights left: {', '.join(map(str, kept))}"
        )

    train_command(__file__, Config, train, name, summary)


if __name__ == "__main__":
    command(main)
