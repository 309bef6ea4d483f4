"""The report's figures: accuracy against multiply-adds and latency, R and z over stage 1, what is left of blocks."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from common.claims import Rows

COLORS = [colormaps["tab20"](index) for index in (*range(0, 20, 2), *range(1, 20, 2))]  # the strong ones first


def draw(rows: Rows) -> dict[str, Figure]:
    """`accuracy`; `plans` where arms removed something, `search` where arms had a stage 1."""
    figures = {"accuracy": _accuracy(rows)}
    if pairs := sorted({(row["cell"]["budget"], row["cell"]["arm"]) for row in rows if row["metrics"]["share"] < 1}):
        figures["plans"] = _plans(rows, pairs)
    if searched := [row for row in rows if "search_R" in row["metrics"]]:
        figures["search"] = _search(searched)
    return figures


def _accuracy(rows: Rows) -> Figure:
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    names = list(dict.fromkeys(row["cell"]["arm"] for row in rows))
    share = "R, share of the multiply-adds (exact)"
    axes = (
        ("share", "before_accuracy", share, "before stage 2"),
        ("share", "test_accuracy", share, "after stage 2"),
        ("latency_ratio", "test_accuracy", "latency, share of the dense network's", "after stage 2"),
    )
    for panel, (x, y, label, title) in zip(panels, axes, strict=True):
        for index, name in enumerate(names):
            there = [row["metrics"] for row in rows if row["cell"]["arm"] == name and x in row["metrics"]]
            if name == "start" and y == "before_accuracy":
                there = []  # of random weights: all it does is stage 2
            points = np.array([(metrics[x], metrics[y]) for metrics in there]).reshape(-1, 2)
            style = "os^vDP*"[index % 7]
            panel.plot(*points.T, style, color=COLORS[index % 20], label=name, alpha=0.8, markersize=5)
        panel.set(xlabel=label, ylabel="test accuracy, %", title=title)
    after = [row["metrics"]["test_accuracy"] for row in rows]
    panels[1].set_ylim(_low(after), max(after) + 0.5)
    if below := sum(value < _low(after) for value in after):
        panels[1].set_title(f"after stage 2 ({below} below the axis)")
    panels[2].sharey(panels[1])
    panels[2].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _low(values: Sequence[float]) -> float:
    """Where an axis starts that leaves out networks that collapsed."""
    return float(np.percentile(values, 10)) - 2


def _search(rows: Rows) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    shares, multipliers = figure.subplots(1, 2)
    pairs = list(dict.fromkeys((row["cell"]["arm"], row["cell"]["budget"]) for row in rows))
    for row in rows:
        pair, found = (row["cell"]["arm"], row["cell"]["budget"]), row["metrics"]
        style = {"color": f"C{pairs.index(pair) % 10}", "alpha": 0.6, "linewidth": 1}
        first = all(pair != (other["cell"]["arm"], other["cell"]["budget"]) for other in rows[: rows.index(row)])
        name = f"{pair[0]} {pair[1]:g}" if first else None
        shares.plot(found["search_step"], found["search_R"], label=name, **style)
        shares.plot(found["search_step"], found["search_target"], color="k", linewidth=0.5, linestyle=":")
        multipliers.plot(found["search_step"], found["search_z"], **style)
    shares.set(xlabel="step of stage 1", ylabel="R (dotted: its target)")
    multipliers.set(xlabel="step of stage 1", ylabel="z, multiplier of the budget", yscale="symlog")
    shares.legend(fontsize=7)
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
