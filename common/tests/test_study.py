"""Facts about studies: each cell is run once, a broken one breaks no other, a killed study resumes where it was."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from common import study
from common.config import ConfigError, UserError
from common.runs import CheckpointError, Interrupted, hold, read_json, revision, write_json
from common.study import Cell, Progress, StudyConfig, StudyResult, run_study, scale_arguments, study_config
from common.tests import children, tiny_study

TINY = Path(tiny_study.__file__)


def do(cell: Cell, home: Path, progress: Progress) -> list[dict[str, Any]]:
    """What `cell` says in "do", noted in <folder>/calls; its rows are what a cell's process looks like."""
    with open(home.parent / "calls", "a") as calls:
        print(cell.name, file=calls)
    deed = cell.settings.get("do")
    print(f"doing {deed}")
    if deed == "raise":
        raise ValueError("broken")
    if deed == "user error":
        raise UserError("data.path must be a file, got 'x'")
    if deed == "nan":
        return [{"metrics": {"loss": float("nan")}}]
    if deed == "exit":
        os._exit(3)
    if deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "stop":
        raise KeyboardInterrupt
    if deed == "wait":
        progress(0.25)
        children.until((home.parent / "go").exists)
    metrics = {"threads": torch.get_num_threads(), "seed times ten": 10 * cell.seed}
    return [{"cell": {"part": part}, "metrics": metrics} for part in (1, 2)]


def tell_gpu(cell: Cell, home: Path, progress: Progress) -> list[dict[str, Any]]:
    """The GPU that a cell sees; the long one ends last."""
    children.until(lambda: cell.settings["name"] != "long" or len(list(home.parent.glob("*.rows.json"))) == 3)
    return [{"metrics": {"gpu": float(os.environ["CUDA_VISIBLE_DEVICES"])}}]


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def cells(*deeds: str, seeds: Sequence[int] = (0,)) -> list[Cell]:
    return [Cell({"do": deed}, seed) for seed in seeds for deed in deeds]


def run(folder: Path, todo: Sequence[Cell], identity: str = "", **options: Any) -> StudyResult:
    return run_study(todo, do, folder, identity, StudyConfig(**options))


def last_line(log: Path) -> str:
    return log.read_text().splitlines()[-1]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def cell_pids(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "pids").read_text().split()] if (folder / "pids").exists() else []


# Cells and rows


def test_a_cell_is_named_by_settings_and_seed_in_characters_fit_for_files() -> None:
    assert (
        Cell({"method": "imp+nrs", "rate": 0.5, "path": "a b/ü"}, 3).name == "method=imp+nrs_rate=0.5_path=a_b_ü_seed=3"
    )


def test_rows_carry_settings_of_the_cell_and_of_the_row_and_the_seed(tmp_path: Path) -> None:
    found = run(tmp_path, cells("a", seeds=[7]))
    metrics = {"threads": 1, "seed times ten": 70}
    assert found.rows == [{"cell": {"do": "a", "part": part}, "seed": 7, "metrics": metrics} for part in (1, 2)]
    assert (found.scale, found.failed) == ("demo", {})


def test_every_cell_runs_with_one_thread(tmp_path: Path) -> None:
    assert {row["metrics"]["threads"] for row in run(tmp_path, cells("a", "b"), workers=2).rows} == {1}


def test_one_worker_and_two_give_equal_rows_in_the_order_of_cells(tmp_path: Path) -> None:
    todo = cells("a", "b", "c", seeds=[0, 1])
    one, two = (run(tmp_path / str(workers), todo, workers=workers).rows for workers in (1, 2))
    assert one == two
    assert [(row["cell"]["do"], row["seed"]) for row in one[::2]] == [(c.settings["do"], c.seed) for c in todo]


def test_finished_cells_are_found_again_and_not_run_again(tmp_path: Path) -> None:
    first = run(tmp_path, cells("a", "b"))
    again = run(tmp_path, cells("a", "b"))
    assert (again.rows, again.seconds) == (first.rows, first.seconds)
    assert sorted(calls(tmp_path)) == ["do=a_seed=0", "do=b_seed=0"]


def test_a_longer_study_runs_the_new_cells_alone_and_adds_up_the_seconds(tmp_path: Path) -> None:
    first = run(tmp_path, cells("a"))
    longer = run(tmp_path, cells("a", "b"))
    assert calls(tmp_path) == ["do=a_seed=0", "do=b_seed=0"]
    assert longer.seconds > first.seconds > 0


def test_the_seconds_of_a_sitting_that_finished_no_cell_count(tmp_path: Path) -> None:
    run(tmp_path, cells("a"))
    (rows,), (clock,) = list(tmp_path.rglob("*.rows.json")), list(tmp_path.rglob("seconds.json"))
    rows.unlink()
    rows.with_name(rows.name.removesuffix(".rows.json")).mkdir(exist_ok=True)  # where the cell began
    clock.write_text("1000.0")
    assert run(tmp_path, cells("a")).seconds > 1000


def test_with_another_identity_a_cell_is_another_cell(tmp_path: Path) -> None:
    for identity in ("lr: 0.1", "lr: 0.2", "lr: 0.1"):
        run(tmp_path, cells("a"), identity)
    assert calls(tmp_path) == ["do=a_seed=0"] * 2


def test_with_other_settings_or_seed_a_cell_is_another_cell(tmp_path: Path) -> None:
    run(tmp_path, cells("a"))
    run(tmp_path, cells("b"))
    run(tmp_path, cells("a", seeds=[1]))
    assert calls(tmp_path) == ["do=a_seed=0", "do=b_seed=0", "do=a_seed=1"]


def test_damaged_rows_are_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, cells("a"))
    next(tmp_path.glob("*.rows.json")).write_text("[{")
    with pytest.raises(CheckpointError, match=r"do=a_seed=0-\w+\.rows\.json: damaged"):
        run(tmp_path, cells("a"))


def test_unfinished_cells_count_by_their_fraction(tmp_path: Path) -> None:
    todo = [(cell, tmp_path / cell.name) for cell in cells("wait", "a")]
    seen = []
    for finished in study._in_processes(todo, do, workers=2, threads=1):
        seen.append(finished)
        if finished == 1.25:
            (tmp_path / "go").touch()
    assert seen[-1] == 2 and 1.25 in seen


# Broken cells

DEATHS = {
    "raise": "ValueError: broken",
    "user error": "error: data.path must be a file, got 'x'",
    "nan": "ValueError: Out of range float values are not JSON compliant",
    "exit": "the process ended with exit code 3",
    "kill": "the process ended with exit code -9",
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    return run(tmp_path_factory.mktemp("broken"), cells("a", *DEATHS, "b"), workers=2)


def test_broken_cells_stop_no_other_and_are_listed(broken: StudyResult) -> None:
    assert [row["cell"]["do"] for row in broken.rows] == ["a", "a", "b", "b"]
    assert list(broken.failed) == [cell.name for cell in cells(*DEATHS)]


@pytest.mark.parametrize("deed", DEATHS)
def test_the_log_of_a_broken_cell_ends_with_the_reason(deed: str, broken: StudyResult) -> None:
    log = broken.failed[cells(deed)[0].name]
    assert log.read_text().startswith(f"doing {deed}\n")
    assert last_line(log).startswith(DEATHS[deed])


def test_a_cell_whose_log_cannot_be_written_says_so_in_one_line(tmp_path: Path) -> None:
    run(tmp_path, cells("a"))
    (log,), (rows,) = tmp_path.glob("*.log"), tmp_path.glob("*.rows.json")
    rows.unlink()
    log.unlink()
    log.mkdir()
    again = f"from common.tests.test_study import *; print(run(Path({str(tmp_path)!r}), cells('a')))"
    done = children.run("-c", again)
    assert "rows=[], failed={'do=a_seed=0'" in done.stdout and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "error" in line] == [f"error: {log}: Is a directory"]


def test_a_broken_cell_is_run_again_by_the_next_study(tmp_path: Path) -> None:
    for _ in range(2):
        run(tmp_path, cells("a", "raise"))
    assert sorted(calls(tmp_path)) == ["do=a_seed=0"] + ["do=raise_seed=0"] * 2


@pytest.mark.parametrize(("deed", "word"), [("raise", "ValueError: broken"), ("stop", "stopped"), ("a", "doing a")])
def test_what_a_cell_says_goes_to_its_log(
    deed: str, word: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    study._work(do, cells(deed)[0], tmp_path / "cell", 1, lambda fraction: None)
    torch.set_num_threads(threads)
    assert last_line(tmp_path / "cell.log") == word
    assert (tmp_path / "cell.rows.json").exists() == (deed == "a")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("number", [1, 2])
def test_the_work_of_a_cell_is_done_by_its_number_of_threads_and_keeps_its_memory_wherever_it_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(study, "keep_freed_memory", lambda: kept.append(True))
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - number)
    study._work(do, cells("a")[0], tmp_path / "cell", number, lambda fraction: None)
    torch.set_num_threads(threads)
    assert kept
    assert read_json(tmp_path / "cell.rows.json")[0]["metrics"]["threads"] == number


def test_what_a_study_imports_is_imported_once_for_all_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heavy.py").write_text(f"print('imported', file=open({str(tmp_path / 'imports')!r}, 'a'))\n")
    (tmp_path / "light.py").write_text(
        "import heavy, sys\nfrom pathlib import Path\nfrom common.tests.test_study import cells, run\n"
        "if __name__ == '__main__':\n    run(Path(sys.argv[1]), cells('a', 'b', 'c', 'd'))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert children.run("-m", "light", tmp_path / "study").returncode == 0
    assert len(list((tmp_path / "study").glob("*.rows.json"))) == 4
    assert (tmp_path / "imports").read_text().split() == ["imported"] * 2  # here, and where the cells come from


# Killed and interrupted


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    found = tiny_study.study(tmp_path_factory.mktemp("undisturbed"))
    assert not found.failed
    return found.rows


def started(folder: Path) -> Any:
    """A study process that has finished a cell, with two more in the midst of training (the cells' lengths differ)."""
    process = children.start(TINY, folder)
    children.until(lambda: len(cell_pids(folder)) >= 3 and len(list(folder.glob("*/checkpoint.pt"))) >= 3)
    return process


def test_a_killed_study_takes_its_cells_with_it_and_resumes_to_equal_rows(
    tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    process = started(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    pids = cell_pids(tmp_path)
    children.until(lambda: not any(map(alive, pids)), seconds=5)
    assert len(list(tmp_path.glob("*/done.json"))) < len(tiny_study.CELLS)
    assert tiny_study.study(tmp_path).rows == undisturbed


def test_ctrl_c_stops_and_saves_the_cells_and_says_how_many_are_finished(
    tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    process = started(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, err = process.communicate(timeout=30)
    finished = len(list(tmp_path.glob("*.rows.json")))
    message = f"stopped with {finished} of 4 cells finished; the same command resumes"
    assert (process.returncode, err.splitlines()[-1]) == (130, message)
    assert not any(map(alive, cell_pids(tmp_path)))
    stopped = [log for log in tmp_path.glob("*.log") if "the same command resumes it" in log.read_text()]
    assert stopped and finished < len(tiny_study.CELLS)
    assert tiny_study.study(tmp_path).rows == undisturbed


def test_ctrl_c_in_this_process_ends_the_cells_it_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        children.until((tmp_path / "calls").exists)
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "wait", stop)
    with pytest.raises(Interrupted, match="stopped with 0 of 1 cells finished") as caught:
        run(tmp_path, cells("wait"))
    assert caught.value.status == 130
    assert last_line(next(tmp_path.glob("*.log"))) == "stopped"


def test_a_study_in_use_is_refused(tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(UserError, match="another process is working in this folder"):
        run(tmp_path, cells("a"))
    assert len(run(tmp_path, cells("a")).rows) == 2


def test_rows_keep_the_revision_they_were_measured_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, cells("a"))
    assert first.revisions == [revision()] and "revision" not in first.rows[0]
    (rows,) = tmp_path.glob("*.rows.json")
    write_json(rows, [{**row, "revision": "before"} for row in read_json(rows)])
    assert run(tmp_path, cells("a", "b")).revisions == sorted([revision(), "before"])


@pytest.mark.parametrize(("visible", "cards"), [(None, ["0", "1"]), ("2,5", ["2", "5"])])
def test_a_cell_gets_the_gpu_that_the_fewest_have(
    visible: str | None, cards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    todo = [Cell({"name": name}, 0) for name in ("long", "short", "short2", "short3")]
    found = run_study(todo, tell_gpu, tmp_path, "", StudyConfig(workers=2))
    assert [row["metrics"]["gpu"] for row in found.rows] == [float(card) for card in (cards[0], *[cards[1]] * 3)]


# Ray


def test_ray_gives_the_rows_of_local_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    todo = cells("a", "raise", "b")
    here = run(tmp_path / "local", todo)
    there = run(tmp_path / "ray", todo, backend="ray", workers=2)
    assert there.rows == here.rows and len(here.rows) == 4
    assert [last_line(log) for log in there.failed.values()] == ["ValueError: broken"]


def test_without_ray_its_backend_is_refused_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs the optional extra: pip install '\.\[ray\]'"):
        run(tmp_path, cells("a"), backend="ray")


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "study.seeds must be at least one seed"),
        ({"seeds": [1, 2, 1]}, r"study.seeds must be without repetition, got \[1, 2, 1\]"),
        ({"seeds": [0, -1]}, r"study.seeds must be at least 0 each, got \[0, -1\]"),
        ({"workers": 0}, "study.workers must be at least 1, got 0"),
    ],
)
def test_study_settings_that_cannot_be_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StudyConfig(**options)


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    for name in ("demo", "smoke"):
        (tmp_path / f"{name}.yaml").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "name", "rest"),
    [
        ([], "demo", []),
        (["--scale", "smoke"], "smoke", []),
        (["--seed", "1", "--scale", "smoke", "--run.threads", "2"], "smoke", ["--seed", "1", "--run.threads", "2"]),
    ],
)
def test_a_scale_becomes_its_configuration_file_and_its_name_in_front(
    argv: list[str], name: str, rest: list[str], configs: Path
) -> None:
    assert scale_arguments(configs, argv) == ["--config", f"{configs}/{name}.yaml", "--study.scale", name, *rest]


def test_the_scale_is_read_from_the_command_line(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--scale", "smoke"])
    assert scale_arguments(configs) == ["--config", f"{configs}/smoke.yaml", "--study.scale", "smoke"]


@pytest.mark.parametrize("argv", [["--scale", "huge"], ["--scale"]])
def test_an_unknown_scale_is_refused_with_those_there_are(argv: list[str], configs: Path) -> None:
    with pytest.raises(ConfigError, match=r"--scale must be one of demo, smoke, got '(huge)?'"):
        scale_arguments(configs, argv)


@dataclass(frozen=True)
class PaperConfig:
    """A paper's configuration."""

    study: StudyConfig = field(default_factory=StudyConfig)


def test_results_that_cannot_be_written_are_refused_before_the_study(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("study: {}\n")
    (tmp_path / "file").touch()
    asked = ["--study.results", str(tmp_path / "file" / "results")]
    with pytest.raises(ConfigError, match=r"study\.results must be a folder that may be written into, got '.*/file/"):
        study_config(PaperConfig, tmp_path / "configs", asked)
    assert study_config(PaperConfig, tmp_path / "configs", []).study.results == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs", "file"]
