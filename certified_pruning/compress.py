"""Physical removal of pruned channels: the small network that computes what the masked one does (spec c.7).

A channel whose batch norm has scale and shift 0 is 0 for every input. It leaves the convolution and the batch norm that
make it, and the next convolution or linear layer that reads it. Verification then runs on the small network.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from certified_pruning.errors import EmptyLayerError, UnsupportedLayerError
from certified_pruning.train_ibp import sequential_leaves


def compress_channels(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A smaller copy of a channel-pruned network with the same outputs.

    Args:
        model: chain network (see `train_ibp.ibp`); not changed. Convolutions must have groups = 1.
        masks: parameter name -> bool tensor of the parameter's shape, True is kept. A channel is removed when the given
            masks of its batch norm's scale and shift are all False; masks of other parameters remove no channel.
            None: remove every channel whose scale and shift are exactly 0.

    Returns:
        A network with the same layer names, types, dtype, device and train/eval mode as the model.

    Raises:
        ValueError: a mask that names no parameter, or is of another shape or type; a channel that the masks remove
            though its scale or shift is not 0 (apply the masks to the model first).
        EmptyLayerError: no channel of some layer is left.
        UnsupportedLayerError: the model is no chain of supported layers, a convolution is grouped, or a batch norm with
            channels to remove does not follow a convolution.
    """
    if masks is not None:
        _check_masks(model, masks)
    leaves = sequential_leaves(model)
    kept_of_bn = {name: _kept_channels(name, leaf, masks) for name, leaf in leaves if isinstance(leaf, nn.BatchNorm2d)}
    replacements: dict[str, nn.Module] = {}
    kept: Tensor | None = None  # channels that reach the current layer; None: all of them
    channels = 0  # their number before compression
    for i, (name, leaf) in enumerate(leaves):
        if isinstance(leaf, nn.Conv2d):
            kept_out = kept_of_bn.get(_following_bn(leaves, i))
            if leaf.groups != 1 and (kept is not None or kept_out is not None):
                raise UnsupportedLayerError(name, leaf, f"groups is {leaf.groups}, must be 1")
            replacements[name] = _slice_conv(leaf, kept_out, kept)
            kept, channels = kept_out, leaf.out_channels
        elif isinstance(leaf, nn.BatchNorm2d):
            kept_here = kept_of_bn[name]
            if kept_here is not kept:
                raise UnsupportedLayerError(name, leaf, "its pruned channels must come directly from a convolution")
            if kept is not None:
                replacements[name] = _slice_bn(leaf, kept)
        elif isinstance(leaf, nn.Linear):
            if kept is not None:
                replacements[name] = _slice_columns(leaf, kept, channels)
            kept = None
    small = copy.deepcopy(model)
    for name, layer in replacements.items():
        if not name:
            return layer
        parent, _, child = name.rpartition(".")
        setattr(small.get_submodule(parent), child, layer)
    return small


def _check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"masks must name parameters of the model, got {name!r}")
        if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            raise ValueError(
                f"masks[{name!r}] must be bool of shape {tuple(parameters[name].shape)}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )


def _kept_channels(name: str, bn: nn.BatchNorm2d, masks: Mapping[str, Tensor] | None) -> Tensor | None:
    """Indices of the channels that stay, ascending; None if all do."""
    if bn.weight is None or bn.bias is None:
        return None
    silent = (bn.weight.detach() == 0) & (bn.bias.detach() == 0)
    if masks is None:
        removed = silent
    else:
        given = [masks[key] for key in _parameter_names(name) if key in masks]
        removed = ~torch.stack(given).any(dim=0).to(silent.device) if given else torch.zeros_like(silent)
        wrong = (removed & ~silent).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"masks remove channels {wrong} of {name!r}, whose scale or shift is not 0; apply the masks first"
            )
    if not removed.any():
        return None
    if removed.all():
        raise EmptyLayerError(name)
    return (~removed).nonzero().flatten()


def _parameter_names(name: str) -> tuple[str, str]:
    prefix = f"{name}." if name else ""
    return f"{prefix}weight", f"{prefix}bias"


def _following_bn(leaves: list[tuple[str, nn.Module]], position: int) -> str:
    """Name of the batch norm directly after a layer; "" if another layer follows."""
    for name, leaf in leaves[position + 1 :]:
        if not isinstance(leaf, nn.Identity):
            return name if isinstance(leaf, nn.BatchNorm2d) else ""
    return ""


def _slice_conv(conv: nn.Conv2d, kept_out: Tensor | None, kept_in: Tensor | None) -> nn.Conv2d:
    small = copy.deepcopy(conv)
    if kept_out is not None:
        small.weight = _parameter(conv.weight[kept_out], conv.weight)
        if conv.bias is not None:
            small.bias = _parameter(conv.bias[kept_out], conv.bias)
    if kept_in is not None:
        small.weight = _parameter(small.weight[:, kept_in], conv.weight)
    small.out_channels, small.in_channels = small.weight.shape[:2]
    return small


def _slice_bn(bn: nn.BatchNorm2d, kept: Tensor) -> nn.BatchNorm2d:
    small = copy.deepcopy(bn)
    small.num_features = len(kept)
    small.weight = _parameter(bn.weight[kept], bn.weight)
    small.bias = _parameter(bn.bias[kept], bn.bias)
    if bn.running_mean is not None and bn.running_var is not None:
        small.running_mean, small.running_var = bn.running_mean[kept], bn.running_var[kept]
    return small


def _slice_columns(linear: nn.Linear, kept: Tensor, channels: int) -> nn.Linear:
    small = copy.deepcopy(linear)
    maps = linear.weight.view(linear.out_features, channels, -1)  # flattened (channels, height, width)
    small.weight = _parameter(maps[:, kept].flatten(1), linear.weight)
    small.in_features = small.weight.shape[1]
    return small


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=like.requires_grad)
