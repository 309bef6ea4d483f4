"""From scores to masks of an exact density (spec c, Mask at density d and Mask update).

k = int((1 - d) N) weights go. The k-th smallest score is found by bracketing it, neither sorted nor fully partitioned.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

SCOPES = ("global", "local")
TIES = ("rank", "threshold")
UPDATES = ("nested", "intersect", "replace")
LARGE, STRIDE = 1 << 17, 61  # from this many values on the order statistic is bracketed by a sample of every 61st
BLOCK = 1 << 16  # values looked at together


def pruned_count(density: float, total: int) -> int:
    """k = int((1 - d) N) in double precision: int(0.19999999999999996 * 100) is 19.

    Raises ValueError: density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    return int((1.0 - density) * total)


def threshold(
    scores: Mapping[str, Tensor],
    density: float,
    scope: str = "global",
    ties: str = "rank",
    prev: Mapping[str, Tensor] | None = None,
    update: str = "nested",
) -> dict[str, Tensor]:
    """The masks that keep the largest scores: N - k weights of all N, exactly.

    Args:
        scores: finite tensors by name.
        density: part of the weights to keep, in (0, 1].
        scope: global ranks all tensors together, local each on its own.
        ties: rank drops exactly k, of equal scores those first (tensor order, then flattened index); threshold keeps
            what lies above the k-th smallest score and so drops all that are equal to it, as the released code.
        prev: masks in force; all ones if None.
        update: nested drops dead weights first, so that masks only shrink, to the exact density (one already sparser
            stays); intersect multiplies the new mask, found over all weights, with `prev` (released); replace is new.

    Returns:
        bool tensors of the scores' shapes.

    Raises:
        ValueError: a wrong option, density, NaN or infinite score, or a previous mask of other names, shape or values.
    """
    for name, value, allowed in (("scope", scope, SCOPES), ("ties", ties, TIES), ("update", update, UPDATES)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if not scores:
        raise ValueError("scores must hold at least one tensor, got none")
    before = _previous(scores, prev)
    groups = [list(scores)] if scope == "global" else [[name] for name in scores]
    found: dict[str, Tensor] = {}
    for names in groups:
        alive = [before[name] for name in names] if prev is not None and update == "nested" else None
        new = _keep([scores[name] for name in names], density, ties, alive)
        found.update({name: before[name] for name in names} if new is None else zip(names, new, strict=True))
    return found if update != "intersect" else {name: found[name] & before[name] for name in scores}


def _previous(scores: Mapping[str, Tensor], prev: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if prev is None:
        return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    if prev.keys() != scores.keys():
        raise ValueError(f"prev must name the scores' tensors {sorted(scores)}, got {sorted(prev)}")
    for name, mask in prev.items():
        if mask.shape != scores[name].shape:
            raise ValueError(f"prev {name} must be {tuple(scores[name].shape)}, got {tuple(mask.shape)}")
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"prev {name} must hold only 0 and 1")
    return {name: mask.bool().to(scores[name].device) for name, mask in prev.items()}


def _keep(scores: list[Tensor], density: float, ties: str, alive: list[Tensor] | None) -> list[Tensor] | None:
    """Masks without the k lowest, dead ones first; None where none is to go, because k < 1 or as many are dead."""
    dtype = functools.reduce(torch.promote_types, [score.dtype for score in scores])
    flat = [score.detach().reshape(-1).to(dtype) for score in scores]
    least, most = torch.stack([bound for part in flat if len(part) for bound in part.aminmax()]).aminmax()
    if not (least.isfinite() and most.isfinite()):
        raise ValueError("scores must be finite, got NaN or Inf")
    if least == most == 0:
        warnings.warn("all scores are zero: the first weights are dropped", stacklevel=3)
    total = sum(len(part) for part in flat)
    k, dead = pruned_count(density, total), 0
    if alive is not None:
        masks = [mask.reshape(-1) for mask in alive]
        dead = total - _count(masks)
        flat = [torch.where(mask, part, -torch.inf) for mask, part in zip(masks, flat, strict=True)]
    if k <= dead:
        return None
    cut = kth_smallest(flat, k)
    kept = [part > cut for part in flat]
    missing = total - k - _count(kept)
    if ties == "rank" and missing:
        for part, mask in zip(reversed(flat), reversed(kept), strict=True):
            equal = (part == cut).nonzero().squeeze(1)
            mask[equal[max(len(equal) - missing, 0) :]] = True
            missing -= min(missing, len(equal))
    return [mask.view(score.shape) for mask, score in zip(kept, scores, strict=True)]


def _count(masks: Sequence[Tensor]) -> int:
    """How many are True, with one synchronisation."""
    return int(torch.stack([torch.count_nonzero(mask) for mask in masks]).sum())


def kth_smallest(values: Sequence[Tensor], k: int) -> float:
    """The k-th smallest (k = 1 is the least) of flat float tensors of one type together, exactly (Floyd & Rivest 1975).

    On the CPU a sorted sample brackets it, and nothing is concatenated: block by block, within the cache, counting
    settles whether it does, and what lies in the bracket is laid aside to be searched.
    """
    total = sum(len(part) for part in values)
    if total < LARGE or values[0].device.type != "cpu" or values[0].dtype == torch.bfloat16:
        return torch.cat(list(values)).kthvalue(k).values.item()
    numbers = [part.numpy() for part in values]
    sample = np.sort(np.concatenate([part[::STRIDE] for part in numbers]))
    place, margin = k * len(sample) // total, 2 * int(len(sample) ** 0.5)
    low, high = sample[max(place - margin, 0)], sample[min(place + margin, len(sample) - 1)]
    rank, bracket = k, []
    for part in numbers:
        for start in range(0, len(part), BLOCK):
            block = part[start : start + BLOCK]
            above = block >= low
            rank -= len(block) - int(np.count_nonzero(above))
            bracket.append(block[np.flatnonzero(above & (block <= high))])
    if not 1 <= rank <= sum(len(part) for part in bracket):
        bracket, rank = numbers, k
    return float(np.partition(np.concatenate(bracket), rank - 1)[rank - 1])
