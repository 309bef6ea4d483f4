"""The folder of one run: configuration, environment, metrics, checkpoints; a killed run resumes bit for bit.

with Run(folder, config, total_steps=n) as run:
    saved = run.restore()                       # None at the start, else the last snapshot
    for step in run.steps(start, n, snapshot):  # snapshot() -> plain data, taken between two steps
        ...
    run.finish(metrics)
"""

import contextlib
import ctypes
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from common import distributed
from common.config import ConfigError, UserError, dump, read_yaml, require

FORMAT = "ten-papers-checkpoint-1"


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and how it computes; may differ when a run is resumed."""

    folder: str = ""
    """of the run; empty: named after the configuration, under runs/"""
    checkpoint_every: int = 200
    """steps between checkpoints"""
    threads: int = 0
    """processor threads; 0: torch's choice. Results are equal bit for bit only at the same number"""

    def __post_init__(self) -> None:
        require(self.checkpoint_every >= 1, "run.checkpoint_every", self.checkpoint_every, "at least 1")
        require(self.threads >= 0, "run.threads", self.threads, "at least 0")


class CheckpointError(UserError):
    """A checkpoint that is damaged, foreign or not there."""


class NonFiniteError(UserError):
    """NaN or Inf where a number was needed; the last good checkpoint stays."""

    status = 1


class Interrupted(UserError):
    """Ctrl-C: the step was finished and saved."""

    status = 130


def generator(*keys: int) -> torch.Generator:
    """A CPU generator that depends on `keys` and their number alone, as (seed, epoch, batch): no state needs saving."""
    entropy = (len(keys), *keys)  # the number too: zeros at the end do not count for numpy
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def keep_freed_memory() -> None:
    """Let this process keep what it frees for its next step: new pages take up to an eighth of a ResNet's time.

    Of glibc (other systems are left as they are): up to 1 GiB stays, and no tensor below that is mapped by itself.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
            library.mallopt(option, 1 << 30)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`, made if need be. Raises `UserError` if one is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the system however this process ends
        except BlockingIOError:
            raise UserError(f"{folder}: another process is working in this folder") from None
        yield


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either the old or the new content, whatever happens. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, atomically. NaN and Inf are not JSON: they raise ValueError."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """What `write_json` wrote. Raises `CheckpointError` if it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged, not JSON ({error})") from error


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Save tensors, numbers, strings and containers of them, atomically: a torch file with its SHA-256 behind it."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` saved, on the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: if it is missing, damaged, holds anything but plain data, or is not of this project.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    # torch reads damaged tensors without a word, so nothing is read before every bit is known to be right.
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of this project")
    try:
        content = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
    except Exception as error:  # what a forged file may raise has no common class
        raise CheckpointError(f"{path}: holds more than plain data") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this project")
    return content


def environment() -> dict[str, Any]:
    """Machine, versions, git revision, threads and time: what a measured number must carry."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "machine": {"cpu": (models or [platform.machine()])[0], "cores": os.cpu_count(), "gpus": gpus},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "revision": revision(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def revision() -> str:
    """The commit of this tree, with -dirty where files other than results differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude,glob)**/results/**")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _rng_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy_state = [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest]
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy_state, "python": random.getstate()}


def _set_rng_state(state: Mapping[str, Any]) -> None:
    name, keys, *rest = state["numpy"]
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


class Run:
    """One run's folder, opened by one process (of a data-parallel group rank 0 writes, the others only read).

    Args:
        folder: made if missing; holds `config.yaml`, `environment.json`, `metrics.jsonl`, `checkpoint.pt`, events for
            TensorBoard and, once finished, `done.json`.
        config: a dataclass; a folder in which a run of another one has begun is refused (run.* and study.* may differ).
        total_steps: for the progress bar.
        checkpoint_every: steps between checkpoints.
        progress: called with the finished fraction in [0, 1] instead of drawing a bar.

    Raises:
        UserError: at once if the folder is another's, on entering if it is in use; nothing is written then.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        *,
        total_steps: int,
        checkpoint_every: int = 200,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.folder, self.config, self.total_steps = (
            Path(folder),
            dump(config),
            total_steps,
        )  # the configuration as text
        self.checkpoint_every, self._progress = checkpoint_every, progress
        self.writes = distributed.rank() == 0
        self._stop = False
        self._events: Any = None
        if self.writes:
            self._refuse_another_configuration()

    @property
    def finished(self) -> bool:
        """Whether `done.json` is there."""
        return (self.folder / "done.json").exists()

    def __enter__(self) -> "Run":
        with contextlib.ExitStack() as stack:
            if self.writes:
                stack.enter_context(hold(self.folder))
                for left in self.folder.rglob(".*.partial"):  # by a process killed in the middle of a write
                    left.unlink()
                if not self._begun():
                    write_json(self.folder / "environment.json", environment())
                    write_atomically(self.folder / "config.yaml", self.config.encode())
                self._metrics = stack.enter_context(open(self.folder / "metrics.jsonl", "ab"))
            hidden = not self.writes or self._progress is not None
            self._bar = stack.enter_context(tqdm(total=self.total_steps, unit="step", mininterval=0.5, disable=hidden))
            if threading.current_thread() is threading.main_thread():
                stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, self._on_interrupt))
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._events is not None:
            self._events.close()
        self._open.close()
        if self._stop and kind is None:  # after the last step: what comes next is not to begin
            raise KeyboardInterrupt

    def restore(self) -> dict[str, Any] | None:
        """The last snapshot, with the random state and `metrics.jsonl` set back to its moment; None at the start."""
        path = self.folder / "checkpoint.pt"
        saved = load_checkpoint(path) if path.exists() else None
        if saved and (lacking := sorted({"step", "metrics_bytes", "rng", "snapshot", "config"} - saved.keys())):
            raise CheckpointError(f"{path}: not a run's checkpoint (it has no {lacking[0]})")
        for key, there, here in self._other_than(yaml.safe_load(saved["config"])) if saved else ():
            raise CheckpointError(f"{path}: of a run with {key}={there!r}, this one has {here!r}")
        step = saved["step"] if saved else 0
        if distributed.any_rank(step != distributed.mean(step)):
            raise CheckpointError(f"{path}: not the same for all processes, it must lie on a disk that all share")
        if self.writes:
            logged = saved["metrics_bytes"] if saved else 0
            if self._metrics.tell() < logged:
                raise CheckpointError(f"{self.folder}/metrics.jsonl: shorter than when checkpoint.pt was written")
            self._metrics.truncate(logged)
        if saved is None:
            return None
        _set_rng_state(saved["rng"])
        self._show(saved["step"])
        return saved["snapshot"]

    def steps(self, start: int, stop: int, snapshot: Callable[[], Mapping[str, Any]]) -> Iterator[int]:
        """Yield the steps [start, stop); between two steps save when it is due, and stop on Ctrl-C.

        Args:
            snapshot: the complete state after the step just done, as plain data; `restore` gives it back.
        """
        for step in range(start, stop):
            yield step
            self._show(step + 1)
            stopping = distributed.any_rank(self._stop)
            if stopping or (step + 1) % self.checkpoint_every == 0:
                self.save(step + 1, snapshot())
            if stopping:
                self._stop = False
                where = f"after step {step + 1} of {self.total_steps}, saved in {self.folder}"
                raise Interrupted(f"stopped {where}; the same command resumes it")

    def save(self, step: int, snapshot: Mapping[str, Any]) -> None:
        """Write `checkpoint.pt` atomically; `step` is the number of finished steps.

        Raises:
            NonFiniteError: NaN or Inf in a tensor of the snapshot; the last checkpoint stays.
        """
        for name, value in _tensors(snapshot):
            if not bool(value.isfinite().all()):
                raise NonFiniteError(f"{name} is not finite at step {step}; {self.kept}")
        if self.writes:
            self._flush()
            size = self._metrics.seek(0, os.SEEK_END)
            content = {"step": step, "metrics_bytes": size, "rng": _rng_state(), "snapshot": dict(snapshot)}
            save_checkpoint(self.folder / "checkpoint.pt", {**content, "config": self.config})

    def log(self, step: int, split: str, **values: float) -> None:
        """Append one line to `metrics.jsonl` and TensorBoard. Raises `NonFiniteError` on NaN or Inf."""
        self.require_finite(step, **values)
        if not self.writes:
            return
        self._metrics.write(json.dumps({"step": step, "split": split, **values}).encode() + b"\n")
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # here: its import takes a second

            self._events = SummaryWriter(str(self.folder), purge_step=step)
        for name, value in values.items():
            self._events.add_scalar(f"{split}/{name}", value, step)
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in list(values.items())[:3]}, refresh=False)

    def require_finite(self, step: int, **values: float) -> None:
        """Raise `NonFiniteError` naming the step and the first value that is NaN or Inf."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{name} is {value} at step {step}; {self.kept}")

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write `done.json`: the run is finished and its final metrics are these."""
        if self.writes:
            self._flush()  # killed right afterwards, the run is finished and its log whole
            write_json(self.folder / "done.json", metrics)

    def _flush(self) -> None:
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        if self._events is not None:
            self._events.flush()

    def _show(self, step: int) -> None:
        self._bar.update(step - self._bar.n)
        if self._progress is not None:
            self._progress(step / max(self.total_steps, 1))

    def _on_interrupt(self, *_: object) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True

    def _begun(self) -> bool:
        """Whether the folder has a configuration and more than a run leaves that ends before its first number."""
        sizes = {path.name: path.stat().st_size for path in self.folder.glob("[!.]*")}
        start = {"config.yaml", "environment.json"}  # config.yaml alone is not a run's
        return "config.yaml" in sizes and (
            not start <= sizes.keys() or any(sizes[name] for name in sizes.keys() - start)
        )

    def _other_than(self, there: Any) -> Iterator[tuple[str, Any, Any]]:
        """Keys on which the results depend that this configuration has otherwise, both values."""
        for key, old, new in _differences(there, yaml.safe_load(self.config)):
            if not key.startswith(("run.", "study.")):
                yield key, old, new

    @property
    def kept(self) -> str:
        """In words, for what ends a run: where its last checkpoint is."""
        saved = (self.folder / "checkpoint.pt").exists()
        return f"the last good checkpoint is in {self.folder}" if saved else "no checkpoint had been written"

    def _refuse_another_configuration(self) -> None:
        path = self.folder / "config.yaml"
        if path.exists():
            for key, old, new in self._other_than(read_yaml(path)) if self._begun() else ():
                wanted = f"holds a run with {key}={old!r}, asked for {new!r}"
                raise ConfigError(f"{self.folder}: {wanted}; choose another run.folder or remove that one")
        elif any(there.name != "environment.json" for there in self.folder.glob("[!.]*")):
            raise ConfigError(f"{self.folder}: not empty and not a run folder (it has no config.yaml)")


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in plain data, with their names."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, f"{name}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _tensors(part, f"{name}.{number}".removeprefix("."))
    elif isinstance(value, Tensor) and value.is_floating_point():
        yield name, value


def _differences(there: Any, here: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in {**there, **here}:
            yield from _differences(there.get(name), here.get(name), f"{key}.{name}".removeprefix("."))
    elif there != here:
        yield key, there, here
