"""Facts about scanning a network of one's own (acceptance checks 13, 18, 19), and the README's example."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from backdoor_lth import scan as scanning
from backdoor_lth.models import build_model
from backdoor_lth.scan import main
from backdoor_lth.tests import nets
from common.config import command
from common.runs import read_json
from common.tests.paper_checks import refusal, said

FEW = ["--inversion.steps", "4", "--inversion.images", "3", "--shape", "[3, 16, 16]", "--network.name", "cnn"]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = build_model("cnn", 3, 10)
    with torch.no_grad():
        model[3].weight[:, 1:] = 0  # type: ignore[index, operator]
        model[9].weight.zero_()  # type: ignore[index, operator]
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "net.pt"
    )
    safetensors.torch.save_file(model.state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "net.pt"


def test_a_scan_leaves_the_same_report_every_time_and_names_disconnected_layers(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [weights.parent / name for name in ("one", "two")]
    for folder, file in zip(folders, (weights, weights.with_suffix(".safetensors")), strict=True):
        status, out, _ = said(main, ["--weights", file, *FEW, "--folder", folder], capsys)
        assert status is None or status == 0
        assert "answers that to nearly everything" in out  # its last layer is cut, so all get one label
        assert sorted(path.name for path in folder.iterdir()) == ["masks.png", "report.json", "triggers.png"]
    one, two = (read_json(folder / "report.json") for folder in folders)
    assert one.pop("weights") != two.pop("weights") and one == two
    assert (
        one["disconnected"] == ["9.weight"] and len(one["l1"]) == 10 and one["null_success"][one["collapse_label"]] == 1
    )


def test_training_data_give_a_trojan_score(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draws = np.random.default_rng(0)
    images, labels = draws.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8), np.arange(60) % 10
    path = weights.parent / "set.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    options = [
        "--train",
        "true",
        "--data.name",
        "npz",
        "--data.path",
        path,
        "--score.points",
        "3",
        "--score.batches",
        "1",
    ]
    said(main, ["--weights", weights, *FEW, *options, "--folder", weights.parent / "out"], capsys)
    report = read_json(weights.parent / "out" / "report.json")
    assert 0 <= report["trojan_score"] <= 1 and len(report["error"]) == 3
    assert (weights.parent / "out" / "score.png").exists()


def test_nothing_in_a_file_of_weights_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (tmp_path / "executed",))

    with open(tmp_path / "evil.pt", "wb") as file:
        pickle.dump({"model": Evil()}, file)
    line = refusal(main, ["--weights", tmp_path / "evil.pt", *FEW, "--folder", tmp_path / "out"], capsys)
    assert "does not hold this network's weights as plain tensors" in line
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def test_a_network_of_ones_own_is_built_by_its_import_path(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "mine", lambda: build_model("cnn", 3, 10), raising=False)
    options = ["--weights", weights, *FEW, "--builder", "backdoor_lth.scan:mine", "--folder", weights.parent / "out"]
    monkeypatch.setattr("sys.argv", ["scan.py", *map(str, options)])
    with pytest.raises(SystemExit):
        command(main)
    assert read_json(weights.parent / "out" / "report.json")["density"] < 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "weights must be a file of weights, got ''"),
        (["--weights", "no.pt"], "no.pt: no such file of weights"),
        (["--weights", "x", "--classes", "2"], "classes must be at least 3, got 2"),
        (["--weights", "x", "--shape", "[3]"], r"shape must be channels, height and width, got \[3\]"),
        (["--weights", "x", "--builder", "nothing"], "builder must be package.module:function, got 'nothing'"),
        (["--weights", "x", "--builder", "a.b:c"], "builder must be package.module:function that can be imported"),
    ],
)
def test_scans_that_cannot_be_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.match(message, refusal(main, options, capsys))


def test_the_readmes_example_runs() -> None:
    text = (nets.CONFIGS.parent / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    torch.manual_seed(0)
    names: dict[str, object] = {
        "model": nets.TinyNet(),
        "images": torch.randint(0, 256, (50, 3, 16, 16), dtype=torch.uint8),
    }
    names["labels"] = torch.arange(50) % 5
    exec(code, names)
    assert names["found"].label in range(5)  # type: ignore[attr-defined]
