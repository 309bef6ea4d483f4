"""Masks of three states on any number of ranks: two_ranks.py FILE (the rank is appended).

Score batches are not split, so that batch statistics are those of one process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from app_progressive import AnytimePruner
from app_progressive.tests.nets import batch, small_net
from common import distributed


def main(path: Path) -> None:
    """Three states of one training step on the same batch, without batch norm's running statistics in the way."""
    with distributed.process_group():
        net = small_net()
        wrapped = DistributedDataParallel(net) if distributed.world_size() > 1 else net
        pruner = AnytimePruner(wrapped, 3, 4.5)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
        pruner.attach(optimizer)
        masks = []
        for state in range(3):
            pruner.step([batch(seed=state), batch(10, seed=state + 9)], reduce=distributed.average_)
            masks.append(dict(pruner.masks))
            x, y = batch(seed=20 + state)
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x), y).backward()  # every rank the whole batch: DDP averages equal gradients
            optimizer.step()
        torch.save(masks, f"{path}{distributed.rank()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
