"""Train one chain of lottery rounds: python certified_pruning/train.py --config certified_pruning/configs/demo.yaml

Round k trains its start weights under mask k, keeps the result as tickets/<k>.pt, prunes it to mask k + 1, rewinds.
Data-parallel: torchrun --nproc_per_node=N certified_pruning/train.py --config ...
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certified_pruning.auto_lirpa import BoundedModule, bounded
from certified_pruning.channel_pruners import density
from certified_pruning.eps_schedule import LinearEps, SmoothedEps
from certified_pruning.fast_ibp import fast_ibp_init_
from certified_pruning.lottery import initial_masks, next_masks
from certified_pruning.models import build_model
from certified_pruning.objective import robust_loss
from certified_pruning.settings import Config
from common import distributed
from common.config import ConfigError, command, require
from common.data import ImageSet, Splits, batches, load, pixels, steps_per_epoch
from common.experiment import accuracy, train_command
from common.masks import Masks, prunable_weights
from common.runs import Run, generator, read_json, save_checkpoint, seed_everything


def train(config: Config, folder: Path, progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Run the chain in `folder`, from where it stands; returns and leaves in done.json the metrics of each round.

    Args:
        config: of the run.
        folder: the run's.
        progress: called with the finished fraction instead of drawing a progress bar.
    """
    require(config.data.val > 0, "data.val", config.data.val, "above 0: levels are chosen on validation images")
    with distributed.process_group() as device:
        splits = load(config.data)
        steps = config.train.epochs * steps_per_epoch(splits.train, config.train.batch_size)
        seed_everything(config.seed)
        model = network(config, splits.train).to(device)
        if config.train.regime == "fast_ibp":
            fast_ibp_init_(model)
        graph = None
        if config.train.bounds == "auto_lirpa":
            channels, size = config.model.image_shape(splits.train)
            graph = bounded(model.train(), (channels, size, size))
        total = steps * config.prune.rounds
        run = Run(folder, config, total_steps=total, checkpoint_every=config.run.checkpoint_every, progress=progress)
        if run.finished:
            return read_json(folder / "done.json")
        with run:
            return _rounds(config, run, splits, model, graph, steps)


@dataclass
class Chain:
    """All that a chain is between two steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    masks: Masks
    initial: dict[str, Tensor]  # the weights a round starts from
    levels: list[dict[str, float]]  # finished rounds
    position: int = 0  # finished steps, over all rounds

    def state(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "initial": self.initial}
        return {**state, "masks": self.masks.state_dict(), "levels": self.levels, "position": self.position}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        device = next(self.model.parameters()).device
        self.masks = Masks({name: mask.to(device) for name, mask in state["masks"].items()})
        self.initial = state["initial"]
        self.levels, self.position = state["levels"], state["position"]


def _rounds(
    config: Config, run: Run, splits: Splits, model: nn.Module, graph: BoundedModule | None, steps: int
) -> dict[str, Any]:
    device = next(model.parameters()).device
    initial = copy.deepcopy(model.state_dict())
    chain = Chain(model, _optimizer(config, model), initial_masks(config, model), initial, levels=[])
    if saved := run.restore():
        chain.load(saved)
    elif config.prune.at_init:
        chain.masks = next_masks(config, model, chain.masks, 0, splits.train)
    per_epoch = steps // config.train.epochs

    for level in range(len(chain.levels), config.prune.rounds):
        if chain.position == level * steps:
            if config.prune.prune_type == "rewind_trained" and level:
                convolutions = {name: chain.initial[name] for name in prunable_weights(model)}
                model.load_state_dict({**model.state_dict(), **convolutions})
            elif config.prune.prune_type != "finetune":
                model.load_state_dict(chain.initial)
            chain.optimizer = _optimizer(config, model)
        detach = chain.masks.attach(model, chain.optimizer)
        stream = batches(splits.train, config.train.batch_size, config.data, seed=config.seed, step=chain.position)
        for step in run.steps(chain.position, (level + 1) * steps, chain.state):
            images, labels = (tensor.to(device, non_blocking=True) for tensor in next(stream))
            model.train()
            loss, logits = _loss(config, model, pixels(images), labels, step, steps, graph)
            run.require_finite(step, loss=loss.item())
            chain.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            distributed.synchronize(model)
            nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
            chain.optimizer.param_groups[0]["lr"] = learning_rate(config, step, steps)
            chain.optimizer.step()
            chain.position = step + 1
            if config.prune.prune_type == "rewind_lt" and chain.position == config.prune.rewind_epoch * per_epoch:
                chain.initial = copy.deepcopy(model.state_dict())
            if chain.position % per_epoch == 0:
                correct = (logits.argmax(1) == labels).float().mean().item()
                values = {"loss": distributed.mean(loss.item()), "accuracy": 100 * distributed.mean(correct)}
                run.log(chain.position, "train", epoch=chain.position // per_epoch, **values)
        detach()
        if config.prune.prune_type in ("pt", "rewind_trained") and level == 0:
            chain.initial = copy.deepcopy(model.state_dict())
        level_metrics = {
            "density": density(chain.masks),
            "val_accuracy": accuracy(model, splits.val, config.model.normalize),
        }
        run.log(chain.position, "val", **level_metrics)
        chain.levels.append(level_metrics)
        if run.writes:
            ticket = {"model": model.state_dict(), "masks": chain.masks.state_dict(), **level_metrics}
            save_checkpoint(run.folder / "tickets" / f"{level}.pt", ticket)
        if level + 1 < config.prune.rounds:
            chain.masks = next_masks(config, model, chain.masks, level, splits.train)
    run.finish({"levels": chain.levels})
    return {"levels": chain.levels}


def network(config: Config, data: ImageSet) -> nn.Module:
    """The configured network for images like those of `data`, its weights drawn now. Raises `ConfigError`."""
    if not isinstance(data.images, Tensor):
        raise ConfigError(f"data.name must be a data set that fits memory, got {config.data.name!r}")
    channels, size = config.model.image_shape(data)
    try:
        return build_model(config.model.name, channels, size, data.classes, config.model.channels or None)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def learning_rate(config: Config, step: int, steps: int) -> float:
    """Learning rate of step `step` of a chain with rounds of `steps`, each with the same schedule.

    Warm-up and straight decay, or a tenth at each milestone.
    """
    number, step = divmod(step, steps)
    if config.train.milestones:
        epoch = step // (steps // config.train.epochs) + (config.train.milestones_early if number else 0)
        return config.train.lr * 0.1 ** sum(epoch >= milestone for milestone in config.train.milestones)
    rise = max(config.train.warmup * steps, 1)
    return config.train.lr * min((step + 1) / rise, (steps - step) / max(steps - rise, 1))


def _optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    train = config.train
    if train.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), train.lr, weight_decay=train.weight_decay)
    return torch.optim.SGD(model.parameters(), train.lr, train.momentum, weight_decay=train.weight_decay)


def _loss(
    config: Config,
    model: nn.Module,
    raw: Tensor,
    labels: Tensor,
    step: int,
    steps: int,
    graph: BoundedModule | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and logits of this rank's images in step `step` of the chain."""
    eps = _eps(config, steps)(step % steps)
    return robust_loss(config, model, raw, labels, eps, generator(config.seed, 1, step), graph)


def _eps(config: Config, steps: int) -> LinearEps | SmoothedEps:
    train = config.train
    if train.eps_start:
        per_epoch = steps // train.epochs
        return SmoothedEps(train.eps, train.eps_start, train.eps_length, train.eps_mid, 4, per_epoch)
    return LinearEps(train.eps, steps, train.eps_ramp)


def main() -> None:
    """The command line."""

    def summary(metrics: Mapping[str, Any]) -> str:
        return "\n".join(
            f"round {number}: density {level['density']:.4f}, validation accuracy {level['val_accuracy']:.2f} %"
            for number, level in enumerate(metrics["levels"])
        )

    train_command(__file__, Config, train, lambda config: f"{config.prune.method}-seed{config.seed}", summary)


if __name__ == "__main__":
    command(main)
