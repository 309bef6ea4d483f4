"""Each paper must work with nothing but common/ beside it: python common/tests/carry_away.py PAPER ...

Copies PAPER/ and common/ to an empty folder and runs the paper's tests and its README's example there, a paper a core.
No process of theirs, however deep, can import from this tree: a `sitecustomize` in that folder takes the editable
install out of every interpreter's way and notes modules that come from here all the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITECUSTOMIZE = """
import atexit, os, sys

def is_stray(path, root=os.environ["CARRY_AWAY_ROOT"] + os.sep, packages=sys.prefix + os.sep):
    path = os.path.realpath(path or root) + os.sep
    return path.startswith(root) and not path.startswith(packages)

def note_strays():
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())} - {None}
    with open(os.environ["CARRY_AWAY_STRAYS"], "a") as strays:
        strays.writelines(f"{path}\\n" for path in sorted(files) if is_stray(path))

sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
sys.path[:] = [path for path in sys.path if path and not is_stray(path) and "__editable__" not in path]
atexit.register(note_strays)
"""


def wait_for_group(group: int, seconds: float = 10) -> None:
    """Until the last process of `group` has ended and noted its strays: fork servers outlive the tests by a moment."""
    end = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.05)


def example(readme: Path) -> str:
    """The first block of Python."""
    found = re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    if found is None:
        raise ValueError(f"{readme}: has no example")
    return found[1]


def carry_away(paper: str) -> tuple[bool, str]:
    """Whether `paper` works in an empty folder, and what its tests said or why not."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        away = Path(place) / "away"
        for name in (paper, "common"):
            shutil.copytree(ROOT / name, away / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        (away / "sitecustomize.py").write_text(SITECUSTOMIZE)
        strays = Path(place) / "strays"
        strays.touch()
        told = {"PYTHONPATH": str(away), "CARRY_AWAY_ROOT": str(ROOT), "CARRY_AWAY_STRAYS": str(strays)}
        options = ["-x", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", str(away)]
        commands = {
            "its README's example fails": ["-c", example(away / paper / "README.md")],
            "its tests fail": ["-m", "pytest", *options, str(away / paper)],
        }
        for complaint, command in commands.items():
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=away,
                env={**os.environ, "OMP_NUM_THREADS": "1", **told},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            said, _ = process.communicate()
            wait_for_group(process.pid)
            if process.returncode:
                return False, f"{complaint} there:\n{said}"
        if found := sorted(set(strays.read_text().split())):
            return False, f"it imports from {ROOT}: {', '.join(found)}"
        return True, f"works on its own: {said.strip().splitlines()[-1]}"


def main() -> int:
    """One line a paper; 1 if one fails, 2 if there is no such paper."""
    papers = sys.argv[1:]
    for paper in papers:
        if not (ROOT / paper / "tests").is_dir():
            print(f"error: {paper}: no such paper in {ROOT}", file=sys.stderr)
            return 2
    status = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for paper, (works, told) in zip(papers, pool.map(carry_away, papers), strict=True):
            print(f"{paper}: {told}", flush=True)
            status = status if works else 1
    return status


if __name__ == "__main__":
    sys.exit(main())
