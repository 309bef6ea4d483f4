"""The report's figures: accuracy against exact multiply-adds, and what is left of every block."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from common.claims import Rows


def draw(rows: Rows) -> dict[str, Figure]:
    """`accuracy`, and `plans` where arms removed something."""
    figures = {"accuracy": _accuracy(rows)}
    if pairs := sorted({(row["cell"]["budget"], row["cell"]["arm"]) for row in rows if row["metrics"]["share"] < 1}):
        figures["plans"] = _plans(rows, pairs)
    return figures


def _accuracy(rows: Rows) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    names = list(dict.fromkeys(row["cell"]["arm"] for row in rows))
    for panel, key, title in zip(
        panels, ("before_accuracy", "test_accuracy"), ("before stage 2", "after stage 2"), strict=True
    ):
        for index, name in enumerate(names):
            there = [row["metrics"] for row in rows if row["cell"]["arm"] == name]
            points = np.array([(metrics["share"], metrics[key]) for metrics in there])
            panel.plot(points[:, 0], points[:, 1], "os^v"[index % 4], color=f"C{index % 10}", label=name, alpha=0.7)
        panel.set(xlabel="R, share of the multiply-adds (exact)", ylabel="test accuracy, %", title=title)
    panels[1].legend(fontsize=7)
    return figure


def _plans(rows: Rows, pairs: Sequence[tuple[float, str]]) -> Figure:
    figure = Figure(figsize=(10, 1 + 0.35 * len(pairs)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for panel, key in zip(panels, ("heads", "dims", "neurons"), strict=True):
        table = [
            np.mean(
                [row["metrics"][key] for row in rows if (row["cell"]["budget"], row["cell"]["arm"]) == pair], axis=0
            )
            for pair in pairs
        ]
        image = panel.imshow(np.array(table), vmin=0, vmax=1, aspect="auto", cmap="viridis")
        panel.set(title=f"{key} left", xlabel="block")
        panel.set_yticks(range(len(pairs)), [f"{name} {budget:g}" for budget, name in pairs])
    figure.colorbar(image, ax=panels)
    return figure
