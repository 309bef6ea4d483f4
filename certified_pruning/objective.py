"""What a network is trained on: the loss of the configured regime, and the regulariser of the pruning method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from certified_pruning.auto_lirpa import BoundedModule
from certified_pruning.certified_loss import crown_ibp_loss
from certified_pruning.channel_pruners import slim_loss
from certified_pruning.fast_ibp import fast_ibp_regulariser
from certified_pruning.fgsm import fgsm_gradalign_loss, fgsm_random_start_loss, standard_loss
from certified_pruning.lirpa_loss import lirpa_crown_ibp_loss
from certified_pruning.nrs import nrs_from_bounds, nrs_loss
from certified_pruning.settings import Config
from certified_pruning.train_ibp import pixel_box
from common import distributed


def robust_loss(
    config: Config,
    model: nn.Module,
    raw: Tensor,
    labels: Tensor,
    eps: float,
    draws: torch.Generator,
    graph: BoundedModule | None = None,
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
        graph: what auto_LiRPA made of `model`, to take its bounds in crown_ibp; None: our own.
    """
    train, normalize = config.train, config.model.normalize
    stable = config.prune.method in ("imp+nrs", "nrs")
    if train.regime in ("crown_ibp", "fast_ibp"):
        box, eps_frac = pixel_box(raw, eps, normalize), eps / train.eps if train.eps else 0.0
        inputs = *box, normalize(raw), labels
        if graph is not None:
            loss, logits, relus = lirpa_crown_ibp_loss(graph, *inputs, eps_frac)
        elif train.regime == "crown_ibp":
            loss, logits, bounds = crown_ibp_loss(model, *inputs, eps_frac, train.loss_fusion)
            relus = bounds.relus
        else:
            loss, logits, bounds = crown_ibp_loss(model, *inputs, eps_frac=1.0)  # IBP alone
            relus = bounds.relus
            loss = loss + fast_ibp_regulariser(relus, *box, eps_frac)
        if stable:
            loss = loss + train.nrs * nrs_from_bounds(relus, reduction="channel")[0]
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
