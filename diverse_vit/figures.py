"""Figures of the study: similarity by depth, spectra of weights, and what mixed patches look like."""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.claims import Rows
from common.data import DataConfig, load, pixels
from diverse_vit.patch_mixup import PatchMixup


def draw(rows: Rows) -> dict[str, Figure]:
    """Patch and head cosines by layer; spectra and reconstruction errors of q, k, v; samples of mixed digits."""
    arms = list(dict.fromkeys(row["cell"]["arm"] for row in rows))
    return {"depth": _depth(rows, arms), "spectra": _spectra(rows, arms), "patches": _patches()} if arms else {}


def _mean(rows: Rows, arm: str, *names: str) -> Any:
    """Mean over seeds of a list by layer; empty where it is missing."""
    found = []
    for row in (row for row in rows if row["cell"]["arm"] == arm):
        value: Any = row["metrics"]
        for name in names:
            value = value.get(name, {})
        found.append([np.nan if number is None else number for number in value])
    return np.mean(found, axis=0)


def _depth(rows: Rows, arms: list[str]) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    names = {"embedding_cosine": (0, "patches of a layer"), "head_cosine": (1, "heads of a block")}
    names["embedding_cross"] = (1, "a patch before and after a block")
    for panel, (name, (first, title)) in zip(panels, names.items(), strict=True):
        for arm in arms:
            curve = _mean(rows, arm, name)
            panel.plot(range(first, first + len(curve)), curve, label=arm)
        panel.set(xlabel="layer", ylabel="mean cosine", title=title)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend(fontsize=7)
    return figure


def _spectra(rows: Rows, arms: list[str]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm in arms:
        left.plot(_mean(rows, arm, "spectrum"), label=arm)
        errors = np.mean([_mean(rows, arm, "weights", name, "rre_25") for name in "qkv"], axis=0)
        right.plot(range(1, 1 + len(errors)), errors, label=arm)
    gaussian = np.mean([row["metrics"]["gaussian_rre_25"] for row in rows])
    right.axhline(gaussian, color="grey", linewidth=0.8, label="Gaussian")
    left.set(xlabel="singular value", ylabel="over the largest", title="q, k, v (mean over matrices)")
    right.set(xlabel="block", ylabel="relative error", title="q, k, v at 25 % of the rank")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(fontsize=7)
    return figure


def _patches() -> Figure:
    """Four digits mixed with their partners: the image, and the weight of the first label in each patch."""
    images = pixels(load(DataConfig(val=0.0)).train.images[torch.arange(0, 3200, 400)])  # type: ignore[arg-type,index]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(2, 4)
    for column in range(4):
        draws = np.random.RandomState(column)
        mixed = PatchMixup(patch_size=7, switch_prob=float(column < 3), generator=draws)(images, torch.arange(8))
        panels[0, column].imshow(mixed.x[column, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        weights = mixed.patch_weight.view(4, 4)
        panels[1, column].imshow(weights.numpy(), vmin=0, vmax=1)
        for (row, other), weight in np.ndenumerate(weights.numpy()):
            panels[1, column].text(
                other, row, f"{weight:.2f}", ha="center", va="center", fontsize=7, color="wk"[int(weight > 0.5)]
            )
        panels[0, column].set_title("cutmix" if column < 3 else "mixup")
        for panel in panels[:, column]:
            panel.axis("off")
    panels[1, 0].set_title("weight of the first label", fontsize=8)
    return figure
