"""A network trained on any number of ranks: two_ranks.py FILE."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import distributed
from optimizer_amalgamation.optimizers import AmalgamatedOptimizer
from optimizer_amalgamation.tests.vectors import student_weights


def main(path: Path) -> None:
    """Six steps, each rank on its part of the batch; rank 0 saves the network."""
    with distributed.process_group():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        wrapped = DistributedDataParallel(net) if distributed.world_size() > 1 else net
        optimizer = AmalgamatedOptimizer(wrapped.parameters(), student_weights(), warmup=2)
        for step in range(6):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            wrapped(distributed.shard(x)).square().mean().backward()
            optimizer.step()
        if distributed.rank() == 0:
            torch.save(net.state_dict(), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
