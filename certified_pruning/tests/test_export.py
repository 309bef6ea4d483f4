"""What other verifiers are given is what we verify: the same function, the same box, the same question."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certified_pruning.export import OPSET, export_instances, vnnlib, write_onnx
from certified_pruning.ibp import input_box
from certified_pruning.models import cnn_s
from certified_pruning.optional import MissingPackageError
from certified_pruning.tests.nets import images, odd_net, randomise_norms, small_conv, worked_net
from certified_pruning.verifier import CompleteVerifier

torch.set_num_threads(1)
writes = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")), reason="onnx is not installed"
)


def run_onnx(path: Path, x: Tensor) -> Tensor:
    """Outputs of the file by onnxruntime, one input at a time; skips the test without it."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = [value.name for value in session.get_inputs()]
    return torch.cat([torch.from_numpy(session.run(None, {name: row[None].numpy()})[0]) for row in x])


@dataclass
class Property:
    """What a reader makes of a file: a box in float64 and pairs (t, y) of the disjunction Y_t >= Y_y."""

    low: Tensor
    high: Tensor
    pairs: list[tuple[int, int]]
    outputs: int


def read(text: str) -> Property:
    """Every statement must be one of the five that we write; anything else fails."""
    text = re.sub(r";[^\n]*", "", text)
    declared = re.findall(r"\(declare-const ([XY])_(\d+) Real\)", text)
    number = r"(-?\d+(?:\.\d+)?)"
    bounds = re.findall(rf"\(assert \(([<>]=) X_(\d+) {number}\)\)", text)
    (body,) = re.findall(r"\(assert \(or((?:\s*\(and \(>= Y_\d+ Y_\d+\)\))+)\s*\)\)", text)
    rest = re.sub(r"\(declare-const [XY]_\d+ Real\)", "", text)
    rest = re.sub(rf"\(assert \([<>]= X_\d+ {number}\)\)", "", rest)
    rest = re.sub(r"\(assert \(or(?:\s*\(and \(>= Y_\d+ Y_\d+\)\))+\s*\)\)", "", rest)
    assert not rest.strip()
    inputs = sum(kind == "X" for kind, _ in declared)
    low, high = torch.full((2, inputs), float("nan"), dtype=torch.float64)
    for sign, index, value in bounds:
        side = low if sign == ">=" else high
        assert side[int(index)].isnan()
        side[int(index)] = float(value)
    pairs = [(int(a), int(b)) for a, b in re.findall(r"\(>= Y_(\d+) Y_(\d+)\)", body)]
    return Property(low, high, pairs, len(declared) - inputs)


def test_a_property_reads_back_to_the_same_float64_box_and_question() -> None:
    g = torch.Generator().manual_seed(0)
    scale = 10.0 ** torch.randint(-12, 9, (2, 3, 4), generator=g).double()
    low = torch.randn(2, 3, 4, generator=g, dtype=torch.float64) * scale
    high = low + torch.rand(2, 3, 4, generator=g, dtype=torch.float64)
    low[0, 0, 0], high[0, 0, 0], low[0, 0, 1] = 0.0, 0.0, -5e-324
    there = read(vnnlib(low, high, 2, 4, "a\ncomment"))
    assert torch.equal(there.low, low.flatten()) and torch.equal(there.high, high.flatten())
    assert there.pairs == [(0, 2), (1, 2), (3, 2)] and there.outputs == 4


def test_float32_boxes_are_written_as_the_float64_they_are() -> None:
    low = torch.tensor([0.1, -1 / 3])
    there = read(vnnlib(low, low, 0, 2))
    assert torch.equal(there.low, low.double()) and torch.equal(there.high, low.double())


NETS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "cnn_s": (randomise_norms(cnn_s(1, 12, 10), 3).eval(), (1, 12, 12)),
    "odd": (odd_net(), (2, 9, 7)),
}


@writes
@pytest.mark.parametrize("name", NETS)
def test_onnx_outputs_equal_the_networks(name: str, tmp_path: Path) -> None:
    model, shape = NETS[name]
    write_onnx(model, shape, tmp_path / "n.onnx")
    x = images(shape, 20) * 3 - 1
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(tmp_path / "n.onnx", x), model(x), atol=1e-5, rtol=1e-5)


@writes
def test_the_onnx_file_has_the_stated_opset_and_names_and_no_paths_of_this_machine(tmp_path: Path) -> None:
    import onnx

    write_onnx(small_conv(), (1, 6, 5), tmp_path / "n.onnx")
    model = onnx.load(str(tmp_path / "n.onnx"))
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [OPSET] and OPSET >= 17
    assert [i.name for i in model.graph.input] == ["input"] and [o.name for o in model.graph.output] == ["logits"]
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 1, 6, 5]
    content = (tmp_path / "n.onnx").read_bytes()
    assert not any(word in content for word in (b".py", b"site-packages", str(Path.cwd()).encode()))


@writes
def test_instances_list_a_property_for_each_image_in_normalised_coordinates(tmp_path: Path) -> None:
    x, y = images((2, 9, 7), 3), torch.tensor([1, 0, 3])
    csv = export_instances(tmp_path, odd_net(), x, y, 0.05, 4, normalize=((0.2, 0.4), (0.5, 0.25)), timeout_s=60)
    rows = [line.split(",") for line in csv.read_text().splitlines()]
    assert [row[2] for row in rows] == ["60"] * 3 and all((tmp_path / row[0]).exists() for row in rows)
    low, high = input_box(x.double(), 0.05, (0.2, 0.4), (0.5, 0.25))
    for i, (_, name, _) in enumerate(rows):
        there = read((tmp_path / name).read_text())
        assert torch.equal(there.low, low[i].flatten()) and torch.equal(there.high, high[i].flatten())
        assert there.pairs == [(t, int(y[i])) for t in range(4) if t != y[i]]


@writes
def test_a_witness_of_ours_satisfies_the_exported_property_in_the_exported_network(tmp_path: Path) -> None:
    """The worked net on [0, 1] x [0, 0.5]: its smallest margin is constant - 2."""
    pytest.importorskip("onnxruntime")
    for constant, verdict in ((1.5, "falsified"), (2.5, "verified")):
        model, x, y = worked_net(constant), torch.tensor([[0.5, 0.0]]), torch.tensor([0])
        found = CompleteVerifier(model, (2,), 0.5, 2).verify(x, y).images[0]
        assert found.status == verdict
        csv = export_instances(tmp_path / verdict, model, x, y, 0.5, 2)
        network, name, _ = csv.read_text().strip().split(",")
        there = read((csv.parent / name).read_text())
        grid = np.linspace(0, 1, 21)
        points = torch.tensor([[a, b] for a in grid for b in grid])
        if found.witness is not None:
            points = torch.cat([points, found.witness[None]])
        inside = ((points >= there.low) & (points <= there.high)).all(1)
        logits = run_onnx(csv.parent / network, points.float())
        satisfied = torch.stack([logits[:, t] >= logits[:, label] for t, label in there.pairs]).any(0) & inside
        assert bool(satisfied.any()) == (verdict == "falsified")
        assert found.witness is None or bool(satisfied[-1])


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackageError, match=r"^onnx is not installed; get it with: pip install onnx onnxscript$"):
        write_onnx(small_conv(), (1, 6, 5), tmp_path / "n.onnx")


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    x, y = images((1, 6, 5), 2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="timeout_s must be finite and > 0, got 0"):
        export_instances(tmp_path, small_conv(), x, y, 0.1, 4, timeout_s=0)
    with pytest.raises(ValueError, match=r"y must be in \[0, 2\)"):
        vnnlib(x[0], x[0], 2, 2)
    with pytest.raises(ValueError, match="x_lb must be finite, <= x_ub"):
        vnnlib(x[0] + 1, x[0], 0, 2)
    with pytest.raises(ValueError, match="eps must be finite and >= 0, got -1"):
        export_instances(tmp_path, small_conv(), x, y, -1, 4)
    with pytest.raises(ValueError, match="eval mode"):
        write_onnx(small_conv().train(), (1, 6, 5), tmp_path / "n.onnx")
    assert not list(tmp_path.iterdir())
