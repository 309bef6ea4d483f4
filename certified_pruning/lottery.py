"""The masks of a lottery chain: all ones at first, then what the configured method keeps of a trained network."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from certified_pruning.channel_pruners import (
    channel_masks,
    dense_channel_masks,
    nrs_scores,
    prune_channels,
    prune_input_channels,
    refill_scores,
    slim_scores,
)
from certified_pruning.hydra import hydra_scores
from certified_pruning.nrs import NrsStats, nrs_loss
from certified_pruning.objective import robust_loss
from certified_pruning.pruners import (
    KINDS,
    dense_masks,
    keep_of_rate,
    keep_of_remain,
    magnitude,
    prune_weights,
    saliency,
)
from certified_pruning.settings import CHANNEL_METHODS, Config
from certified_pruning.train_ibp import pixel_box
from common.config import UserError
from common.data import ImageSet, batches, in_order, pixels, steps_per_epoch
from common.masks import Masks, prunable_weights, random_scores
from common.runs import generator


def initial_masks(config: Config, model: nn.Module) -> Masks:
    """Masks of the dense network over what the method prunes. Raises `UserError` where there are no such channels."""
    method = config.prune.method
    if method not in CHANNEL_METHODS:
        return dense_masks(model, KINDS[config.prune.prunable])
    try:
        return dense_channel_masks(model, convolutions=method in ("refill", "l1-channel"))
    except ValueError as error:
        raise UserError(f"prune.method {method}: {error}") from error


def next_masks(config: Config, model: nn.Module, masks: Masks, level: int, data: ImageSet) -> Masks:
    """The masks after round `level`, nested in those of that round.

    After round s a share (1 - rate)^(s+1) stays: of the weights by round(rate * kept) a round ("imp", "random") or by
    int of the pruned share of all ("snip", "taylor", "hydra"), of the channels by int of the pruned share of all.

    Args:
        config: of the chain.
        model: the trained network; not changed.
        masks: it was trained under.
        level: of the round, from 0.
        data: training images. Batches for scores come from epochs that no round trains on.

    Raises:
        UserError: a layer would be left with nothing.
    """
    try:
        return _next_masks(config, model, masks, level, data)
    except ValueError as error:
        raise UserError(f"prune.method {config.prune.method}, round {level}: {error}") from error


def _next_masks(config: Config, model: nn.Module, masks: Masks, level: int, data: ImageSet) -> Masks:
    prune, per_layer = config.prune, config.prune.scope == "layer"
    kinds = KINDS[prune.prunable]
    remain = (1 - prune.rate) ** (level + 1)
    if prune.method in ("imp", "imp+nrs"):
        return prune_weights(magnitude(model, kinds), masks, keep_of_rate(masks, prune.rate, per_layer))
    if prune.method == "random":
        scores = random_scores(prunable_weights(model, kinds), generator(config.seed, level))
        return prune_weights(scores, masks, keep_of_rate(masks, prune.rate, per_layer))
    if prune.method in ("snip", "taylor", "hydra"):
        return _by_gradient(config, model, masks, level, remain, data)
    if prune.method == "l1-channel":
        return prune_input_channels(model, masks, prune.rate)
    channels = {bn: mask.numel() for bn, mask in channel_masks(masks).items()}
    if prune.method == "slim":
        scores = slim_scores(model)
    elif prune.method == "refill":
        scores = refill_scores(model, masks, prune.imp_rate)
    else:
        scores = nrs_scores(model, _stability(config, model, data))
    return prune_channels(scores, masks, keep_of_remain(channels, remain, per_layer), prune.min_channels)


def _by_gradient(config: Config, model: nn.Module, masks: Masks, level: int, remain: float, data: ImageSet) -> Masks:
    prune, per_epoch = config.prune, steps_per_epoch(data, config.train.batch_size)
    steps = prune.search_epochs * per_epoch if prune.method == "hydra" else 1
    first = 1 if prune.method == "taylor" else 0  # SNIP and Taylor are one criterion, on batches of their own
    unseen = (config.train.epochs * prune.rounds + (prune.search_epochs + 1) * level) * per_epoch + first
    stream = batches(data, config.train.batch_size, config.data, seed=config.seed, step=unseen)
    device = next(model.parameters()).device

    def loss(network: nn.Module, step: int) -> Tensor:
        images, labels = (tensor.to(device) for tensor in next(stream))
        draws = generator(config.seed, 2, level, step)
        return robust_loss(config, network, pixels(images), labels, config.train.eps, draws)[0]

    sizes = {name: mask.numel() for name, mask in masks.items()}
    if prune.method != "hydra":
        scores = saliency(model, lambda network: loss(network, first), KINDS[prune.prunable])
        return prune_weights(scores, masks, keep_of_remain(sizes, remain, prune.scope == "layer"))
    keep = keep_of_remain(sizes, remain, per_layer=True)
    assert not isinstance(keep, int)
    scores = hydra_scores(model, masks, keep, loss, steps, prune.search_lr, config.train.clip)
    return prune_weights(scores, masks, keep)


@torch.no_grad()
def _stability(config: Config, model: nn.Module, data: ImageSet) -> NrsStats:
    """NRS statistics of a trained network over all training images, on the box of the full eps."""
    normalize, device = config.model.normalize, next(model.parameters()).device
    total: dict[str, Tensor] = {}
    for images, _ in in_order(data, 500):
        _, stats = nrs_loss(model, *pixel_box(pixels(images.to(device)), config.train.eps, normalize))
        for bn, mean in stats.per_channel.items():
            total[bn] = total.get(bn, 0) + mean * (len(images) / len(data))
    return replace(stats, per_channel=total)
