"""What the claims measure over the rows of the study (spec b and i).

Rows: cell {arm, what, by, problem}; what is race, training or memory. A race's measures are lists of R lists of J
numbers: log losses of replicate i's trainings from the starts i J to i J + J - 1. All optimizers race from the same
starts, so differences are paired: with the pool by start, between learnt optimizers by replicate of one seed too, as
replicates of one number begin meta-training with the same weights. A seed changes no start: the pool and shipped
weights, one replicate each, race alike at every one.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean, median
from typing import Any

import numpy as np
from scipy.linalg import helmert

from common.claims import Rows, bounds
from optimizer_amalgamation.measures import equal_spread, random_effects
from optimizer_amalgamation.pool_search import TRUE_ADAM

Measure = Callable[[Rows], list[float]]
SIMILAR = 0.05  # in log loss
COLLAPSED = -0.1  # mean meta loss of an unroll that brings next to nothing
SHARE = 2 / 3  # of the problems
DEVIATIONS = 20
NOISE = (0.0, 0.1, 0.3, 1.0)
CHOICES = ("choice-large", "choice-small", "choice-large-student", "choice-small-student")
LEARNT = (*CHOICES, "minmax", "mean", "rnnprop", "stronger", "original", "scale")


def rows_of(rows: Rows, **cell: Any) -> list[Any]:
    """Rows with these settings, by seed. Raises KeyError without any."""
    found = [row for row in rows if all(row["cell"].get(key) == value for key, value in cell.items())]
    if not found:
        raise KeyError(f"no rows of {cell}")
    return sorted(found, key=lambda row: row["seed"])


def by_seed(rows: Rows, metric: str, **cell: Any) -> dict[int, list[Any]]:
    """A metric of the rows with these settings: of every seed its replicates' values."""
    return {row["seed"]: row["metrics"][metric] for row in rows_of(rows, **cell)}


def together(*found: dict[int, list[Any]]) -> list[tuple[Any, ...]]:
    """Of each replicate its values in all of `found`; without the seeds that one of them lacks."""
    seeds = [seed for seed in found[0] if all(seed in other for other in found)]
    return [values for seed in seeds for values in zip(*(one[seed] for one in found), strict=False)]


def raced(rows: Rows, by: str, problem: str, measure: str = "val_best") -> list[list[float]]:
    """R lists of J numbers of an optimizer, the seeds' replicates one behind the other."""
    return [row for own in by_seed(rows, measure, what="race", by=by, problem=problem).values() for row in own]


def problems_of(rows: Rows) -> list[str]:
    """All problems, as the study has them: that of meta-training first."""
    return list(dict.fromkeys(row["cell"]["problem"] for row in rows_of(rows, what="race")))


def at(rows: Rows, place: int | str) -> str:
    """The problem at this place, or of this name. Raises KeyError where there are fewer, or none."""
    problems = problems_of(rows)
    if isinstance(place, str):
        if place not in problems:
            raise KeyError(f"no problem {place}")
        return place
    if place >= len(problems):
        raise KeyError(f"no problem number {place}")
    return problems[place]


def oracles(rows: Rows, problem: str) -> list[float]:
    """Log loss of the pool's best member from each start."""
    (pool,) = rows_of(rows, what="race", problem=problem, oracle=True)[:1]
    return [value for (value,) in pool["metrics"]["val_best"]]


def over_oracle(by: str, place: int | str) -> Measure:
    """B3: per replicate, mean log loss minus that of the pool's best member from the same starts."""

    def measure(rows: Rows) -> list[float]:
        problem = at(rows, place)
        theirs, races = oracles(rows, problem), by_seed(rows, "val_best", what="race", by=by, problem=problem)
        first = next(iter(races.values()))
        if len(first) == 1:  # shipped weights: one replicate, by start; the same at every seed
            return [a - b for a, b in zip(first[0], theirs, strict=False)]
        size = len(first[0])  # every seed's replicates race from the same starts
        return [
            mean(row) - mean(theirs[i * size : (i + 1) * size]) for own in races.values() for i, row in enumerate(own)
        ]

    return measure


def best_over_oracle(by: str) -> Measure:
    """B3: the upper bound under which the best replicate lies behind the oracle on two thirds of the problems.

    The replicate is the best in the validation of its meta-training; its difference to the oracle on a problem has
    one-sided 95 % bounds over starts. Where fewer problems are shown to be non-inferior, but not so many inferior that
    two thirds cannot be, the one number has no bounds, and nothing is decided.
    """

    def measure(rows: Rows) -> list[float]:
        lows, highs, seed, best = [], [], rows_of(rows, what="race", by=by)[0]["seed"], 0
        if not by.startswith("shipped-"):
            validations = by_seed(rows, "validations", what="training", by=by)
            _, seed, best = min((value, seed, i) for seed, own in validations.items() for i, value in enumerate(own))
        for problem in {row["cell"]["problem"] for row in rows_of(rows, what="race", by=by)}:
            try:
                theirs = oracles(rows, problem)
            except KeyError:  # the pool does not race with private gradients
                continue
            ours = by_seed(rows, "val_best", what="race", by=by, problem=problem)[seed][best]
            first = best * len(ours)
            away = [a - b for a, b in zip(ours, theirs[first : first + len(ours)], strict=True)]
            _, low, high = bounds(away, "t")
            lows.append(low)
            highs.append(high)
        if not highs:
            raise KeyError(f"no problem on which {by} and the pool raced")
        wanted = math.ceil(SHARE * len(highs) - 1e-9)
        upper, lower = sorted(highs)[:wanted], sorted(lows)[:wanted]
        return upper if upper[-1] < SIMILAR else lower if lower[-1] >= SIMILAR else upper[-1:]

    return measure


def difference(rows: Rows, by: str, reference: str, problem: str) -> list[float]:
    """Per replicate, the difference of two learnt optimizers' mean log losses."""
    ours, theirs = (by_seed(rows, "val_best", what="race", by=name, problem=problem) for name in (by, reference))
    return [mean(a) - mean(b) for a, b in together(ours, theirs)]


def over(by: str, reference: str, place: int) -> Measure:
    """B1, B2: the same on the problem at this place."""
    return lambda rows: difference(rows, by, reference, at(rows, place))


def over_all(by: str, reference: str) -> Measure:
    """B2, larger scales: the same, mean over all problems that both have raced on."""

    def measure(rows: Rows) -> list[float]:
        problems = {row["cell"]["problem"] for row in rows_of(rows, what="race", by=by)}
        problems &= {row["cell"]["problem"] for row in rows_of(rows, what="race", by=reference)}
        found = [difference(rows, by, reference, problem) for problem in sorted(problems)]
        return [mean(values) for values in zip(*found, strict=True)]

    return measure


def unsteadiness(by: str) -> Measure:
    """B4: per problem that the pool raced on too, mean instability over the median of its members, minus 1."""

    def measure(rows: Rows) -> list[float]:
        found = []
        pool = [row for row in rows_of(rows, arm="pool") if "warmup" not in row["cell"]]
        for row in rows_of(rows, what="race", by=by):
            problem = row["cell"]["problem"]
            own = [one for one in pool if one["cell"]["problem"] == problem and one["cell"]["by"] != TRUE_ADAM]
            if own:
                typical = median(float(np.mean(one["metrics"]["instability"])) for one in own)
                found.append(float(np.mean(row["metrics"]["instability"])) / typical - 1)
        return found

    return measure


def recent(rows: Rows, magnitude: float) -> dict[int, list[float]]:
    """B5: mean meta loss of the last 20 meta-steps under relative noise, of every seed one a replicate.

    It is measured while the noise acts, so that noise raises it whatever the student has learnt.
    """
    return by_seed(rows, "recent", what="training", arm="noise", kind="relative", magnitude=magnitude)


def diverged(magnitude: float) -> Measure:
    """B5: the same; nothing where a replicate without noise has not learnt either."""

    def measure(rows: Rows) -> list[float]:
        pairs = together(recent(rows, 0.0), recent(rows, magnitude))
        return [noisy for _, noisy in pairs] if all(plain < COLLAPSED for plain, _ in pairs) else []

    return measure


def least_rise(rows: Rows) -> list[float]:
    """B5: per replicate, the smallest rise of that loss from one magnitude to the next."""
    losses = together(*(recent(rows, magnitude) for magnitude in NOISE))
    return [min(b - a for a, b in pairwise(one)) for one in losses]


def log_spread(kind: str, magnitude: float) -> Measure:
    """B5, B6: log ratio of the spread over replicates under noise to that without: its jackknife pseudo-values.

    Of both spreads the evaluations' share is taken out; nothing where that leaves none.
    """

    def measure(rows: Rows) -> list[float]:
        noises: list[dict[str, Any]] = [{"kind": kind, "magnitude": magnitude}, {"magnitude": 0.0}]
        races = together(*(by_seed(rows, "train_last", what="race", arm="noise", **noise) for noise in noises))
        if not races:
            return []
        samples = [np.array(sample) for sample in zip(*races, strict=True)]
        count = len(samples[0])
        left = [[random_effects(np.delete(one, out, 0)).meta_sd for one in samples] for out in range(count)]
        spreads = [[random_effects(one).meta_sd for one in samples], *left]
        if not all(min(pair) > 0 for pair in spreads):
            return []
        whole, *without = (math.log(noisy / plain) for noisy, plain in spreads)
        return [count * whole - (count - 1) * one for one in without]

    return measure


def lead_of_one_teacher(rows: Rows) -> list[float]:
    """B9: per replicate, the largest share of steps with one teacher nearest: mean minus max."""
    by_mean = by_seed(rows, "nearest", what="training", arm="nearest", reduce="mean")
    by_max = by_seed(rows, "nearest", what="training", arm="noise", kind="relative", magnitude=0.0)
    return [max(a) - max(b) for a, b in together(by_mean, by_max)]


def memory_growth(rows: Rows) -> list[float]:
    """B9: peak memory with two and six teachers over that with one."""
    found = [rows_of(rows, what="memory", teachers=count)[0]["metrics"]["megabytes"] for count in (1, 2, 6)]
    return [found[1] / found[0], found[2] / found[0]]


def evaluation_spread(rows: Rows) -> list[float]:
    """B8: per problem, p of Levene's test over the optimizers' deviations within replicates.

    Of a replicate's J evaluations J - 1 deviations are independent: the Helmert contrasts, each with their variance.
    Optimizers with fewer than `DEVIATIONS` are left out: of so few no difference would be seen.
    """
    found = []
    for problem in problems_of(rows):
        groups = []
        for by in LEARNT:
            try:
                values = np.array(raced(rows, by, problem))
            except KeyError:
                continue
            contrasts = values @ helmert(values.shape[1]).T
            if contrasts.size >= DEVIATIONS:
                groups.append(contrasts)
        if len(groups) > 1:
            found.append(equal_spread(*groups))
    return found


def optimizers(rows: Rows, problem: str) -> Sequence[str]:
    """Names of those that raced on a problem, in order."""
    return list(dict.fromkeys(row["cell"]["by"] for row in rows_of(rows, what="race", problem=problem)))
