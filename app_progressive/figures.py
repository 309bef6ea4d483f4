"""The report's figures: curves along the stream, the gap of the long one, densities, and the primary claims."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from app_progressive.holm import judge_together
from app_progressive.measures import of, smooth
from common.claims import Claim, Rows, by_seed

COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9")
CURVES = {"test_acc": "test accuracy, %", "gap_last": "train - val, last epoch, points", "density": "effective density"}


def draw(rows: Rows, claims: Sequence[Claim]) -> dict[str, Figure]:
    """Those figures for which there are rows: `few`, `long`, `layers`, `primary`."""
    figures = {}
    for name, part, curves in (
        ("few", "F", CURVES),
        ("long", "L", {"test_acc": CURVES["test_acc"], "test_gap_last": "train - test, points", "density": "density"}),
    ):
        if arms := _arms(rows, part):
            figures[name] = _curves(rows, part, arms, curves)
    if {"app", "app-mag"} <= set(_arms(rows, "F")):
        figures["layers"] = _layers(rows)
    tested = [
        each for each in judge_together(claims, rows) if "holm" in each and None not in (each["low"], each["high"])
    ]
    if tested:
        figures["primary"] = _primary(tested)
    return figures


def _arms(rows: Rows, part: str) -> list[str]:
    return list(dict.fromkeys(row["cell"]["arm"] for row in rows if row["cell"]["part"] == part))


def _curves(rows: Rows, part: str, arms: list[str], curves: dict[str, str]) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for panel, (name, title) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        for arm, colour in zip(arms, COLOURS, strict=False):
            mean = np.mean([metrics[name] for metrics in by_seed(rows, of(part, arm)).values()], axis=0)
            if name == "test_gap_last":
                mean = smooth(list(mean))
            panel.plot(range(1, len(mean) + 1), mean, f"{colour}-", label=arm)
        panel.set(xlabel="state", title=title)
        if name == "density":
            panel.set(yscale="log")
    panel.legend(fontsize=7)
    return figure


def _layers(rows: Rows) -> Figure:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    panel = figure.subplots()
    for arm in ("app", "app-mag", "app-random", "osp", "released"):
        if arm in _arms(rows, "F"):
            found = [list(metrics["per_layer"].values()) for metrics in by_seed(rows, of("F", arm)).values()]
            panel.plot(range(1, len(found[0]) + 1), np.mean(found, axis=0), "o-", label=arm)
    panel.set(xlabel="convolution", ylabel="density after the last state", ylim=(0, None))
    panel.legend(fontsize=7)
    return figure


def _primary(tested: Sequence[Mapping[str, Any]]) -> Figure:
    """Estimate over half the width of its interval, and p after Holm's correction."""
    figure = Figure(figsize=(7, 0.4 * len(tested) + 1.2), layout="constrained")
    panel = figure.subplots()
    for place, claim in enumerate(tested):
        scale = (claim["high"] - claim["low"]) / 2
        panel.errorbar(claim["estimate"] / scale, -place, xerr=1, fmt="ko", capsize=3)
    panel.axvline(0, color="0.6")
    labels = [f"{each['id']} (Holm p = {each['holm']['held']:.2g})" for each in tested]
    panel.set_yticks([-place for place in range(len(tested))], labels)
    panel.set(xlabel="estimate in half-widths of its 90 % interval; the claim is to the right of 0 (C1w: around 0)")
    return figure
