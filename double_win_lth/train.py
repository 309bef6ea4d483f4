"""Train one run: python double_win_lth/train.py --config double_win_lth/configs/demo.yaml

task tickets: pre-train on the source images under a regime (or take --init), then prune and rewind, round by round;
leaves pretrained.pt and tickets.safetensors. task transfer: train tickets of such a run on the target images
(transfer.py). Data-parallel: torchrun --nproc_per_node=N double_win_lth/train.py --config ...
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from common import distributed
from common.config import ConfigError, command
from common.data import Splits, load, steps_per_epoch
from common.experiment import train_command
from common.masks import Masks
from common.runs import Run, read_json, save_checkpoint, seed_everything
from common.study import Progress
from double_win_lth.accuracy import accuracies
from double_win_lth.convert import load_pretrained, read_weights
from double_win_lth.recipes import SgdConfig
from double_win_lth.settings import Config
from double_win_lth.tickets import TicketBook, conv_weights, find_tickets, survivors
from double_win_lth.training import adversarial_batches, checked_step, finite, network, require_finite_weights
from double_win_lth.transfer import transfer


def train(config: Config, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Do the task in `folder`, from where the run stands; returns and leaves in done.json its final metrics.

    Args:
        config: of the run.
        folder: the run's.
        progress: called with the finished fraction instead of drawing a progress bar.
    """
    if config.task == "transfer":
        return transfer(config, folder, progress)
    config.require_apart()
    with distributed.process_group() as device:
        splits = load(config.source)
        seed_everything(config.seed)
        model = network(config, splits.train, device)
        if config.init:
            load_pretrained(model, read_weights(Path(config.init)), Path(config.init))
        chain = Chain(config, splits, model)
        every = config.run.checkpoint_every
        run = Run(folder, config, total_steps=chain.total, checkpoint_every=every, progress=progress)
        if run.finished:
            return read_json(folder / "done.json")
        with run:
            return chain.go(run)


class Chain:
    """Pre-training and the rounds of pruning: one stage after another, each a number of steps of SGD."""

    def __init__(self, config: Config, splits: Splits, model: nn.Module) -> None:
        self.config, self.splits, self.model = config, splits, model
        self.prunable = sum(weight.numel() for weight in conv_weights(model).values())
        try:
            survivors(self.prunable, config.prune.rate, config.prune.rounds)
        except ValueError as error:
            raise ConfigError(f"prune: {error}") from error
        self.first_round = 0 if config.init else self._steps("pretrain")
        self.a_round = self._steps("round") if config.prune.rounds > 1 else 0
        self.total = self.first_round + (config.prune.rounds - 1) * self.a_round
        self.position = 0  # finished steps over all stages
        self.pretrained: dict[str, Tensor] | None = None
        self.book: TicketBook | None = None
        self.optimizer = config.pretrain.optimizer(model)

    def _steps(self, stage: Literal["pretrain", "round"]) -> int:
        per_epoch = steps_per_epoch(self.splits.train, getattr(self.config, stage).batch_size)
        return self.config.steps(stage, per_epoch)

    def state(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        return {
            "position": self.position,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pretrained": self.pretrained,
            "survived": self.book and self.book.survived,
        }

    def go(self, run: Run) -> dict[str, Any]:
        """All stages, from where the run stands; a finished round is not trained again."""
        config, model = self.config, self.model
        saved = run.restore() or {"position": 0, "pretrained": None, "survived": None}
        self.position, self.pretrained = saved["position"], saved["pretrained"]
        self.book = TicketBook(saved["survived"]) if saved["survived"] else None
        if self.pretrained is None:
            self.stage(run, config.pretrain, None, 0, self.first_round, saved)
            self.pretrained = copy.deepcopy(model.state_dict())
            run.save(self.position, self.state())
        model.load_state_dict(self.pretrained)

        def train_round(_: nn.Module, masks: Masks, level: int) -> None:
            self.stage(run, config.round, masks, self.first_round + (level - 1) * self.a_round, self.a_round, saved)

        def on_ticket(book: TicketBook) -> None:
            self.book = book
            run.log(self.position, "tickets", level=book.levels, sparsity=book.sparsity(book.levels))
            run.save(self.position, self.state())

        rate, rounds = config.prune.rate, config.prune.rounds
        book = find_tickets(model, train_round, rate=rate, rounds=rounds, on_ticket=on_ticket, found=self.book)
        if run.writes:
            save_checkpoint(run.folder / "pretrained.pt", {"model": self.pretrained})
            book.save(run.folder / "tickets.safetensors")
        levels = range(book.levels + 1)
        metrics = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "prunable": self.prunable,
            "remaining": [book.remaining(level) for level in levels],
            "sparsity": [book.sparsity(level) for level in levels],
        }
        run.finish(metrics)
        return metrics

    def stage(
        self, run: Run, sgd: SgdConfig, masks: Masks | None, first: int, steps: int, saved: Mapping[str, Any]
    ) -> None:
        """Steps [first, first + steps) of the run: SGD under the regime, masked weights kept at zero."""
        config, model, data, regime = self.config, self.model, self.splits.train, self.config.perturbation
        self.optimizer, start = sgd.optimizer(model), first
        if first < saved["position"] <= first + steps:  # the interrupted stage
            start = saved["position"]
            model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        detach = masks.attach(model, self.optimizer) if masks else lambda: None
        per_epoch = steps_per_epoch(data, sgd.batch_size)
        stream = adversarial_batches(
            data, sgd.batch_size, config.source, regime, size=config.model.size, seed=config.seed, step=start
        )
        for step in run.steps(start, first + steps, self.state):
            lr = sgd.learning_rate(step - first, per_epoch)
            loss, accuracy = checked_step(
                run, step, model, self.optimizer, next(stream), regime, lr, amp=config.model.amp
            )
            self.position = step + 1
            if self.position % per_epoch == 0 or self.position == first + steps:
                values = {"loss": distributed.mean(loss), "accuracy": distributed.mean(accuracy)}
                run.log(self.position, "train", **values)
        detach()
        self.position = first + steps
        require_finite_weights(run, self.position, model)
        if len(self.splits.val):
            options = {"size": config.model.size, "batch_size": config.eval.batch_size}
            with finite(run, self.position):
                accuracy = accuracies(model, self.splits.val, **options)[0]  # type: ignore[arg-type]
            run.log(self.position, "val", accuracy=accuracy)


def main() -> None:
    """The command line."""

    def name(config: Config) -> str:
        if config.task == "tickets":
            return f"{config.regime}-seed{config.seed}"
        chosen = config.transfer
        source = Path(chosen.run).name or "none"
        return f"{source}-to-{chosen.kind}-{chosen.fraction:g}-draw{chosen.draw}-{'-'.join(chosen.tickets)}"

    def summary(metrics: Mapping[str, Any]) -> str:
        if "remaining" in metrics:
            levels = enumerate(zip(metrics["sparsity"], metrics["remaining"], strict=True))
            lines = [
                f"ticket {level}: sparsity {100 * sparsity:.2f} %, {left:,} weights"
                for level, (sparsity, left) in levels
            ]
            return "\n".join(lines)
        values = metrics["tickets"].items()
        return "\n".join(f"{ticket}: SA {each['sa']:.2f} %, RA {each['ra']:.2f} %" for ticket, each in values)

    train_command(__file__, Config, train, name, summary)


if __name__ == "__main__":
    command(main)
