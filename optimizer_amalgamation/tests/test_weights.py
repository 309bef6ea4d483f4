"""Facts about weights files: what comes back, and that a bad one does nothing but raise."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.runs import save_checkpoint
from optimizer_amalgamation import (
    AmalgamatedOptimizer,
    StudentRule,
    load_keras_npz,
    load_weights,
    provenance,
    save_weights,
    shipped,
)
from optimizer_amalgamation.tests.vectors import REFERENCE, student_weights

SHAPES = StudentRule().shapes
SOURCE = {"rule": "rnnprop", "config": {"seed": 0}, "revision": "abc", "data": "mnist5k", "meta_steps": 3}


class Explosive:
    """Executed by whoever unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_saved_weights_come_back_with_their_provenance(tmp_path: Path) -> None:
    weights = StudentRule().init(torch.Generator().manual_seed(0))
    path = tmp_path / "mine.pt"
    save_weights(path, {name: w.clone().requires_grad_() for name, w in weights.items()}, SOURCE)
    for source in (path, str(path)):
        found = load_weights(source, SHAPES)
        assert all(torch.equal(found[name], w) and not found[name].requires_grad for name, w in weights.items())
        assert provenance(source) == SOURCE
    p = torch.nn.Parameter(torch.ones(3))
    AmalgamatedOptimizer([p], path)


def test_weights_of_one_replicate_do_not_carry_the_others(tmp_path: Path) -> None:
    weights = StudentRule().init(torch.Generator().manual_seed(0), replicates=50)
    save_weights(tmp_path / "one.pt", {name: w[3] for name, w in weights.items()}, SOURCE)
    assert (tmp_path / "one.pt").stat().st_size < 40_000
    assert torch.equal(load_weights(tmp_path / "one.pt", SHAPES)["out_kernel"], weights["out_kernel"][3])


def test_released_arrays_are_read() -> None:
    found = load_keras_npz(REFERENCE / "rnnprop_released.npz")
    assert {name: tuple(w.shape) for name, w in found.items()} == SHAPES
    assert all(torch.equal(found[name], w) for name, w in student_weights().items())


def test_every_shipped_file_has_a_provenance_and_fits_its_rule() -> None:
    for name in shipped():
        assert {"rule", "config", "revision", "data", "meta_steps"} <= provenance(name).keys()
        assert load_weights(name, {"rnnprop": SHAPES}[provenance(name)["rule"]])


def test_shipped_names_are_the_files_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimizer_amalgamation.weights.PRESETS", tmp_path)
    assert shipped() == []
    with pytest.raises(ValueError, match="weights must be one of none yet, or a path, got 'mean'"):
        load_weights("mean", SHAPES)
    for name in ("minmax", "mean"):
        save_weights(tmp_path / f"{name}.pt", student_weights(), SOURCE)
    assert shipped() == ["mean", "minmax"] and provenance("mean") == SOURCE
    assert torch.equal(load_weights("mean", SHAPES)["out_bias"], student_weights()["out_bias"])
    with pytest.raises(ValueError, match=r"one of mean, minmax, or a path, got 'min-max' \(did you mean 'minmax'\?\)"):
        load_weights("min-max", SHAPES)


def changed(**values: Any) -> dict[str, Any]:
    return {**student_weights(), **values}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (changed(out_kernel=torch.zeros(1, 20)), r"out_kernel must have shape \(20, 1\), got \(1, 20\)"),
        (changed(lstm0_bias=torch.full((80,), float("nan"))), "lstm0_bias must be finite, got nan"),
        (changed(lstm0_bias=torch.full((80,), float("inf"))), "lstm0_bias must be finite, got inf"),
        (changed(lstm0_bias=torch.full((80,), -1e7)), "lstm0_bias must be at most 1e"),
        (changed(out_bias=torch.zeros(1, dtype=torch.int64)), "out_bias must be a dense real tensor, got torch.int64"),
        (changed(out_bias=torch.zeros(1, dtype=torch.cfloat)), "out_bias must be a dense real tensor"),
        (changed(out_bias=torch.zeros(1).to_sparse()), "out_bias must be a dense real tensor"),
        (changed(out_bias=0.5), "out_bias must be a dense real tensor, got float"),
        (changed(extra=torch.zeros(1)), "foreign .'extra'."),
        ({"out_bias": torch.zeros(1)}, "missing .'lstm0_kernel', "),
        ({}, "missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        AmalgamatedOptimizer([torch.nn.Parameter(torch.ones(3))], weights)
    save_checkpoint(tmp_path / "bad.pt", {"weights": weights})
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(tmp_path / "bad.pt", SHAPES)
    assert str(tmp_path / "bad.pt") in str(caught.value)


def test_a_file_that_is_no_weights_file_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.pt"
    save_weights(good, student_weights(), SOURCE)
    data = good.read_bytes()
    bad = tmp_path / "bad.pt"
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for content in (b"", b"no", data[:-1], data[: len(data) // 2], bytes(flipped), data + b"x"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="damaged, or not a checkpoint"):
            load_weights(bad, SHAPES)
    with pytest.raises(ValueError, match="no such checkpoint"):
        load_weights(tmp_path / "absent.pt", SHAPES)
    save_checkpoint(bad, {"weights": [1.0]})
    with pytest.raises(ValueError, match="must hold weights by name, got list"):
        load_weights(bad, SHAPES)
    buffer = io.BytesIO()
    torch.save(student_weights(), buffer)
    bad.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_weights(bad, SHAPES)


def test_a_malicious_file_does_nothing_but_raise(tmp_path: Path) -> None:
    mark, bad = tmp_path / "executed", tmp_path / "bad.pt"
    save_checkpoint(bad, {"weights": changed(out_bias=Explosive(mark))})
    with pytest.raises(ValueError, match="holds more than plain data"):
        load_weights(bad, SHAPES)
    bad.write_bytes(pickle.dumps(Explosive(mark)))
    with pytest.raises(ValueError, match="damaged, or not a checkpoint"):
        load_weights(bad, SHAPES)
    archive = tmp_path / "bad.npz"
    np.savez(archive, w_out_bias=np.array([Explosive(mark)], dtype=object))
    with pytest.raises(ValueError, match="of plain arrays"):
        load_keras_npz(archive)
    archive.write_bytes(pickle.dumps(Explosive(mark)))
    with pytest.raises(ValueError, match="of plain arrays"):
        load_keras_npz(archive)
    save_weights(bad, student_weights(), SOURCE)
    bad.with_suffix(".json").write_bytes(pickle.dumps(Explosive(mark)))
    with pytest.raises(ValueError, match="damaged"):
        provenance(bad)
    assert not mark.exists()


def test_archives_without_weights_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="must hold arrays named"):
        load_keras_npz(tmp_path / "none.npz")
    np.savez(tmp_path / "words.npz", w_a=np.array(["x"]))
    with pytest.raises(ValueError, match="a must hold real numbers, got <U1"):
        load_keras_npz(tmp_path / "words.npz")
    with pytest.raises(ValueError, match="absent"):
        load_keras_npz(tmp_path / "absent.npz")


def test_what_cannot_be_traced_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="provenance must name data, meta_steps, got"):
        save_weights(tmp_path / "x.pt", student_weights(), {"rule": "rnnprop", "config": {}, "revision": "abc"})
    with pytest.raises(ValueError, match="must end in"):
        save_weights(tmp_path / "x.bin", student_weights(), SOURCE)
    assert list(tmp_path.iterdir()) == []
    save_weights(tmp_path / "x.pt", student_weights(), SOURCE)
    (tmp_path / "x.json").unlink()
    with pytest.raises(ValueError, match="must say where they come from, and is missing"):
        provenance(tmp_path / "x.pt")
    (tmp_path / "x.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="damaged"):
        provenance(tmp_path / "x.pt")
