"""Masks of four states, and GraSP scores, on any number of ranks: two_ranks.py FILE (the rank is appended).

Score batches are not split, so that batch statistics are those of one process. In the last state, and for GraSP, two
ranks score on a batch each; one process masks by both, one after the other.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from app_progressive import AnytimePruner, scores
from app_progressive.tests.nets import batch, small_net
from common import distributed


def main(path: Path) -> None:
    """Four states of one training step on the same batch, without batch norm's running statistics in the way."""
    with distributed.process_group():
        net = small_net()
        wrapped = DistributedDataParallel(net) if distributed.world_size() > 1 else net
        pruner = AnytimePruner(wrapped, 4, 4.5)
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

        seeds = [30, 31] if distributed.world_size() == 1 else [30 + distributed.rank()]
        pruner.step([batch(seed=seed) for seed in seeds], reduce=distributed.average_)
        masks.append(dict(pruner.masks))
        grasp = scores(small_net(), [batch(200, seeds[0])], "grasp", reduce=distributed.average_)
        torch.save({"masks": masks, "grasp": grasp}, f"{path}{distributed.rank()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
