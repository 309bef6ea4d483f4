"""What a run is made of, from its configuration: the network, the stream of megabatches, the pruner."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from app_progressive.models import Normalized, build_model
from app_progressive.pruner import AnytimePruner, OneShotPruner
from app_progressive.settings import Config
from app_progressive.stream import MegabatchStream
from common import distributed
from common.config import ConfigError
from common.data import ImageSet
from common.runs import generator

FRESH = 4  # key of the random draws of new weights; train.py has the others


def network(config: Config, pool: ImageSet) -> Normalized:
    """The configured network, its weights drawn now. Raises `ConfigError` where it does not fit the images."""
    model = config.model
    channels, _ = model.image_shape(pool)
    try:
        return build_model(model.name, channels, pool.classes, model.mean, model.std, model.width, model.imagenet)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def another(config: Config, pool: ImageSet, model: nn.Module, state: int) -> Normalized:
    """A newly initialised network for this state; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, FRESH, state, 1).initial_seed())
        return network(config, pool).to(next(model.parameters()).device)


def megabatches(config: Config, pool: ImageSet) -> MegabatchStream:
    """The configured stream over the pool. Raises `ConfigError` where it does not fit."""
    options = config.stream
    seed = config.seed if options.shuffle else None
    k, l = options.buffer  # noqa: E741
    try:
        stream = MegabatchStream(
            len(pool), options.states, options.size, options.val_fraction, options.replay, seed, (k, l)
        )
        stream.score_idx(1, config.prune.q)
    except ValueError as error:
        key = "prune" if str(error).startswith("q ") else "stream"
        raise ConfigError(f"{key}.{error}") from error
    return stream


def check_batches(config: Config, stream: MegabatchStream, model: nn.Module, image: Tensor) -> None:
    """Raise `ConfigError` where a last batch is a single image and the network cannot train on one.

    It cannot where a batch norm sees a single pixel of the image, as VGG-16's at 28 pixels.

    Args:
        image: one of the size of all, (1, channels, height, width), on the model's device.
    """
    size, ranks = config.train.batch_size, distributed.world_size()
    counts = [len(stream.state(state)[0]) // ranks * ranks for state in range(1, config.stream.states + 1)]
    alone = [count for count in counts if (count % size or size) // ranks == 1]
    if not alone:
        return
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(image)
    except ValueError as error:
        wrong = f"one image, on which {config.model.name} cannot train at {image.shape[2]} pixels"
        raise ConfigError(
            f"train.batch_size must leave no batch of {wrong}, got {size} for a state of {alone[0]}"
        ) from error


def make_pruner(config: Config, model: nn.Module) -> AnytimePruner | None:
    """The configured pruner; None for dense training."""
    prune = config.prune
    options: dict[str, Any] = {
        name: getattr(prune, name)
        for name in ("criterion", "base", "scope", "ties", "update", "score_weights", "keep_stored")
    }
    if prune.method == "dense":
        return None
    if prune.method == "osp":
        return OneShotPruner(model, prune.tau, **options)
    states = None if prune.growth else config.stream.states
    schedule = prune.densities or prune.schedule
    return AnytimePruner(model, states, prune.tau, schedule=schedule, growth=prune.growth or 1.0, **options)
