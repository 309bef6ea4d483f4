"""The paper's claims over the rows of the study (arXiv 2206.07311; spec b and i).

A row is one round of one chain: cell {regime, method, round, density, ...}, seed, metrics in percent. The dense
reference of a regime and seed is round 0 of plain IMP, trained without any regulariser. Where a claim speaks of the
best level, it is chosen on validation images and reported on test images, so that choosing does not flatter.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from scipy import stats

from certified_pruning.tickets import Record, matching
from common.claims import Claim, Rows, bounds

Row = Mapping[str, Any]
ADVERSARIAL, CERTIFIED = ("fgsm", "fgsm_gradalign"), ("crown_ibp", "fast_ibp")
CERTAIN = 1 - 1e-6  # a correlation of 1 has no z
CLEAN_TOLERANCE = 1.0  # points of clean accuracy a certified ticket may lose ("matching", spec c.10)
HELPED_SHARE = 2 / 3  # of the methods, for C3


def select(rows: Rows, regimes: Sequence[str] = ADVERSARIAL, methods: Sequence[str] = ()) -> list[Row]:
    """Rows of the first of these regimes that the study has, and of these methods if any are named."""
    regime = next((each for each in regimes if any(row["cell"]["regime"] == each for row in rows)), None)
    of_regime = [row for row in rows if row["cell"]["regime"] == regime]
    return [row for row in of_regime if not methods or row["cell"]["method"] in methods]


def by_seed(rows: Rows) -> dict[int, list[Row]]:
    """Rows grouped by seed, in the order of seeds."""
    return {seed: [row for row in rows if row["seed"] == seed] for seed in sorted({row["seed"] for row in rows})}


def dense(rows: Rows, regimes: Sequence[str] = ADVERSARIAL) -> Row:
    """The dense reference among one seed's rows. Raises KeyError without one."""
    for row in select(rows, regimes, ["imp"]):
        if row["cell"]["round"] == 0:
            return row
    raise KeyError(f"no dense row of imp under {regimes}")


def best_sparse(
    rows: Rows, methods: Sequence[str] = (), regimes: Sequence[str] = ADVERSARIAL, chosen_by: str = "val_verified"
) -> Row:
    """The sparse row that is best on validation images; of equals that of the latest round. Raises KeyError."""
    sparse = [row for row in select(rows, regimes, methods) if row["cell"]["density"] < 1]
    if not sparse:
        raise KeyError(f"no sparse row of {methods} under {regimes}")
    return max(sparse, key=lambda row: (row["metrics"][chosen_by], row["cell"]["round"]))


def gain(
    metric: str,
    methods: Sequence[str] = ("imp", "imp+nrs"),
    regimes: Sequence[str] = ADVERSARIAL,
    chosen_by: str = "val_verified",
) -> Callable[[Rows], list[float]]:
    """Per seed: `metric` of the best sparse level of `methods` minus that of the dense reference."""

    def measure(rows: Rows) -> list[float]:
        found = by_seed(select(rows, regimes)).values()
        pairs = [(best_sparse(each, methods, regimes, chosen_by), dense(each, regimes)) for each in found]
        return [ticket["metrics"][metric] - reference["metrics"][metric] for ticket, reference in pairs]

    return measure


def share_of_methods_that_help(rows: Rows) -> list[float]:
    """Share of the methods whose gain in verified accuracy has a lower 95 % bound above 0.

    One statement about all seeds together, given once a seed where it is decided (enough methods help for certain, or
    too many for certain do not); else given once, by which no verdict is made.
    """
    adversarial = select(rows)
    methods = sorted({row["cell"]["method"] for row in adversarial})
    if not methods:
        raise KeyError("no row of adversarial training")
    bounded = [bounds(gain("verified", [method])(adversarial), "t") for method in methods]
    share, possible = (mean(bound[side] > 0 for bound in bounded) for side in (1, 2))
    decided = share >= HELPED_SHARE - 1e-9 or possible < HELPED_SHARE - 1e-9
    return [share] * (len(by_seed(adversarial)) if decided else 1)


def regulariser_at_equal_levels(rows: Rows) -> list[float]:
    """Per seed: verified accuracy of IMP+NRS minus that of IMP, mean over the sparse rounds that both have."""
    found = []
    for of_seed in by_seed(select(rows)).values():
        plain, stable = (
            {row["cell"]["round"]: row["metrics"]["verified"] for row in select(of_seed, methods=[method])}
            for method in ("imp", "imp+nrs")
        )
        equal = [number for number in plain if number > 0 and number in stable]
        if not equal:
            raise KeyError("no sparse round of both imp and imp+nrs")
        found.append(sum(stable[number] - plain[number] for number in equal) / len(equal))
    return found


def regulariser_against_the_best_other(rows: Rows) -> list[float]:
    """Per seed: verified accuracy of the best level of IMP+NRS minus that of the best level of any other pruner."""
    found = []
    for of_seed in by_seed(select(rows)).values():
        others = sorted({row["cell"]["method"] for row in of_seed} - {"imp+nrs", "nrs"})
        ours, theirs = best_sparse(of_seed, ["imp+nrs"]), best_sparse(of_seed, others)
        found.append(ours["metrics"]["verified"] - theirs["metrics"]["verified"])
    return found


def ticket_densities(
    rows: Rows, tolerance: float = CLEAN_TOLERANCE, clean: str = "test_accuracy", verified: str = "verified"
) -> set[float]:
    """Densities of plain IMP, in one seed's rows, that match dense: clean accuracy within `tolerance`, verified >=."""
    records = [
        Record(row["cell"]["density"], row["metrics"][clean], row["metrics"][verified])
        for row in select(rows, methods=["imp"])
    ]
    return {record.density for record in matching(records, tolerance, 0.0)}


def ticket_level(rows: Rows, tolerance: float = CLEAN_TOLERANCE) -> float:
    """The density that on validation images matches dense in most seeds, of equals the sparsest; -1 without any."""
    seeds = by_seed(select(rows)).values()
    tickets = [ticket_densities(of_seed, tolerance, "val_accuracy", "val_verified") for of_seed in seeds]
    levels = sorted(set().union(*tickets))
    return max(levels, key=lambda level: sum(level in each for each in tickets), default=-1.0)


def certified_ticket(rows: Rows, tolerance: float = CLEAN_TOLERANCE) -> list[float]:
    """Per seed 1 or 0: does the level chosen on validation match dense on test images?

    tolerance 0 is the strict sense of a ticket (spec c.10). KeyError without sparse rows, and where nothing of the
    dense net is verified, which any net matches.
    """
    found = [of_seed for of_seed in by_seed(select(rows)).values() if best_sparse(of_seed, ["imp"])]
    if not all(dense(of_seed)["metrics"]["verified"] > 0 for of_seed in found):
        raise KeyError("no image of a dense net is verified")
    level = ticket_level(rows, tolerance)
    return [float(level in ticket_densities(of_seed, tolerance)) for of_seed in found]


def stability_correlation(rows: Rows) -> list[float]:
    """Per seed: Fisher's z of Spearman's correlation of unstable ratio and verified accuracy over its rows.

    z, the artanh, is near to normal, as t bounds suppose; rho itself ends at -1. KeyError if one is constant.
    """
    found = []
    for of_seed in by_seed(select(rows)).values():
        unstable, verified = ([float(row["metrics"][name]) for row in of_seed] for name in ("unstable", "verified"))
        if len(set(unstable)) < 2 or len(set(verified)) < 2:
            raise KeyError("no correlation of a constant")
        rho = float(stats.spearmanr(unstable, verified).statistic)
        found.append(math.atanh(max(-CERTAIN, min(rho, CERTAIN))))
    return found


def claims(max_nodes: int | None) -> list[Claim]:
    """C1 to C7, for a verifier that evaluates at most `max_nodes` sub-domains an image (None: no limit)."""
    budget = "no node limit" if max_nodes is None else f"at most {max_nodes} nodes an image"
    return [
        Claim(
            id="C1",
            statement=f"Pruning raises verified accuracy ({budget}) under adversarial training: best level of IMP and "
            "IMP+NRS minus dense",
            source="abstract",
            paper="up to +24.5 points (CIFAR-10, FGSM+GradAlign; eps 2/255 inferred from the configs)",
            measure=gain("verified"),
            at_least=5,
        ),
        Claim(
            id="C2",
            statement=f"Pruning raises verified accuracy ({budget}) under standard training: best level of IMP minus "
            "dense",
            source="abstract",
            paper="up to +8.2 points (CIFAR-10; which regime is meant is not verifiable)",
            measure=gain("verified", ["imp"], ["standard"]),
        ),
        Claim(
            id="C3",
            statement="Pruning helps in general: share of the pruners whose best level verifies more than dense, each "
            f"with a 95 % bound above 0 ({budget})",
            source="abstract",
            paper="most existing pruners help at some sparsity (CIFAR-10, SVHN, FashionMNIST; no number)",
            measure=share_of_methods_that_help,
            threshold=HELPED_SHARE - 1e-9,  # at least two thirds
            interval="worst",
            unit="of pruners",
        ),
        Claim(
            id="C4a",
            statement=f"The NRS regulariser helps: verified accuracy ({budget}) of IMP+NRS minus IMP, mean over equal "
            "sparse levels",
            source="abstract",
            paper="better (CIFAR-10, FGSM+GradAlign; no number in the abstract)",
            measure=regulariser_at_equal_levels,
        ),
        Claim(
            id="C4b",
            statement=f"IMP+NRS is best: its best level minus the best level of any pruner without NRS ({budget})",
            source="abstract",
            paper="better than existing pruners (CIFAR-10, FGSM+GradAlign; no number in the abstract)",
            measure=regulariser_against_the_best_other,
        ),
        Claim(
            id="C5",
            statement="Certified tickets: an IMP level matches dense in clean (-1 point) and verified accuracy "
            f"({budget}), every seed",
            source="abstract",
            paper="exist (several data sets; tolerance not stated)",
            measure=certified_ticket,
            threshold=0.5,
            interval="worst",
            unit="of seeds",
        ),
        Claim(
            id="C6a",
            statement="Mechanism: fewer unstable neurons (share under CROWN bounds, best level minus dense)",
            source="abstract",
            paper="fewer (CIFAR-10; no number in the abstract)",
            measure=gain("unstable"),
            direction="below",
            unit="share",
        ),
        Claim(
            id="C6b",
            statement=f"Mechanism: fewer branch-and-bound sub-domains (best level minus dense, {budget})",
            source="abstract",
            paper="fewer (CIFAR-10; no number in the abstract)",
            measure=gain("nodes"),
            direction="below",
            unit="nodes",
        ),
        Claim(
            id="C6c",
            statement="Mechanism: the fewer unstable neurons a net has, the more it verifies (Spearman's rho "
            "over all nets below -0.5)",
            source="abstract",
            paper="implied (no number in the abstract)",
            measure=stability_correlation,
            threshold=math.atanh(-0.5),
            direction="below",
            unit="artanh rho",
        ),
        Claim(
            id="C7",
            statement="It holds with certified training: accuracy verified by interval bounds alone, best level of IMP "
            "minus dense, CROWN-IBP",
            source="repository page",
            paper="consistent improvement (CIFAR-10, CROWN-IBP and Fast-IBP; no number)",
            measure=gain("ibp_verified", ["imp"], CERTIFIED, chosen_by="val_ibp_verified"),
        ),
    ]
