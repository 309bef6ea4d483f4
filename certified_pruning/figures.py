"""The figures of the report, from the rows of the study."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from certified_pruning.claims import ADVERSARIAL, Row, select
from common.claims import Rows, bounds

LABELS = {
    "verified": "verified accuracy, %",
    "test_accuracy": "clean accuracy, %",
    "nodes": "branch-and-bound nodes",
    "ibp_verified": "verified by intervals, %",
}

SAME_DENSE = {**dict.fromkeys(("random", "snip", "taylor", "hydra", "refill", "l1-channel"), "imp"), "nrs": "imp+nrs"}
"""Methods whose first round trains what that of another one trains."""


def draw(rows: Rows) -> dict[str, Figure]:
    """Accuracies and effort by density, verified accuracy by instability, bound gaps by layer, the other regimes."""
    adversarial = select(rows)
    others = list(dict.fromkeys(row["cell"]["regime"] for row in rows if row["cell"]["regime"] not in ADVERSARIAL))
    found = {}
    if adversarial:
        found["levels"] = _levels(adversarial)
        found["instability"] = _instability(adversarial)
        found["gaps"] = _gaps(adversarial)
    if others:
        found["regimes"] = _regimes(rows, others)
    return found


def curve(axes: Axes, rows: Rows, metric: str, **style: Any) -> None:
    """The mean of a metric by density, with 90 % intervals over seeds (the one-sided 95 % bounds of the claims)."""
    densities = sorted({row["cell"]["density"] for row in rows}, reverse=True)
    estimates = [
        bounds([row["metrics"][metric] for row in rows if row["cell"]["density"] == density], "t")
        for density in densities
    ]
    means = [mean for mean, _, _ in estimates]
    lengths = [mean - low if isfinite(low) else 0.0 for mean, low, _ in estimates]  # one seed has no interval
    axes.errorbar(densities, means, yerr=lengths, marker="o", capsize=3, elinewidth=0.7, **style)


def _by_method(rows: Rows) -> dict[str, list[Row]]:
    """Rows of each method; a dense net that was not verified again comes from the chain that trains the same one."""
    found = {}
    for method in dict.fromkeys(row["cell"]["method"] for row in rows):
        of_method = select(rows, methods=[method])
        if method in SAME_DENSE and all(row["cell"]["density"] < 1 for row in of_method):
            dense = [row for row in select(rows, methods=[SAME_DENSE[method]]) if row["cell"]["density"] == 1]
            of_method = dense + of_method
        found[method] = of_method
    return found


def _levels(rows: Rows) -> Figure:
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, metric in zip(panels, ("verified", "test_accuracy", "nodes"), strict=True):
        for number, (method, of_method) in enumerate(_by_method(rows).items()):
            curve(panel, of_method, metric, color=f"C{number}", label=method)
        _density_axis(panel, rows)
        panel.set_ylabel(LABELS[metric])
    panels[0].legend()
    return figure


def _instability(rows: Rows) -> Figure:
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    axes = figure.subplots()
    for number, (method, of_method) in enumerate(_by_method(rows).items()):
        unstable, verified = ([row["metrics"][name] for row in of_method] for name in ("unstable", "verified"))
        axes.plot(unstable, verified, f"C{number}o", alpha=0.7, label=method)
    axes.set(xlabel="unstable ReLUs (share, CROWN bounds)", ylabel=LABELS["verified"], title="all nets, all seeds")
    axes.legend()
    return figure


def _gaps(rows: Rows) -> Figure:
    """Mean gap of the ReLU relaxation by layer, one line a density: does pruning tighten every layer?"""
    methods = [method for method in ("imp", "imp+nrs") if select(rows, methods=[method])]
    figure = Figure(figsize=(4.5 * max(len(methods), 1), 3.6), layout="constrained")
    panels = figure.subplots(1, max(len(methods), 1), sharey=True, squeeze=False)[0]
    for panel, method in zip(panels, methods, strict=False):
        of_method = select(rows, methods=[method])
        layers = sum(name.startswith("gap_") for name in of_method[0]["metrics"])
        densities = sorted({row["cell"]["density"] for row in of_method}, reverse=True)
        for number, density in enumerate(densities):
            level = [row["metrics"] for row in of_method if row["cell"]["density"] == density]
            means = [sum(m[f"gap_{layer}"] for m in level) / len(level) for layer in range(1, layers + 1)]
            shade = str(0.75 * number / max(len(densities) - 1, 1))
            panel.semilogy(range(1, layers + 1), means, "o-", color=shade, label=f"{density:.3g}")
        panel.set(title=method, xlabel="ReLU layer", ylabel="mean gap of the relaxation", xticks=range(1, layers + 1))
        panel.legend(title="density")
    return figure


def _regimes(rows: Rows, regimes: Sequence[str]) -> Figure:
    metrics = ("verified", "ibp_verified", "test_accuracy")
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    shown = [row for row in rows if row["cell"]["regime"] in regimes]
    for panel, metric in zip(figure.subplots(1, 3), metrics, strict=True):
        for number, regime in enumerate(regimes):
            of_regime = select(rows, [regime])
            for method in dict.fromkeys(row["cell"]["method"] for row in of_regime):
                curve(panel, select(rows, [regime], [method]), metric, color=f"C{number}", label=f"{regime}, {method}")
        _density_axis(panel, shown)
        panel.set_ylabel(LABELS[metric])
    figure.axes[0].legend()
    return figure


def _density_axis(axes: Axes, rows: Rows) -> None:
    ticks: list[float] = []
    for density in sorted({row["cell"]["density"] for row in rows}, reverse=True):
        if not ticks or density < 0.9 * ticks[-1]:  # labels of densities closer than that would overlap
            ticks.append(density)
    axes.set(xscale="log", xlabel="density (weights, or channels, kept)")
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks], rotation=45, fontsize=7)
    axes.minorticks_off()
    axes.invert_xaxis()
