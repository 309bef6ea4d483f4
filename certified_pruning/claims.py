"""The paper's claims over the rows of the study (arXiv 2206.07311; spec b and i).

A row is one round of one chain: cell {method, round, density}, seed, metrics in percent. The dense reference of a seed
is round 0 of plain IMP. Where a claim speaks of the best level, the level is chosen on validation images (verified by
alpha-CROWN) and reported on test images, so that choosing does not flatter.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from scipy import stats

from common.claims import Claim, Rows

Row = Mapping[str, Any]
CLEAN_TOLERANCE = 1.0  # points of clean accuracy a certified ticket may lose ("matching", spec c.10)


def by_seed(rows: Rows) -> dict[int, list[Row]]:
    """Rows grouped by seed, in the order of seeds."""
    return {seed: [row for row in rows if row["seed"] == seed] for seed in sorted({row["seed"] for row in rows})}


def dense(rows: Rows) -> Row:
    """The dense reference among one seed's rows. Raises KeyError without one."""
    for row in rows:
        if row["cell"]["method"] == "imp" and row["cell"]["round"] == 0:
            return row
    raise KeyError("no dense row of imp")


def best_sparse(rows: Rows, methods: Sequence[str]) -> Row:
    """The sparse row of `methods` that verifies most validation images; of equals the sparsest. Raises KeyError."""
    sparse = [row for row in rows if row["cell"]["method"] in methods and row["cell"]["round"] > 0]
    if not sparse:
        raise KeyError(f"no sparse row of {methods}")
    return max(sparse, key=lambda row: (row["metrics"]["val_verified"], row["cell"]["round"]))


def gain(metric: str, methods: Sequence[str] = ("imp", "imp+nrs")) -> Callable[[Rows], list[float]]:
    """Per seed: `metric` of the best sparse level of `methods` minus that of the dense reference."""

    def measure(rows: Rows) -> list[float]:
        pairs = ((best_sparse(of_seed, methods), dense(of_seed)) for of_seed in by_seed(rows).values())
        return [ticket["metrics"][metric] - reference["metrics"][metric] for ticket, reference in pairs]

    return measure


def ticket_rounds(rows: Rows, tolerance: float = CLEAN_TOLERANCE) -> set[int]:
    """Rounds of plain IMP, among one seed's rows, that match dense: clean accuracy within `tolerance`, verified >=."""
    reference = dense(rows)["metrics"]
    return {
        row["cell"]["round"]
        for row in rows
        if row["cell"]["method"] == "imp"
        and row["cell"]["round"] > 0
        and row["metrics"]["test_accuracy"] >= reference["test_accuracy"] - tolerance
        and row["metrics"]["verified"] >= reference["verified"]
    }


def certified_ticket(rows: Rows) -> list[float]:
    """Per seed 1 or 0: is the round that matches dense in most seeds (of equals the sparsest) a ticket in this one?"""
    tickets = [ticket_rounds(of_seed) for of_seed in by_seed(rows).values()]
    rounds = sorted(set().union(*tickets)) if tickets else []
    best = max(rounds, key=lambda number: (sum(number in found for found in tickets), number), default=-1)
    return [float(best in found) for found in tickets]


def stability_correlation(rows: Rows) -> list[float]:
    """Per seed: Spearman correlation of unstable ratio and verified accuracy over its rows; KeyError if constant."""
    found = []
    for of_seed in by_seed(rows).values():
        unstable, verified = ([float(row["metrics"][name]) for row in of_seed] for name in ("unstable", "verified"))
        if len(set(unstable)) < 2 or len(set(verified)) < 2:
            raise KeyError("no correlation of a constant")
        found.append(float(stats.spearmanr(unstable, verified).statistic))
    return found


CLAIMS = [
    Claim(
        id="C1",
        statement="Pruning raises verified accuracy under adversarial training (best of IMP, IMP+NRS minus dense)",
        source="abstract",
        paper="up to +24.5 points (CIFAR-10, FGSM+GradAlign; eps 2/255 inferred from the configs)",
        measure=gain("verified"),
        at_least=5,
    ),
    Claim(
        id="C5",
        statement="Certified tickets: an IMP level matches dense in clean (-1 point) and verified accuracy, every seed",
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
        statement="Mechanism: fewer branch-and-bound sub-domains (best level minus dense, same node budget)",
        source="abstract",
        paper="fewer (CIFAR-10; no number in the abstract)",
        measure=gain("nodes"),
        direction="below",
        unit="nodes",
    ),
    Claim(
        id="C6c",
        statement="Mechanism: the fewer unstable neurons a net has, the more it verifies (Spearman over all rounds)",
        source="abstract",
        paper="implied (no number in the abstract)",
        measure=stability_correlation,
        threshold=-0.5,
        direction="below",
        unit="rho",
    ),
]


def draw(rows: Rows) -> dict[str, Figure]:
    """Verified and clean accuracy by density, and verified accuracy by unstable ratio."""
    methods = list(dict.fromkeys(row["cell"]["method"] for row in rows))
    levels = Figure(figsize=(9, 3.6), layout="constrained")
    panels = levels.subplots(1, 2)
    scatter = Figure(figsize=(5, 3.8), layout="constrained")
    cloud = scatter.subplots()
    for number, method in enumerate(methods):
        of_method = [row for row in rows if row["cell"]["method"] == method]
        densities = sorted({row["cell"]["density"] for row in of_method}, reverse=True)
        for panel, metric in zip(panels, ("verified", "test_accuracy"), strict=True):
            groups = [[r["metrics"][metric] for r in of_method if r["cell"]["density"] == d] for d in densities]
            panel.plot(densities, [sum(g) / len(g) for g in groups], f"C{number}o-", label=method)
            for density, group in zip(densities, groups, strict=True):
                panel.plot([density] * len(group), group, f"C{number}.", alpha=0.4)
        unstable, verified = ([r["metrics"][name] for r in of_method] for name in ("unstable", "verified"))
        cloud.plot(unstable, verified, f"C{number}o", alpha=0.7, label=method)
    densities = sorted({row["cell"]["density"] for row in rows}, reverse=True)
    for panel, title in zip(panels, ("verified accuracy", "clean accuracy"), strict=True):
        panel.set(xscale="log", xlabel="density of convolution weights", ylabel="% of test images", title=title)
        panel.set_xticks(densities, [f"{density:.3g}" for density in densities])
        panel.minorticks_off()
        panel.invert_xaxis()
    panels[0].legend()
    cloud.set(
        xlabel="unstable ReLUs (share, CROWN bounds)", ylabel="verified accuracy, %", title="all rounds, all seeds"
    )
    cloud.legend()
    return {"levels": levels, "instability": scatter}
