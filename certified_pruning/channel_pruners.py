"""Which channels a lottery round prunes: a score for every convolution channel, the lowest go (spec c.6).

    slim         |gamma| of its batch norm; training adds `slim_loss`
    nrs          minus its mean NRS term: the most unstable channels go; training adds `nrs_loss`
    refill       mean |w| of its filter after a global magnitude step; kept channels get all their weights back
    l1-channel   L1 norm of the weights that read it, layer by layer

A pruned channel has scale and shift 0, so that it is 0 for every input and `compress_channels` removes it. Masks are
nested: pruned channels are no candidates again.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from certified_pruning.errors import EmptyLayerError
from certified_pruning.nrs import NrsStats
from certified_pruning.pruners import Keep, keep_of_rate
from certified_pruning.train_ibp import sequential_leaves
from common.masks import Masks, keep_top, keep_top_per_layer, prunable_weights


def normed_convolutions(model: nn.Module) -> dict[str, str]:
    """Name of each batch norm -> name of the convolution directly before it, in order.

    Raises:
        ValueError: if there is none: only such channels can be pruned.
    """
    pairs = pairwise(sequential_leaves(model))
    found = {bn: conv for (conv, a), (bn, b) in pairs if isinstance(a, nn.Conv2d) and isinstance(b, nn.BatchNorm2d)}
    if not found:
        raise ValueError("model must have a batch norm directly after a convolution, found none")
    return found


def dense_channel_masks(model: nn.Module, convolutions: bool = False) -> Masks:
    """Masks that keep every channel: of scale and shift of each batch norm, and, if asked, of the convolutions."""
    parameters = dict(model.named_parameters())
    names = [name for bn in normed_convolutions(model) for name in (f"{bn}.weight", f"{bn}.bias")]
    names += list(prunable_weights(model)) if convolutions else []
    return Masks.ones_like({name: parameters[name] for name in names})


def channel_masks(masks: Mapping[str, Tensor]) -> Masks:
    """Batch norm -> which of its channels are kept, (channels,); empty for masks of single weights."""
    return Masks({name.removesuffix(".bias"): mask for name, mask in masks.items() if name.endswith(".bias")})


def density(masks: Masks) -> float:
    """Share of kept channels where channels are masked, else of kept weights."""
    return (channel_masks(masks) or masks).density


def prune_channels(scores: Mapping[str, Tensor], masks: Masks, keep: Keep, min_channels: int = 0) -> Masks:
    """Nested masks that keep the channels of the highest scores, in the form of `masks`.

    A kept channel keeps all its weights, whatever pruned them ("refill").

    Args:
        scores: batch norm -> (channels,).
        masks: of the round just trained, from `dense_channel_masks` or here.
        keep: channels to keep, over all layers together or by batch norm.
        min_channels: 1: the best channel of each layer is kept whatever its score; 0: an empty layer is an error.

    Raises:
        EmptyLayerError: if a layer would lose its last channel.
    """
    alive = channel_masks(masks)
    ranked = {bn: score.detach().clone() for bn, score in scores.items()}
    if min_channels:
        for bn, score in ranked.items():
            score[score.masked_fill(~alive[bn], -torch.inf).argmax()] = torch.inf
    kept = keep_top(ranked, keep, alive) if isinstance(keep, int) else keep_top_per_layer(ranked, keep, alive)
    for bn, mask in kept.items():
        if not mask.any():
            raise EmptyLayerError(bn)
    return _with_channels(masks, kept)


def slim_scores(model: nn.Module) -> dict[str, Tensor]:
    """|gamma| of every channel (network slimming, Liu et al. 2017)."""
    return {bn: model.get_parameter(f"{bn}.weight").detach().abs() for bn in normed_convolutions(model)}


def nrs_scores(model: nn.Module, stats: NrsStats) -> dict[str, Tensor]:
    """Minus the mean NRS term of every channel, from the statistics of `nrs_loss` on training images."""
    return {bn: -stats.per_channel[bn] for bn in normed_convolutions(model)}


def refill_scores(model: nn.Module, masks: Masks, imp_rate: float = 0.2) -> dict[str, Tensor]:
    """Mean |w| of every filter once the smallest `imp_rate` of the weights in kept channels are set to 0.

    Args:
        model: the trained network.
        masks: from `dense_channel_masks(model, convolutions=True)` or of a later round.
    """
    convolutions = normed_convolutions(model)
    weights = {name: weight.detach().abs() for name, weight in prunable_weights(model).items()}
    alive = Masks({name: masks[name] for name in weights})
    keep = keep_of_rate(alive, imp_rate)
    assert isinstance(keep, int)
    sparse = keep_top(weights, keep, alive)
    names = {bn: f"{conv}.weight" for bn, conv in convolutions.items()}
    return {bn: (weights[name] * sparse[name]).mean(dim=(1, 2, 3)) for bn, name in names.items()}


def prune_input_channels(model: nn.Module, masks: Masks, rate: float) -> Masks:
    """Layer by layer, drop round(rate * kept) of the channels a convolution reads, by L1 norm of their weights.

    What torch's `ln_structured(dim=1)` does in the released code, plus: the batch norm that makes a channel nothing
    reads is masked too, which changes no output and lets it be removed. The image's own channels are kept.

    Args:
        model: the trained network.
        masks: from `dense_channel_masks(model, convolutions=True)` or of a later round.

    Raises:
        EmptyLayerError: if a convolution would read nothing.
    """
    kept, pruned = channel_masks(masks), Masks(masks)
    readers = list(prunable_weights(model))[1:]
    for bn, reader in zip(normed_convolutions(model), readers, strict=False):  # the last one feeds a linear layer
        norms = {bn: model.get_parameter(reader).detach().abs().sum(dim=(0, 2, 3))}
        alive = Masks({bn: kept[bn]})
        keep = keep_of_rate(alive, rate)
        assert isinstance(keep, int)
        kept[bn] = keep_top(norms, keep, alive)[bn]
        if not kept[bn].any():
            raise EmptyLayerError(reader.removesuffix(".weight"))
        pruned[reader] = masks[reader] & kept[bn].view(1, -1, 1, 1)
        pruned[f"{bn}.weight"] = pruned[f"{bn}.bias"] = kept[bn]
    return pruned


def slim_loss(model: nn.Module) -> Tensor:
    """Mean |gamma| over all batch-norm scales, sum / (1e-8 + count), 0-dim."""
    scales = [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not scales:
        raise ValueError("model must have a batch norm for the slim loss, found none")
    return torch.stack([scale.abs().sum() for scale in scales]).sum() / (1e-8 + sum(scale.numel() for scale in scales))


def _with_channels(masks: Masks, kept: Masks) -> Masks:
    """`masks` with the given channels of each batch norm, of scale, shift and the convolution before it."""
    expanded = Masks(masks)
    names = list(masks)
    convolutions = [name for name in names if masks[name].dim() == 4]
    for position, (bn, channels) in enumerate(kept.items()):
        expanded[f"{bn}.weight"] = expanded[f"{bn}.bias"] = channels
        if convolutions:
            name = convolutions[position]
            expanded[name] = channels.view(-1, 1, 1, 1).expand_as(masks[name]).clone()
    return expanded
