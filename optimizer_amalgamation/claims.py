"""The paper's claims over the rows of the study (arXiv 2203.06474; spec b and i).

Rows: cell {arm, what, by, problem}; what is race, training or memory. A race's measures are lists of R lists of J
numbers: log losses of replicate i's trainings from the starts i J to i J + J - 1. All optimizers race from the same
starts, so differences are paired: with the pool by start, between learnt optimizers by replicate too, as replicates of
one number begin meta-training with the same weights.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean, median
from typing import Any

import numpy as np

from common.claims import Claim, Rows
from optimizer_amalgamation.measures import equal_spread

Measure = Callable[[Rows], list[float]]
SIMILAR = 0.05  # in log loss
COLLAPSED = -0.1  # mean meta loss of an unroll that brings next to nothing
NOISE = (0.0, 0.1, 0.3, 1.0)
FEW_POINTS = "no number, a figure: Train CNN on MNIST, 8 replicates x 10 evaluations of 25 epochs"
STABLER = "spread falls until about 1e-3; min-max, small pool, 8 replicates"
LEARNT = ("choice-large", "choice-small", "minmax", "mean", "rnnprop", "stronger", "original", "scale")


def rows_of(rows: Rows, **cell: Any) -> list[Any]:
    """Rows with these settings, by seed. Raises KeyError without any."""
    found = [row for row in rows if all(row["cell"].get(key) == value for key, value in cell.items())]
    if not found:
        raise KeyError(f"no rows of {cell}")
    return sorted(found, key=lambda row: row["seed"])


def raced(rows: Rows, by: str, problem: str, measure: str = "val_best") -> list[list[float]]:
    """R lists of J numbers of an optimizer, the seeds' replicates one behind the other."""
    return [row for one in rows_of(rows, what="race", by=by, problem=problem) for row in one["metrics"][measure]]


def over_oracle(by: str, problem: str) -> Measure:
    """B3: per replicate, mean log loss minus that of the pool's best member from the same starts."""

    def measure(rows: Rows) -> list[float]:
        (pool,) = rows_of(rows, what="race", problem=problem, oracle=True)[:1]
        theirs = [value for (value,) in pool["metrics"]["val_best"]]
        ours = raced(rows, by, problem)
        size = len(ours[0])
        if len(ours) == 1:  # shipped weights: one replicate, by start
            return [a - b for a, b in zip(ours[0], theirs, strict=False)]
        fitting = len(theirs) // size
        return [mean(row) - mean(theirs[i * size : (i + 1) * size]) for i, row in enumerate(ours[:fitting])]

    return measure


def over(by: str, reference: str, problem: str, measure_name: str = "val_best") -> Measure:
    """B1, B2: per replicate, the difference of two learnt optimizers' mean log losses."""

    def measure(rows: Rows) -> list[float]:
        ours, theirs = (raced(rows, name, problem, measure_name) for name in (by, reference))
        return [mean(a) - mean(b) for a, b in zip(ours, theirs, strict=False)]

    return measure


def over_all(by: str, reference: str) -> Measure:
    """B2, larger scales: the same, mean over all problems that both have raced on."""

    def measure(rows: Rows) -> list[float]:
        problems = {row["cell"]["problem"] for row in rows_of(rows, what="race", by=by)}
        problems &= {row["cell"]["problem"] for row in rows_of(rows, what="race", by=reference)}
        return [mean(values) for values in zip(*(over(by, reference, p)(rows) for p in sorted(problems)), strict=True)]

    return measure


def unsteadiness(by: str) -> Measure:
    """B4: per problem, mean instability over the median of the pool's members, minus 1."""

    def measure(rows: Rows) -> list[float]:
        found = []
        for row in rows_of(rows, what="race", by=by):
            pool = rows_of(rows, arm="pool", problem=row["cell"]["problem"])
            typical = median(float(np.mean(one["metrics"]["instability"])) for one in pool)
            found.append(float(np.mean(row["metrics"]["instability"])) / typical - 1)
        return found

    return measure


def trained(rows: Rows, metric: str, **cell: Any) -> list[Any]:
    """A metric of a training, one a replicate."""
    return [value for row in rows_of(rows, what="training", **cell) for value in row["metrics"][metric]]


def recent(magnitude: float) -> Measure:
    """B5: mean meta loss of the last 20 meta-steps under relative noise, one a replicate."""
    return lambda rows: trained(rows, "recent", arm="noise", kind="relative", magnitude=magnitude)


def diverged(magnitude: float) -> Measure:
    """B5: the same; nothing where a replicate without noise has not learnt either."""

    def measure(rows: Rows) -> list[float]:
        return recent(magnitude)(rows) if max(recent(0.0)(rows)) < COLLAPSED else []

    return measure


def least_rise(rows: Rows) -> list[float]:
    """B5: per replicate, the smallest rise of that loss from one magnitude to the next."""
    losses = [recent(magnitude)(rows) for magnitude in NOISE]
    return [min(b - a for a, b in pairwise(one)) for one in zip(*losses, strict=True)]


def log_spread(kind: str, magnitude: float) -> Measure:
    """B5, B6: log ratio of the spread over replicates under noise to that without: its jackknife pseudo-values."""

    def measure(rows: Rows) -> list[float]:
        samples = []
        for size in (magnitude, 0.0):
            found = rows_of(rows, what="race", arm="noise", kind=kind, magnitude=size)
            samples.append(np.array([mean(row) for one in found for row in one["metrics"]["train_last"]]))
        noisy, plain = samples
        whole, count = np.log(noisy.std(ddof=1) / plain.std(ddof=1)), len(noisy)
        without = [np.log(np.delete(noisy, i).std(ddof=1) / np.delete(plain, i).std(ddof=1)) for i in range(count)]
        return [float(count * whole - (count - 1) * one) for one in without]

    return measure


def lead_of_one_teacher(rows: Rows) -> list[float]:
    """B9: per replicate, the largest share of steps with one teacher nearest: mean minus max."""
    by_mean = trained(rows, "nearest", arm="nearest", reduce="mean")
    by_max = trained(rows, "nearest", arm="noise", kind="relative", magnitude=0.0)
    return [max(a) - max(b) for a, b in zip(by_mean, by_max, strict=True)]


def memory_growth(rows: Rows) -> list[float]:
    """B9: peak memory with two and six teachers over that with one."""
    found = [rows_of(rows, what="memory", teachers=count)[0]["metrics"]["megabytes"] for count in (1, 2, 6)]
    return [found[1] / found[0], found[2] / found[0]]


def evaluation_spread(rows: Rows) -> list[float]:
    """B8: per problem, p of Levene's test over the optimizers' deviations from their replicates' means."""
    problems = sorted({row["cell"]["problem"] for row in rows_of(rows, what="race")})
    found = []
    for problem in problems:
        groups = []
        for by in LEARNT:
            try:
                values = raced(rows, by, problem)
            except KeyError:
                continue
            groups.append([value - mean(row) for row in values for value in row])
        if len(groups) > 1:
            found.append(equal_spread(*groups))
    return found


def _against_the_oracle() -> list[Claim]:
    words = {
        "choice-large": "The choice policy",
        "minmax": "Min-max amalgamation",
        "shipped-choice-large": "The shipped student of the choice policy",
    }
    found = []
    arms = [(by, problem) for by in words for problem in ("tiny14", "small14")]
    for letter, (by, problem) in zip("abcdef", arms, strict=True):
        found.append(
            Claim(
                id=f"B3{letter}",
                statement=f"{words[by]} is no worse than the pool's best member on {problem}",
                source="Fig. 4",
                paper=f"similar or better; {FEW_POINTS}",
                measure=over_oracle(by, problem),
                threshold=SIMILAR,
                direction="below",
                unit="log loss",
            )
        )
    return found


CLAIMS: list[Claim] = [
    *(
        Claim(
            id=f"B1{letter}",
            statement=f"Optimal choice beats {name} on small14",
            source="Fig. 1",
            paper=f"better; {FEW_POINTS}",
            measure=over("choice-large-student", reference, "small14"),
            direction="below",
            unit="log loss (not judged at demo scale)",
        )
        for letter, name, reference in (("a", "the mean", "mean"), ("b", "min-max", "minmax"))
    ),
    *(
        Claim(
            id=f"B2{letter}",
            statement=f"Min-max amalgamation beats RNNProp, which has no teachers, on {problem}",
            source="Fig. 2",
            paper=f"better, significantly; {FEW_POINTS}",
            measure=over("minmax", "rnnprop", problem),
            direction="below",
            unit="log loss",
        )
        for letter, problem in (("a", "tiny14"), ("b", "small14"))
    ),
    *(
        Claim(
            id=f"B2{letter}",
            statement=f"The student of the large choice beats {reference}, mean over all problems",
            source="Fig. 2",
            paper=f"better on all problems; {FEW_POINTS}",
            measure=over_all("choice-large-student", reference),
            direction="below",
            unit="log loss (not judged at demo scale)",
        )
        for letter, reference in zip("cdef", ("original", "rnnprop", "scale", "stronger"), strict=True)
    ),
    *_against_the_oracle(),
    Claim(
        id="B4",
        statement="The amalgamated optimizer is as steady as the pool's median: instability over it, minus 1",
        source="Fig. 3, 5",
        paper="meets or exceeds the best analytical ones",
        measure=unsteadiness("choice-large-student"),
        direction="below",
        unit="by problem (not judged at demo scale)",
    ),
    Claim(
        id="B5a",
        statement="More noise on the weights, worse meta-training: least rise of the meta loss over 0, .1, .3, 1",
        source="Fig. 6",
        paper="no number",
        measure=least_rise,
        unit="log loss",
    ),
    Claim(
        id="B5b",
        statement="Relative noise of 1 makes every replicate diverge: mean meta loss of the last 20 steps",
        source="Fig. 6",
        paper="all diverge at .1, after the whole curriculum",
        measure=diverged(1.0),
        threshold=COLLAPSED,
        interval="worst",
        unit="log loss",
    ),
    Claim(
        id="B5c",
        statement="Relative noise of .1 already does",
        source="Fig. 6",
        paper="all diverge at .1, after the whole curriculum",
        measure=diverged(0.1),
        threshold=COLLAPSED,
        interval="worst",
        unit="log loss",
    ),
    *(
        Claim(
            id=f"{name}",
            statement=f"{words} of 1e-3 makes meta-training steadier: log ratio of the spread over replicates",
            source="Fig. 6",
            paper=STABLER,
            measure=log_spread(kind, 1e-3),
            direction="below",
            unit="(not judged at demo scale)",
        )
        for name, kind, words in (("B5d", "relative", "Relative noise"), ("B6", "cgd", "Adversarial noise"))
    ),
    Claim(
        id="B8",
        statement="Repeated evaluations spread alike for all learnt optimizers: p of Levene's test, by problem",
        source="App. E.1",
        paper="about the same",
        measure=evaluation_spread,
        threshold=0.05,
        interval="worst",
        unit="p (a small one refutes; a large one proves nothing)",
    ),
    Claim(
        id="B9a",
        statement="The mean sticks to one teacher more than the maximum: largest share of steps with one nearest",
        source="Sec. 3.3",
        paper="an argument, no number",
        measure=lead_of_one_teacher,
        unit="share of steps",
    ),
    Claim(
        id="B9b",
        statement="Teachers that leave no graph (spec h3) cost no memory: peak with two and six over one",
        source="Sec. 3.3",
        paper="in proportion to their number, which is what speaks for optimal choice",
        measure=memory_growth,
        threshold=1.05,
        direction="below",
        interval="worst",
        unit="times",
    ),
]


def optimizers(rows: Rows, problem: str) -> Sequence[str]:
    """Names of those that raced on a problem, in order."""
    return list(dict.fromkeys(row["cell"]["by"] for row in rows_of(rows, what="race", problem=problem)))
