"""From scores to masks of an exact density (spec c, Mask at density d and Mask update).

k = int((1 - d) N) weights go. The k-th smallest score is found by bracketing it, neither sorted nor fully partitioned.
"""

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

SCOPES = ("global", "local")
TIES = ("rank", "threshold")
UPDATES = ("nested", "intersect", "replace")
LARGE, SAMPLE = 1 << 17, 1 << 14  # from this many values on the order statistic is bracketed by this many


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
    flat = torch.cat([score.detach().reshape(-1) for score in scores])
    least, most = flat.aminmax()
    if not (least.isfinite() and most.isfinite()):
        raise ValueError("scores must be finite, got NaN or Inf")
    if least == most == 0:
        warnings.warn("all scores are zero: the first weights are dropped", stacklevel=3)
    k = pruned_count(density, len(flat))
    dead = 0
    if alive is not None:
        mask = torch.cat([part.reshape(-1) for part in alive])
        dead = len(flat) - int(torch.count_nonzero(mask))
        flat.masked_fill_(mask.logical_not_(), -torch.inf)
    if k <= dead:
        return None
    cut = kth_smallest(flat, k)
    kept = flat > cut
    missing = len(flat) - k - int(torch.count_nonzero(kept))
    if ties == "rank" and missing:
        equal = (flat == cut).nonzero().squeeze(1)
        kept[equal[len(equal) - missing :]] = True
    return [part.view(score.shape) for part, score in zip(kept.split([s.numel() for s in scores]), scores, strict=True)]


def kth_smallest(values: Tensor, k: int) -> float:
    """The k-th smallest (k = 1 is the least) of a flat float tensor, exactly (Floyd & Rivest 1975).

    On the CPU a sorted sample brackets it: counting settles whether it does, and only what lies in the bracket is
    searched.
    """
    if len(values) < LARGE or values.device.type != "cpu" or values.dtype == torch.bfloat16:
        return values.kthvalue(k).values.item()
    numbers = values.numpy()
    sample = np.sort(numbers[:: len(numbers) // SAMPLE])
    place, margin = k * len(sample) // len(numbers), 2 * int(len(sample) ** 0.5)
    low, high = sample[max(place - margin, 0)], sample[min(place + margin, len(sample) - 1)]
    above = numbers >= low
    rank = k - len(numbers) + int(np.count_nonzero(above))
    bracket = numbers[np.flatnonzero(above & (numbers <= high))]
    if not 1 <= rank <= len(bracket):
        bracket, rank = numbers, k
    return float(np.partition(bracket, rank - 1)[rank - 1])
