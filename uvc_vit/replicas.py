"""Of a data-parallel run: what every rank must hold alike comes from rank 0."""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

from common import distributed


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by rank 0's, in place; one process has nothing to do."""
    if distributed.world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def broadcast_text(text: str) -> str:
    """Rank 0's."""
    there = [text]
    if distributed.world_size() > 1:
        dist.broadcast_object_list(there, 0)
    return there[0]
