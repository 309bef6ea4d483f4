"""Matching and double-win: does a ticket do as well as the dense network in every metric? (Sec. 3; spec c)

A ticket matches in a metric where its mean over seeds is at least the dense mean less a tolerance; it wins twice where
it matches in all three: standard accuracy of standard transfer, standard and robust accuracy of adversarial transfer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

Values = Mapping[str, Sequence[float]]
METRICS = ("sa_std", "sa_adv", "ra_adv")
ROUNDING = 1e-9  # points; a tie counts as a match


@dataclass(frozen=True)
class Match:
    """One ticket in one metric: mean over seeds minus the dense mean, in points; the tolerance; whether it matches."""

    difference: float
    tol: float
    matching: bool


@dataclass(frozen=True)
class DoubleWin:
    """Matches by sparsity and metric, and the largest sparsity that wins twice (levels need not be contiguous)."""

    levels: dict[float, dict[str, Match]]
    extreme_sparsity: float | None


def double_win(
    dense: Values,
    tickets: Mapping[float, Values],
    *,
    metrics: Sequence[str] = METRICS,
    tol: float | Literal["std"] = "std",
) -> DoubleWin:
    """Compare tickets with the dense network they come from.

    Args:
        dense: metric -> one value a seed, in percent.
        tickets: sparsity -> the same.
        metrics: those that must match.
        tol: points a ticket may lose; "std": the sample standard deviation of the dense runs over seeds.

    Raises:
        ValueError: no metrics, other numbers of seeds, values outside [0, 100], sparsities outside [0, 1), a bad tol.
    """
    if not metrics:
        raise ValueError("metrics must name at least one, got none")
    _check(dense, metrics, "dense", 0)
    tolerances = {}
    for metric in metrics:
        seeds = len(dense[metric])
        if tol == "std":
            if seeds < 2:
                raise ValueError(f"tol 'std' must have at least two seeds of {metric}, got {seeds}")
            tolerances[metric] = stdev(dense[metric])
        elif isinstance(tol, str) or not 0 <= tol < math.inf:
            raise ValueError(f"tol must be 'std' or a number of points of at least 0, got {tol!r}")
        else:
            tolerances[metric] = float(tol)
    levels = {}
    for sparsity, values in sorted(tickets.items()):
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
        _check(values, metrics, f"ticket {sparsity:g}", len(dense[metrics[0]]))
        gaps = {metric: mean(values[metric]) - mean(dense[metric]) for metric in metrics}
        levels[sparsity] = {
            metric: Match(gap, tolerances[metric], gap >= -tolerances[metric] - ROUNDING)
            for metric, gap in gaps.items()
        }
    wins = [sparsity for sparsity, matches in levels.items() if all(match.matching for match in matches.values())]
    return DoubleWin(levels, max(wins, default=None))


def _check(values: Values, metrics: Sequence[str], name: str, seeds: int) -> None:
    for metric in metrics:
        if metric not in values:
            raise ValueError(f"{name} must have {metric}, got {sorted(values)}")
        wanted = seeds or len(values[metrics[0]])
        if not wanted or len(values[metric]) != wanted:
            raise ValueError(f"{name} {metric} must have {max(wanted, 1)} seeds, got {len(values[metric])}")
        for value in values[metric]:
            if not 0 <= value <= 100:
                raise ValueError(f"{name} {metric} must be in [0, 100] percent, got {value}")
