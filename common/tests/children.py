"""Child processes of the tests: started in this very tree, ended by the signals that users and machines send."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def start(*arguments: object) -> subprocess.Popen[str]:
    """`python ARGUMENTS` in a process group of its own, importing from this tree, one thread."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The finished `python ARGUMENTS`."""
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def descendants(pid: int) -> list[int]:
    """Process ids of all that `pid` started, directly or not; torchrun gives each rank a process group of its own."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for above in found:
        found += [child for child, parent in parents.items() if parent == above]
    return found[1:]


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to `process` and all that it started."""
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for `condition`; an assertion fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def tree(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Contents of the files under `folder` that match one of the globs `names`."""
    found = (path for name in names for path in sorted(folder.glob(name)))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}
