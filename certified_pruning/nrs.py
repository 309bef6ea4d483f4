"""NRS loss: how stable the ReLUs are over a box, normalised by the batch-norm scale (the paper's NRSLoss; spec c.3).

A ReLU input with bounds [l, u] is unstable when l < 0 < u. Its term is -tanh(1 + l*u / (|gamma|^p + e)), where gamma is
the scale of the batch norm directly before the ReLU: rescaling a channel by its gamma leaves the term (p = 2) alone,
so that shrinking gamma cannot lower the loss. Terms lie in (-1, 1); lower is more stable. p = 0 is the RS loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from certified_pruning.train_ibp import BatchStats, ReluBounds, relu_bounds

Reduction = Literal["neuron", "channel"]

ZERO_BOUND = 1e-5
"""A bound this close to 0 counts as 0 in the statistics of instability (released code)."""


@dataclass(frozen=True)
class LayerStability:
    """One ReLU layer: mean NRS term, and share of unstable neurons in [0, 1]; both 0-dim and detached."""

    nrs: Tensor
    unstable_ratio: Tensor


@dataclass(frozen=True)
class NrsStats:
    """What an NRS loss saw, detached.

    Attributes:
        per_channel: name of each batch norm directly before a ReLU -> (channels,), mean NRS term over batch, height
            and width. The most unstable channels, those with the largest term, are what the `nrs` pruner removes.
        unstable_ratio: share of (image, neuron) pairs that are unstable, over all ReLU layers seen; 0-dim, float64.
            (The released certified path averages channels first, so that its global ratio weighs small maps more.)
        per_layer: name of each ReLU -> its stability.
    """

    per_channel: dict[str, Tensor]
    unstable_ratio: Tensor
    per_layer: dict[str, LayerStability]


def nrs_loss(
    model: nn.Module,
    x_lb: Tensor,
    x_ub: Tensor,
    gamma_pow: float = 2,
    reduction: Reduction = "neuron",
    bn_eps: float | None = None,
    batch_stats: BatchStats | None = None,
) -> tuple[Tensor, NrsStats]:
    """NRS loss of a chain network over a box, with IBP bounds.

    The released FGSM path adds 0.01 times the "neuron" loss, on the box of the *full* eps even while the eps of FGSM
    still ramps; the auto_LiRPA path adds 0.001 times the "channel" loss at the current eps, with bounds from the batch
    statistics of the clean forward (`batch_stats`). Certified training that has the bounds already calls
    `nrs_from_bounds`. No batch norm is updated.

    Args:
        model: chain network (see `train_ibp.ibp`).
        x_lb, x_ub: corners of the input box, normalised units, (batch, ...).
        gamma_pow: the power p, >= 0. 2 is NRS, 0 is RS.
        reduction: "neuron" averages over all inputs of all ReLUs; "channel" averages each channel of the ReLUs that
            follow a batch norm over batch and space, then all channels of all layers.
        bn_eps: added to the variance in batch norm; each module's own eps if None. The released FGSM path uses 1e-8.
        batch_stats: statistics for batch norm, from `train_ibp.clean_forward`; the running ones if None.

    Returns:
        (loss, statistics); the loss is 0-dim and differentiable in weights, batch-norm scales and shifts.

    Raises:
        ValueError: x_lb > x_ub, NaN or infinite; unknown reduction; gamma_pow < 0; no image or ReLU to average.
        UnsupportedLayerError: the model is no chain of supported layers (the released code returned 0).
    """
    _check_options(gamma_pow, reduction)
    return nrs_from_bounds(relu_bounds(model, x_lb, x_ub, bn_eps, batch_stats), gamma_pow, reduction)


def nrs_from_bounds(
    relus: Sequence[ReluBounds], gamma_pow: float = 2, reduction: Reduction = "neuron"
) -> tuple[Tensor, NrsStats]:
    """NRS loss of ReLU layers whose bounds are known; see `nrs_loss`.

    gamma is detached: its gradient comes through the bounds only. e is 1e-20 ("neuron") or 1e-8 ("channel").

    Raises:
        ValueError: as `nrs_loss`.
    """
    _check_options(gamma_pow, reduction)
    if not relus or relus[0].lower.shape[0] == 0:
        raise ValueError("model must have at least one ReLU, and the batch at least one image, found none")
    if reduction == "channel" and all(relu.bn is None for relu in relus):
        raise ValueError('model must have a batch norm directly before a ReLU for reduction="channel", found none')
    tiny = 1e-20 if reduction == "neuron" else 1e-8
    layer_sums: list[Tensor] = []
    channel_means: dict[str, Tensor] = {}
    per_layer: dict[str, LayerStability] = {}
    unstable_counts: list[Tensor] = []
    neurons = 0
    for relu in relus:
        term = nrs_term(relu.lower, relu.upper, relu.gamma, gamma_pow, tiny)
        if relu.bn is None:
            layer_sum = term.sum()
        else:
            channel_sum = term.sum(dim=(0, 2, 3))
            channel_means[relu.bn] = channel_sum * (term.shape[1] / term.numel())
            layer_sum = channel_sum.sum()
        layer_sums.append(layer_sum)
        unstable = ((relu.lower.detach() < -ZERO_BOUND) & (relu.upper.detach() > ZERO_BOUND)).sum()
        unstable_counts.append(unstable)
        neurons += term.numel()
        per_layer[relu.name] = LayerStability(layer_sum.detach() / term.numel(), unstable.double() / term.numel())

    if reduction == "neuron":
        loss = torch.stack(layer_sums).sum() / neurons
    else:
        loss = torch.cat(list(channel_means.values())).mean()
    stats = NrsStats(
        per_channel={name: mean.detach() for name, mean in channel_means.items()},
        unstable_ratio=torch.stack(unstable_counts).sum().double() / neurons,
        per_layer=per_layer,
    )
    return loss, stats


def nrs_term(lower: Tensor, upper: Tensor, gamma: Tensor | None, gamma_pow: float = 2, tiny: float = 1e-20) -> Tensor:
    """-tanh(1 + lower*upper / (|gamma|^gamma_pow + tiny)), element by element.

    Args:
        lower, upper: bounds of ReLU inputs, (batch, channels, ...).
        gamma: batch-norm scale, (channels,), treated as a constant; 1 if None.
        gamma_pow: 2 for NRS, 0 for RS.
        tiny: keeps a scale of 0 from dividing by 0.
    """
    product = lower * upper
    if gamma is not None and gamma_pow != 0:
        denominator = gamma.detach().abs().pow(gamma_pow) + tiny
        product = product / denominator.view(-1, *[1] * (lower.dim() - 2))
    return -torch.tanh(1 + product)


def _check_options(gamma_pow: float, reduction: str) -> None:
    if not gamma_pow >= 0:
        raise ValueError(f"gamma_pow must be >= 0, got {gamma_pow}")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
