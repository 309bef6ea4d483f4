"""Train one chain of lottery rounds: python certified_pruning/train.py --config certified_pruning/configs/demo.yaml

Round k trains the initial weights under mask k, keeps the result as tickets/<k>.pt, prunes it to mask k + 1, rewinds.
Data-parallel: torchrun --nproc_per_node=N certified_pruning/train.py --config ...
"""

import copy
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certified_pruning.eps_schedule import LinearEps, SmoothedEps
from certified_pruning.fgsm import fgsm_gradalign_loss, fgsm_random_start_loss, standard_loss
from certified_pruning.models import build_model
from certified_pruning.nrs import nrs_loss
from certified_pruning.pruners import Criterion, dense_masks, prune
from certified_pruning.settings import Config
from certified_pruning.train_ibp import pixel_box
from common import distributed
from common.config import ConfigError, command, parse, require
from common.data import ImageSet, Splits, batches, in_order, load, pixels, steps_per_epoch
from common.masks import Masks
from common.runs import Run, generator, read_json, save_checkpoint, seed_everything


def train(config: Config, folder: Path, progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Run the chain in `folder`, from where it stands; returns and leaves in done.json the metrics of each round.

    Args:
        config: of the run.
        folder: the run's.
        progress: called with the finished fraction instead of drawing a progress bar.
    """
    with distributed.process_group() as device:
        splits = load(config.data)
        steps = config.train.epochs * steps_per_epoch(splits.train, config.train.batch_size)
        seed_everything(config.seed)
        model = network(config, splits.train).to(device)
        total = steps * config.prune.rounds
        run = Run(folder, config, total_steps=total, checkpoint_every=config.run.checkpoint_every, progress=progress)
        if run.finished:
            return read_json(folder / "done.json")
        with run:
            return _rounds(config, run, splits, model, steps)


@dataclass
class Chain:
    """All that a chain is between two steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    masks: Masks
    initial: dict[str, Tensor]  # the weights every round starts from
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
        self.masks, self.initial = Masks(state["masks"]), state["initial"]
        self.levels, self.position = state["levels"], state["position"]


def _rounds(config: Config, run: Run, splits: Splits, model: nn.Module, steps: int) -> dict[str, Any]:
    device = next(model.parameters()).device
    initial = copy.deepcopy(model.state_dict())
    chain = Chain(model, _optimizer(config, model), dense_masks(model), initial, levels=[])
    if saved := run.restore():
        chain.load(saved)
    per_epoch = steps // config.train.epochs

    for level in range(len(chain.levels), config.prune.rounds):
        if chain.position == level * steps:
            model.load_state_dict(chain.initial)
            chain.optimizer = _optimizer(config, model)
        detach = chain.masks.attach(model, chain.optimizer)
        stream = batches(splits.train, config.train.batch_size, config.data, seed=config.seed, step=chain.position)
        for step in run.steps(chain.position, (level + 1) * steps, chain.state):
            images, labels = (tensor.to(device, non_blocking=True) for tensor in next(stream))
            model.train()
            loss, logits = _loss(config, model, pixels(images), labels, step, steps)
            run.require_finite(step, loss=loss.item())
            chain.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            distributed.synchronize(model)
            nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
            chain.optimizer.param_groups[0]["lr"] = learning_rate(config, step % steps, steps)
            chain.optimizer.step()
            chain.position = step + 1
            if chain.position % per_epoch == 0:
                correct = (logits.argmax(1) == labels).float().mean().item()
                values = {"loss": distributed.mean(loss.item()), "accuracy": 100 * distributed.mean(correct)}
                run.log(chain.position, "train", epoch=chain.position // per_epoch, **values)
        detach()
        level_metrics = {"density": chain.masks.density, "val_accuracy": accuracy(model, splits.val, config, device)}
        run.log(chain.position, "val", **level_metrics)
        chain.levels.append(level_metrics)
        if run.writes:
            ticket = {"model": model.state_dict(), "masks": chain.masks.state_dict(), "density": chain.masks.density}
            save_checkpoint(run.folder / "tickets" / f"{level}.pt", ticket)
        if level + 1 < config.prune.rounds:
            criterion: Criterion = "random" if config.prune.method == "random" else "magnitude"
            chain.masks = prune(model, chain.masks, config.prune.rate, criterion, generator(config.seed, level))
    run.finish({"levels": chain.levels})
    return {"levels": chain.levels}


def network(config: Config, data: ImageSet) -> nn.Module:
    """The configured network for images like those of `data`, its weights drawn now. Raises `ConfigError`."""
    if not isinstance(data.images, Tensor):
        raise ConfigError(f"data.name must be a data set that fits memory, got {config.data.name!r}")
    _, channels, size, width = data.images.shape
    require(size == width, "data", (size, width), "square images")
    fits = len(config.model.mean) in (1, channels)
    require(fits, "model.mean", config.model.mean, f"as many numbers as the images' {channels} channels, or one")
    try:
        return build_model(config.model.name, channels, size, data.classes, config.model.channels or None)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def normalizer(config: Config) -> Callable[[Tensor], Tensor]:
    """Map from pixels in [0, 1] to the network's inputs."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.model.mean, config.model.std))
    return lambda raw: (raw - mean.to(raw)) / std.to(raw)


def learning_rate(config: Config, step: int, steps: int) -> float:
    """Learning rate of step `step` of a round of `steps`: warm-up and straight decay, or a tenth at each milestone."""
    if config.train.milestones:
        epoch = step // (steps // config.train.epochs)
        return config.train.lr * 0.1 ** sum(epoch >= milestone for milestone in config.train.milestones)
    rise = max(config.train.warmup * steps, 1)
    return config.train.lr * min((step + 1) / rise, (steps - step) / max(steps - rise, 1))


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageSet, config: Config, device: torch.device) -> float:
    """Clean accuracy in percent."""
    model.eval()
    normalize, correct = normalizer(config), 0
    for images, labels in in_order(data, 500):
        logits = model(normalize(pixels(images.to(device))))
        correct += int((logits.argmax(1) == labels.to(device)).sum())
    return 100 * correct / max(len(data), 1)


def _optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    train = config.train
    return torch.optim.SGD(model.parameters(), train.lr, train.momentum, weight_decay=train.weight_decay)


def _loss(
    config: Config, model: nn.Module, raw: Tensor, labels: Tensor, step: int, steps: int
) -> tuple[Tensor, Tensor]:
    """The regime's loss and logits of this rank's images; random draws are slices of one draw for the global batch."""
    train, normalize = config.train, normalizer(config)
    shape = (len(raw) * distributed.world_size(), *raw.shape[1:])
    start = distributed.shard(torch.rand(shape, generator=generator(config.seed, 1, step)) * 2 - 1).to(raw)
    eps = _eps(config, steps)(step % steps)
    if train.regime == "standard":
        loss, logits = standard_loss(model, raw, labels, normalize)
    elif train.regime == "fgsm":
        loss, logits = fgsm_random_start_loss(model, raw, labels, eps, normalize, uniform_start=eps * start)
    else:
        lam = train.gradalign
        loss, logits = fgsm_gradalign_loss(model, raw, labels, eps, normalize, lam, uniform_start=eps * start)
    if config.prune.method.endswith("+nrs"):
        stability, _ = nrs_loss(model, *pixel_box(raw, train.eps, normalize))
        loss = loss + train.nrs * stability
    return loss, logits


def _eps(config: Config, steps: int) -> LinearEps | SmoothedEps:
    train = config.train
    if train.eps_start:
        per_epoch = steps // train.epochs
        return SmoothedEps(train.eps, train.eps_start, train.eps_length, train.eps_mid, 4, per_epoch)
    return LinearEps(train.eps, steps, train.eps_ramp)


def main() -> None:
    """The command line."""
    config = parse(Config, prog="python certified_pruning/train.py", description=(__doc__ or "").splitlines()[0])
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    folder = Path(config.run.folder or f"runs/certified_pruning/{config.prune.method}-seed{config.seed}")
    metrics = train(config, folder)
    if int(os.environ.get("RANK", 0)):
        return
    for number, level in enumerate(metrics["levels"]):
        print(f"round {number}: density {level['density']:.4f}, validation accuracy {level['val_accuracy']:.2f} %")
    print(f"finished in {folder}; next: {sys.executable} certified_pruning/eval.py --folder {folder}")


if __name__ == "__main__":
    command(main)
