"""A study: cells (settings and a seed) run side by side into rows; killed at any moment, it goes on where it was.

Every cell works in its own process with a fixed number of threads, so its numbers do not depend on how many run beside
it. A cell's folder is named after its settings: a finished one is found again, a changed one starts afresh.
"""

import contextlib
import hashlib
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from tqdm import tqdm

from common.config import UserError, parse, require
from common.runs import Interrupted, hold, keep_freed_memory, read_json, revision, write_json

C = TypeVar("C", bound="Studied")
Progress = Callable[[float], None]
RunCell = Callable[["Cell", Path, Progress], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class StudyConfig:
    """Which seeds, where, and how many cells at a time."""

    scale: str = "demo"
    """set by --scale, the configuration's name; names the results: <results>/<scale>.json, .md and .html"""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """fixed before the measured run"""
    workers: int = 2
    """cells at a time"""
    threads: int = 1
    """of each cell; bit for bit its numbers are those of this number of threads"""
    backend: Literal["local", "ray"] = "local"
    """ray: on the cluster of RAY_ADDRESS, or a local one; runs must then lie on a shared disk"""
    runs: str = "runs"
    """folder of the cells"""
    results: str = ""
    """folder of the report; empty: the paper's own results/"""

    def __post_init__(self) -> None:
        require(len(self.seeds) > 0, "study.seeds", self.seeds, "at least one seed")
        require(len(set(self.seeds)) == len(self.seeds), "study.seeds", self.seeds, "without repetition")
        require(min(self.seeds) >= 0, "study.seeds", self.seeds, "at least 0 each")
        require(self.workers >= 1, "study.workers", self.workers, "at least 1")
        require(self.threads >= 1, "study.threads", self.threads, "at least 1")


class Studied(Protocol):
    """A paper's configuration."""

    @property
    def study(self) -> StudyConfig:
        """That of its study."""


@dataclass(frozen=True)
class Cell:
    """One unit of work: `settings` are what its rows record; with the seed they name it."""

    settings: dict[str, Any]
    seed: int

    @property
    def name(self) -> str:
        """Readable, unique in its study and fit for a file's name."""
        parts = [f"{key}={value}" for key, value in self.settings.items()]
        return re.sub(r"[^\w=.+-]+", "_", "_".join([*parts, f"seed={self.seed}"]))


@dataclass(frozen=True)
class StudyResult:
    """Rows {"cell", "seed", "metrics"}, failed cells with their logs, wall-clock seconds over all sittings.

    `revisions` are the commits that the rows were measured at.
    """

    scale: str
    rows: list[dict[str, Any]]
    failed: dict[str, Path]
    seconds: float
    revisions: list[str]


def scale_arguments(configs: Path, argv: Sequence[str] | None = None) -> list[str]:
    """The command line with `--scale NAME` (default demo) put as `--config <configs>/NAME.yaml` in front."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    scale = "demo"
    if "--scale" in arguments:
        position = arguments.index("--scale")
        scale = "".join(arguments[position + 1 : position + 2])
        del arguments[position : position + 2]
    known = sorted(path.stem for path in configs.glob("*.yaml"))
    require(scale in known, "--scale", scale, f"one of {', '.join(known)}")
    return ["--config", str(configs / f"{scale}.yaml"), "--study.scale", scale, *arguments]


def study_config(config_class: type[C], configs: Path, argv: Sequence[str] | None = None) -> C:
    """The configuration of `python -m <paper>.reproduce --scale NAME ...`, from <paper>/configs/NAME.yaml."""
    scales = "|".join(name for name in ("smoke", "demo", "cifar", "paper") if (configs / f"{name}.yaml").exists())
    about = f"Run the study of one scale: --scale {scales} (its YAML in configs/), then any option below."
    prog = f"python -m {configs.parent.name}.reproduce"
    config = parse(config_class, scale_arguments(configs, argv), prog=prog, description=about)
    place = Path(config.study.results or configs.parent / "results").absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    require(writable, "study.results", str(place), "a folder that may be written into")  # now, not after hours
    return config


def run_study(
    cells: Sequence[Cell], run_cell: RunCell, folder: Path, identity: str, config: StudyConfig
) -> StudyResult:
    """Run the cells that are not finished yet, and collect the rows of all.

    Args:
        cells: with unique names.
        run_cell: a picklable function (cell, its folder, progress) -> rows, each a mapping with "metrics" and, where a
            cell yields several rows, more settings under "cell". It resumes what it finds in its folder.
        folder: of the cells.
        identity: all else the rows depend on (the configuration as text); with another identity a cell is another cell.
        config: workers, threads and backend.
    """
    digests = [hashlib.sha256(f"{cell}\n{identity}".encode()).hexdigest()[:8] for cell in cells]
    homes = [folder / f"{cell.name}-{digest}" for cell, digest in zip(cells, digests, strict=True)]
    with hold(folder):
        seconds = _work_off(cells, homes, run_cell, folder, config)
    rows: list[dict[str, Any]] = []
    failed, revisions = {}, set()
    for cell, home in zip(cells, homes, strict=True):
        if _rows_of(home).exists():
            for row in read_json(_rows_of(home)):
                settings = {**cell.settings, **row.get("cell", {})}
                rows.append({"cell": settings, "seed": cell.seed, "metrics": row["metrics"]})
                revisions.add(row.get("revision", "unknown"))
        else:
            failed[cell.name] = _log_of(home)
    return StudyResult(config.scale, rows, failed, seconds, sorted(revisions))


def _work_off(
    cells: Sequence[Cell], homes: Sequence[Path], run_cell: RunCell, folder: Path, config: StudyConfig
) -> float:
    """Run the cells without rows; returns the seconds of all sittings."""
    todo = [(cell, home) for cell, home in zip(cells, homes, strict=True) if not _rows_of(home).exists()]
    clock, started = folder / "seconds.json", time.monotonic()
    begun = any(home.exists() or _rows_of(home).exists() for home in homes)
    before = read_json(clock) if clock.exists() and begun else 0.0
    seconds = before
    backend = _on_ray if config.backend == "ray" else _in_processes
    look = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total} [{elapsed}<{remaining}]"
    known = len(cells) - len(todo)
    with tqdm(total=len(cells), initial=known, desc="cells", mininterval=1, smoothing=0.05, bar_format=look) as bar:
        try:
            for finished in backend(todo, run_cell, config.workers, config.threads):
                bar.update(known + finished - bar.n)
                seconds = before + time.monotonic() - started
                write_json(clock, seconds)
        except KeyboardInterrupt:
            done = sum(_rows_of(home).exists() for home in homes)
            raise Interrupted(f"stopped with {done} of {len(cells)} cells finished; the same command resumes") from None
    return seconds


def _rows_of(home: Path) -> Path:
    return home.with_name(home.name + ".rows.json")


def _log_of(home: Path) -> Path:
    return home.with_name(home.name + ".log")


def _work(run_cell: RunCell, cell: Cell, home: Path, threads: int, progress: Progress) -> None:
    """Run one cell with its output in <home>.log; its rows appear, whole, in <home>.rows.json."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    with (
        open(_log_of(home), "a", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            rows = run_cell(cell, home, progress)
            write_json(_rows_of(home), [{**row, "revision": revision()} for row in rows])
        except UserError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("stopped")
        except Exception:
            traceback.print_exc()


def _child(run_cell: RunCell, cell: Cell, home: Path, threads: int, pipe: Connection, gpu: str | None) -> None:
    os.setpgrp()  # the terminal's Ctrl-C reaches the parent alone, which passes it on once
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu

    def end_with_the_parent() -> None:
        with contextlib.suppress(EOFError, OSError):
            pipe.recv()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    try:
        _work(run_cell, cell, home, threads, pipe.send)
    except OSError as error:  # of the log: no space for it, no permission
        print(f"\nerror: {_log_of(home)}: {error.strerror}", file=sys.stderr)


@dataclass
class _Running:
    process: Any
    home: Path
    gpu: str | None
    fraction: float = 0.0


def _in_processes(todo: list[tuple[Cell, Path]], run_cell: RunCell, workers: int, threads: int) -> Iterator[float]:
    """Run cells in `workers` processes at a time; yields how many are finished, fractions included."""
    # One thread until a cell sets its own: a forked child must not inherit a pool of threads.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    context = multiprocessing.get_context("forkserver")
    # Under python -m the study's module by its name: the imports of "__main__" would be done again by each cell.
    context.set_forkserver_preload(["torch", getattr(sys.modules["__main__"].__spec__, "name", "__main__")])
    waiting, done = list(reversed(todo)), 0
    running: dict[Connection, _Running] = {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                cell, home = waiting.pop()
                pipe, child_end = context.Pipe()
                gpu = min(gpus, key=[one.gpu for one in running.values()].count, default=None)
                process = context.Process(target=_child, args=(run_cell, cell, home, threads, child_end, gpu))
                process.start()
                child_end.close()
                running[pipe] = _Running(process, home, gpu)
            ready = wait(list(running), timeout=1)
            for pipe in [pipe for pipe in running if pipe in ready]:
                one = running[pipe]
                try:
                    one.fraction = float(pipe.recv())
                except EOFError:
                    one.process.join()
                    if one.process.exitcode:  # such a death leaves no word in the log: say it there
                        with open(_log_of(one.home), "a") as log:
                            print(f"the process ended with exit code {one.process.exitcode}", file=log)
                    del running[pipe]
                    done += 1
            yield done + sum(one.fraction for one in running.values())
    finally:
        for one in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.process.pid, signal.SIGINT)
        for one in running.values():
            one.process.join()


def _on_ray(todo: list[tuple[Cell, Path]], run_cell: RunCell, workers: int, threads: int) -> Iterator[float]:
    """The same on a Ray cluster (RAY_ADDRESS), as many as it has GPUs or CPUs, or on a local one of `workers` CPUs."""
    try:
        import ray
    except ImportError:
        raise UserError("study.backend ray needs the optional extra: pip install '.[ray]'") from None
    local: dict[str, Any] = (
        {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers * threads, "include_dashboard": False}
    )
    ray.init(logging_level=logging.ERROR, log_to_driver=False, **local)
    try:
        gpu = 1 if ray.cluster_resources().get("GPU") else 0
        work = ray.remote(num_cpus=threads, num_gpus=gpu, max_retries=0)(_work)
        pending = [work.remote(run_cell, cell, home.resolve(), threads, lambda fraction: None) for cell, home in todo]
        while pending:
            _, pending = ray.wait(pending, timeout=1)
            yield len(todo) - len(pending)
    finally:
        ray.shutdown()
