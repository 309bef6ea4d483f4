"""Train one GAN: python sparse_gan/train.py --config sparse_gan/configs/demo.yaml

One loop over generator steps; the generator's moving average is kept at some moments, all weights end in model.pt.
Data-parallel: torchrun --nproc_per_node=N sparse_gan/train.py --config ...
"""

from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import distributed
from common.config import command
from common.data import ImageSet, batches, in_order, load, steps_per_epoch
from common.experiment import train_command
from common.runs import Run, generator, read_json, save_checkpoint
from common.study import Progress
from sparse_gan.game import Game, draw_noise, phase_lengths
from sparse_gan.images import prepare
from sparse_gan.settings import Config
from sparse_gan.sparse_state import pack


def train(config: Config, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train in `folder`, from where the run stands; returns and leaves in done.json the final training metrics.

    Args:
        config: of the run.
        folder: the run's.
        progress: called with the finished fraction instead of drawing a progress bar.
    """
    with distributed.process_group() as device:
        data = load(config.data).train
        steps_per_epoch(data, config.train.batch_size)
        prepare(next(in_order(data.subset(torch.tensor([0])), 1))[0], config.model.size)
        total = sum(phase_lengths(config))
        run = Run(folder, config, total_steps=total, checkpoint_every=config.run.checkpoint_every, progress=progress)
        if run.finished:
            return read_json(folder / "done.json")
        with run:
            return _fit(config, run, data, device)


def snapshot_steps(config: Config) -> list[int]:
    """The numbers of generator steps after which the averaged generator is kept."""
    total, count = sum(phase_lengths(config)), config.train.snapshots
    return sorted({round(total * k / count) for k in range(1, count + 1)} - {0})


def dequantisation(config: Config, shape: torch.Size, step: int, turn: int) -> Tensor:
    """Uniform noise in [0, 1/128) for this rank's part of the batch of a discriminator step; `shape` of one image."""
    draws = generator(config.seed, 2, step, turn, 0)
    return distributed.shard(torch.rand(config.train.batch_size, *shape, generator=draws)) / 128


def _fit(config: Config, run: Run, data: ImageSet, device: torch.device) -> dict[str, Any]:
    options, lengths = config.train, phase_lengths(config)
    starts = [0, *accumulate(lengths)]
    kept_steps = set(snapshot_steps(config))
    game, start = Game(config, data, device), 0
    if saved := run.restore():
        game.load_state_dict(saved["game"])
        start = saved["step"]
    position = start

    def snapshot() -> dict[str, Any]:
        return {"game": game.state_dict(), "step": position}

    def noise(step: int, turn: int) -> tuple[Tensor, Tensor]:
        z, labels = draw_noise(options.batch_size, config.model.z_dim, data.classes, config.seed, 1, step, turn)
        return distributed.shard(z).to(device), distributed.shard(labels).to(device)

    def refuse(step: int, name: str, loss: float) -> None:
        run.require_finite(step, **{name: loss})

    stream = batches(data, options.batch_size, config.data, seed=config.seed, step=start * options.n_dis)
    for step in run.steps(start, starts[-1], snapshot):
        phase = sum(step >= begin for begin in starts[1:-1])
        if phase > game.phase:
            game.enter(phase)
        within = step - starts[phase]
        factor = 1 - within / lengths[phase] if options.decay else 1.0
        for turn in range(options.n_dis):
            raw, labels = next(stream)
            real = prepare(raw, config.model.size)
            if options.dequantize:
                real += dequantisation(config, real.shape[1:], step, turn)
            batch = real.to(device), labels.to(device), *noise(step, turn)
            loss_d = game.discriminate(*batch, factor, partial(refuse, step, "loss_d"))
        loss_g = game.generate(*noise(step, options.n_dis), factor, partial(refuse, step, "loss_g"))
        game.follow(within + 1)

        position = step + 1
        if position in kept_steps:
            explored = {"explored_g": game.g.explored, "explored_d": game.d.explored}
            losses = {"loss": distributed.mean(loss_d), "loss_g": distributed.mean(loss_g)}
            run.log(position, "train", **losses, **explored)
            if run.writes:
                save_checkpoint(snapshot_path(run.folder, position), _averages(game))
    metrics = {
        "parameters_g": sum(p.numel() for p in game.g.module.parameters()),
        "parameters_d": sum(p.numel() for p in game.d.module.parameters()),
        "density_g": game.g.masks.density if game.g.masks else 1.0,
        "density_d": game.d.masks.density if game.d.masks else 1.0,
        "explored_g": game.g.explored,
        "explored_d": game.d.explored,
    }
    if run.writes:
        live = {name: pack(player.module.state_dict(), player.masks) for name, player in (("g", game.g), ("d", game.d))}
        save_checkpoint(run.folder / "model.pt", {**live, **_averages(game)})
    run.finish(metrics)
    return metrics


def snapshot_path(folder: Path, step: int) -> Path:
    """Of the averaged generator after `step` generator steps."""
    return folder / f"generator-{step:07d}.pt"


def _averages(game: Game) -> dict[str, Any]:
    return {name: pack(average.module.state_dict(), game.g.masks) for name, average in game.averages.items()}


def main() -> None:
    """The command line."""

    def name(config: Config) -> str:
        return f"{config.sparsity.method}-g{config.sparsity.density_g}-d{config.sparsity.density_d}-seed{config.seed}"

    def summary(metrics: Mapping[str, Any]) -> str:
        parts = (("generator", "g"), ("discriminator", "d"))
        return "; ".join(
            f"{word}: {metrics[f'parameters_{key}']:,} parameters, convolutions {metrics[f'density_{key}']:.1%} dense, "
            f"{metrics[f'explored_{key}']:.1%} ever active"
            for word, key in parts
        )

    train_command(__file__, Config, train, name, summary)


if __name__ == "__main__":
    command(main)
