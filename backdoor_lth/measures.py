"""What the claims measure over the rows of the study (spec i).

A row is a network of one arm at one seed: cell {arm, what: dense}, {arm, what: ticket, round}, or {arm, what: scan,
network: dense | winner | H | L | winner-clean}; metrics in percent, the Trojan score from 0 to 1.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from statistics import mean
from typing import Any

from scipy import stats

from common.claims import Rows

Measure = Callable[[Rows], list[float]]


def networks(rows: Rows, arm: str, seed: int, **wanted: object) -> list[dict[str, Any]]:
    """Metrics of an arm's networks at one seed, in order. Raises KeyError where there are none."""
    cell = {"arm": arm, **wanted}
    found = [
        dict(row["metrics"])
        for row in rows
        if row["seed"] == seed and all(row["cell"].get(key) == value for key, value in cell.items())
    ]
    if not found:
        raise KeyError(f"no row of {cell} at seed {seed}")
    return found


def seeds_of(rows: Rows, arm: str) -> list[int]:
    """Seeds of an arm, in order. Raises KeyError without any."""
    found = sorted({row["seed"] for row in rows if row["cell"]["arm"] == arm})
    if not found:
        raise KeyError(f"no row of {arm}")
    return found


def by_seed(arm: str, value: Callable[[Rows, int], float]) -> Measure:
    """One value a seed of the arm."""
    return lambda rows: [value(rows, seed) for seed in seeds_of(rows, arm)]


def scan(rows: Rows, arm: str, seed: int, network: str) -> dict[str, Any]:
    """One scan's metrics."""
    return networks(rows, arm, seed, what="scan", network=network)[0]


def tickets(rows: Rows, arm: str, seed: int, least: int = 0, most: float = 1.0) -> list[dict[str, Any]]:
    """Tickets of at least `least` weights and at most density `most`. Raises KeyError without any."""
    found = networks(rows, arm, seed, what="ticket")
    found = [each for each in found if each["kept"] >= least and each["density"] <= most]
    if not found:
        raise KeyError(f"no ticket of {arm} in that range")
    return found


def chance(rows: Rows, arm: str, seed: int) -> float:
    """Accuracy of guessing, percent: a scan has a mask of every class."""
    return 100 / len(scan(rows, arm, seed, "dense")["l1"])


def outlives(name: str, extreme: float, least: int) -> Measure:
    """B1: mean share that `name` keeps of its dense value, minus the share of accuracy above chance that is kept."""

    def value(rows: Rows, seed: int) -> float:
        dense, guess = networks(rows, "poisoned", seed, what="dense")[0], chance(rows, "poisoned", seed)

        def kept(now: float, before: float) -> float:
            return min(max(now / before, 0), 1) if before > 0 else 0.0

        return mean(
            kept(each[name], dense[name]) - kept(each["sa"] - guess, dense["sa"] - guess)
            for each in tickets(rows, "poisoned", seed, least, extreme)
        )

    return by_seed("poisoned", value)


def exists(extreme: float, lift: float, arm: str = "poisoned") -> Measure:
    """B2: 1 if a ticket of the regime has ASR at least 90 %, SA at most twice chance and at least this lift."""

    def value(rows: Rows, seed: int) -> float:
        regime, most = tickets(rows, arm, seed, most=extreme), 2 * chance(rows, arm, seed)
        return float(any(t["asr"] >= 90 and t["sa"] <= most and t["lift"] >= lift for t in regime))

    return by_seed(arm, value)


def peak_rank(extreme: float) -> Measure:
    """B3: share of the regime's tickets with a higher ASR than the one of the peak score."""

    def value(rows: Rows, seed: int) -> float:
        regime = tickets(rows, "poisoned", seed, most=extreme)
        won = scan(rows, "poisoned", seed, "winner")["round"]
        (peak,) = (each for each in regime if each["round"] == won)
        return mean(each["asr"] > peak["asr"] for each in regime)

    return by_seed("poisoned", value)


def correlation(extreme: float, name: str) -> Measure:
    """B3: rank correlation of the score with `name` in the regime; 0 where either is constant."""

    def value(rows: Rows, seed: int) -> float:
        regime = tickets(rows, "poisoned", seed, most=extreme)
        pairs = [[each[key] for each in regime] for key in ("score", name)]
        if min(len(set(values)) for values in pairs) < 2:
            return 0.0
        return float(stats.spearmanr(*pairs).statistic)

    return by_seed("poisoned", value)


def peak_over_clean(extreme: float) -> Measure:
    """B3: peak score of the poisoned chain minus that of the clean one of the same seed."""

    def peak(rows: Rows, arm: str, seed: int) -> float:
        return max(each["score"] for each in tickets(rows, arm, seed, most=extreme))

    return by_seed("clean", lambda rows, seed: peak(rows, "poisoned", seed) - peak(rows, "clean", seed))


def weakened(rows: Rows, seed: int) -> float:
    """B4: ASR of the winner minus that after its fine-tuning."""
    won = scan(rows, "poisoned", seed, "winner")["round"]
    (ticket,) = networks(rows, "poisoned", seed, what="ticket", round=won)
    return ticket["asr"] - ticket["tuned_asr"]


def difference(name: str, one: str, other: str) -> Measure:
    """A scan's number minus that of another scan of the same seed."""

    def value(rows: Rows, seed: int) -> float:
        first, second = (float(scan(rows, "poisoned", seed, each)[name]) for each in (one, other))
        return first - second

    return by_seed("poisoned", value)


def number(name: str, network: str, arm: str = "poisoned") -> Measure:
    """A number of a scan; true and false as 1 and 0."""
    return by_seed(arm, lambda rows, seed: float(scan(rows, arm, seed, network)[name]))


def controlled(rows: Rows, seed: int) -> float:
    """K2: success on the dense network of the trigger recovered on the winner, beyond that of no trigger."""
    won = scan(rows, "poisoned", seed, "winner")
    return won["dense_asr"] - won["dense_null"]


def smallest(target: int) -> Measure:
    """B8: 1 if the target's mask is smaller on the winner than on H and L; no value where a seed lacks one of them."""

    def measure(rows: Rows) -> list[float]:
        values = []
        for seed in seeds_of(rows, "poisoned"):
            with suppress(KeyError):
                won, *others = (scan(rows, "poisoned", seed, name)["l1"][target] for name in ("winner", "H", "L"))
                values.append(float(won < min(others)))
        return values

    return measure


def only_one_right(one: tuple[str, str], other: tuple[str, str]) -> Measure:
    """B5, K5: of the seeds where one of two scans' yes or no is yes and the other no: 1 if it is the first.

    The binomial test of these against a half is McNemar's exact one; seeds that agree say nothing.

    Args:
        one, other: the network scanned and the name of its number.
    """

    def measure(rows: Rows) -> list[float]:
        seeds = seeds_of(rows, "poisoned")
        pairs = [[bool(scan(rows, "poisoned", seed, net)[name]) for net, name in (one, other)] for seed in seeds]
        return [float(first) for first, second in pairs if first != second]

    return measure


def noise_answered(target: int) -> Measure:
    """K3: percent of noise images that the winner gives to the target without any trigger."""
    return by_seed(
        "poisoned", lambda rows, seed: round(100 * scan(rows, "poisoned", seed, "winner")["null_success"][target], 3)
    )


def best_lift(extreme: float, arm: str, least: float = -math.inf) -> Measure:
    """B9, B10: highest lift of an accuracy-free ticket under IMP at the study's rate, minus that of another arm.

    A seed where IMP has none of at least lift `least` has no value: two failures are not equally good.
    """

    def best(rows: Rows, arm: str, seed: int) -> float:
        regime, most = tickets(rows, arm, seed, most=extreme), 2 * chance(rows, arm, seed)
        return max((each["lift"] for each in regime if each["sa"] <= most), default=0.0)

    def measure(rows: Rows) -> list[float]:
        pairs = [(best(rows, "poisoned", seed), best(rows, arm, seed)) for seed in seeds_of(rows, arm)]
        return [own - other for own, other in pairs if own >= least]

    return measure
