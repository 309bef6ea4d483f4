"""Facts about the page of all results: what is in it, that it needs nothing else, and what it does in a browser."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common import house
from common.claims import Verdict
from common.config import command
from common.house import studies_of, write_page
from common.runs import write_json

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def judged(name: str, verdict: Verdict, estimate: float | None, **words: str) -> dict[str, Any]:
    known = {"id": name, "statement": f"statement of {name}", "source": "abstract", "paper": "+2", "rule": "> 0"}
    values = [] if estimate is None else [estimate] * 2
    numbers = {"values": values, "estimate": estimate, "low": estimate, "high": estimate}
    return {**known, "unit": "points", **numbers, "verdict": verdict, **words}


def stored(root: Path, paper: str, scale: str, claims: list[dict[str, Any]]) -> Path:
    facts = {"machine": {"cpu": "a CPU", "cores": 2}, "versions": {"torch": "2.14.1"}, "revision": "abc", "seconds": 90}
    results = {"paper": paper, "scale": scale, "date": "2026-11-27 10:00", "rows": [{}], "claims": claims, **facts}
    path = root / paper / "results" / f"{scale}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    return path


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Results of two papers, one of them with a title, a figure and a second scale."""
    numbers = [judged("A1", "held", 10.0), judged("A2", "not held", -2.0), judged("A3", "inconclusive", 9.0)]
    found = [
        stored(tmp_path, "pruning", "cifar", [judged("A1", "inconclusive", None)]),
        stored(tmp_path, "pruning", "demo", numbers),
        stored(tmp_path, "another", "demo", [judged("B1", "held", 1.0)]),
    ]
    (tmp_path / "pruning" / "README.md").write_text("# pruning\n\n*Pruning\nhelps.* Somebody, 2022; *not this*.\n")
    (tmp_path / "pruning" / "results" / "demo-curves.png").write_bytes(b"a picture")
    return found


def written(paths: list[Path]) -> str:
    page = paths[0].parents[2] / "report.html"
    write_page(page, studies_of(paths))
    return page.read_text()


def test_studies_stand_by_paper_with_the_demo_first_and_their_verdicts_counted(paths: list[Path]) -> None:
    text = written(paths)
    assert re.findall(r'<section id="([^"]+)"', text) == ["another-demo", "pruning-demo", "pruning-cifar"]
    row = re.search(r'<a href="#pruning-demo">.*?</tr>', text, re.DOTALL)
    words = " ".join(re.sub(r"<[^>]*>", " ", row[0]).split()) if row else ""
    assert words == "pruning, demo Pruning helps. 1 1 1 1.5 2026-11-27"


def test_a_figure_is_inside_the_page_and_nothing_is_fetched(paths: list[Path]) -> None:
    text = written(paths)
    assert 'src="data:image/png;base64,YSBwaWN0dXJl"' in text
    targets = re.findall(r"""(?:src|href|action)=["']?([^"'\s>]+)|url\(([^)]*)\)|@import""", text)
    assert all(target[0].startswith(("data:", "#")) for target in targets) and "http" not in text


def test_words_of_results_are_text_and_never_markup(tmp_path: Path) -> None:
    hostile = judged('"><b>', "held", 1.0, statement="<script>alert(1)</script>", paper="</table>")
    text = written([stored(tmp_path, "pruning", "demo", [hostile])])
    assert text.count("<script>") == 1 and "&lt;script&gt;alert(1)" in text
    assert text.count("</table>") == 2 and "<b>" not in text


def test_the_command_prints_one_line_a_study_and_the_sums(
    paths: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = paths[0].parents[2] / "report.html"
    monkeypatch.setattr(sys, "argv", ["house", str(page), *map(str, paths)])
    assert house.main() == 0 and page.exists()
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert lines == [
        ["another", "demo", "1", "0", "0", "1.5", "2026-11-27"],
        ["pruning", "demo", "1", "1", "1", "1.5", "2026-11-27"],
        ["pruning", "cifar", "0", "0", "1", "1.5", "2026-11-27"],
        ["all", "", "2", "1", "2", "4.5", ""],
    ]
    assert out.splitlines()[-1].endswith("report.html")


def test_a_paper_without_readme_has_no_title(paths: list[Path]) -> None:
    assert house.title(paths[2].parents[1]) == ""


def test_damaged_results_end_in_one_line_and_leave_the_page_before(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = written(paths)
    page = paths[0].parents[2] / "report.html"
    paths[0].write_text("{")
    monkeypatch.setattr(sys, "argv", ["house", str(page), *map(str, paths)])
    with pytest.raises(SystemExit) as ended:
        command(house.main)
    error = capsys.readouterr().err
    assert ended.value.code in (1, 2) and error.startswith(f"error: {paths[0]}: ") and error.count("\n") == 1
    assert page.read_text() == text


# In a browser


def shown(paths: list[Path], actions: str) -> str:
    """The claims to be seen in headless Chromium after some `actions` in JavaScript, and the count beside them."""
    if CHROMIUM is None:
        pytest.skip("headless Chromium is missing (Debian package chromium): the page was not tried in a browser")
    page = paths[0].parents[2] / "tried.html"
    seen = """
    const visible = [...document.querySelectorAll(".claims tbody tr")].filter(row => row.offsetParent)
    const ids = visible.map(row => row.cells[0].textContent)
    document.title = "seen: " + ids.join(" ") + "; " + document.querySelector("output").textContent
    """
    helpers = """
    const press = selector => document.querySelector(selector).click()
    const type = words => { const box = document.querySelector("[type=search]"); box.value = words
                            box.dispatchEvent(new Event("input", { bubbles: true })) }
    """
    page.write_text(written(paths).replace("</html>", f"<script>{helpers}{actions};{seen}</script></html>"))
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent}/browser"]
    browser += ["--disable-dev-shm-usage", "--dump-dom", page.as_uri()]
    done = subprocess.run(browser, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>seen: (.*?)</title>", done.stdout)
    assert found, done.stderr
    return found[1]


def test_at_first_every_claim_is_seen(paths: list[Path]) -> None:
    assert shown(paths, "") == "B1 A1 A2 A3 A1; 5 of 5 claims"


def test_claims_are_filtered_by_verdict_and_by_words_of_claim_and_paper(paths: list[Path]) -> None:
    assert shown(paths, "press('[value=held]')") == "A2 A3 A1; 3 of 5 claims"
    assert shown(paths, "type('Pruning a1 statement')") == "A1 A1; 2 of 5 claims"
    assert shown(paths, "press('[value=held]'); type('a1'); press('[value=held]')") == "A1 A1; 2 of 5 claims"


def test_a_table_is_sorted_by_value_of_the_column_whose_header_is_pressed(paths: list[Path]) -> None:
    header = "press('#pruning-demo th:nth-child(4) button')"
    assert shown(paths, header) == "B1 A2 A3 A1 A1; 5 of 5 claims"
    assert shown(paths, f"{header}; {header}") == "B1 A1 A3 A2 A1; 5 of 5 claims"
