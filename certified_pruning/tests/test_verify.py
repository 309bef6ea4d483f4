"""The command that verifies a user's network: right verdicts, however many processes, and one line for a mistake."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from certified_pruning import verify
from certified_pruning.models import cnn_s
from certified_pruning.settings import Config, ModelConfig, TrainConfig
from certified_pruning.tests.nets import Residual, images, randomise_norms
from certified_pruning.verdicts import VerifyConfig
from certified_pruning.verifier import CompleteVerifier
from common.config import command, dump
from common.data import DataConfig
from common.runs import save_checkpoint
from common.tests import children

torch.set_num_threads(1)
SIZE, CLASSES, EPS = 12, 4, 0.03


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return randomise_norms(cnn_s(1, SIZE, CLASSES, [3, 4]), seed).eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data on which `net()` is right but for image 0, and its weights in every kind of file."""
    place = tmp_path_factory.mktemp("user")
    pixels = (images((SIZE, SIZE), 23) * 255).round().to(torch.uint8)
    with torch.no_grad():
        labels = net()(pixels[:, None] / 255).argmax(1)
    labels[0] = (labels[0] + 1) % CLASSES
    labels_all = torch.cat([torch.arange(CLASSES), labels]).numpy()
    pixels_all = torch.cat([pixels[:CLASSES], pixels]).numpy()
    train = {"x_train": pixels_all, "y_train": labels_all}
    np.savez(place / "data.npz", x_test=pixels.numpy(), y_test=labels.numpy(), **train)
    weights = net().state_dict()
    torch.save(weights, place / "plain.pt")
    save_file(weights, place / "weights.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in weights.items()}}, place / "parallel.pth")
    save_checkpoint(place / "ticket.pt", {"model": weights, "masks": {}, "density": 1.0})
    (place / "my_nets.py").write_text(
        "from torch import nn\n"
        "from certified_pruning.models import cnn_s\n"
        "from certified_pruning.tests.nets import Residual\n"
        f"def build():\n    return cnn_s(1, {SIZE}, {CLASSES}, [3, 4])\n"
        "def residual():\n    layers = list(build().children())\n"
        "    return nn.Sequential(*layers[:6], Residual(4), *layers[6:])\n"
        "def number():\n    return 3\n"
        "def broken():\n    raise RuntimeError('no\\nluck')\n"
    )
    return place


def options(place: Path, checkpoint: str = "plain.pt", **more: object) -> list[str]:
    given: dict[str, object] = {"checkpoint": place / checkpoint, "eps": EPS, "images": 20, "verify.max_nodes": 30}
    given |= {"data.name": "npz", "data.path": place / "data.npz", "model.channels": "[3,4]"}
    given |= {"report": place / "report.json"} | {key.replace("__", "."): value for key, value in more.items()}
    return [f"--{key}={value}" for key, value in given.items() if value is not None]


def status_of(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    monkeypatch.setattr(sys, "argv", ["verify.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command(verify.main)
    return int(stopped.value.code or 0)


def networks(path: Path) -> list[dict[str, Any]]:
    """The report without times, which differ from run to run."""
    found = json.loads(path.read_text())["networks"]
    for network in found:
        del network["summary"]["seconds"]
        for image in network["images"]:
            del image["seconds"]
    return found


@pytest.fixture(scope="module")
def expected(place: Path) -> list[dict[str, Any]]:
    """Status, nodes and stage of each image by `CompleteVerifier`; several kinds of verdict."""
    data = np.load(place / "data.npz")
    x, y = torch.from_numpy(data["x_test"][:20, None]) / 255, torch.from_numpy(data["y_test"][:20])
    verifier = CompleteVerifier(net(), (1, SIZE, SIZE), EPS, CLASSES, VerifyConfig(max_nodes=30))
    verdicts = verifier.verify(x, y).images
    assert verdicts[0].status == "misclassified" and {"verified", "falsified"} <= {v.status for v in verdicts}
    assert any(v.nodes for v in verdicts)
    rows = [{"status": v.status, "stage": v.stage, "nodes": v.nodes} for v in verdicts]
    return [{"image": i, "label": int(label), **row} for i, (label, row) in enumerate(zip(y, rows, strict=True))]


def verdicts(network: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "lb"} for row in network["images"]]


@pytest.mark.parametrize("checkpoint", ["plain.pt", "weights.safetensors", "parallel.pth", "ticket.pt"])
def test_the_verdicts_are_those_of_the_verifier_whatever_file_the_weights_are_in(
    place: Path, expected: list[dict[str, Any]], checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status_of(monkeypatch, options(place, checkpoint)) == 0
    (network,) = networks(place / "report.json")
    assert verdicts(network) == expected and network["network"] == str(place / checkpoint) and network["eps"] == EPS
    counts = network["summary"]["counts"]
    assert sum(counts.values()) == 20
    assert network["summary"]["verified_accuracy"] == pytest.approx(100 * counts["verified"] / 20)


def test_a_model_of_the_users_own_function_gets_the_same_verdicts(
    place: Path, expected: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert status_of(monkeypatch, options(place, model__build="my_nets:build", model__channels=None)) == 0
    assert verdicts(networks(place / "report.json")[0]) == expected
    printed = capsys.readouterr().out
    assert printed.count("│") >= 20 * 8 and f"20 images at eps {EPS}: verified" in printed


def test_a_graph_that_is_no_chain_is_refused_by_name_unless_auto_lirpa_is_to_bound_it(
    place: Path, expected: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`net()` with a residual block that adds nothing, so that the verdicts are known."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))
    layers, block = list(net().children()), Residual(4)
    block.second.weight.data.zero_()
    block.second.bias.data.zero_()
    torch.save(nn.Sequential(*layers[:6], block, *layers[6:]).state_dict(), place / "residual.pt")
    given = options(place, "residual.pt", model__build="my_nets:residual", model__channels=None)
    assert status_of(monkeypatch, given) == 2
    line = capsys.readouterr().err
    assert re.search(r"layer '6' is a Residual: .*; bounds auto_lirpa takes other graphs\n$", line), line
    assert status_of(monkeypatch, [*given, "--bounds=auto_lirpa"]) == 0
    heading = json.loads((place / "report.json").read_text())
    budget = {"pgd_steps", "pgd_restarts", "pgd_step", "root_steps", "max_images", "seed"}
    assert heading["bounds"] == "auto_lirpa" and set(heading["verify"]) == budget  # what has an effect
    rows = networks(place / "report.json")[0]["images"]
    assert all(row["status"] in (known["status"], "unknown") for row, known in zip(rows, expected, strict=True))
    assert {"verified", "misclassified"} <= {row["status"] for row in rows} and not any(row["nodes"] for row in rows)


def test_two_processes_write_the_report_of_one(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """19 images: the shares of the ranks differ."""
    assert status_of(monkeypatch, options(place, images=19, report=tmp_path / "one.json")) == 0
    more = options(place, images=19, report=tmp_path / "two.json")
    done = children.run(*children.TORCHRUN, verify.__file__, *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("19 images at eps") == 1
    one, two = networks(tmp_path / "one.json")[0], networks(tmp_path / "two.json")[0]
    bounds = [[row.pop("lb") for row in network["images"]] for network in (one, two)]
    assert two == one
    for first, second in zip(*bounds, strict=True):
        assert (first is None) == (second is None) and first == pytest.approx(second, abs=1e-5)


def a_run(folder: Path, place: Path, tickets: int) -> None:
    config = Config(
        data=DataConfig(name="npz", path=str(place / "data.npz"), val=0.0, val_from="test"),
        model=ModelConfig(channels=[3, 4]),
        train=TrainConfig(eps=EPS),
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(config))
    for number in range(tickets):
        content = {"model": net(number).state_dict(), "masks": {}, "density": 1.0}
        save_checkpoint(folder / "tickets" / f"{number}.pt", content)


def test_all_tickets_of_all_runs_in_a_folder_are_verified_in_order_at_the_runs_eps(
    place: Path, expected: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a_run(tmp_path / "runs" / "a", place, 11)
    a_run(tmp_path / "runs" / "b", place, 1)
    more = {"runs": tmp_path / "runs", "images": 2, "verify.max_nodes": 0, "report": tmp_path / "r.json"}
    assert status_of(monkeypatch, [f"--{key}={value}" for key, value in more.items()]) == 0
    found = networks(tmp_path / "r.json")
    names = [f"a/tickets/{number}.pt" for number in range(11)] + ["b/tickets/0.pt"]
    assert [network["network"] for network in found] == [str(tmp_path / "runs" / name) for name in names]
    assert all(network["eps"] == EPS for network in found)
    more |= {"runs": tmp_path / "runs" / "b", "images": 20, "verify.max_nodes": 30}
    assert status_of(monkeypatch, [f"--{key}={value}" for key, value in more.items()]) == 0
    assert verdicts(networks(tmp_path / "r.json")[0]) == expected


def test_pruned_channels_of_a_ticket_are_removed_first(place: Path, tmp_path: Path) -> None:
    a_run(tmp_path / "run", place, 0)
    pruned = net()
    pruned[1].weight.data[0] = pruned[1].bias.data[0] = 0.0
    save_checkpoint(tmp_path / "run" / "tickets" / "0.pt", {"model": pruned.state_dict(), "masks": {}, "density": 0.5})
    (job,) = verify.jobs(verify.Arguments(runs=str(tmp_path / "run")), torch.device("cpu"))
    assert next(job.model.children()).out_channels < 3


def test_paper_verifier_is_the_papers_configuration_and_options_beside_it_override() -> None:
    argv = ["--verify.timeout_s=7", "--paper-verifier", "--checkpoint=a.pt", "--eps=0.1"]
    found = verify.parse(verify.Arguments, verify.expand(argv), prog="verify").verify
    paper = VerifyConfig.paper()
    assert found.timeout_s == 7 and paper.timeout_s == 300
    assert found == VerifyConfig(**{**vars(paper), "timeout_s": 7.0})


def test_export_writes_the_question_of_each_image(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    more = options(place, images=3, export=tmp_path / "out", verify__timeout_s=9, report=tmp_path / "r.json")
    monkeypatch.chdir(place)
    assert status_of(monkeypatch, more) == 0
    (csv,) = (tmp_path / "out").rglob("instances.csv")
    rows = [line.split(",") for line in csv.read_text().splitlines()]
    assert len(rows) == 3 and all((csv.parent / name).is_file() for row in rows for name in row[:2])
    assert {row[2] for row in rows} == {"9"}


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("exploded", "w")


MISTAKES: dict[str, tuple[dict[str, object], str]] = {
    "no such file": ({"checkpoint": "none.pt"}, "none.pt: No such file or directory"),
    "no such safetensors": ({"checkpoint": "none.safetensors"}, "none.safetensors: No such file or directory"),
    "damaged": ({"checkpoint": "damaged.pt"}, "damaged.pt: damaged, not a torch file, or holds more than plain data"),
    "damaged safetensors": ({"checkpoint": "damaged.safetensors"}, "not a safetensors file"),
    "code": ({"checkpoint": "bomb.pt"}, "bomb.pt: damaged, not a torch file, or holds more than plain data"),
    "no weights": ({"checkpoint": "list.pt"}, "list.pt: must hold a state dict, alone or under model, state_dict"),
    "other net": ({"model.channels": "[3,5]"}, r"'3.weight' must have shape \(5, 3, 4, 4\), got \(4, 3, 4, 4\)"),
    "missing": ({"checkpoint": "half.pt"}, r"not weights of this network: no '0.weight' \(1 missing\)"),
    "unknown": ({"checkpoint": "more.pt"}, r"not weights of this network: it has no 'extra' \(1 unknown\)"),
    "NaN": ({"checkpoint": "nan.pt"}, "nan.pt: model must have finite weights"),
    "no eps": ({"eps": None}, "eps must be given with checkpoint, got None"),
    "eps": ({"eps": -1}, r"eps must be in \[0, 1\], got -1"),
    "images": ({"images": 0}, "images must be at least 1, got 0"),
    "neither": ({"checkpoint": None}, "checkpoint must be given, or else runs, got ''"),
    "both": ({"runs": "somewhere"}, "checkpoint must be given, or else runs"),
    "build form": ({"model.build": "my_nets"}, "model.build must be module:function, such as my.nets:build, got"),
    "no module": ({"model.build": "no_nets:build"}, "model.build must be a function that runs.*No module named"),
    "not a module": ({"model.build": "my_nets:number"}, "model.build must be a function that returns an nn.Module"),
    "raises": ({"model.build": "my_nets:broken"}, r"got 'my_nets:broken' \(RuntimeError: no luck\)"),
    "colours": ({"model.mean": "[0,0,0]", "model.std": "[1,1,1]"}, "model.mean must be as many numbers as the images'"),
    "budget": ({"verify.max_nodes": -1}, "max_nodes must be >= 0, got -1"),
    "option": ({"verify.nodes": 1}, "unknown key 'verify.nodes'; did you mean 'verify.max_nodes'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2_and_nothing_is_written(
    mistake: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))
    weights = net().state_dict()
    torch.save([1, 2], place / "list.pt")
    torch.save({key: value for key, value in weights.items() if key != "0.weight"}, place / "half.pt")
    torch.save({**weights, "extra": torch.ones(1)}, place / "more.pt")
    torch.save({**weights, "0.bias": weights["0.bias"] * float("nan")}, place / "nan.pt")
    for name in ("damaged.pt", "damaged.safetensors"):
        (place / name).write_bytes((place / "plain.pt").read_bytes()[:2000])
    torch.save({"0.weight": Bomb()}, place / "bomb.pt")
    wrong, message = MISTAKES[mistake]
    given = dict(argument.removeprefix("--").split("=", 1) for argument in options(place, report=tmp_path / "r.json"))
    arguments = [f"--{key}={value}" for key, value in {**given, **wrong}.items() if value is not None]
    assert status_of(monkeypatch, arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and not out
    assert re.search(message, err), err
    assert not (tmp_path / "r.json").exists() and not (place / "exploded").exists()


def test_runs_that_are_none_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    assert status_of(monkeypatch, [f"--runs={tmp_path / 'empty'}"]) == 2
    assert "must be the folder of a run, or a folder of such folders" in capsys.readouterr().err
    assert status_of(monkeypatch, [f"--runs={tmp_path}", "--model.name=cnn_a"]) == 2
    assert "runs must be without model.* and data.*, which come from the runs" in capsys.readouterr().err
