"""Facts about ratios, their targets, how they are timed, and the table of all benchmarks."""

import sys
from pathlib import Path

import pytest

from common import bench
from common.bench import Ratio, conclude, interleaved, main, ratio, table_of
from common.config import command


@pytest.mark.parametrize(
    ("found", "target", "verdict"),
    [
        (Ratio("a", 4.0, least=4.0), "≥ 4", "met"),
        (Ratio("a", 3.99, least=4.0), "≥ 4", "missed"),
        (Ratio("a", 1.1, most=1.1), "≤ 1.1", "met"),
        (Ratio("a", 1.11, most=1.1), "≤ 1.1", "missed"),
        (Ratio("a", float("nan"), least=0.0), "≥ 0", "missed"),
        (Ratio("a", 7.0), "", ""),
    ],
)
def test_a_ratio_is_met_at_its_target_and_missed_beyond(found: Ratio, target: str, verdict: str) -> None:
    assert (found.target, found.verdict) == (target, verdict)


def test_works_take_turns_and_the_first_call_of_each_is_not_timed() -> None:
    calls: list[str] = []
    ticks = iter(range(100))
    works = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = interleaved(works, 2, lambda: float(next(ticks)))
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert times == {"a": [1.0, 1.0], "b": [1.0, 1.0]} and next(ticks) == 8


def test_a_ratio_is_the_median_over_the_repeats_not_that_of_medians() -> None:
    """1/2, 9/3, 4/1: median 3; medians 4 and 2 would give 2."""
    assert ratio({"a": [1.0, 9.0, 4.0], "b": [2.0, 3.0, 1.0]}, "a", "b") == 3.0


def test_the_status_is_1_only_where_a_target_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    assert conclude([Ratio("shown", 0.5), Ratio("fast enough", 5.0, least=4.0)]) == 0
    assert conclude([Ratio("too slow", 2.0, most=1.0), Ratio("fast enough", 5.0, least=4.0)]) == 1
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("too slow", "≤ 1", "missed", "shown", "0.5"))


def script(folder: Path, name: str, body: str) -> Path:
    path = folder / "a_paper" / "benchmarks" / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"import sys\nfrom common.bench import Ratio, conclude\n{body}\n")
    return path


@pytest.mark.parametrize(
    ("body", "status", "row"),
    [
        ('sys.exit(conclude([Ratio("x", 4.25, least=4.0)]))', 0, "| a_paper/one | x | 4.25 | ≥ 4 | met |"),
        ('sys.exit(conclude([Ratio("x", 3.5, least=4.0)]))', 1, "| a_paper/one | x | 3.5 | ≥ 4 | missed |"),
        ("sys.exit(3)", 1, "| a_paper/one | ended without a ratio | | | failed |"),
        ("", 1, "| a_paper/one | ended without a ratio | | | failed |"),
    ],
)
def test_scripts_are_run_and_their_ratios_stand_in_one_table(
    body: str, status: int, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [script(tmp_path, "one", body), script(tmp_path, "two", 'sys.exit(conclude([Ratio("y", 1.0)]))')]
    page = tmp_path / "results" / "bench.md"
    monkeypatch.setattr(sys, "argv", ["bench", str(page), *map(str, paths)])
    monkeypatch.setenv("PYTHONPATH", str(Path(bench.__file__).parents[1]))
    assert main() == status
    assert page.read_text().splitlines()[-2:] == [row, "| a_paper/two | y | 1 |  |  |"]


def test_the_table_says_the_machine() -> None:
    assert "cores" in table_of({}) and "torch 2." in table_of({})


def test_without_scripts_one_line_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", str(tmp_path / "bench.md")])
    with pytest.raises(SystemExit) as ended:
        command(main)
    assert ended.value.code == 2 and "the paths of scripts" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
