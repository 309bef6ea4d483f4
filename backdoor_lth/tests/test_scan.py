"""Facts about scanning a network of one's own (acceptance checks 13, 18, 19), and the README's example."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from backdoor_lth.models import build_model
from backdoor_lth.pruning import global_magnitude
from backdoor_lth.scan import main
from backdoor_lth.tests import nets
from common.runs import read_json, save_checkpoint
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


def training_set(path: Path, classes: int = 10, size: int = 16) -> Path:
    draws = np.random.default_rng(0)
    images, labels = draws.integers(0, 256, (60, size, size, 3), dtype=np.uint8), np.arange(60) % classes
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return path


def test_training_data_give_a_trojan_score(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = training_set(weights.parent / "set.npz")
    options = ["--data.name", "npz", "--data.path", path, "--score.points", "3", "--score.batches", "1"]
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


def test_the_masks_of_a_ticket_are_applied(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model("cnn", 3, 10)
    masks = global_magnitude(model, None, 0.75)
    path = weights.parent / "round-00.pt"
    save_checkpoint(path, {"model": model.state_dict(), "masks": masks.state_dict()})
    said(main, ["--weights", path, *FEW, "--folder", weights.parent / "out"], capsys)
    assert read_json(weights.parent / "out" / "report.json")["weights_left"] == masks.kept == 8172
    save_checkpoint(path, {"model": model.state_dict(), "masks": {"no.weight": torch.ones(1)}})
    assert "mask no.weight must name a parameter" in refusal(main, ["--weights", path, *FEW], capsys)


def test_a_pruned_modules_state_without_its_masks_is_refused(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = build_model("cnn", 3, 10).state_dict()
    state["0.weight_orig"] = state.pop("0.weight")
    torch.save(state, weights)
    assert "plain tensors ('0.weight_mask')" in refusal(main, ["--weights", weights, *FEW], capsys)


MINE = """
import torch
from torch import nn

from models import Mine
from backdoor_lth.models import build_model


def make():
    return Mine()


def two():
    return build_model("cnn", 3, 2)


def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
"""


@pytest.fixture
def own(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a package `models`, as this folder's own file is called, and weights of its networks."""
    monkeypatch.chdir(weights.parent)
    monkeypatch.setattr(sys, "path", [str(nets.CONFIGS.parent), *sys.path])  # as `python backdoor_lth/scan.py` has it
    for name in ("models", "mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    Path("models").mkdir()
    Path("models/__init__.py").write_text(
        "from backdoor_lth.models import small_cnn\nMine = lambda: small_cnn(3, 10)\n"
    )
    Path("mine.py").write_text(MINE)
    torch.save(build_model("cnn", 3, 2).state_dict(), "two.pt")
    torch.save({"1.weight": torch.randn(10, 768), "1.bias": torch.zeros(10)}, "flat.pt")
    return weights


def test_a_network_of_ones_own_is_found_in_the_working_directory(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(main, ["--weights", own, *FEW, "--builder", "mine:make", "--folder", "out"], capsys)
    assert not status and "the report: out/report.json" in out
    assert read_json(Path("out/report.json"))["density"] < 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "two.pt", "--builder", "mine:two"], "classes must be the 2 that the network answers, got 10"),
        (["--weights", "flat.pt", "--builder", "mine:flat"], "flat.pt: model must have a weight to prune"),
        (["--weights", "flat.pt", "--builder", "mine:flat", "--shape", "[3, 8, 8]"], "flat.pt: mat1 and mat2 shapes"),
        (
            ["--weights", "net.pt", "--data.name", "npz", "--data.path", "12.npz"],
            "classes must be at least 12, as many",
        ),
        (
            ["--weights", "net.pt", "--data.name", "npz", "--data.path", "8x8.npz"],
            r"shape must be that of .*\[3, 8, 8\]",
        ),
        (
            ["--weights", "net.pt", "--data.name", "imagefolder", "--data.path", "x"],
            "data.name must be a data set held",
        ),
        (["--weights", "net.pt", "--builder", "mine:nothing"], "builder must be .* that can be imported.*'nothing'"),
    ],
)
def test_networks_and_data_that_do_not_fit_are_refused(
    options: list[str], message: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training_set(Path("12.npz"), classes=12)
    training_set(Path("8x8.npz"), size=8)
    assert re.match(message, refusal(main, [*FEW, *options], capsys))
    assert not Path("scan").exists()


def test_what_a_scan_has_no_use_for_is_no_option_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--score.extreme", "--inversion.clean", "--train"):
        assert f"unknown key '{option[2:]}'" in refusal(main, ["--weights", "x", option, "1"], capsys)


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
