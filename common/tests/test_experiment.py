"""Facts about what the commands of all papers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common import experiment
from common.config import ConfigError, dump
from common.data import DataConfig, ImageFiles, ImageSet
from common.experiment import (
    InputConfig,
    accuracy,
    eval_command,
    finished_run,
    load_weights,
    measurement,
    progress_bar,
    train_command,
)
from common.runs import CheckpointError, RunConfig, read_json, write_json
from common.tests.paper_checks import refusal, said


@dataclass(frozen=True)
class Config:
    """Of a paper that trains nothing."""

    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)


def grey(values: Tensor, labels: list[int]) -> ImageSet:
    return ImageSet(values.to(torch.uint8), torch.tensor(labels), 2)


# What the network sees


def test_pixels_are_normalised_by_channel() -> None:
    raw = torch.tensor([0.5, 1.0]).view(1, 2, 1, 1)
    seen = InputConfig(mean=[0.5, 0.2], std=[0.25, 0.4]).normalize(raw)
    assert seen.flatten().tolist() == pytest.approx([0.0, 2.0])
    assert torch.equal(InputConfig().normalize(raw), raw)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": [0.0, 0.0]}, r"model.std must be as many numbers as model.mean, got \[1.0\]"),
        ({"mean": [], "std": []}, "model.std must be as many numbers as model.mean"),
        ({"std": [0.0]}, r"model.std must be positive, got \[0.0\]"),
    ],
)
def test_impossible_normalisation_is_refused(values: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InputConfig(**values)


def test_images_have_channels_and_one_side() -> None:
    assert InputConfig().image_shape(grey(torch.zeros(1, 3, 8, 8), [0])) == (3, 8)
    files = ImageFiles(["a.png"], DataConfig(name="imagefolder", path="there", size=160))
    assert InputConfig(mean=[0.0] * 3, std=[1.0] * 3).image_shape(ImageSet(files, torch.zeros(1).long(), 2)) == (3, 160)


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data must be square images, got \(8, 9\)"):
        InputConfig().image_shape(grey(torch.zeros(1, 1, 8, 9), [0]))
    two = InputConfig(mean=[0.0, 0.0], std=[1.0, 1.0])
    with pytest.raises(ConfigError, match=r"model.mean must be as many numbers as the images' 1 channels, or one"):
        two.image_shape(grey(torch.zeros(1, 1, 8, 8), [0]))


class Brightness(nn.Module):
    """Says class 1 to a positive mean, in eval mode; the other class in training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        sign = -1 if self.training else 1
        bright = sign * self.scale * images.mean(dim=(1, 2, 3))
        return torch.stack([-bright, bright], dim=1)


def test_accuracy_is_of_all_images_in_eval_mode_after_normalisation() -> None:
    values = torch.tensor([0, 255, 255, 0, 255]).view(5, 1, 1, 1)
    data = grey(values, [0, 1, 1, 0, 0])
    centred = InputConfig(mean=[0.5])
    for batch_size in (2, 500):
        assert accuracy(Brightness(), data, centred.normalize, batch_size) == pytest.approx(80)
    assert accuracy(Brightness(), grey(values[:1] + 255, [1])) == 100
    assert accuracy(Brightness(), data.subset(torch.arange(0))) == 0


# Runs


@pytest.mark.parametrize(
    "content", [{}, {"model": {"other": torch.ones(1)}}, {"model": {"scale": torch.ones(2)}}, {"model": 3}]
)
def test_weights_of_another_network_are_refused_by_the_name_of_their_file(content: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"^x/model\.pt: not the weights of this run's network$"):
        load_weights(Brightness(), content, Path("x/model.pt"))


def test_weights_are_loaded_under_their_name() -> None:
    model = Brightness()
    load_weights(model, {"average": {"scale": torch.full((1,), 3.0)}}, Path("model.pt"), "average")
    assert model.scale.item() == 3


def run_at(folder: Path, config: Config) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(config))
    write_json(folder / "done.json", {})
    return folder


def test_only_a_finished_run_is_measured(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run", Config(seed=3))
    assert finished_run(run, Config) == Config(seed=3)
    (run / "done.json").unlink()
    with pytest.raises(ConfigError, match="this run is not finished"):
        finished_run(run, Config)
    with pytest.raises(ConfigError, match="nowhere: no such run"):
        finished_run(tmp_path / "nowhere", Config)
    another = run_at(tmp_path / "another", Config())
    (another / "config.yaml").write_text("depth: 3\n")
    with pytest.raises(ConfigError, match=r"another/config\.yaml: unknown key 'depth'"):
        finished_run(another, Config)


def test_a_run_is_measured_once_with_its_configuration_and_what_was_found_is_kept(tmp_path: Path) -> None:
    told: list[float] = []

    @measurement(Config)
    def evaluate(config: Config, folder: Path, progress: Any) -> dict[str, Any]:
        """What is measured."""
        progress(0.5)
        return {"seed": config.seed, "folder": folder.name, "of": (1, 2)}

    run = run_at(tmp_path / "run", Config(seed=3))
    found = evaluate(run)
    assert found == {"seed": 3, "folder": "run", "of": [1, 2]} == read_json(run / "eval.json")
    write_json(run / "eval.json", {"kept": True})
    assert evaluate(run, told.append) == {"kept": True} and not told
    (run / "eval.json").unlink()
    assert evaluate(run, told.append) == found and told == [0.5]
    assert evaluate.__doc__ == "What is measured."
    (run / "done.json").unlink()
    with pytest.raises(ConfigError, match="this run is not finished"):
        evaluate(run)


# Commands


def train_main() -> None:
    def train(config: Config, folder: Path) -> Mapping[str, Any]:
        return {"seed": config.seed, "threads": torch.get_num_threads(), "folder": folder}

    def summary(metrics: Mapping[str, Any]) -> str:
        return f"seed {metrics['seed']} on {metrics['threads']}"

    train_command("/somewhere/paper/train.py", Config, train, lambda config: f"plain-seed{config.seed}", summary)


def test_training_says_what_came_out_where_it_lies_and_what_is_next(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    status, out, _ = said(train_main, ["--seed", 4, "--run.threads", threads + 1], capsys)
    torch.set_num_threads(threads)
    assert status is None
    assert out.splitlines()[0] == f"seed 4 on {threads + 1}"
    assert out.splitlines()[1].startswith("finished in runs/paper/plain-seed4; next: ")
    assert out.splitlines()[1].endswith(" paper/eval.py --folder runs/paper/plain-seed4")
    _, out, _ = said(train_main, ["--run.folder", "elsewhere"], capsys)
    assert "finished in elsewhere; next: " in out


def test_training_keeps_its_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(experiment, "keep_freed_memory", lambda: kept.append(True))
    said(train_main, [], capsys)
    assert kept


def test_of_several_ranks_the_first_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert said(train_main, [], capsys)[1] == ""


def test_measuring_shows_its_progress_and_says_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(folder: Path, progress: Any) -> str:
        progress(0.5)
        progress(1.0)
        return folder.name

    def main() -> None:
        eval_command("paper/eval.py", Config, evaluate, lambda found, config: f"{found} of seed {config.seed}")

    run = run_at(tmp_path / "run", Config(seed=5))
    status, out, err = said(main, ["--folder", run], capsys)
    assert (status, out) == (None, "run of seed 5\n")
    assert "measuring" in err and "100%" in err
    assert refusal(main, [], capsys) == "folder must be the folder of a run, got ''"
    assert refusal(main, ["--folder", tmp_path / "no"], capsys).endswith("no: no such run (it has no config.yaml)")


def test_a_progress_bar_takes_fractions(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("working") as progress:
        progress(0.25)
        progress(1.0)
    assert "working: 100%" in capsys.readouterr().err
