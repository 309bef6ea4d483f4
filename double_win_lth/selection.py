"""Which weights stay: the largest magnitudes over all tensors together, to the exact count (spec c, h.3).

Non-negative floats compare like the integers of their bits, so 16 bits at a time are counted in a histogram: two passes
over float32 give the exact threshold, with no concatenation, no sort and 65,536 counters of memory.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.masks import Masks

INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
BINS = 1 << 16


@torch.no_grad()
def keep_largest(weights: Mapping[str, Tensor], keep: int, within: Mapping[str, Tensor] | None = None) -> Masks:
    """Keep exactly `keep` entries of the largest |w| over all tensors, by one global threshold.

    Among equal magnitudes the first (tensor order, then index in row-major order) goes first. Ranks of a data-parallel
    run hold equal weights and so find equal masks.

    Args:
        weights: float tensors by name, all of one dtype.
        keep: from 0 to the number of candidates.
        within: masks by name; only entries True there are candidates. All if None.

    Raises:
        ValueError: keep out of range, other dtypes, or a candidate that is NaN or infinite (named, with their number).
    """
    dtypes = {weight.dtype for weight in weights.values()}
    if len(dtypes) != 1 or not dtypes <= INTEGERS.keys():
        raise ValueError(f"weights must be float tensors of one dtype, got {sorted(map(str, dtypes))}")
    integer = INTEGERS[dtypes.pop()]
    bits = {name: weight.detach().abs().contiguous().view(integer) for name, weight in weights.items()}
    count = sum(bits[name].numel() if within is None else int(within[name].sum()) for name in bits)
    if not 0 <= keep <= count:
        raise ValueError(f"keep must be in [0, {count}], got {keep}")
    _refuse_non_finite(weights, within)
    if not keep:
        return Masks({name: torch.zeros_like(value, dtype=torch.bool) for name, value in bits.items()})
    threshold, equal = _threshold(bits, count - keep, within)
    masks = Masks()
    for name, value in bits.items():
        kept = value >= threshold
        if within is not None:
            kept &= within[name]
        if equal:  # of those at the threshold, this many still have to go
            ties = ((value == threshold) & kept).flatten().nonzero().squeeze(1)[:equal]
            kept.view(-1)[ties] = False
            equal -= len(ties)
        masks[name] = kept
    return masks


def _threshold(bits: Mapping[str, Tensor], rank: int, within: Mapping[str, Tensor] | None) -> tuple[int, int]:
    """The value of this rank from below (0 is the smallest), and how many equal ones rank below it."""
    width = 8 * next(iter(bits.values())).element_size()
    prefix = 0
    for shift in range(width - 16, -1, -16):
        histogram = torch.zeros(BINS, dtype=torch.int64)
        for name, value in bits.items():
            chosen = value.flatten() if within is None else value[within[name]]
            if shift < width - 16:
                chosen = chosen[(chosen >> (shift + 16)) == prefix]
            histogram += torch.bincount((chosen >> shift) & (BINS - 1), minlength=BINS).cpu()
        below = histogram.cumsum(0)
        digit = int(torch.searchsorted(below, rank, right=True))
        rank -= int(below[digit - 1]) if digit else 0
        prefix = (prefix << 16) | digit
    return prefix, rank


def _refuse_non_finite(weights: Mapping[str, Tensor], within: Mapping[str, Tensor] | None) -> None:
    for name, weight in weights.items():
        if not weight.abs().max() < float("inf"):  # a look at all entries; NaN fails too
            candidates = weight if within is None else weight[within[name]]
            if odd := int((~candidates.isfinite()).sum()):
                raise ValueError(f"{name} has {odd} non-finite values")
