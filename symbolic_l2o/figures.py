"""The report's figures: races on unseen problems, and what the equations say."""

from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from common.claims import Rows

ARMS = ("dm", "rp", "rp_s", "rp_si")
FORMS = ("template", "pole", "operon-0")


def draw(rows: Rows) -> dict[str, Figure]:
    """The figures that the rows have numbers for: `races`, `teachers`, `equations`."""
    figures = {"races": _races(rows), "teachers": _teachers(rows), "equations": _equations(rows)}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _rows(rows: Rows, **cell: Any) -> list[Any]:
    return [row for row in rows if all(row["cell"].get(key) == value for key, value in cell.items())]


def _curve(rows: list[Any]) -> list[float]:
    curves = [row["metrics"]["curve"] for row in rows]
    return [mean(values) for values in zip(*curves, strict=True)]


def _panel(panel: Any, curve: list[float], label: str, style: str = "-") -> None:
    panel.semilogy([i / max(len(curve) - 1, 1) for i in range(len(curve))], curve, style, label=label)


def _races(rows: Rows) -> Figure | None:
    """Mean minibatch loss of rule and rivals on the unseen problems."""
    baselines = _rows(rows, arm="baselines")
    problems = list(dict.fromkeys(row["cell"]["problem"] for row in baselines))
    if not problems:
        return None
    figure = Figure(figsize=(4 * len(problems), 3.4), layout="constrained")
    for panel, problem in zip(figure.subplots(1, len(problems), squeeze=False)[0], problems, strict=True):
        if ours := _rows(rows, arm="rp_s", by="pole", problem=problem, what="race"):
            _panel(panel, _curve(ours), "pole rule, lr .01")
        for name in dict.fromkeys(row["cell"]["by"] for row in baselines):
            _panel(panel, _curve(_rows(baselines, by=name, problem=problem)), f"{name}, tuned", "--")
        panel.set(title=problem, xlabel="share of the steps", ylabel="minibatch loss")
    figure.axes[0].legend(fontsize=7)
    return figure


def _teachers(rows: Rows) -> Figure | None:
    """Teachers and their equations on two problems."""
    races = [row for row in _rows(rows, what="race") if row["cell"]["arm"] in ARMS]
    arms = [arm for arm in ARMS if _rows(races, arm=arm)]
    if not arms:
        return None
    figure = Figure(figsize=(4 * len(arms), 3.4), layout="constrained")
    for panel, arm in zip(figure.subplots(1, len(arms), squeeze=False)[0], arms, strict=True):
        problem = "relu01" if arm == "dm" else _rows(races, arm=arm)[0]["cell"]["problem"]
        for by in ("teacher", *FORMS):
            if there := _rows(races, arm=arm, by=by, problem=problem):
                _panel(panel, _curve(there), by, "-" if by == "teacher" else "--")
        panel.set(title=f"{arm} on {problem}", xlabel="share of the steps", ylabel="minibatch loss")
    figure.axes[0].legend(fontsize=7)
    return figure


def _equations(rows: Rows) -> Figure | None:
    """The equations of one seed, in LaTeX."""
    lines = []
    for arm in ARMS:
        for by in ("pole", "operon-0"):
            if found := _rows(rows, arm=arm, what="equation", by=by):
                metrics = found[0]["metrics"]
                text = metrics["latex"].replace("\\operatorname", "\\mathrm")
                drawn = f"${text}$" if len(text) < 400 else f"({metrics['complexity']} nodes)"
                lines.append(f"{arm}, {by}, $R^2$ {metrics['r2']:.2f}:  {drawn}")
    if not lines:
        return None
    figure = Figure(figsize=(14, 0.6 * len(lines) + 0.4))
    for number, line in enumerate(lines):
        figure.text(0.01, 1 - (number + 0.7) / len(lines), line, fontsize=8)
    return figure
