"""What a run is made of, from its configuration: the network, the stream of megabatches, the pruner."""

from typing import Any

import torch
from torch import nn

from app_progressive.models import Normalized, build_model
from app_progressive.pruner import AnytimePruner, OneShotPruner
from app_progressive.settings import Config
from app_progressive.stream import MegabatchStream
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
