"""What a network is trained on: the loss of the configured regime, and the regulariser of the pruning method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from certified_pruning.certified_loss import crown_ibp_loss
from certified_pruning.channel_pruners import slim_loss
from certified_pruning.fast_ibp import fast_ibp_regulariser
from certified_pruning.fgsm import fgsm_gradalign_loss, fgsm_random_start_loss, standard_loss
from certified_pruning.nrs import nrs_from_bounds, nrs_loss
from certified_pruning.settings import Config
from certified_pruning.train_ibp import pixel_box
from common import distributed


def normalizer(config: Config) -> Callable[[Tensor], Tensor]:
    """Map from pixels in [0, 1] to the network's inputs."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.model.mean, config.model.std))
    return lambda raw: (raw - mean.to(raw)) / std.to(raw)


def robust_loss(
    config: Config, model: nn.Module, raw: Tensor, labels: Tensor, eps: float, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The regime's loss, regularised as the pruning method asks, and logits: of this rank's images.

    The stability regulariser bounds the box of the full eps in the FGSM regimes, with the running batch-norm
    statistics, and takes the bounds of the loss itself in the certified ones (the two released paths; spec c.3).

    Args:
        config: train.regime, train.eps, prune.method and their weights.
        model: chain of layers in train mode.
        raw: pixels in [0, 1], (batch, channels, height, width).
        labels: (batch,), int64.
        eps: present radius, in [0, train.eps].
        draws: CPU generator; every rank draws the start points of the global batch and takes its share.
    """
    train, normalize = config.train, normalizer(config)
    stable = config.prune.method in ("imp+nrs", "nrs")
    if train.regime in ("crown_ibp", "fast_ibp"):
        box, eps_frac = pixel_box(raw, eps, normalize), eps / train.eps if train.eps else 0.0
        if train.regime == "crown_ibp":
            result = crown_ibp_loss(model, *box, normalize(raw), labels, eps_frac, train.loss_fusion)
            loss = result.loss
        else:
            result = crown_ibp_loss(model, *box, normalize(raw), labels, eps_frac=1.0)  # IBP alone
            loss = result.loss + fast_ibp_regulariser(result.bounds.relus, *box, eps_frac)
        logits = result.logits
        if stable:
            loss = loss + train.nrs * nrs_from_bounds(result.bounds.relus, reduction="channel")[0]
    else:
        shape = (len(raw) * distributed.world_size(), *raw.shape[1:])
        start = eps * distributed.shard(torch.rand(shape, generator=draws) * 2 - 1).to(raw)
        if train.regime == "standard":
            loss, logits = standard_loss(model, raw, labels, normalize)
        elif train.regime == "fgsm":
            loss, logits = fgsm_random_start_loss(model, raw, labels, eps, normalize, uniform_start=start)
        else:
            lam = train.gradalign
            loss, logits = fgsm_gradalign_loss(model, raw, labels, eps, normalize, lam, uniform_start=start)
        if stable:
            loss = loss + train.nrs * nrs_loss(model, *pixel_box(raw, train.eps, normalize))[0]
    if config.prune.method == "slim":
        loss = loss + train.slim * slim_loss(model)
    return loss, logits
