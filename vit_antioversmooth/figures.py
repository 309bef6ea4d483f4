"""The report's figures: HC/DC and cosines by layer, learnt scales by layer and head, low-pass curves and bounds."""

import math
from itertools import zip_longest
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.claims import Rows

STYLES = {  # a control has its method's colour, dashed
    "plain": "C0-",
    "attnscale": "C1-",
    "featscale": "C2-",
    "both": "C3-",
    "attnscale-control": "C1--",
    "featscale-control": "C2--",
}
BY_LAYER = {  # metric: title, first layer
    "hc_over_dc": ("high over low frequencies, HC/DC", 0),
    "patch_cosine": ("cosine between patches", 0),
    "attention_cosine": ("cosine between rows of maps", 1),
}
FACTORS = {
    "map_rho": "rho, measured",
    "bound_bd": "Bhatia-Davis bound",
    "bound_colsum": "column-sum bound",
    "weights": "||Wo Wv|| of a head",
}


def draw(rows: Rows) -> dict[str, Figure]:
    """The figures that the rows have numbers for: `layers`, `scales`, `lowpass`."""
    figures = {"layers": _layers(rows), "scales": _scales(rows), "lowpass": _lowpass(rows)}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _average(rows: Rows, arm: str, name: str) -> Any:
    """Mean over seeds of an array by layer; None where no row has it."""
    found = [_array(row["metrics"][name]) for row in rows if row["cell"]["arm"] == arm and row["metrics"].get(name)]
    return np.mean(found, axis=0) if found else None


def _array(layers: list[Any]) -> Any:
    """(layers,), or (layers, heads) with NaN where a layer has fewer heads than another."""
    return np.array(list(zip_longest(*layers, fillvalue=math.nan))).T if np.ndim(layers[0]) else np.array(layers)


def _layers(rows: Rows) -> Figure | None:
    arms = [arm for arm in STYLES if _average(rows, arm, "hc_over_dc") is not None]
    if not arms:
        return None
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for panel, (name, (title, first)) in zip(figure.subplots(1, 3), BY_LAYER.items(), strict=True):
        for arm in arms:
            curve = _average(rows, arm, name)
            panel.plot(range(first, first + len(curve)), curve, STYLES[arm], label=arm)
        panel.set(xlabel="layer", title=title)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].legend(fontsize=7)
    return figure


def _scales(rows: Rows) -> Figure | None:
    omega, s, t = (_average(rows, *pair) for pair in (("attnscale", "omega"), ("featscale", "s"), ("featscale", "t")))
    if omega is None and s is None:
        return None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    if omega is not None:
        reach = max(float(np.nanmax(np.abs(omega))), 1e-9)
        image = left.imshow(omega.T, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
        figure.colorbar(image, ax=left)
        left.set(xlabel="layer", ylabel="head", title="learnt omega (mean over seeds)")
        left.set_xticks(range(len(omega)), [str(layer) for layer in range(1, len(omega) + 1)])
        left.set_yticks(range(omega.shape[1]), [str(head) for head in range(1, omega.shape[1] + 1)])
    if s is not None:
        layers = range(1, len(s) + 1)
        right.plot(layers, s, "C0o-", label="s (mean token)")
        right.plot(layers, t, "C1o-", label="t (the rest)")
        right.axhline(0, color="grey", linewidth=0.8)
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        right.margins(y=0.3)  # room for the legend
        right.set(xlabel="layer", title="learnt s and t (means)")
        right.legend(loc="upper left", ncols=2)
    return figure


def _lowpass(rows: Rows) -> Figure | None:
    curves = _average(rows, "plain", "lowpass_curves")
    if curves is None:
        return None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for layer, curve in enumerate(curves, 1):
        left.plot(range(1, len(curve) + 1), curve, color=f"{0.8 * (1 - layer / len(curves)):.2f}")
    left.set(
        xlabel="applications of the map", ylabel="log10 HC/DC", title="A^t z of trained maps, light to dark by layer"
    )
    values = [
        mean(row["metrics"].get(name, math.nan) for row in rows if row["cell"]["arm"] == "plain") for name in FACTORS
    ]
    right.bar(list(FACTORS.values()), values, color=("C0", "C1", "C1", "C2"))
    right.axhline(1, color="grey", linewidth=0.8)
    right.tick_params(axis="x", labelrotation=20)
    right.set(ylabel="factor on HC (means)", title="one application: measured and bounds")
    return figure
