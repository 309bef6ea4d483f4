"""Figures of the study: sample sheets, distance over training, density by layer, explored weights."""

import base64
import io
import zlib
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.claims import Rows

Key = tuple[str, float, float]


def draw(rows: Rows) -> dict[str, Figure]:
    """Figures by name; arms in the order of their rows, means over seeds, samples of each arm's first seed."""
    arms: dict[Key, list[dict[str, Any]]] = {}
    for row in rows:
        cell = row["cell"]
        arms.setdefault((cell["arm"], cell["density_g"], cell["density_d"]), []).append(dict(row["metrics"]))
    if not arms:
        return {}
    return {"samples": _samples(arms), "curves": _curves(arms), "topology": _topology(arms)}


def label(arm: Key) -> str:
    """An arm in words."""
    return arm[0] if arm[0] == "dense" else f"{arm[0]} {arm[1]:g}/{arm[2]:g}"


def unpacked_sheet(sheet: dict[str, Any]) -> Tensor:
    """Images (n, channels, side, side) uint8 of a row's `sheet`."""
    levels = np.frombuffer(zlib.decompress(base64.b64decode(sheet["data"])), np.uint8)
    return torch.from_numpy(levels * 17).view(sheet["shape"])


def sheet_png(images: Tensor) -> bytes:
    """Images (n, channels, side, side) uint8 in a grid, as PNG."""
    figure = Figure(figsize=(8, 8 * -(-len(images) // 10) / 10), layout="tight")
    _show(figure.subplots(), images, 10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _show(panel: Any, images: Tensor, columns: int) -> None:
    count, channels, side, _ = images.shape
    full = -(-count // columns) * columns
    tiles = torch.zeros(full, channels, side, side, dtype=torch.uint8)
    tiles[:count] = images
    grid = tiles.view(-1, columns, channels, side, side).permute(0, 3, 1, 4, 2)
    picture = grid.reshape(full // columns * side, columns * side, channels).numpy()
    panel.imshow(picture.squeeze(2) if channels == 1 else picture, cmap="gray", vmin=0, vmax=255)
    panel.axis("off")


def _samples(arms: dict[Key, list[dict[str, Any]]]) -> Figure:
    figure = Figure(figsize=(9, 1.25 * len(arms)), layout="constrained")
    panels = figure.subplots(len(arms), 1, squeeze=False)[:, 0]
    for panel, (arm, metrics) in zip(panels, arms.items(), strict=True):
        _show(panel, unpacked_sheet(metrics[0]["sheet"]), 10)
        mean = np.mean([m["fd"] for m in metrics])
        panel.set_title(f"{label(arm)}: fd_classifier {mean:.0f}", fontsize=9, loc="left")
    return figure


def _curves(arms: dict[Key, list[dict[str, Any]]]) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    panel = figure.subplots()
    for arm, metrics in arms.items():
        steps = [step for step, _ in metrics[0]["curve"]]
        panel.plot(steps, np.mean([[fd for _, fd in m["curve"]] for m in metrics], axis=0), label=label(arm))
    panel.axhline(next(iter(arms.values()))[0]["floor"], color="grey", linewidth=0.8, label="real images")
    panel.set(xlabel="generator steps", ylabel="fd_classifier of the average", yscale="log", title="means over seeds")
    panel.legend(fontsize=7)
    return figure


def _topology(arms: dict[Key, list[dict[str, Any]]]) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn: set[float] = set()
    for arm, metrics in arms.items():
        layers, density = metrics[0]["layer_density"], metrics[0]["density_g"]
        if density not in drawn:  # arms of one density have the same layers
            left.plot(range(len(layers)), list(layers.values()), ".-", label=f"density {density:.2g}")
            left.set_xticks(range(len(layers)), list(layers), rotation=70, fontsize=6)
            drawn.add(density)
        right.bar(label(arm), np.mean([m["explored_g"] for m in metrics]), color="C0")
        right.bar(label(arm), density, color="C1")
    left.set(yscale="log", title="density of the generator's layers")
    left.legend(fontsize=7)
    right.tick_params(axis="x", labelrotation=70, labelsize=7)
    right.set(title="weights active at the end (orange), ever (blue)")
    return figure
