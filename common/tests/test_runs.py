"""Facts about the run folder: whatever happens to a run, its last good state is there, and resuming changes nothing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from common import runs
from common.config import ConfigError, UserError, command, dump
from common.runs import (
    CheckpointError,
    Interrupted,
    NonFiniteError,
    Run,
    RunConfig,
    environment,
    generator,
    load_checkpoint,
    read_json,
    save_checkpoint,
    seed_everything,
    write_atomically,
    write_json,
)
from common.study import StudyConfig
from common.tests import children, tiny_training

TINY = Path(tiny_training.__file__)
FORKS = multiprocessing.get_context("forkserver")  # starts in milliseconds where a new interpreter takes seconds
FORKS.set_forkserver_preload(["__main__", __name__, "torch.utils.tensorboard"])


@dataclass(frozen=True)
class Config:
    seed: int = 0
    rates: list[float] = field(default_factory=lambda: [0.1, 0.2])
    run: RunConfig = field(default_factory=RunConfig)
    study: StudyConfig = field(default_factory=StudyConfig)


def open_run(folder: Path, total_steps: int = 10, config: Any = None, **options: Any) -> Run:
    options = {"progress": lambda fraction: None, **options}
    return Run(folder, config or Config(), total_steps=total_steps, **options)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(path: Path) -> str:
    """The message with which `load_checkpoint` refuses `path`; one line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


# Writing


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_atomically(path, b"new")
    assert (caught.value.filename, path.read_bytes(), names(tmp_path)) == (str(path), b"old", ["a"])


def test_a_write_makes_the_folders_it_needs(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b", b"new")
    assert (tmp_path / "a" / "b").read_bytes() == b"new"


def write_for_ever(path: Path) -> None:
    for number in range(10**9):
        save_checkpoint(path, {"number": number, "weights": torch.full((2_000_000,), float(number))})


def test_a_checkpoint_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    path, draw = tmp_path / "c.pt", random.Random(0)
    for number in range(60):
        if number >= 10 and list(tmp_path.glob(".*.partial")):
            break
        path.unlink(missing_ok=True)
        process = FORKS.Process(target=write_for_ever, args=(path,))
        process.start()
        children.until(path.exists)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        found = load_checkpoint(path)
        assert torch.equal(found["weights"], torch.full((2_000_000,), float(found["number"])))
    assert list(tmp_path.glob(".*.partial")), "no kill fell into a write"


def test_a_file_that_may_not_grow_further_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"number": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(path, {"number": 2, "weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(path)["number"] == 1
    assert names(tmp_path) == ["c.pt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk; the file size limit above stands in")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_its_checkpoint(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_disk / "run"

    def train() -> None:
        with open_run(folder, checkpoint_every=1) as run:
            for step in run.steps(0, 10, lambda: {"weights": torch.zeros(50_000)}):
                run.log(step + 1, "train", loss=1.0)
                if step == 1:
                    (small_disk / "ballast").write_bytes(bytes(700_000))

    with pytest.raises(SystemExit) as ended:
        command(train)
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: {folder}/checkpoint.pt: No space left on device\n"
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 1
    assert not list(folder.glob(".*.partial"))


def test_json_with_nan_is_refused_and_the_old_file_kept(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert read_json(tmp_path / "a.json") == 1


def test_json_that_is_damaged_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"loss": 1')
    with pytest.raises(CheckpointError, match=r"a\.json: damaged, not JSON"):
        read_json(tmp_path / "a.json")


# Reading checkpoints


def sealed(content: bytes) -> bytes:
    """`content` with the digest that a file of ours carries."""
    return content + hashlib.sha256(content).digest()


def torch_file(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Poison:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.marker,)


def test_tensors_numbers_and_containers_come_back_equal(tmp_path: Path) -> None:
    content = {"w": torch.arange(5.0), "half": torch.ones(2, dtype=torch.bfloat16), "n": [1, (2.5, None)], "s": "é"}
    save_checkpoint(tmp_path / "c.pt", content)
    found = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(found["w"], content["w"]) and torch.equal(found["half"], content["half"])
    assert (found["n"], found["s"]) == (content["n"], content["s"])


def test_a_checkpoint_is_also_a_plain_torch_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", {"w": torch.arange(5.0)})
    assert torch.equal(torch.load(tmp_path / "c.pt", weights_only=True)["w"], torch.arange(5.0))


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "c.pt").endswith(": no such checkpoint")


@pytest.mark.parametrize("keep", [0, 1, 31, 32, 33, 0.25, 0.5, 0.9, -33, -32, -1])
def test_a_truncated_checkpoint_is_refused(keep: float, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"w": torch.arange(100.0)})
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert "damaged" in refusal(path)


def test_a_checkpoint_with_any_one_bit_flipped_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"w": torch.arange(20.0)})
    data = bytearray(path.read_bytes())
    for bit in range(0, 8 * len(data), 7):  # 7 and 8 have no common factor: every position within a byte comes up
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert "damaged" in refusal(path)
        data[bit // 8] ^= 1 << bit % 8


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("seal", [bytes, sealed], ids=["plain", "forged digest"])
@pytest.mark.parametrize("write", [pickle.dumps, torch_file], ids=["pickle", "torch file"])
def test_code_in_a_checkpoint_is_refused_and_not_executed(
    write: Callable[[object], bytes], seal: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    marker, path = tmp_path / "executed", tmp_path / "c.pt"
    content = write({"format": "ten-papers-checkpoint-1", "w": Poison(marker)})
    with contextlib.suppress(Exception):
        pickle.loads(content)
    armed = marker.exists() or write is torch_file
    path.write_bytes(seal(content))
    with contextlib.suppress(FileNotFoundError):
        marker.rmdir()
    refusal(path)
    assert armed and not marker.exists()


@pytest.mark.parametrize("content", [torch_file({"w": torch.ones(3)}), torch_file([1, 2]), b"", b"PK\3\4"])
def test_a_foreign_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    for data in (content, sealed(content)):
        path.write_bytes(data)
        assert str(path) in refusal(path)


# Randomness


def draws() -> list[object]:
    numbers = [torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.normal(), random.random(), random.gauss()]
    return [*numbers, torch.randn(2).tolist()]


def test_equal_seeds_seed_torch_numpy_and_python_equally() -> None:
    seed_everything(7)
    first = draws()
    seed_everything(7)
    assert draws() == first
    seed_everything(8)
    assert not any(one == other for one, other in zip(draws(), first, strict=True))


def test_all_three_random_states_come_back_with_the_checkpoint(tmp_path: Path) -> None:
    seed_everything(3)
    draws()  # leaves numpy and python with the second number of a pair of normal draws
    with open_run(tmp_path / "run") as run:
        run.save(1, {})
        expected = draws()
    seed_everything(4)
    with open_run(tmp_path / "run") as run:
        run.restore()
        assert draws() == expected


def test_a_generator_depends_on_its_keys_and_their_order_alone() -> None:
    first = torch.rand(4, generator=generator(1, 2))
    torch.rand(1)
    assert torch.equal(first, torch.rand(4, generator=generator(1, 2)))
    assert not torch.equal(first, torch.rand(4, generator=generator(2, 1)))
    others = [torch.rand(4, generator=generator(*keys)) for keys in ((1, 2), (1, 2, 0), (1, 2, 0, 0), (1,), (0,), ())]
    assert torch.equal(first, others[0]) and len({tuple(other.tolist()) for other in others}) == len(others)


# Memory


def test_memory_that_was_freed_is_used_again_without_new_pages() -> None:
    work = (
        "import resource, torch\n"
        "from common.runs import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def step():\n"
        "    held = [torch.ones(6_000_000) for _ in range(4)]\n"  # 24 MB each, 5,860 pages
        "for _ in range(3): step()\n"
        "before = faults()\n"
        "for _ in range(5): step()\n"
        "print(faults() - before)"
    )
    assert int(children.run("-c", work).stdout) < 20_000  # 117,000 where nothing is kept


# The folder


def test_an_empty_folder_has_nothing_to_restore(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        assert run.restore() is None


def test_a_new_run_leaves_its_configuration_and_environment(tmp_path: Path) -> None:
    with open_run(tmp_path / "run"):
        pass
    assert names(tmp_path / "run") == [".lock", "config.yaml", "environment.json", "metrics.jsonl"]
    there = read_json(tmp_path / "run" / "environment.json")
    assert there["versions"] == environment()["versions"] and there["threads"] == torch.get_num_threads()
    assert set(there) == {"machine", "versions", "revision", "threads", "date"}


def test_a_revision_is_dirty_where_other_files_than_results_were_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    for name in ("common/runs.py", "paper/results/demo.json", "paper/train.py"):
        write_atomically(tree / name, b"old")
    git = ["git", "-C", str(tree), "-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(runs, "__file__", str(tree / "common" / "runs.py"))
    revision = environment()["revision"]
    assert re.fullmatch(r"[0-9a-f]{12}", revision)
    for name in ("paper/results/demo.json", "paper/new.py"):  # a file that git does not know runs no study
        (tree / name).write_text("new")
        assert environment()["revision"] == revision
    (tree / "paper" / "train.py").write_text("new")
    assert environment()["revision"] == f"{revision}-dirty"


def test_the_revision_is_unknown_where_git_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment()["revision"] == "unknown"


def test_a_finished_run_has_its_whole_log_even_if_its_process_is_killed_the_moment_after(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        run.log(3, "train", loss=1.0)
        run.finish({})
        assert lines(tmp_path / "run") == [{"step": 3, "split": "train", "loss": 1.0}]


def test_metrics_written_after_the_checkpoint_are_dropped_on_resuming(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", checkpoint_every=2) as run, contextlib.suppress(ZeroDivisionError):
        for step in run.steps(0, 10, lambda: {}):
            run.log(step + 1, "train", loss=float(step))
            1 / (2 - step)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]
    with open_run(tmp_path / "run") as run:
        run.restore()
        run.log(3, "val", loss=0.5)
    expected = [(1, "train", 0.0), (2, "train", 1.0), (3, "val", 0.5)]
    assert [tuple(line.values()) for line in lines(tmp_path / "run")] == expected


def test_metrics_shorter_than_at_the_checkpoint_are_refused(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        run.log(1, "train", loss=1.0)
        run.save(1, {})
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"")
    with open_run(tmp_path / "run") as run, pytest.raises(CheckpointError, match=r"metrics\.jsonl: shorter"):
        run.restore()


def test_a_run_without_a_checkpoint_starts_its_metrics_afresh(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        run.log(1, "train", loss=1.0)
    with open_run(tmp_path / "run") as run:
        run.restore()
    assert lines(tmp_path / "run") == []


def test_a_damaged_checkpoint_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        run.log(1, "train", loss=1.0)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"damaged")
    with open_run(tmp_path / "run") as run, pytest.raises(CheckpointError, match=r"checkpoint\.pt: damaged"):
        run.restore()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == b"damaged"
    assert len(lines(tmp_path / "run")) == 1


def test_what_a_killed_write_left_is_removed_on_the_next_opening(tmp_path: Path) -> None:
    left = tmp_path / "run" / "tickets" / ".0.pt.123.partial"
    write_atomically(left, b"half")
    (tmp_path / "run" / "config.yaml").write_text(dump(Config()))
    with open_run(tmp_path / "run"):
        assert not left.exists()


def hold(folder: Path, pipe: Connection) -> None:
    with open_run(folder):
        pipe.send("open")
        time.sleep(60)


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    pipe, far_end = FORKS.Pipe()
    process = FORKS.Process(target=hold, args=(tmp_path / "run", far_end))
    process.start()
    pipe.recv()
    before = names(tmp_path / "run")
    with (
        pytest.raises(UserError, match="run: another process is working in this folder"),
        open_run(tmp_path / "run"),
    ):
        pass
    assert names(tmp_path / "run") == before
    process.kill()
    process.join()
    with open_run(tmp_path / "run") as run:
        assert run.restore() is None


def test_the_lock_is_free_after_leaving(tmp_path: Path) -> None:
    for _ in range(2):
        with open_run(tmp_path / "run") as run:
            assert run.restore() is None


def test_another_configuration_is_refused_by_key_with_old_and_new_value(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        run.log(1, "train", loss=1.0)
    before = children.tree(tmp_path, ["run/*"])
    other = Config(rates=[0.1, 0.3])
    with pytest.raises(ConfigError) as caught, open_run(tmp_path / "run", config=other):
        pass
    assert "rates=[0.1, 0.2], asked for [0.1, 0.3]" in str(caught.value)
    assert children.tree(tmp_path, ["run/*"]) == before


@pytest.mark.parametrize("other", [{"run": RunConfig("elsewhere", 7, 3)}, {"study": StudyConfig(seeds=[5])}])
def test_where_a_run_lies_how_often_it_saves_and_its_study_may_differ(other: dict[str, Any], tmp_path: Path) -> None:
    with open_run(tmp_path / "run"):
        pass
    with open_run(tmp_path / "run", config=Config(**other)) as run:
        assert run.restore() is None


def test_a_run_that_ended_before_its_first_number_takes_another_configuration(tmp_path: Path) -> None:
    with contextlib.suppress(ConfigError), open_run(tmp_path / "run"):
        raise ConfigError("too few samples")
    with open_run(tmp_path / "run", config=Config(rates=[0.1, 0.3])) as run:
        assert run.restore() is None
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["rates"] == [0.1, 0.3]


def test_a_configuration_of_the_users_own_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("rates: [0.5]\n")
    with pytest.raises(ConfigError, match="holds a run with"), open_run(tmp_path):
        pass
    assert (tmp_path / "config.yaml").read_text() == "rates: [0.5]\n"


def test_a_finished_run_of_another_configuration_is_refused_too(tmp_path: Path) -> None:
    with open_run(tmp_path, config=StudyConfig(runs="there")) as run:
        run.finish({})
    with pytest.raises(ConfigError, match="holds a run with runs='there', asked for 'here'"):
        open_run(tmp_path, config=StudyConfig(runs="here"))


def test_a_key_that_the_old_configuration_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ConfigError, match=r"rates=None, asked for \[0\.1, 0\.2\]"), open_run(tmp_path):
        pass


def test_a_poisoned_configuration_is_refused_and_not_executed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"!!python/object/apply:os.mkdir ['{tmp_path}/executed']")
    with pytest.raises(ConfigError, match=r"config\.yaml: not a readable YAML file"), open_run(tmp_path):
        pass
    assert names(tmp_path) == ["config.yaml"]


@pytest.mark.parametrize("name", ["holiday.jpg", "metrics.jsonl", "checkpoint.pt", "done.json"])
def test_a_folder_that_is_no_run_folder_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with (
        pytest.raises(ConfigError, match=r"not empty and not a run folder \(it has no config\.yaml\)"),
        open_run(tmp_path),
    ):
        pass
    assert (names(tmp_path), (tmp_path / name).read_text()) == ([name], "mine")


def test_a_run_is_finished_once_its_final_metrics_are_there(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        assert not run.finished
        run.finish({"accuracy": 12.5})
        assert run.finished
    assert read_json(tmp_path / "run" / "done.json") == {"accuracy": 12.5}


@pytest.mark.parametrize(("option", "value"), [("checkpoint_every", 0), ("threads", -1)])
def test_run_settings_that_cannot_be_are_refused_by_name(option: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"run.{option} must be at least"):
        RunConfig(**{option: value})  # type: ignore[arg-type]


# Steps


def test_snapshots_are_taken_between_steps_when_they_are_due(tmp_path: Path) -> None:
    done: list[int] = []
    with open_run(tmp_path / "run", checkpoint_every=3) as run:
        for step in run.steps(2, 8, lambda: {"done": list(done)}):
            if step == 5:
                assert not (run.folder / "checkpoint.pt").exists() or run.restore() == {"done": [2]}
            done.append(step)
        saved = load_checkpoint(run.folder / "checkpoint.pt")
    assert (done, saved["step"], saved["snapshot"]) == ([2, 3, 4, 5, 6, 7], 6, {"done": [2, 3, 4, 5]})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_ends_the_run_at_its_step_and_keeps_the_checkpoint(
    value: float, tmp_path: Path
) -> None:
    with pytest.raises(NonFiniteError) as caught, open_run(tmp_path / "run", checkpoint_every=1) as run:
        for step in run.steps(0, 10, lambda: {"good": True}):
            run.log(step, "train", accuracy=1.0, loss=value if step == 3 else 0.0)
    assert str(caught.value) == f"loss is {value} at step 3; the last good checkpoint is in {tmp_path / 'run'}"
    assert caught.value.status == 1
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 1, 2]


def test_a_number_that_is_not_finite_before_any_checkpoint_names_none(tmp_path: Path) -> None:
    with (
        pytest.raises(NonFiniteError, match=r"^loss is nan at step 0; no checkpoint had been written$"),
        open_run(tmp_path / "run") as run,
    ):
        run.log(0, "train", loss=math.nan)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_do_not_replace_the_last_checkpoint(value: float, tmp_path: Path) -> None:
    weights = {"w": torch.ones(3), "count": torch.tensor(1)}
    with (
        pytest.raises(NonFiniteError, match=r"model\.w is not finite at step 6; the last good"),
        open_run(tmp_path / "run", checkpoint_every=3) as run,
    ):
        for step in run.steps(0, 10, lambda: {"model": weights}):
            weights["w"][1] = value if step == 5 else step
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert saved["step"] == 3 and saved["snapshot"]["model"]["w"].tolist() == [1, 2, 1]


def test_another_file_of_this_project_in_place_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        save_checkpoint(run.folder / "checkpoint.pt", {"weights": {}})
        with pytest.raises(CheckpointError, match=r"checkpoint.pt: not a run's checkpoint \(it has no config\)"):
            run.restore()


def test_a_checkpoint_of_another_configuration_is_refused_by_key(tmp_path: Path) -> None:
    for name, rates in (("run", [0.1, 0.2]), ("other", [0.1, 0.3])):
        with open_run(tmp_path / name, config=Config(rates=rates), checkpoint_every=1) as run:
            next(steps := run.steps(0, 2, dict))
            next(steps)
    shutil.copy(tmp_path / "other" / "checkpoint.pt", tmp_path / "run" / "checkpoint.pt")
    wanted = r"checkpoint\.pt: of a run with rates=\[0\.1, 0\.3\], this one has \[0\.1, 0\.2\]"
    with pytest.raises(CheckpointError, match=wanted), open_run(tmp_path / "run") as run:
        run.restore()


def test_ctrl_c_after_the_last_step_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "run") as run:
        for _ in run.steps(0, 10, lambda: {}):
            pass
        signal.raise_signal(signal.SIGINT)
        run.finish({"loss": 1.0})
    assert run.finished


def test_progress_is_told_to_the_callback_instead_of_a_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[float] = []
    with open_run(tmp_path / "run", 4, progress=told.append) as run:
        for _ in run.steps(0, 4, lambda: {}):
            run.log(1, "train", loss=1.0)
    assert told == [0.25, 0.5, 0.75, 1.0]
    assert capfd.readouterr().err == ""


def test_without_a_callback_a_bar_shows_steps_and_losses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with open_run(tmp_path / "run", 4, progress=None) as run:
        for step in run.steps(0, 4, lambda: {}):
            run.log(step, "train", loss=1.25)
    assert "4/4" in (shown := capfd.readouterr().err) and "loss=1.25" in shown


def test_a_resumed_run_shows_what_is_done_already(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", 4) as run:
        run.save(3, {})
    told: list[float] = []
    with open_run(tmp_path / "run", 4, progress=told.append) as run:
        run.restore()
    assert told == [0.75]


def test_ctrl_c_finishes_the_step_and_saves_it(tmp_path: Path) -> None:
    before, finished = signal.getsignal(signal.SIGINT), []
    with pytest.raises(Interrupted) as caught, open_run(tmp_path / "run") as run:
        for step in run.steps(0, 10, lambda: {"finished": list(finished)}):
            if step == 4:
                signal.raise_signal(signal.SIGINT)
            finished.append(step)
    message = f"stopped after step 5 of 10, saved in {tmp_path / 'run'}; the same command resumes it"
    assert (str(caught.value), caught.value.status) == (message, 130)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["snapshot"] == {"finished": [0, 1, 2, 3, 4]}
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "run") as run:
        for _ in run.steps(0, 10, lambda: {}):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_ctrl_c_in_the_terminal_says_how_to_resume_with_status_130(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = children.start(TINY, "--run.folder", folder, "--steps", 100_000)
    children.until((folder / "checkpoint.pt").exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    step = load_checkpoint(folder / "checkpoint.pt")["step"]
    assert err == f"stopped after step {step} of 100000, saved in {folder}; the same command resumes it\n"
    assert (process.returncode, lines(folder)[-1]["step"]) == (130, step)


# TensorBoard


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        run.log(1, "train", loss=0.5, accuracy=10.0)
        run.log(2, "val", loss=0.25)
    expected = {"train/loss": [(1, 0.5)], "train/accuracy": [(1, 10.0)], "val/loss": [(2, 0.25)]}
    assert events(tmp_path / "run") == expected


def log_and_die(folder: Path, value: float, at: int) -> None:
    """Log `value` at every step, save every second one, and die without a word at step `at`."""
    with open_run(folder, checkpoint_every=2) as run:
        done = (run.restore() or {"done": 0})["done"]
        for step in run.steps(done, 10, lambda: {"done": done}):  # noqa: B023 (called before the next step)
            done = step + 1
            run.log(done, "train", loss=value)
            if step == at:
                run._events.flush()
                os.kill(os.getpid(), signal.SIGKILL)


def test_tensorboard_holds_neither_gaps_nor_the_future_a_killed_run_lost(tmp_path: Path) -> None:
    for value, at in ((1.0, 4), (2.0, 99)):
        process = FORKS.Process(target=log_and_die, args=(tmp_path / "run", value, at))
        process.start()
        process.join()
        time.sleep(1.1)  # event files are read in the order of their names, which count seconds
    expected = [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 11)]
    assert events(tmp_path / "run") == {"train/loss": expected}


def test_events_up_to_the_checkpoint_are_on_disk_when_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda self, data: (time.sleep(0.02), write(self, data)))  # a slow disk
    with open_run(tmp_path / "run") as run:
        for step in range(1, 21):
            run.log(step, "train", loss=1.0)
        run.save(20, {})
        assert events(tmp_path / "run") == {"train/loss": [(step, 1.0) for step in range(1, 21)]}


# Killed and resumed


def train_until_killed(folder: Path, suicide: tuple[str, int] | None) -> None:
    """The tiny run; `suicide` (name, n): SIGKILL to itself in the n-th call of os.<name>."""
    if suicide is not None:
        name, left = suicide
        call = getattr(os, name)

        def deadly(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        setattr(os, name, deadly)
    torch.set_num_threads(1)
    tiny_training.train(tiny_training.TinyConfig(run=RunConfig(str(folder), checkpoint_every=3)))


def tiny(folder: Path, suicide: tuple[str, int] | None = None) -> Any:
    process = FORKS.Process(target=train_until_killed, args=(folder, suicide))
    process.start()
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    tiny(folder).join()
    return results(folder)


def results(folder: Path) -> dict[str, bytes]:
    return children.tree(folder, ["final.pt", "metrics.jsonl", "done.json"])


def test_a_run_killed_at_ten_random_moments_equals_an_undisturbed_one_bit_for_bit(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    folder, draw = tmp_path / "run", random.Random(1)
    checkpoint = folder / "checkpoint.pt"
    steps = [0]
    for _ in range(10):
        process = tiny(folder)
        for _ in range(draw.randint(1, 4)):  # so many checkpoints further, and a little more
            there = checkpoint.stat().st_ino if checkpoint.exists() else None
            children.until(lambda there=there: checkpoint.exists() and checkpoint.stat().st_ino != there)
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed"
        steps.append(load_checkpoint(checkpoint)["step"])
    tiny(folder).join()
    assert steps == sorted(set(steps))
    assert results(folder) == undisturbed and len(undisturbed) == 3


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_run_killed_within_every_twentieth_write_equals_an_undisturbed_one(
    call: str, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    folder, deaths = tmp_path / "run", 0
    while not (folder / "done.json").exists():
        process = tiny(folder, (call, 40 if call == "fsync" else 20))
        process.join()
        deaths += process.exitcode == -signal.SIGKILL
    assert deaths >= 2
    assert results(folder) == undisturbed
