"""A small training run that puts everything into a run folder, for the tests that disturb it.

python common/tests/tiny_training.py --run.folder FOLDER
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common import distributed
from common.config import command, parse
from common.data import DataConfig, batches, load, pixels
from common.masks import keep_top, prunable_weights
from common.runs import Run, RunConfig, save_checkpoint, seed_everything


@dataclass(frozen=True)
class TinyConfig:
    """The run."""

    seed: int = 0
    steps: int = 150
    batch_size: int = 20
    dropout: float = 0.3
    data: DataConfig = field(default_factory=lambda: DataConfig(crop_padding=2, flip=True, fraction=0.1))
    run: RunConfig = field(default_factory=lambda: RunConfig(checkpoint_every=3))


def network(dropout: float = 0.0) -> nn.Sequential:
    """A convolution and two linear layers for mnist5k."""
    convolution = [nn.Conv2d(1, 4, 5, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*convolution, nn.Dropout(dropout), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))


def train(config: TinyConfig) -> None:
    """SGD with momentum under masks, with an average of the weights; every random generator is drawn from."""
    with distributed.process_group():
        images = load(config.data).train
        folder, every = Path(config.run.folder), config.run.checkpoint_every
        with Run(folder, config, total_steps=config.steps, checkpoint_every=every, progress=lambda _: None) as run:
            seed_everything(config.seed)
            model = network(config.dropout)
            average = copy.deepcopy(model)
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
            masks = keep_top({n: w.abs() for n, w in prunable_weights(model, (nn.Conv2d, nn.Linear)).items()}, 4000)
            done = 0
            if saved := run.restore():
                model.load_state_dict(saved["model"])
                average.load_state_dict(saved["average"])
                optimizer.load_state_dict(saved["optimizer"])
                done = saved["done"]

            def snapshot() -> dict[str, Any]:
                states = {"model": model, "average": average, "optimizer": optimizer}
                return {"done": done, **{name: each.state_dict() for name, each in states.items()}}

            masks.attach(model, optimizer)
            stream = batches(images, config.batch_size, config.data, seed=config.seed, step=done)
            for step in run.steps(done, config.steps, snapshot):
                raw, labels = next(stream)
                loss = nn.functional.cross_entropy(model(pixels(raw)), labels)
                optimizer.zero_grad()
                loss.backward()
                distributed.synchronize(model)
                optimizer.step()
                for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                    slow.data.lerp_(fast.data, 0.1)
                done = step + 1
                draws = {"numpy": float(np.random.normal()), "python": random.random()}
                run.log(done, "train", loss=distributed.mean(loss.item()), **draws)
            pruned = keep_top({n: w.abs() for n, w in prunable_weights(model).items()}, 50)
            final = folder / "final.pt" if run.writes else folder.with_suffix(".other-rank.pt")
            save_checkpoint(final, {**snapshot(), "masks": pruned.state_dict()})
            run.finish({"loss": distributed.mean(loss.item())})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    torch.set_num_threads(1)
    train(parse(TinyConfig, arguments, prog="tiny_training.py"))


if __name__ == "__main__":
    command(main)
