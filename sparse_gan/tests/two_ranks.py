"""Train on any number of ranks: two_ranks.py FOLDER OPTIONS...; each leaves what it ended with in FOLDER/rank-N."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from sparse_gan import train as training
from sparse_gan.tests.runs import smoke


def main(folder: Path, options: list[str]) -> None:
    """The weights and masks of both players, as they are in this process."""
    games = []

    class Kept(training.Game):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            games.append(self)

    training.Game = Kept  # type: ignore[misc]
    training.train(smoke(*options), folder / "run")
    players = [games[0].g, games[0].d]
    torch.save([(p.module.state_dict(), dict(p.masks)) for p in players], folder / f"rank-{os.environ['RANK']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
