"""Figures of the study: accuracy over sparsity, lead over amount of data, likeness of masks; and its extremes."""

from collections.abc import Iterable
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.claims import Rows
from double_win_lth.claims import compare, fractions, gap, levels_of, seeds_of, value
from double_win_lth.settings import REGIMES

COLOURS = {"std": "C0", "fast": "C1", "adv": "C3"}
BASELINES = {"omp": "s", "random": "x", "reinit": "+", "shuffled": "*"}


def draw(rows: Rows) -> dict[str, Figure]:
    """Those figures for which there are rows."""
    figures = {}
    if any("fraction" in row["cell"] for row in rows):
        figures = {"sparsity": _sparsity(rows), "data": _data(rows)}
    if any("pair" in row["cell"] for row in rows):
        figures["masks"] = _masks(rows)
    return figures


def extremes(rows: Rows, margin: float) -> list[str]:
    """Extreme double-win sparsity of each regime and fraction: against its own and against every dense network."""
    lines = []
    for fraction in fractions(rows) if rows else []:
        for regime in REGIMES:
            if not levels_of(rows, regime, fraction):
                continue
            try:
                found = [
                    compare(rows, regime, fraction, seeds_of(rows), margin, other) for other in _dense(rows, fraction)
                ]
                own = compare(rows, regime, fraction, seeds_of(rows), margin).extreme_sparsity
            except KeyError:
                continue  # a failed cell
            wins = set.intersection(
                *({s for s, m in f.levels.items() if all(x.matching for x in m.values())} for f in found)
            )
            words = [f"{100 * s:.2f} %" if s is not None else "none" for s in (own, max(wins, default=None))]
            lines.append(
                f"{100 * fraction:g} % of the data, {regime}: extreme double-win sparsity {words[0]} against its own "
                f"dense network, {words[1]} against those of all regimes (margin {margin:g} points)"
            )
    return lines


def _dense(rows: Rows, fraction: float) -> list[str]:
    cells = [row["cell"] for row in rows if row["cell"].get("fraction") == fraction and row["cell"]["level"] == 0]
    return [regime for regime in REGIMES if any(cell["regime"] == regime for cell in cells)]


def _means(
    rows: Rows, regime: str, fraction: float, metric: str, levels: Iterable[int], ticket: str = "imp"
) -> list[float]:
    """Mean over the seeds that have it; NaN where none has."""
    found = []
    for level in levels:
        values = []
        for seed in seeds_of(rows):
            try:
                values.append(value(rows, seed, regime, fraction, metric, level, ticket))
            except KeyError:
                continue
        found.append(mean(values) if values else float("nan"))
    return found


def _sparsity(rows: Rows) -> Figure:
    least = fractions(rows)[0]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    names = {
        "ra_adv": "RA, adversarial transfer",
        "sa_adv": "SA, adversarial transfer",
        "sa_std": "SA, standard transfer",
    }
    for panel, (metric, title) in zip(figure.subplots(1, 3), names.items(), strict=True):
        for regime in REGIMES:
            levels = levels_of(rows, regime, least)
            sparsities = [0.0, *(100 * sparsity for sparsity in levels.values())]
            panel.plot(
                sparsities,
                _means(rows, regime, least, metric, [0, *levels]),
                f"{COLOURS[regime]}o-",
                label=regime.upper(),
            )
        _baselines(panel, rows, least, metric)
        panel.set(xlabel="sparsity, %", title=f"{title}, {100 * least:g} % of the data")
    panel.legend(fontsize=7)
    return figure


def _baselines(panel: Axes, rows: Rows, fraction: float, metric: str) -> None:
    for ticket, marker in BASELINES.items():
        cells = [
            row["cell"] for row in rows if row["cell"].get("ticket") == ticket and row["cell"]["fraction"] == fraction
        ]
        at = {cell["level"]: 100 * cell["sparsity"] for cell in cells if cell["regime"] == "adv"}
        if at:
            heights = _means(rows, "adv", fraction, metric, at, ticket)
            panel.plot(list(at.values()), heights, f"k{marker}", label=f"ADV, {ticket}")


def _data(rows: Rows) -> Figure:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    panel = figure.subplots()
    for level in sorted({row["cell"]["level"] for row in rows if row["cell"].get("ticket") == "imp"}):
        points = []
        for fraction in fractions(rows):
            for seed in seeds_of(rows):
                try:
                    points.append((100 * fraction, gap(rows, seed, fraction, level)))
                except KeyError:
                    continue
        if len({x for x, _ in points}) > 1:
            at = sorted({x for x, _ in points})
            panel.plot(at, [mean(y for x, y in points if x == each) for each in at], "o-", label=f"level {level}")
    panel.axhline(0, color="grey", linewidth=0.8)
    panel.set(
        xscale="log", xlabel="target images used, %", ylabel="points", title="RA of ADV minus STD, adversarial transfer"
    )
    if panel.lines[1:]:
        panel.legend()
    return figure


def _masks(rows: Rows) -> Figure:
    masks = [row for row in rows if "pair" in row["cell"]]
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    panel = figure.subplots()
    for number, pair in enumerate(sorted({row["cell"]["pair"] for row in masks})):
        levels = sorted({row["cell"]["level"] for row in masks})
        for name, style in (("iou", "o-"), ("layerwise_chance", ":")):
            heights = [
                mean(
                    row["metrics"][name]
                    for row in masks
                    if (row["cell"]["pair"], row["cell"]["level"]) == (pair, level)
                )
                for level in levels
            ]
            panel.plot(levels, heights, f"C{number}{style}", label=pair if name == "iou" else None)
    panel.set(xlabel="level", ylabel="IoU", title="likeness of masks (dotted: by chance, given the layers)")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(fontsize=7)
    return figure
