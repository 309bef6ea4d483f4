"""Open sub-domains of branch and bound over many images and targets: a struct of tensors (spec c.8.7, h.3).

A domain stores no tensor of the net's size: bounds and relaxation are rebuilt from its image's root bounds and its list
of splits. It keeps fp16 slopes of the neurons unstable at the root, the splits with their multipliers, and the neurons
worth splitting next.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from certified_pruning.rows import Splits


@dataclass
class Domains:
    """R sub-domains.

    Attributes:
        image, target: (R,) long; which problem, and which row of its specification.
        lb: (R,) best lower bound known.
        alpha: (R, P) fp16, slopes of the root-unstable neurons of the image, padded.
        neuron, sign, beta: (R, D) int32, int8, float32; the splits (sign 0: padding) and their multipliers.
        candidates: (R, M) int32, neurons for the branching rule to choose from.
    """

    image: Tensor
    target: Tensor
    lb: Tensor
    alpha: Tensor
    neuron: Tensor
    sign: Tensor
    beta: Tensor
    candidates: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, rows: Tensor) -> Domains:
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(1)
        # 5 times as fast as indexing: it copies whole rows.
        return Domains(**{f.name: getattr(self, f.name).index_select(0, rows) for f in fields(self)})

    @property
    def depth(self) -> Tensor:
        """(R,) number of splits."""
        return (self.sign != 0).sum(1)

    @property
    def splits(self) -> Splits | None:
        """None if no row has any. Columns beyond the deepest row are left out."""
        d = int(self.depth.max()) if len(self) else 0
        return Splits(self.neuron[:, :d].long(), self.sign[:, :d].to(self.lb)) if d else None

    def widen(self, columns: int) -> Domains:
        """With at least so many columns for splits."""
        extra = columns - self.sign.shape[1]
        if extra <= 0:
            return self
        pads = {n: torch.nn.functional.pad(getattr(self, n), (0, extra)) for n in ("neuron", "sign", "beta")}
        return Domains(**{f.name: pads.get(f.name, getattr(self, f.name)) for f in fields(self)})

    def children(self, neuron: Tensor) -> Domains:
        """Two sub-domains a row, active (z >= 0) then inactive, splitting `neuron` (R,); slopes warm-started."""
        column = self.depth.repeat_interleave(2)[:, None]
        rows = torch.arange(len(self), device=neuron.device).repeat_interleave(2)
        child = self.widen(int(self.depth.max()) + 1)[rows]
        sign = torch.tensor([1, -1], dtype=torch.int8, device=neuron.device).repeat(len(self))
        child.neuron.scatter_(1, column, neuron[rows, None].to(child.neuron.dtype))
        child.sign.scatter_(1, column, sign[:, None])
        return child

    @staticmethod
    def cat(parts: list[Domains]) -> Domains:
        columns = max(p.sign.shape[1] for p in parts)
        wide = [p.widen(columns) for p in parts]
        return Domains(**{f.name: torch.cat([getattr(p, f.name) for p in wide]) for f in fields(Domains)})


class Frontier:
    """Slots for domains: push and pop cost the rows moved, not the rows stored."""

    def __init__(self, empty: Domains) -> None:
        self.store = empty[torch.zeros(0, dtype=torch.long, device=empty.image.device)]
        device = self.store.image.device
        self.live = torch.zeros(0, dtype=torch.bool, device=device)
        # Order of arrival breaks ties of lb, so that the choice for one image does not depend on the others.
        self.serial = torch.zeros(0, dtype=torch.long, device=device)
        self.pushed = 0

    def __len__(self) -> int:
        return int(self.live.sum())

    @property
    def bytes_per_domain(self) -> int:
        """Memory of one slot, in bytes."""
        tensors = [getattr(self.store, f.name) for f in fields(Domains)]
        return sum(t.element_size() * t[:1].numel() for t in tensors) + 9

    def push(self, domains: Domains) -> None:
        n = len(domains)
        if not n:
            return
        if domains.sign.shape[1] > self.store.sign.shape[1]:
            self.store = self.store.widen(-(-domains.sign.shape[1] // 8) * 8)
        domains = domains.widen(self.store.sign.shape[1])
        free = (~self.live).nonzero().squeeze(1)
        if len(free) < n:
            self._grow(max(n - len(free), len(self.live)))
            free = (~self.live).nonzero().squeeze(1)
        slots = free[:n]
        for f in fields(Domains):
            getattr(self.store, f.name)[slots] = getattr(domains, f.name)
        self.live[slots] = True
        self.serial[slots] = torch.arange(self.pushed, self.pushed + n, device=slots.device)
        self.pushed += n

    def pop(self, slots: Tensor) -> Domains:
        self.live[slots] = False
        return self.store[slots]

    def holds(self, image: int) -> bool:
        """Whether an image has a domain here."""
        return bool((self.live & (self.store.image == image)).any())

    def drop(self, images: Tensor) -> Tensor:
        """Remove all domains of these images (long); returns the smallest lb of each, +inf if it had none."""
        worst = self.worst(int(images.max()) + 1 if len(images) else 0)[images]
        self.live &= ~torch.isin(self.store.image, images)
        return worst

    def worst(self, n_images: int) -> Tensor:
        """(n_images,) smallest lb of the domains of each image; +inf if it has none."""
        here = self.live & (self.store.image < n_images)
        worst = self.store.lb.new_full((n_images,), float("inf"))
        return worst.scatter_reduce(0, self.store.image[here], self.store.lb[here], "amin")

    def choose(self, max_rows: int, limit: Tensor) -> Tensor:
        """Slots to split next: round-robin over images, in each image the smallest lb first.

        Args:
            limit: (images,) how many domains of an image may be chosen.
        """
        slots = self.live.nonzero().squeeze(1)
        slots = slots[self.serial[slots].argsort()]
        slots = slots[self.store.lb[slots].argsort(stable=True)]
        slots = slots[self.store.image[slots].argsort(stable=True)]
        image = self.store.image[slots]
        count = torch.bincount(image, minlength=len(limit))
        rank = torch.arange(len(slots), device=slots.device) - (count.cumsum(0) - count)[image]
        keep = rank < limit[image]
        slots, rank = slots[keep], rank[keep]
        return slots[rank.argsort(stable=True)][:max_rows]

    def _grow(self, extra: int) -> None:
        for f in fields(Domains):
            t = getattr(self.store, f.name)
            setattr(self.store, f.name, torch.cat([t, t.new_zeros((extra, *t.shape[1:]))]))
        self.live = torch.cat([self.live, self.live.new_zeros(extra)])
        self.serial = torch.cat([self.serial, self.serial.new_zeros(extra)])
