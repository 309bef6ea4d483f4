"""The paper's claims over the rows of the study (arXiv 2206.04762; spec b and i).

A row is one transferred ticket: cell {regime, fraction, draw, transfer, ticket, level, sparsity}, seed, metrics sa and
ra in percent; or one pair of masks: cell {pair, level}, metrics iou and the levels of chance. Regimes of one seed share
initial weights, batches and subsets, so differences are paired; draws are averaged inside a seed.
"""

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from common.claims import Claim, Rows
from double_win_lth.matching import METRICS, DoubleWin, double_win
from double_win_lth.settings import Config

Measure = Callable[[Rows], list[float]]
WORDS = {
    "sa_std": "accuracy after standard transfer",
    "sa_adv": "accuracy after adversarial transfer",
    "ra_adv": "robust accuracy after adversarial transfer",
}
NO_NUMBER = "curves for ResNet-50, ImageNet to CIFAR-10/100; direction only, values not verified"


def fractions(rows: Rows) -> list[float]:
    """Those of the study, rising. Raises KeyError without any."""
    found = sorted({row["cell"]["fraction"] for row in rows if "fraction" in row["cell"]})
    if not found:
        raise KeyError("no rows of a transfer")
    return found


def seeds_of(rows: Rows) -> list[int]:
    """Seeds, in order."""
    return sorted({row["seed"] for row in rows})


def value(
    rows: Rows, seed: int, regime: str, fraction: float, metric: str, level: int = 0, ticket: str = "imp"
) -> float:
    """Mean over draws of a metric such as "ra_adv" (metric, then transfer). Raises KeyError where there is no row."""
    name, _, transfer = metric.partition("_")
    wanted = {"regime": regime, "fraction": fraction, "transfer": transfer, "ticket": ticket, "level": level}
    found = [
        row["metrics"][name]
        for row in rows
        if row["seed"] == seed and all(row["cell"].get(key) == item for key, item in wanted.items())
    ]
    if not found:
        raise KeyError(f"no row of {wanted} at seed {seed}")
    return mean(found)


def levels_of(rows: Rows, regime: str, fraction: float) -> dict[int, float]:
    """Sparsity of each IMP level above 0 that a regime has at a fraction."""
    cells = [row["cell"] for row in rows if row["cell"].get("ticket") == "imp"]
    found = {
        cell["level"]: cell["sparsity"]
        for cell in cells
        if cell["level"] and (cell["regime"], cell["fraction"]) == (regime, fraction)
    }
    return dict(sorted(found.items()))


def compare(
    rows: Rows, regime: str, fraction: float, seeds: Sequence[int], tol: Any, reference: str = "", among: Any = None
) -> DoubleWin:
    """Tickets of a regime against its own dense network, or that of `reference`; `among`: these levels only."""

    def values(of: str, level: int) -> dict[str, list[float]]:
        return {m: [value(rows, seed, of, fraction, m, level) for seed in seeds] for m in METRICS}

    levels = levels_of(rows, regime, fraction)
    tickets = {s: values(regime, level) for level, s in levels.items() if among is None or level in among}
    return double_win(values(reference or regime, 0), tickets, tol=tol)


def loss_of_ticket(metric: str, which: int, level: int) -> Measure:
    """C1, per seed: ADV ticket minus its dense network, at one of the larger fractions (-1 is all data)."""

    def measure(rows: Rows) -> list[float]:
        larger = fractions(rows)[1:]
        if len(larger) < -which:
            raise KeyError("no such fraction")
        fraction = larger[which]
        return [
            value(rows, seed, "adv", fraction, metric, level) - value(rows, seed, "adv", fraction, metric)
            for seed in seeds_of(rows)
        ]

    return measure


def sparser(regime: str, margin: float) -> Measure:
    """C2, per seed: extreme double-win sparsity of `regime` minus that of STD, over the levels of both, percent."""

    def measure(rows: Rows) -> list[float]:
        least = fractions(rows)[0]
        both = set(levels_of(rows, regime, least)) & set(levels_of(rows, "std", least))
        found = []
        for seed in seeds_of(rows):
            ours, theirs = (compare(rows, each, least, [seed], margin, among=both) for each in (regime, "std"))
            found.append(100 * ((ours.extreme_sparsity or 0.0) - (theirs.extreme_sparsity or 0.0)))
        return found

    return measure


def gap(rows: Rows, seed: int, fraction: float, level: int, metric: str = "ra_adv") -> float:
    """ADV minus STD at one level, points."""
    return value(rows, seed, "adv", fraction, metric, level) - value(rows, seed, "std", fraction, metric, level)


def mean_gap(metric: str) -> Measure:
    """C3, per seed: ADV minus STD, mean over the levels above 0 that both have at the least fraction."""

    def measure(rows: Rows) -> list[float]:
        least = fractions(rows)[0]
        both = set(levels_of(rows, "adv", least)) & set(levels_of(rows, "std", least))
        if not both:
            raise KeyError("no level of both regimes")
        return [mean(gap(rows, seed, least, level, metric) for level in both) for seed in seeds_of(rows)]

    return measure


def scarcity(level: int) -> Measure:
    """C4, per seed: gap at the least fraction minus gap at the largest. KeyError where there is but one."""

    def measure(rows: Rows) -> list[float]:
        least, most = fractions(rows)[0], fractions(rows)[-1]
        if least == most:
            raise KeyError("but one fraction")
        return [gap(rows, seed, least, level) - gap(rows, seed, most, level) for seed in seeds_of(rows)]

    return measure


def amplification(level: int) -> Measure:
    """C5, per seed: gap at this level minus gap of the dense networks, least fraction."""
    return lambda rows: [
        gap(rows, seed, fractions(rows)[0], level) - gap(rows, seed, fractions(rows)[0], 0) for seed in seeds_of(rows)
    ]


def beats(baseline: str, level: int) -> Measure:
    """C6, per seed: RA of the ADV IMP ticket minus that of a baseline of equal sparsity, least fraction."""

    def measure(rows: Rows) -> list[float]:
        least = fractions(rows)[0]
        return [
            value(rows, seed, "adv", least, "ra_adv", level)
            - value(rows, seed, "adv", least, "ra_adv", level, baseline)
            for seed in seeds_of(rows)
        ]

    return measure


def overlap(rows: Rows, seed: int, pair: str, level: int) -> float:
    """IoU of a pair of regimes such as "fast-adv". Raises KeyError where it was not measured."""
    wanted = {"pair": pair, "level": level}
    for row in rows:
        if row["seed"] == seed and all(row["cell"].get(key) == item for key, item in wanted.items()):
            return row["metrics"]["iou"]
    raise KeyError(f"no masks of {wanted} at seed {seed}")


def alike(level: int) -> Measure:
    """C7, per seed: IoU of the two robust regimes minus their mean IoU with the standard one."""
    return lambda rows: [
        overlap(rows, seed, "fast-adv", level)
        - mean((overlap(rows, seed, "std-fast", level), overlap(rows, seed, "std-adv", level)))
        for seed in seeds_of(rows)
    ]


def claims(config: Config) -> list[Claim]:
    """C1 to C7 at the levels and margin of the study."""
    study, keeps = config.study, 1 - config.prune.rate
    middle, high = (f"{100 * (1 - keeps**level):.2f} %" for level in (study.middle, study.high))
    sparsities = "extreme sparsity {} (CIFAR-10 / CIFAR-100, ResNet-50 from ImageNet)"
    found = [
        Claim(
            id=f"C1{letter}",
            statement=f"Double-win tickets exist: ADV ticket of {middle} against its dense network, {words}, {amount}",
            source="abstract",
            paper=sparsities.format("STD 89.26 / 73.79 %, FAST 89.26 / 79.03 %, ADV 91.41 / 83.22 %"),
            measure=loss_of_ticket(metric, which, study.middle),
            threshold=-study.margin,
        )
        for letter, (metric, words), (which, amount) in (
            (letter, item, amount)
            for letter, (item, amount) in zip(
                "abcdef",
                [(i, a) for a in ((-2, "less data"), (-1, "all data")) for i in WORDS.items()],
                strict=True,
            )
        )
    ]
    pairs = (("C2a", "adv", "ADV", "91.41 / 83.22 %"), ("C2b", "fast", "FAST", "89.26 / 79.03 %"))
    found += [
        Claim(
            id=name,
            statement=f"Robust pre-training gives sparser double-win tickets: {title} minus STD, least data",
            source="abstract",
            paper=sparsities.format(f"{title} {numbers} against STD 89.26 / 73.79 %"),
            measure=sparser(regime, study.margin),
            unit="points of sparsity",
        )
        for name, regime, title, numbers in pairs
    ]
    found += [
        Claim(
            id=f"C3{letter}",
            statement=f"At equal sparsity ADV tickets beat STD tickets: {WORDS[metric]}, least data, mean of levels",
            source="Sec. 4",
            paper=NO_NUMBER,
            measure=mean_gap(metric),
        )
        for letter, metric in zip("abc", ("ra_adv", "sa_adv", "sa_std"), strict=True)
    ]
    found += [
        Claim(
            id="C4",
            statement=f"Data efficiency: ADV's lead in robust accuracy at {high} is larger with least data than all",
            source="title, Sec. 4",
            paper=f"{NO_NUMBER}; 1 % and 10 % of the data",
            measure=scarcity(study.high),
        ),
        Claim(
            id="C5",
            statement=f"Amplification: ADV's lead in robust accuracy is larger at {high} than dense, least data",
            source="abstract",
            paper=NO_NUMBER,
            measure=amplification(study.high),
        ),
    ]
    baselines = (("a", "random", "random pruning", 0.0), ("b", "reinit", "its mask on new random weights", 0.0))
    found += [
        Claim(
            id=f"C6{letter}",
            statement=f"ADV IMP ticket of {high} against {words}: robust accuracy, least data",
            source="Sec. 4",
            paper="IMP above (recalled, unverified, no number)",
            measure=beats(baseline, study.high),
            threshold=threshold,
        )
        for letter, baseline, words, threshold in (*baselines, ("c", "omp", "one-shot pruning (not worse)", -2.0))
    ]
    found += [
        Claim(
            id=f"C7{letter}",
            statement=f"Masks of {sparsity}: IoU of FAST and ADV minus their mean IoU with STD",
            source="Sec. 4",
            paper="robust regimes more alike (recalled, unverified, no number)",
            measure=alike(level),
            unit="IoU",
        )
        for letter, level, sparsity in (("a", study.middle, middle), ("b", study.high, high))
    ]
    return found
