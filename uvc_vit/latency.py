"""Costs measured on this machine in place of multiply-adds: python -m uvc_vit.latency --config CONFIG --out table.json

Writes a table for --method.accounting latency --method.table table.json. The time of a block is fitted as
base + head * heads + dim * value dimensions + neuron * neurons, each at least 0, over blocks with less of each.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from common.config import ConfigError, command, parse, require
from common.data import load
from common.runs import write_json
from uvc_vit.adapter import BlockDims, ViTAdapter
from uvc_vit.cost import now
from uvc_vit.plan import Plan
from uvc_vit.resource import Costs, mac_costs
from uvc_vit.settings import Config
from uvc_vit.slim import slim

SHARES = (0.25, 0.5, 0.75)  # of neurons and of value dimensions, beside all of them
PARTS = ("block", "head", "dim", "neuron")


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one forward, by block; `sizes` of the model's blocks as in a plan."""

    sizes: tuple[BlockDims, ...]
    embed: float
    """of all that is outside the blocks"""
    block: tuple[float, ...]
    """of a block that is not skipped, whatever is left of it"""
    head: tuple[float, ...]
    dim: tuple[float, ...]
    neuron: tuple[float, ...]
    error: float = 0.0
    """largest distance of a measured time from the fit, as a share of it"""

    def costs(self, adapter: ViTAdapter) -> Costs:
        """For `UVCController`. Raises ValueError where the table is for another model."""
        Plan.full(self.sizes).validate(adapter)
        device = adapter.blocks[0].mlp.fc2.weight.device
        counts = mac_costs(self.sizes, 1, 0, device=device)
        parts = {name: torch.tensor(getattr(self, name), dtype=torch.float64, device=device) for name in PARTS}
        return replace(counts, embed=self.embed, **parts)

    @classmethod
    def read(cls, path: Path) -> "LatencyTable":
        """What `main` wrote. Raises ConfigError naming the file where it is missing or anything else."""
        try:
            tree = json.loads(path.read_text())
            sizes = tuple(BlockDims(**{**entry, "v_dims": tuple(entry["v_dims"])}) for entry in tree.pop("sizes"))
            Plan.full(sizes)
            parts = {name: tuple(map(_seconds, tree.pop(name))) for name in PARTS}
            if {len(part) for part in parts.values()} != {len(sizes)} or set(tree) != {"embed", "error"}:
                raise ValueError(f"its parts must have {len(sizes)} blocks each")
            return cls(sizes, _seconds(tree["embed"]), **parts, error=_seconds(tree["error"]))
        except FileNotFoundError:
            raise ConfigError(f"method.table: {path}: no such table") from None
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"method.table: {path}: not a table of latencies ({error})") from error


def measure(model: nn.Module, images: Tensor, repeats: int = 30) -> LatencyTable:
    """Time `model` block by block on its device; blocks of equal sizes are timed once.

    Args:
        model: see `ViTAdapter`.
        images: one batch, (batch, channels, height, width).
        repeats: forwards of each kind, turn about; their median counts.
    """
    model = copy.deepcopy(model).eval()
    adapter = ViTAdapter(model)
    tokens = adapter.tokens((images.shape[-2], images.shape[-1]))
    x = torch.randn(len(images), tokens, adapter.dims[0].dim, device=images.device, dtype=images.dtype)
    fits: dict[BlockDims, tuple[Tensor, float]] = {}
    for index, sizes in enumerate(adapter.dims):
        if sizes not in fits:
            plans = list(variants(sizes))
            blocks = [slim(_with_blocks(model, [index]), plan, "grouped").get_submodule("blocks") for plan in plans]
            times = _times([partial(block, x) for block in blocks], repeats)
            fits[sizes] = fit([plan.left()[0] for plan in plans], times)
    block, head, dim, neuron = zip(*(fits[sizes][0].tolist() for sizes in adapter.dims), strict=True)
    (embed,) = _times([partial(_with_blocks(model, []), images)], repeats)
    error = max(error for _, error in fits.values())
    return LatencyTable(adapter.dims, embed, block, head, dim, neuron, error)


def variants(sizes: BlockDims) -> Iterator[Plan]:
    """Plans of one block: all of it, fewer neurons, fewer value dimensions in every head, fewer heads."""
    full = Plan.full([sizes])
    yield full
    for share in SHARES:
        yield replace(full, keep_mlp=(tuple(range(max(int(sizes.hidden * share), 1))),))
        yield replace(full, keep_dim=(tuple(tuple(range(max(int(size * share), 1))) for size in sizes.v_dims),))
    for count in range(1, sizes.heads):
        yield replace(full, keep_head=(tuple(head < count for head in range(sizes.heads)),))


def fit(left: Sequence[BlockDims], times: Sequence[float]) -> tuple[Tensor, float]:
    """Base, head, dim and neuron, (4,), by non-negative least squares; and the largest relative error."""
    rows = np.array([[1.0, sizes.heads, sum(sizes.v_dims), sizes.hidden] for sizes in left])
    scale = rows.max(0).clip(min=1)
    parts = nnls(rows / scale, np.array(times))[0] / scale
    fitted = rows @ parts
    return torch.from_numpy(parts), float(np.abs(np.array(times) / fitted - 1).max())


def _with_blocks(model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """The model with these of its blocks, nothing copied."""
    small, blocks = copy.copy(model), list(model.get_submodule("blocks").children())
    small._modules = {**model._modules, "blocks": nn.Sequential(*(blocks[index] for index in kept))}
    return small


@torch.no_grad()
def _times(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    spent: list[list[float]] = [[] for _ in works]
    for repeat in range(repeats + 1):
        for own, work in zip(spent, works, strict=True):
            start = now()
            work()
            if repeat:
                own.append(now() - start)
    return [median(own) for own in spent]


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise TypeError(f"a time must be at least 0 and finite, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class MeasureConfig(Config):
    """Of one run, and how its network is timed."""

    out: str = "latency.json"
    """the table"""
    batch: int = 8
    repeats: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch >= 1, "batch", self.batch, "at least 1")
        require(self.repeats >= 1, "repeats", self.repeats, "at least 1")


def main() -> None:
    """The command line."""
    from uvc_vit.choose import build  # here: it needs this file

    config = parse(MeasureConfig, prog="python -m uvc_vit.latency", description="time the blocks of a run's network")
    data = load(config.data).train
    channels, size = config.model.image_shape(data)
    model = build(config, data).to(device := torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    table = measure(model, torch.randn(config.batch, channels, size, size, device=device), config.repeats)
    write_json(Path(config.out), asdict(table))
    print(f"{config.out}: {len(table.sizes)} blocks, fitted within {table.error:.0%}")


if __name__ == "__main__":
    command(main)
