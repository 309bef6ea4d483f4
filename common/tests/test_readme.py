"""Facts about the house's README: what it tells a user to type works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.tests.children import ROOT

README = (ROOT / "README.md").read_text()


def blocks() -> list[str]:
    return re.findall(r"```\n(.*?)```", README, re.DOTALL)


def test_a_paper_is_carried_away_by_the_lines_that_say_so(tmp_path: Path) -> None:
    (lines,) = [block for block in blocks() if block.startswith("cp -r ")]
    folder = tmp_path / "code"
    folder.mkdir()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", "-ec", lines.replace("MYCODE", str(folder))],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "12 layers rescale their attention\n"), done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["common", "vit_antioversmooth"]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"make ([a-z-]+)", README))))
def test_every_target_of_make_that_is_named_exists(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    papers = re.search(r"^PAPERS := (.*)$", makefile, re.MULTILINE)
    assert papers is not None
    targets = {*re.findall(r"^([a-z-]+):", makefile, re.MULTILINE), *(f"reproduce-{p}" for p in papers[1].split())}
    assert name in targets


def test_every_file_that_a_line_names_exists() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    files = set(re.findall(r"\b[a-z_]+/(?:configs/)?[a-z_]+\.(?:py|yaml)", README)) | set(links)
    assert files and [name for name in sorted(files) if not (ROOT / name).exists()] == []
