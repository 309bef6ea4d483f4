"""Weights in a user's file, read as plain tensors: nothing in the file is executed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.runs import CheckpointError, load_checkpoint

KEYS = ("model", "state_dict", "model_state_dict")
"""Where training scripts put the weights in a checkpoint of more than weights."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file, a torch file (.pt, .pth) or a checkpoint or ticket of this project.

    A prefix "module." of all names (DistributedDataParallel) is dropped.

    Raises:
        CheckpointError: the file is missing, damaged, holds anything but plain data, or no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            content: Any = load(path.read_bytes())
        elif _is_ours(path):
            content = load_checkpoint(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # what a forged file may raise has no common class
        kind = "safetensors" if path.suffix == ".safetensors" else "torch"
        raise CheckpointError(f"{path}: damaged, not a {kind} file, or holds more than plain data") from error
    weights = _state_dict(content)
    if weights is None:
        raise CheckpointError(f"{path}: must hold a state dict, alone or under {', '.join(KEYS)}; it holds none")
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill the model with the weights in the file.

    Raises:
        CheckpointError: see `read_weights`; or names or shapes differ from the model's, of which it names the first.
    """
    weights, own = read_weights(path), model.state_dict()
    # Counts of batches are not needed to compute anything, and older files lack them.
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    unknown = [name for name in weights if name not in own]
    unlike = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if missing:
        raise CheckpointError(f"{path}: not weights of this network: no {missing[0]!r} ({len(missing)} missing)")
    if unknown:
        raise CheckpointError(f"{path}: not weights of this network: it has no {unknown[0]!r} ({len(unknown)} unknown)")
    if unlike:
        name = unlike[0]
        shapes = f"must have shape {tuple(own[name].shape)}, got {tuple(weights[name].shape)}"
        raise CheckpointError(f"{path}: not weights of this network: {name!r} {shapes} ({len(unlike)} differ)")
    model.load_state_dict(weights, strict=False)


def _is_ours(path: Path) -> bool:
    data = path.read_bytes()
    return hashlib.sha256(data[:-32]).digest() == data[-32:]


def _state_dict(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping):
        return None
    for key in KEYS:
        if isinstance(content.get(key), Mapping):
            return _state_dict(content[key])
    tensors = bool(content) and all(isinstance(value, Tensor) for value in content.values())
    return {str(name): value for name, value in content.items()} if tensors else None
