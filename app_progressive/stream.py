"""A stream of i.i.d. megabatches, with replay and validation parts (ALMA, arXiv 2106.09563; spec c, Stream).

A pool of examples is read in file order, or in one random order: first the training parts of all S megabatches, then
their validation parts. What a state sees depends on its number alone, so nothing needs saving.
"""

import torch
from torch import Tensor

from common.runs import generator

REPLAYS = ("full", "none", "one", "buffer")
SUBSETS = ("union", "newest", "first")


class MegabatchStream:
    """Which examples each state t = 1..S trains, validates and scores on.

    Args:
        n_pool: examples at hand.
        n_states: S.
        size: |M|, of a megabatch with its validation part: n_tr = int((1 - val_fraction) |M|) train.
        val_fraction: part of each megabatch to validate on.
        replay: full: all megabatches so far; none: the newest; one: the newest two; buffer: the newest and a buffer,
            to which after each state buffer[0] (validation: buffer[1]) of that state's list are added, drawn without
            replacement; it only grows, and holds examples twice.
        seed: of the random order and all draws; None keeps file order, and draws as seed 0.
        buffer: see replay.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        n_pool: int,
        n_states: int,
        size: int,
        val_fraction: float = 0.1,
        replay: str = "full",
        seed: int | None = None,
        buffer: tuple[int, int] = (182, 182),
    ) -> None:
        if replay not in REPLAYS:
            raise ValueError(f"replay must be one of {', '.join(REPLAYS)}, got {replay!r}")
        if n_states < 1:
            raise ValueError(f"n_states must be at least 1, got {n_states}")
        if seed is not None and seed < 0:
            raise ValueError(f"seed must be None or at least 0, got {seed}")
        if len(buffer) != 2:
            raise ValueError(f"buffer must be two numbers, got {tuple(buffer)}")
        if size < 1 or size * n_states > n_pool:
            raise ValueError(f"size must be in [1, n_pool / n_states = {n_pool // n_states}], got {size}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be in (0, 1), got {val_fraction}")
        self.n_train = int((1 - val_fraction) * size)
        self.n_val = size - self.n_train
        if self.n_train < 1 or self.n_val < 1:
            raise ValueError(f"size must leave an example to train and one to validate on, got {size}")
        if min(buffer) < 0 or (replay == "buffer" and (buffer[0] > self.n_train or buffer[1] > self.n_val)):
            limit = f"within the parts of a megabatch, ({self.n_train}, {self.n_val})"
            raise ValueError(f"buffer must be {limit}, got {tuple(buffer)}")
        self.n_states, self.size, self.replay, self.seed, self.buffer = n_states, size, replay, seed, buffer
        order = torch.arange(n_pool) if seed is None else torch.randperm(n_pool, generator=generator(seed))
        self._train = order[: n_states * self.n_train].split(self.n_train)
        self._val = order[n_states * self.n_train : n_states * size].split(self.n_val)

    def _check(self, state: int) -> None:
        if not 1 <= state <= self.n_states:
            raise ValueError(f"state must be in [1, {self.n_states}], got {state}")

    def state(self, t: int) -> tuple[Tensor, Tensor]:
        """Pool indices that state t = 1..S trains and validates on, int64, newest megabatch last. Raises ValueError."""
        self._check(t)
        if self.replay == "buffer":
            return self._buffered(self._train, t, 0), self._buffered(self._val, t, 1)
        first = {"full": 0, "none": t - 1, "one": max(t - 2, 0)}[self.replay]
        return torch.cat(self._train[first:t]), torch.cat(self._val[first:t])

    def _buffered(self, chunks: tuple[Tensor, ...], t: int, part: int) -> Tensor:
        kept = chunks[0][:0]
        for state in range(1, t):
            seen = torch.cat([kept, chunks[state - 1]])
            draws = torch.randperm(len(seen), generator=generator(self.seed or 0, 1, part, state))
            kept = torch.cat([kept, seen[draws[: self.buffer[part]]]])
        return torch.cat([kept, chunks[t - 1]])

    def score_idx(self, t: int, q: float = 0.2, mode: str = "union") -> Tensor:
        """int(q |M|) pool indices to score the weights on in state t.

        union: drawn from all that the state trains on, without repetition; newest: the newest megabatch's first; first:
        the state's first, which under full replay are always the same (released). Raises ValueError.
        """
        self._check(t)
        if mode not in SUBSETS:
            raise ValueError(f"mode must be one of {', '.join(SUBSETS)}, got {mode!r}")
        count = int(q * self.size) if 0 < q <= 1 else 0
        if not 1 <= count <= self.n_train:
            raise ValueError(f"q must give 1 to {self.n_train} of {self.size} examples, got {q}")
        if mode == "newest":
            return self._train[t - 1][:count]
        train, _ = self.state(t)
        if mode == "first":
            return train[:count]
        distinct = train.unique()
        return distinct[torch.randperm(len(distinct), generator=generator(self.seed or 0, 2, t))[:count]]
