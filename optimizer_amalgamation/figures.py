"""The report's figures: races, what replicates reach, and meta-training under noise."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.claims import Rows
from optimizer_amalgamation.rows import optimizers, problems_of, raced, rows_of


def draw(rows: Rows) -> dict[str, Figure]:
    """The figures that the rows have numbers for: `races`, `replicates`, `noise`."""
    figures = {"races": _races(rows), "replicates": _replicates(rows), "noise": _noise(rows)}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _panels(count: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.6 * count, 3.8), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _races(rows: Rows) -> Figure | None:
    """Mean log held-out loss by epoch: learnt optimizers, and the pool's members thin, the oracle dashed."""
    if not any(row["cell"].get("what") == "race" for row in rows):
        return None
    problems = problems_of(rows)
    figure, panels = _panels(len(problems))
    for panel, problem in zip(panels, problems, strict=True):
        for by in optimizers(rows, problem):
            found = rows_of(rows, what="race", by=by, problem=problem)
            curves = [row["metrics"]["curve"] for row in found if "curve" in row["metrics"]]
            if not curves:
                continue
            cell = found[0]["cell"]
            style = "--" if cell.get("oracle") else ":" if cell.get("arm") == "pool" else "-"
            rate = f" {cell['rate']:g}" if "rate" in cell else ""
            curve = np.mean(curves, axis=0)
            panel.plot(range(1, len(curve) + 1), curve, style, label=f"{by}{rate}")
        panel.set(title=problem, xlabel="epoch", ylabel="log held-out loss")
    panels[-1].legend(fontsize=7)
    return figure


def _replicates(rows: Rows) -> Figure | None:
    """Log best held-out loss: a dot a training, a column an optimizer."""
    if not any(row["cell"].get("what") == "race" for row in rows):
        return None
    problems = problems_of(rows)
    figure, panels = _panels(len(problems))
    for panel, problem in zip(panels, problems, strict=True):
        names = optimizers(rows, problem)
        for column, by in enumerate(names):
            for number, row in enumerate(raced(rows, by, problem)):
                panel.plot([column + 0.08 * (number % 5 - 2)] * len(row), row, ".", alpha=0.7, color=f"C{column}")
        panel.set(title=problem, ylabel="log best held-out loss")
        panel.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    return figure


def _noise(rows: Rows) -> Figure | None:
    """Meta loss of the last 20 meta-steps under noise, a dot a replicate."""
    found = [row for row in rows if row["cell"].get("arm") == "noise" and row["cell"]["what"] == "training"]
    if not found:
        return None
    figure, (panel,) = _panels(1)
    sizes = sorted({(row["cell"]["kind"], row["cell"]["magnitude"]) for row in found})
    for row in found:
        place = sizes.index((row["cell"]["kind"], row["cell"]["magnitude"]))
        values = row["metrics"]["recent"]
        panel.plot([place] * len(values), values, "o", color="C0", alpha=0.7)
    panel.set_xticks(range(len(sizes)), [f"{kind} {size:g}" for kind, size in sizes], rotation=30, ha="right")
    panel.set(ylabel="meta loss, last 20 steps", title="noise on the weights")
    return figure
