"""A plan: which blocks, heads, value dimensions and neurons of a model stay; as JSON, checked, with its cost."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Literal

from uvc_vit.adapter import BlockDims, ViTAdapter
from uvc_vit.macs import block_macs
from uvc_vit.resource import Accounting, mac_costs

Kind = Literal["exact", "released", "padded"]


@dataclass(frozen=True)
class Plan:
    """What stays of each block, with the sizes of the model it is for.

    Raises:
        ValueError: naming block and field of the first entry that cannot be.
    """

    sizes: tuple[BlockDims, ...]
    """of the model's blocks"""
    keep_block: tuple[bool, ...]
    keep_head: tuple[tuple[bool, ...], ...]
    keep_dim: tuple[tuple[tuple[int, ...], ...], ...]
    """value dimensions of each head, ascending; a head without any counts as removed"""
    keep_mlp: tuple[tuple[int, ...], ...]
    """neurons, ascending"""

    def __post_init__(self) -> None:
        count = len(self.sizes)
        for name in ("keep_block", "keep_head", "keep_dim", "keep_mlp"):
            found = len(getattr(self, name))
            if found != count:
                raise ValueError(f"plan {name} must have {count} blocks, got {found}")
        for index, sizes in enumerate(self.sizes):
            for name in ("keep_head", "keep_dim"):
                found = len(getattr(self, name)[index])
                if found != sizes.heads:
                    raise ValueError(f"plan block {index} {name} must have {sizes.heads} heads, got {found}")
            for head, (dims, most) in enumerate(zip(self.keep_dim[index], sizes.v_dims, strict=True)):
                _require_ascending(f"plan block {index} keep_dim of head {head}", dims, most)
            _require_ascending(f"plan block {index} keep_mlp", self.keep_mlp[index], sizes.hidden)

    @classmethod
    def full(cls, sizes: Sequence[BlockDims]) -> "Plan":
        """Keeps everything."""
        return cls(
            sizes=tuple(sizes),
            keep_block=(True,) * len(sizes),
            keep_head=tuple((True,) * dims.heads for dims in sizes),
            keep_dim=tuple(tuple(tuple(range(size)) for size in dims.v_dims) for dims in sizes),
            keep_mlp=tuple(tuple(range(dims.hidden)) for dims in sizes),
        )

    def heads(self, block: int) -> list[int]:
        """Heads of a block that stay: kept, and with a value dimension left."""
        pairs = zip(self.keep_head[block], self.keep_dim[block], strict=True)
        return [head for head, (kept, dims) in enumerate(pairs) if kept and dims]

    def left(self) -> list[BlockDims]:
        """Sizes of the blocks that stay."""
        return [
            BlockDims(
                dim=sizes.dim,
                qk_dim=sizes.qk_dim,
                v_dims=tuple(len(self.keep_dim[index][head]) for head in self.heads(index)),
                hidden=len(self.keep_mlp[index]),
            )
            for index, sizes in enumerate(self.sizes)
            if self.keep_block[index]
        ]

    def macs(self, tokens: int, embed_macs: int, kind: Kind = "exact") -> int:
        """Multiply-adds of what stays, for one image, classifier left out.

        Args:
            tokens: of an image.
            embed_macs: of the patch embedding.
            kind: "exact"; "padded": every head of a block has as many value dimensions as its widest; "released": the
                authors' count, in which removed value dimensions still cost their part of qkv.
        """
        total = embed_macs
        kept = [index for index, keep in enumerate(self.keep_block) if keep]
        for index, left in zip(kept, self.left(), strict=True):
            v_dims = left.v_dims
            if kind == "padded":
                v_dims = (max(v_dims, default=0),) * left.heads
            total += block_macs(BlockDims(left.dim, left.qk_dim, v_dims, left.hidden), tokens).total
            if kind == "released":
                removed = sum(self.sizes[index].v_dims[head] for head in self.heads(index)) - sum(v_dims)
                total += tokens * left.dim * removed
        return total

    def share(self, tokens: int, embed_macs: int, kind: Kind = "exact") -> float:
        """R: multiply-adds of what stays over those of the whole model, classifier left out of both."""
        accounting: Accounting = "released" if kind == "released" else "exact"
        return self.macs(tokens, embed_macs, kind) / mac_costs(self.sizes, tokens, embed_macs, accounting).dense.item()

    def validate(self, adapter: ViTAdapter) -> None:
        """Raise ValueError, naming block and field, unless the plan is for a model of these sizes."""
        if len(self.sizes) != len(adapter.dims):
            raise ValueError(f"plan is for {len(self.sizes)} blocks, the model has {len(adapter.dims)}")
        for index, (mine, theirs) in enumerate(zip(self.sizes, adapter.dims, strict=True)):
            for field in fields(BlockDims):
                wanted, found = getattr(mine, field.name), getattr(theirs, field.name)
                if wanted != found:
                    raise ValueError(f"plan block {index} is for {field.name} {wanted}, the model has {found}")

    def to_json(self) -> str:
        """One line; equal plans give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """What `to_json` gave. Raises ValueError where the text is anything else."""
        try:
            tree = json.loads(text)
            sizes = [_sizes(entry) for entry in tree.pop("sizes")]
            keep_dim = tuple(tuple(tuple(map(_whole, dims)) for dims in heads) for heads in tree.pop("keep_dim"))
            return cls(
                sizes=tuple(sizes),
                keep_block=tuple(map(_flag, tree.pop("keep_block"))),
                keep_head=tuple(tuple(map(_flag, heads)) for heads in tree.pop("keep_head")),
                keep_dim=keep_dim,
                keep_mlp=tuple(tuple(map(_whole, neurons)) for neurons in tree.pop("keep_mlp")),
            )
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not a plan: {type(error).__name__}: {error}") from error

    def sha256(self) -> str:
        """Of `to_json`, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _sizes(entry: Mapping[str, Any]) -> BlockDims:
    v_dims = tuple(map(_whole, entry["v_dims"]))
    return BlockDims(_whole(entry["dim"]), _whole(entry["qk_dim"]), v_dims, _whole(entry["hidden"]))


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"a number of a plan must be whole and at least 0, got {value!r}")
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError(f"a flag of a plan must be true or false, got {value!r}")
    return value


def _require_ascending(what: str, indices: Sequence[int], count: int) -> None:
    ascending = all(before < after for before, after in pairwise(indices))
    if not ascending or (indices and not 0 <= indices[0] <= indices[-1] < count):
        raise ValueError(f"{what} must be ascending indices below {count}, got {str(list(indices))[:60]}")
