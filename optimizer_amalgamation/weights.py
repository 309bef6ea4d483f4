"""Weights of learnt rules: shipped by name, in files with their provenance, from the released arrays (spec g).

A file NAME.pt holds tensors only; NAME.json beside it says which run they come from. Nothing in either is executed.
"""

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.runs import CheckpointError, load_checkpoint, read_json, save_checkpoint, write_json
from optimizer_amalgamation.rule import Weights

PRESETS = Path(__file__).parent / "presets"
LARGEST = 1e6  # of a weight: beyond, single precision may overflow inside the rule

Source = str | Path | Mapping[str, Tensor]


def shipped() -> list[str]:
    """Names of the weights that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.pt"))


def load_weights(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """Weights of a rule, float32, on the CPU.

    Args:
        source: a shipped name, the path of a file of `save_weights`, or tensors by name.
        shapes: of the rule: what must be there.

    Raises:
        ValueError: for an unknown name (lists the names), a file that is missing, damaged or foreign, a tensor that is
            missing, too many, not of its shape, not real, not finite or beyond 1e6. TypeError for anything else.
    """
    if isinstance(source, Mapping):
        return check_weights(source, shapes, "weights")
    path = _path(source)
    try:
        content = load_checkpoint(path)
    except CheckpointError as error:
        raise ValueError(f"weights: {error}") from error
    except OSError as error:  # a folder for instance
        raise ValueError(f"weights must be a file of weights, got {str(path)!r} ({error.strerror})") from error
    weights = content.get("weights")
    if not isinstance(weights, dict):
        raise ValueError(f"weights: {path} must hold weights by name, got {type(weights).__name__}")
    return check_weights(weights, shapes, str(path))


def check_weights(weights: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str) -> Weights:
    """A detached float32 copy of `weights` where they fit `shapes`; raises ValueError as `load_weights`."""
    missing, foreign = [n for n in shapes if n not in weights], [str(n) for n in weights if n not in shapes]
    if missing or foreign:
        raise ValueError(f"{source}: must hold {', '.join(shapes)}; missing {missing or 'none'}, foreign {foreign}")
    found = {}
    for name, shape in shapes.items():
        w = weights[name]
        if not isinstance(w, Tensor) or not w.is_floating_point() or w.layout != torch.strided:
            kind = f"{w.dtype}, {w.layout}" if isinstance(w, Tensor) else type(w).__name__
            raise ValueError(f"{source}: {name} must be a dense real tensor, got {kind}")
        if tuple(w.shape) != shape:
            raise ValueError(f"{source}: {name} must have shape {shape}, got {tuple(w.shape)}")
        found[name] = w.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
        largest = float(found[name].abs().max())
        if not largest <= LARGEST:
            what = "finite" if not math.isfinite(largest) else f"at most {LARGEST:g}"
            raise ValueError(f"{source}: {name} must be {what}, got {largest}")
    return found


def save_weights(path: str | Path, weights: Weights, provenance: Mapping[str, Any]) -> None:
    """Write `weights` to `path` (.pt) and their provenance beside it (.json), each atomically.

    Args:
        provenance: of the run that made them, plain data: at least `rule`, `config`, `revision`, `data`, `meta_steps`.

    Raises:
        ValueError: for another suffix, or a provenance that lacks one of these.
    """
    path = Path(path)
    if path.suffix != ".pt":
        raise ValueError(f"a weights file must end in .pt, got {path}")
    lacking = [key for key in ("rule", "config", "revision", "data", "meta_steps") if key not in provenance]
    if lacking:
        raise ValueError(f"provenance must name {', '.join(lacking)}, got {sorted(provenance)}")
    plain = {name: w.detach().to("cpu", torch.float32).contiguous().clone() for name, w in weights.items()}
    save_checkpoint(path, {"weights": plain})
    write_json(path.with_suffix(".json"), dict(provenance))


def provenance(source: str | Path) -> dict[str, Any]:
    """Which run the weights of a shipped name or a file come from. Raises ValueError as `load_weights`."""
    path = _path(source).with_suffix(".json")
    if not path.exists():
        raise ValueError(f"weights: {path} must say where they come from, and is missing")
    try:
        return dict(read_json(path))
    except (CheckpointError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"weights: {path}: damaged") from error


def load_keras_npz(path: str | Path) -> Weights:
    """The arrays of an .npz whose names start with `w_`, without that, in the layout of the rules here (Keras's).

    Raises:
        ValueError: if it is missing, no archive of plain numeric arrays, or has none of this name.
    """
    try:
        with np.load(Path(path), allow_pickle=False) as archive:
            arrays = {name.removeprefix("w_"): archive[name] for name in archive.files if name.startswith("w_")}
    except Exception as error:  # what a forged archive may raise has no common class
        raise ValueError(f"{path}: must be an .npz of plain arrays ({type(error).__name__}: {error})") from error
    if not arrays:
        raise ValueError(f"{path}: must hold arrays named w_..., got none")
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            raise ValueError(f"{path}: {name} must hold real numbers, got {array.dtype}")
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}


def _path(source: str | Path) -> Path:
    if not isinstance(source, (str, Path)):
        raise TypeError(f"weights must be a name, a path or tensors by name, got {source!r}")
    if isinstance(source, Path) or source.endswith(".pt") or "/" in source:
        return Path(source)
    names = shipped()
    if source not in names:
        near = difflib.get_close_matches(source, names, 1, 0.5)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"weights must be one of {', '.join(names) or 'none yet'}, or a path, got {source!r}{guess}")
    return PRESETS / f"{source}.pt"
