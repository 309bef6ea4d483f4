"""Facts about scanning a network of one's own (acceptance checks 13, 18, 19), and the README's example."""

from __future__ import annotations

import importlib
import pickle
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from backdoor_lth import scan as scanning
from backdoor_lth.barrier import error_barrier
from backdoor_lth.models import build_model
from backdoor_lth.pruning import global_magnitude
from backdoor_lth.scan import main
from backdoor_lth.tests import nets
from common.data import batches
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
    save_checkpoint(path, {"model": "cnn", "state_dict": model.state_dict(), "masks": masks.state_dict()})
    said(main, ["--weights", path, *FEW, "--folder", weights.parent / "out"], capsys)
    assert read_json(weights.parent / "out" / "report.json")["weights_left"] == masks.kept
    save_checkpoint(path, {"model": model.state_dict(), "masks": {"no.weight": torch.ones(1)}})
    assert "mask no.weight must name a parameter" in refusal(main, ["--weights", path, *FEW], capsys)


def test_a_pruned_modules_state_without_its_masks_is_refused(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = build_model("cnn", 3, 10).state_dict()
    state["0.weight_orig"] = state.pop("0.weight")
    torch.save(state, weights)
    assert "plain tensors (KeyError: '0.weight_mask')" in refusal(main, ["--weights", weights, *FEW], capsys)


MINE = """
import torch
from torch import nn

from models import Mine
from backdoor_lth.models import build_model


def make():
    return Mine()


def needs(classes):
    return Mine()


def breaks():
    raise OSError("no such\\nthing")


def nothing_made():
    pass


number = 3


class Picky(nn.Sequential):
    def forward(self, x):
        assert x.shape[-1] == 32
        return super().forward(x)


def picky():
    return Picky(nn.Flatten(), nn.Linear(768, 10))


class Late(nn.Sequential):
    seen = 0

    def forward(self, x):
        Late.seen += 1
        if Late.seen > 2:
            raise IndexError
        return super().forward(x)


def late():
    return Late(nn.Conv2d(3, 4, 3, 2), nn.Flatten(), nn.Linear(196, 10))


def two():
    return build_model("cnn", 3, 2)


def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 10))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = build_model("cnn", 3, 10)

    def forward(self, x):
        return self.module(x)
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
    late = {"0.weight": torch.randn(4, 3, 3, 3), "0.bias": torch.zeros(4)}
    torch.save({**late, "2.weight": torch.randn(10, 196), "2.bias": torch.zeros(10)}, "late.pt")
    Path("broken.py").write_text("def make(:\n")
    return weights


def test_a_network_of_ones_own_is_found_in_the_working_directory(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(main, ["--weights", own, *FEW, "--builder", "mine:make", "--folder", "out"], capsys)
    assert not status and "the report: out/report.json" in out
    assert read_json(Path("out/report.json"))["density"] < 0.7


def test_a_network_may_have_a_module_of_the_name_that_wrappers_give(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.path.insert(0, "")
    torch.save(importlib.import_module("mine").Wrapped().state_dict(), "wrapped.pt")
    status, _, _ = said(main, [*FEW, "--weights", "wrapped.pt", "--builder", "mine:Wrapped"], capsys)
    assert not status and Path("scan/report.json").exists()


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
        (["--weights", "net.pt", "--builder", "broken:make"], "builder must be .* can be imported, .*SyntaxError: "),
        (["--weights", "net.pt", "--builder", ":make"], r"builder must be .* can be imported, .*\(Empty module name\)"),
        (["--weights", "net.pt", "--builder", "mine:needs"], "builder must be .* without .*'mine:needs' .* 'classes'"),
        (["--weights", "net.pt", "--builder", "mine:breaks"], r"builder must be .* \(OSError: no such\)"),
        (["--weights", "net.pt", "--builder", "mine:nothing_made"], r"builder must be .*\(it returns NoneType\)"),
        (["--weights", "net.pt", "--builder", "mine:number"], "builder must be .* without .*'int' object is not call"),
        (["--weights", "flat.pt", "--builder", "mine:picky"], "flat.pt: AssertionError$"),
    ],
)
def test_networks_and_data_that_do_not_fit_are_refused(
    options: list[str], message: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training_set(Path("12.npz"), classes=12)
    training_set(Path("8x8.npz"), size=8)
    assert re.match(message, refusal(main, [*FEW, *options], capsys))
    assert not Path("scan").exists()


def test_an_error_of_the_network_in_mid_search_is_one_line(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compaction, that cannot run it either
        line = refusal(main, [*FEW, "--weights", "late.pt", "--builder", "mine:late"], capsys)
    assert line == "late.pt: IndexError"


def test_the_first_wrong_weight_is_named(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = build_model("cnn", 3, 10).state_dict()
    lacking = {name: value for name, value in right.items() if name not in ("3.weight", "4.bias")}
    old = {name: value for name, value in right.items() if not name.endswith("num_batches_tracked")}
    wrong = (
        (lacking, "3.weight is missing"),
        ({**right, "3.bias": torch.ones(2), "14.bias": torch.ones(3)}, "14.bias must be (10,), got (3,)"),
        ({**right, "3.bias": torch.ones(2)}, "3.bias is no entry of the network"),
        ({**old, "4.bias": 3}, "4.bias must be (32,), got ()"),
    )
    for state, message in wrong:
        torch.save(state, weights)
        line = refusal(main, ["--weights", weights, *FEW], capsys)
        assert line == f"{weights}: does not hold this network's weights as plain tensors ({message})"
    torch.save(old, weights)
    assert not said(main, ["--weights", weights, *FEW, "--folder", weights.parent / "out"], capsys)[0]


def test_a_whole_module_in_a_file_is_refused_in_plain_words(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(build_model("cnn", 3, 10), weights)
    line = refusal(main, ["--weights", weights, *FEW], capsys)
    assert "plain tensors (it is damaged, or holds Python objects such as a whole network" in line
    assert line.isprintable()


def test_a_folder_that_cannot_be_written_is_found_before_the_search(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scanning, "inverted", lambda *_: pytest.fail("searched"))
    for folder, reason in ((weights, "File exists"), (Path("/proc/self"), "")):  # root may write everywhere else
        status, out, err = said(main, ["--weights", weights, *FEW, "--folder", folder], capsys)
        assert (status, out, err.count("\n")) == (1, "", 1) and str(folder) in err and reason in err


@pytest.mark.parametrize(("name", "left"), [("_bars", True), ("write_json", False)])
def test_a_scan_stopped_while_it_writes_leaves_no_picture_beside_an_older_report(
    name: str, left: bool, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = weights.parent / "out"
    options = ["--weights", weights, *FEW, "--folder", folder]
    said(main, options, capsys)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scanning, name, stopped)
    said(main, [*options, "--seed", "1"], capsys)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert (after == before) == left and ("report.json" in after) == left


def test_a_scan_without_data_leaves_no_older_score(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = weights.parent / "out"
    folder.mkdir()
    (folder / "score.png").write_text("of an earlier scan")
    said(main, ["--weights", weights, *FEW, "--folder", folder], capsys)
    assert (folder / "report.json").exists() and not (folder / "score.png").exists()


def test_the_score_is_measured_between_two_states_on_normalised_training_images(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def spy(model: Any, one: Any, other: Any, sample: Any, **rest: Any) -> Any:
        seen.update(one=one, other=other, sample=sample, found=error_barrier(model, one, other, sample, **rest))
        return seen["found"]

    monkeypatch.setattr(scanning, "error_barrier", spy)
    path = training_set(weights.parent / "set.npz")
    options = ["--data.name", "npz", "--data.path", path, "--score.batches", "1", "--score.steps", "1"]
    options += ["--network.mean", "[0.4, 0.5, 0.6]", "--network.std", "[0.2, 0.25, 0.3]"]
    said(main, ["--weights", weights, *FEW, *options, "--folder", weights.parent / "out"], capsys)
    kept = safetensors.torch.load_file(weights.with_suffix(".safetensors"))
    for name in ("0.weight", "3.weight", "6.weight", "1.running_mean", "14.bias"):
        assert torch.equal(seen["one"][name], kept[name]) and not torch.equal(seen["other"][name], kept[name]), name
    assert torch.equal(seen["other"]["3.weight"] == 0, kept["3.weight"] == 0)
    ((x, y),) = seen["sample"]
    raw = x * torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1) + torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    images = torch.from_numpy(np.load(path)["x_train"]).permute(0, 3, 1, 2)
    same = ((255 * raw).round().to(torch.uint8)[:, None] == images).flatten(2).all(2)
    rows = same.long().argmax(1)
    assert same.any(1).all() and sorted(rows.tolist()) == list(range(60)) and torch.equal(y, rows % 10)
    assert read_json(weights.parent / "out" / "report.json")["error"] == seen["found"].error


def test_a_score_that_is_no_number_ends_a_scan_in_one_line(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = training_set(weights.parent / "set.npz")
    options = ["--data.name", "npz", "--data.path", path, "--score.lr", "1e6"]
    status, out, err = said(main, ["--weights", weights, *FEW, *options, "--folder", weights.parent / "out"], capsys)
    assert (status, out) == (1, "") and re.fullmatch(r"error: \w+ at alpha 0 must be finite, got NaN or Inf.*\n", err)


def test_a_score_takes_at_most_batch_size_images_at_once(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, sizes = training_set(weights.parent / "set.npz"), []

    def spy(data: Any, size: int, *rest: Any, **named: Any) -> Any:
        sizes.append(size)
        return batches(data, size, *rest, **named)

    monkeypatch.setattr(scanning, "batches", spy)
    for size in (20, 128):
        options = ["--data.name", "npz", "--data.path", path, "--score.batch_size", size, "--score.steps", "1"]
        said(main, ["--weights", weights, *FEW, *options, "--folder", weights.parent / "out"], capsys)
    assert sizes == [20, 20, 60, 60]


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
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["found"].label in range(10) and names["found"].collapse_label in range(10)
