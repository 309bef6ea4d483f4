"""Checks that the tests of every paper make of its commands, its runs and its study."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import ConfigError, command
from common.runs import save_checkpoint
from common.tests import children

Capture = pytest.CaptureFixture[str]
Reproduce = Callable[[Sequence[str]], int]


# Claims


def varied(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a study, every fraction in them a little other in each seed and cell, as what is measured is."""
    places: dict[str, int] = {}

    def moved(value: Any, share: float) -> Any:
        if isinstance(value, dict):
            return {name: moved(each, share) for name, each in value.items()}
        if isinstance(value, list):
            return [moved(each, share) for each in value]
        return value + share * (1 + abs(value)) if isinstance(value, float) else value

    def share(row: dict[str, Any]) -> float:
        return 1e-8 * row["seed"] * (1 + places.setdefault(repr(row["cell"]), len(places)))

    return [{**row, "metrics": moved(row["metrics"], share(row))} for row in rows]


# Commands


def said(main: Callable[[], Any], argv: Sequence[object], capsys: Capture) -> tuple[object, str, str]:
    """Exit status, stdout and stderr of a command."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["command", *map(str, argv)])
        command(main)
    return ended.value.code, *capsys.readouterr()


def refusal(main: Callable[[], Any], argv: Sequence[object], capsys: Capture) -> str:
    """What a command says that must refuse its arguments: one line, status 2, nothing else but a progress bar."""
    status, out, err = said(main, argv, capsys)
    line = err.splitlines()[-1]
    assert (status, out) == (2, "") and line.startswith("error: ") and err.count("error: ") == 1
    return line.removeprefix("error: ")


def check_eval_refuses(main: Callable[[], Any], run: Path, weights: str, capsys: Capture) -> None:
    """eval.py refuses, by name, absent, unfinished and damaged runs, and the weights of another network.

    `run` is a copy of a finished run without eval.json, to damage; `weights` is its first file of weights.
    """

    def told(folder: object) -> str:
        return refusal(main, ["--folder", folder], capsys)

    def torn(path: Path) -> str:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] + b"\n[}")
        line = told(run)
        path.write_bytes(whole)
        return line

    assert refusal(main, [], capsys) == "folder must be the folder of a run, got ''"
    assert told(run.parent / "no") == f"{run.parent}/no: no such run (it has no config.yaml)"
    (run / "done.json").rename(run / "moved")
    assert told(run) == f"{run}: this run is not finished; run train.py with its configuration again"
    (run / "moved").rename(run / "done.json")
    for name in ("config.yaml", weights):
        assert torn(run / name).startswith(f"{run / name}: ")
    for content in ({}, {"model": {"0.weight": torch.ones(1)}}):
        save_checkpoint(run / weights, content)
        assert told(run) == f"{run / weights}: not the weights of this run's network"
    (run / weights).unlink()
    assert told(run) == f"{run / weights}: no such checkpoint"
    (run / "eval.json").write_text("{")
    assert told(run).startswith(f"{run}/eval.json: damaged")


# Runs


def quiet(fraction: float) -> None:
    """Progress that nobody looks at."""


def slow(fraction: float) -> None:
    """Progress of a run that is to be killed: it leaves time to do so, on a busy machine too."""
    time.sleep(0.02)


def copied(run: Path, to: Path) -> Path:
    """A copy of a run at `to`, without its measurements."""
    shutil.copytree(run, to)
    (to / "eval.json").unlink(missing_ok=True)
    return to


def losses(run: Path) -> list[float]:
    """The training losses in metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def kill_after_a_checkpoint(start: Callable[[Path], Any], run: Path, times: int = 3) -> None:
    """Start a run `times` times in a process (a multiprocessing one), and kill it soon after each new checkpoint."""
    draw, checkpoint = random.Random(0), run / "checkpoint.pt"

    def stamp() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    for _ in range(times):
        process, before = start(run), stamp()
        children.until(lambda before=before: stamp() > before)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL


# Studies


def study_options(place: Path) -> list[str]:
    """The smoke study, kept under `place`."""
    return ["--scale", "smoke", "--study.runs", f"{place}/runs", "--study.results", f"{place}/results"]


def report(place: Path) -> dict[str, Any]:
    """What a study of `study_options(place)` reported."""
    return json.loads((place / "results" / "smoke.json").read_text())


def rows(place: Path) -> list[dict[str, Any]]:
    """Its rows without the only numbers that may differ: ratios of times."""
    found = report(place)["rows"]
    for row in found:
        row["metrics"] = {name: value for name, value in row["metrics"].items() if not name.endswith("_ratio")}
    return found


def moments(place: Path) -> dict[str, int]:
    """When each file of the cells was last written, but the clock of the study."""
    files = (path for path in (place / "runs").rglob("*") if path.is_file() and path.name != "seconds.json")
    return {str(path): path.stat().st_mtime_ns for path in files}


def check_report(place: Path, claims: Sequence[Any], figures: Sequence[str]) -> None:
    """Every claim has a verdict, and the report has data, text, page and figures."""
    judged = report(place)["claims"]
    assert [claim["id"] for claim in judged] == [claim.id for claim in claims]
    assert {claim["verdict"] for claim in judged} <= {"held", "not held", "inconclusive"}
    names = [*(f"smoke-{name}.png" for name in figures), *(f"smoke.{kind}" for kind in ("html", "json", "md"))]
    assert sorted(path.name for path in (place / "results").iterdir()) == sorted(names)


def check_a_second_call_runs_nothing(reproduce: Reproduce, place: Path, options: Sequence[str]) -> None:
    """The finished study at `place`, called again, writes to no cell and reports the same rows."""
    there, before = report(place)["rows"], moments(place)
    assert reproduce([*study_options(place), *options]) == 0
    assert report(place)["rows"] == there
    assert moments(place) == before


def check_a_killed_study_goes_on(
    paper: str, reproduce: Reproduce, place: Path, options: Sequence[str], wanted: Sequence[Any]
) -> None:
    """A study in the empty folder `place`, killed once a cell is finished, gives `wanted` rows when called again."""
    process = children.start("-m", f"{paper}.reproduce", *study_options(place), *options)
    children.until(lambda: list(place.rglob("*.rows.json")) or process.poll() is not None, seconds=120)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (place / "results").exists()
    assert reproduce([*study_options(place), *options]) == 0
    assert rows(place) == wanted


def check_study_refuses(reproduce: Reproduce, place: Path, wrong: Sequence[str], message: str) -> None:
    """A study with a wrong option is refused before anything is written to the empty folder `place`."""
    with pytest.raises(ConfigError, match=message):
        reproduce([*study_options(place)[2 if "--scale" in wrong else 0 :], *wrong])
    assert list(place.iterdir()) == []
