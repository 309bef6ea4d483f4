"""Sparse storage: of a masked weight only the active entries are kept, as positions (int32) and values.

At density d this takes 2 d of the dense bytes (float32), so 10 % at 95 % sparsity.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.masks import Masks


def pack(state: Mapping[str, Tensor], masks: Masks) -> dict[str, Any]:
    """A state dict as {"dense": tensors, "sparse": {name: shape, index, values}}; weights without a gap stay dense."""
    sparse = {}
    for name, mask in masks.items():
        if not mask.all():
            index = mask.reshape(-1).nonzero().squeeze(1)
            values = state[name].detach().reshape(-1)[index]
            sparse[name] = {"shape": list(mask.shape), "index": index.int(), "values": values}
    return {"dense": {name: tensor for name, tensor in state.items() if name not in sparse}, "sparse": sparse}


def unpack(packed: Mapping[str, Any]) -> tuple[dict[str, Tensor], Masks]:
    """The state dict and the masks of what is stored sparsely. Raises ValueError where the content does not fit."""
    try:
        state, masks = dict(packed["dense"]), Masks()
        for name, part in packed["sparse"].items():
            shape, index, values = torch.Size(part["shape"]), part["index"].long(), part["values"]
            mask = torch.zeros(shape.numel(), dtype=torch.bool)
            mask[index] = True
            if index.shape != values.shape or int(mask.sum()) != len(index):
                raise ValueError(f"{name} must have one value for each of its different positions")
            state[name] = torch.zeros(shape.numel(), dtype=values.dtype).index_copy_(0, index, values).view(shape)
            masks[name] = mask.view(shape)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"not a packed state ({type(error).__name__})") from error
    return state, masks


def packed_bytes(packed: Mapping[str, Any]) -> int:
    """Bytes of all tensors in a packed state."""
    parts = [tensor for part in packed["sparse"].values() for tensor in (part["index"], part["values"])]
    return sum(tensor.nbytes for tensor in [*packed["dense"].values(), *parts])
