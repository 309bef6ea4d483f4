"""Tickets of a small network without batch norm, on any number of ranks: two_ranks.py FILE (the rank is appended).

Batch norm would normalise each rank's part of a batch on its own; all else must not depend on the number of ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from common import distributed
from common.data import DataConfig, load
from common.masks import Masks
from double_win_lth import Regime, find_tickets
from double_win_lth.tests.nets import small_net
from double_win_lth.training import adversarial_batches, sgd_step


def main(path: Path) -> None:
    """Three rounds, two of them trained for four adversarial steps."""
    data = load(DataConfig(classes=[0, 1, 2, 3], val=0.0, fraction=0.05)).train
    net = nn.Sequential(nn.Upsample((6, 12)), nn.Unflatten(3, (2, 6)), Swap(), small_net(norm=False))
    regime = Regime.adv(0.1, 2)

    def train_round(model: nn.Module, masks: Masks, level: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
        masks.attach(model, optimizer)
        stream = adversarial_batches(data, 16, DataConfig(crop_padding=2), regime, size=0, seed=level, step=0)
        for _ in range(4):
            sgd_step(model, optimizer, next(stream), regime, 0.05)

    with distributed.process_group():
        book = find_tickets(net, train_round, rate=0.3, rounds=3)
        book.save(Path(f"{path}{distributed.rank()}"))


class Swap(nn.Module):
    """(n, 1, 6, 2, 6) -> (n, 2, 6, 6)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(1).transpose(1, 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
