"""Scan a network of your own: python backdoor_lth/scan.py --weights net.pt --network.name resnet20s --classes 10

Leaves report.json, triggers.png and masks.png in a folder; with training data also the Trojan score, score.png. Weights
are read as plain tensors and never executed. `--builder package.module:function` takes a network of your own making,
looked for in the working directory first: that code is run, as your own act, and only the weights are then foreign.
"""

import importlib
import io
import itertools
import math
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from backdoor_lth.barrier import error_barrier, fine_tuned
from backdoor_lth.compaction import compact
from backdoor_lth.inversion import classes_of
from backdoor_lth.models import build_model
from backdoor_lth.pruning import disconnected
from backdoor_lth.scanning import inverted, verdict
from backdoor_lth.settings import BarrierConfig, ModelConfig, SearchConfig
from backdoor_lth.traced import anchor
from backdoor_lth.victim import coloured
from common.config import UserError, command, parse, require
from common.data import DataConfig, ImageSet, batches, load, pixels
from common.experiment import device
from common.masks import Masks, prunable_weights
from common.runs import CheckpointError, write_atomically, write_json


@dataclass(frozen=True)
class ScanConfig:
    """Which network to scan, and how."""

    weights: str = ""
    """a state dict: .safetensors, .pt or .pth, or a file of this project with "model" in it; its "masks" are applied"""
    network: ModelConfig = field(default_factory=lambda: ModelConfig(name="resnet20s"))
    builder: str = ""
    """package.module:function that returns your network; empty: one of this folder's, by network.name"""
    classes: int = 10
    """that the network answers"""
    shape: list[int] = field(default_factory=lambda: [3, 32, 32])
    """channels, height and width of the input"""
    data: DataConfig = field(default_factory=lambda: DataConfig(name="", val=0.0))  # type: ignore[arg-type]
    """a training set, possibly poisoned, for the Trojan score: npz with its path, or a named set; no name: no score"""
    inversion: SearchConfig = field(default_factory=SearchConfig)
    score: BarrierConfig = field(default_factory=BarrierConfig)
    seed: int = 0
    folder: str = "scan"
    """of the report"""

    def __post_init__(self) -> None:
        require(bool(self.weights), "weights", self.weights, "a file of weights")
        require(self.classes >= 3, "classes", self.classes, "at least 3")
        fits = len(self.shape) == 3 and min(self.shape) >= 1
        require(fits, "shape", self.shape, "channels, height and width")
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        shape = self.builder == "" or ":" in self.builder
        require(shape, "builder", self.builder, "package.module:function")
        files = self.data.name == "imagefolder"
        require(not files, "data.name", self.data.name, "a data set held in memory")


def scan(config: ScanConfig) -> dict[str, Any]:
    """Scan the configured network; writes and returns the report. Raises `UserError` where a file does not fit."""
    model = _network(config).to(device()).eval()
    data = _training(config) if config.data.name else None
    shape = tuple(config.shape)
    report: dict[str, Any] = {"weights": config.weights, "seed": config.seed}
    folder = Path(config.folder)
    figures = {}
    with _in_one_line(config.weights):
        classes = classes_of(model, anchor(model).new_zeros(1, *shape))
        require(classes == config.classes, "classes", config.classes, f"the {classes} that the network answers")
        masks = Masks({name: weight != 0 for name, weight in prunable_weights(model).items()})
        report |= {"weights_left": masks.kept, "density": masks.density, "disconnected": disconnected(masks)}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # where nothing can be written the long search is in vain
        pass
    with _in_one_line(config.weights):
        if data:
            barrier = _barrier(config, model, masks, data)
            report |= {"trojan_score": barrier.score_error, "error": barrier.error, "alphas": barrier.alphas}
            figures["score"] = _curve(barrier.alphas, barrier.error)
        found = inverted(compact(model, shape), shape, config.inversion, None, config.seed)
    report |= verdict(found, config.inversion.norm)
    answered = max(report["null_success"])
    report["reading"] = (
        f"label {report['detected']} has the least trigger, anomaly index {report['index']:.2f}; without any trigger "
        f"the network gives {100 * answered:.0f} % of noise the label {report['collapse_label']}"
        + (": it answers that to nearly everything, so its trigger says nothing" if answered > 0.8 else "")
    )
    figures |= {"triggers": _triggers(found.mark, found.mask), "masks": _bars(report["l1"], report["detected"])}
    pictures = {name: _png(figure) for name, figure in figures.items()}
    for name in ("report.json", "score.png"):  # of an earlier scan
        (folder / name).unlink(missing_ok=True)
    for name, picture in pictures.items():
        write_atomically(folder / f"{name}.png", picture)
    write_json(folder / "report.json", report)
    return report


@contextmanager
def _in_one_line(weights: str) -> Iterator[None]:
    """What the network raises, of any kind, as a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{weights}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of its message, after its kind where that tells more."""
    line = next(iter(str(error).strip().splitlines()), "")
    kind = "" if isinstance(error, ValueError | RuntimeError) and line else type(error).__name__
    return ": ".join(part for part in (kind, line) if part)


def _built(builder: str) -> nn.Module:
    """What package.module:function returns. Raises `UserError` where that is no network."""
    module, _, name = builder.partition(":")
    sys.path.insert(0, os.getcwd())  # before the folder of this file, which has a models.py too
    try:
        build = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module is the user's: a SyntaxError, whatever it raises
        wanted = "builder must be package.module:function that can be imported"
        raise UserError(f"{wanted}, got {builder!r} ({_reason(error)})") from error
    wanted = "builder must be a function that returns a network without being given anything"
    try:
        model = build()
    except Exception as error:
        raise UserError(f"{wanted}, got {builder!r} ({_reason(error)})") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{wanted}, got {builder!r} (it returns {type(model).__name__})")
    return model


def _network(config: ScanConfig) -> nn.Module:
    path = Path(config.weights)
    if config.builder:
        model = _built(config.builder)
    else:
        model = build_model(config.network.name, config.shape[0], config.classes)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        own, masks = model.state_dict(), Masks()
        for key in ("model", "state_dict"):
            if isinstance(state.get(key), Mapping):
                masks, state = Masks(state.get("masks", masks)), state[key]
        state = {name if name in own else name.removeprefix("module."): value for name, value in state.items()}
        for name in [name for name in state if name.endswith("_orig")]:  # of torch.nn.utils.prune
            plain = name.removesuffix("_orig")
            state[plain] = state.pop(name) * state.pop(f"{plain}_mask")
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(_first_difference(own, state) or str(error).splitlines()[-1].strip()) from error
        masks.apply_(model)
    except Exception as error:  # of torch, pickle, zip and safetensors each another kind
        reason = _reason(error)
        if isinstance(error, pickle.UnpicklingError):  # torch's words are in bold, and advise to execute the file
            reason = "it is damaged, or holds Python objects such as a whole network, which are not read"
        raise CheckpointError(f"{path}: does not hold this network's weights as plain tensors ({reason})") from error
    return model


def _first_difference(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
    """The first entry of a network that a state dict lacks or has otherwise, or the first that it has too many."""
    for name, value in own.items():
        if name not in state and not name.endswith("num_batches_tracked"):  # which old files lack
            return f"{name} is missing"
        there = tuple(getattr(state.get(name, value), "shape", ()))
        if there != tuple(value.shape):
            return f"{name} must be {tuple(value.shape)}, got {there}"
    return next((f"{name} is no entry of the network" for name in state if name not in own), "")


def _training(config: ScanConfig) -> ImageSet:
    data = load(config.data).train
    data = coloured(data) if config.shape[0] == 3 else data
    assert isinstance(data.images, Tensor)
    shape = list(data.images.shape[1:])
    require(config.shape == shape, "shape", config.shape, f"that of the training images, {shape}")
    least = f"at least {data.classes}, as many as the training images have"
    require(config.classes >= data.classes, "classes", config.classes, least)
    return data


def _barrier(config: ScanConfig, model: nn.Module, masks: Masks, data: ImageSet) -> Any:
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def stream(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = min(config.score.batch_size, len(data))
        for images, labels in batches(data, size, config.data, seed=seed):
            yield config.network.normalize(pixels(images.to(device()))), labels.to(device())

    tuned = fine_tuned(
        model, state, masks, itertools.islice(stream(config.seed), config.score.steps), lr=config.score.lr
    )
    sample = list(itertools.islice(stream(config.seed + 1), config.score.batches))
    return error_barrier(model, state, tuned, sample, points=config.score.points)


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _triggers(mark: Tensor, mask: Tensor) -> Figure:
    """Mark, mask and their product of every label, as pictures."""
    count = min(len(mark), 20)
    figure = Figure(figsize=(1.1 * count, 3.6), layout="constrained")
    panels = figure.subplots(3, count, squeeze=False)
    for label in range(count):
        shown, where = mark[label].cpu(), mask[label].cpu()
        shown = shown if len(shown) == 3 else shown[:1].expand(3, -1, -1)
        for row, picture in enumerate((shown, where.expand(3, -1, -1), shown * where)):
            panels[row, label].imshow(picture.permute(1, 2, 0).numpy(), vmin=0, vmax=1)
            panels[row, label].set_axis_off()
        panels[0, label].set_title(str(label), fontsize=8)
    return figure


def _bars(norms: list[float], detected: int) -> Figure:
    figure = Figure(figsize=(5, 3), layout="constrained")
    panel = figure.subplots()
    panel.bar(range(len(norms)), norms, color=["C3" if label == detected else "C0" for label in range(len(norms))])
    panel.set(xlabel="label", ylabel="size of the mask")
    return figure


def _curve(alphas: list[float], errors: list[float]) -> Figure:
    figure = Figure(figsize=(4, 3), layout="constrained")
    panel = figure.subplots()
    panel.plot(alphas, errors, "o-")
    panel.set(xlabel="from fine-tuned (0) to the network itself (1)", ylabel="error on training images")
    return figure


def main() -> None:
    """The command line."""
    about = "backdoor_lth: recover every label's trigger from a network's weights alone"
    config = parse(ScanConfig, prog="python backdoor_lth/scan.py", description=about)
    report = scan(config)
    if not math.isnan(report.get("trojan_score", math.nan)):
        print(f"Trojan score {report['trojan_score']:.3f}")
    print(f"{report['reading']}\nthe report: {config.folder}/report.json")


if __name__ == "__main__":
    command(main)
