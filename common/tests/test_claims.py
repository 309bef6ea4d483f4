"""Facts about verdicts, by hand and from textbook tables, and about the reports that carry them."""

from __future__ import annotations

import html.parser
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from common import claims
from common.claims import (
    Claim,
    Metrics,
    Rows,
    bounds,
    by_seed,
    difference,
    each,
    judge,
    main,
    measured,
    print_table,
    report,
    verdict,
    write_report,
)
from common.config import command
from common.study import StudyResult

INF = math.inf


def claim(values: Sequence[float] = (), **options: Any) -> Claim:
    words = {"id": "C1", "statement": "Pruning helps", "source": "abstract", "paper": "+24.5 points"}
    return Claim(measure=lambda rows: values, **{**words, **options})


def of(values: Sequence[float], **options: Any) -> str:
    return verdict(claim(**options), values)


# Bounds: values by hand


def test_t_bounds_are_mean_plus_minus_the_one_sided_quantile_times_the_standard_error() -> None:
    """1, 2, 3, 6: mean 3, standard deviation sqrt(14/3), and t(0.95; 3) = 2.353363 in every table."""
    estimate, low, high = bounds([1, 2, 3, 6], "t")
    half = 2.353363 * math.sqrt(14 / 3) / 2
    assert estimate == 3
    assert (low, high) == pytest.approx((3 - half, 3 + half), abs=1e-5)


def test_t_bounds_of_two_seeds_use_the_quantile_6_31() -> None:
    """1 and 3: mean 2, standard error 1, t(0.95; 1) = tan(0.45 pi) = 6.313752."""
    assert bounds([1, 3], "t") == pytest.approx((2, 2 - 6.313752, 2 + 6.313752), abs=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("interval", ["t", "bootstrap"])
def test_values_equal_but_for_rounding_say_nothing_of_their_spread(interval: str) -> None:
    for values in ([2] * 20, [0.0] * 20, [0.1, 0.1 + 1e-16] * 15, [0.0, 1e-14] * 10):
        assert bounds(values, interval)[1:] == (-INF, INF)


@pytest.mark.parametrize("interval", ["t", "sign", "binomial", "bootstrap", "worst"])
def test_one_seed_has_no_bounds(interval: str) -> None:
    assert bounds([1], interval) == (1, -INF, INF)


def test_four_seeds_are_too_few_for_a_sign_test_and_five_are_enough() -> None:
    """All of five beyond the median by chance: (1/2)^5 = 1/32 < 5 %; all of four: 1/16 > 5 %."""
    assert bounds([3, 1, 2, 4], "sign") == (2.5, -INF, INF)
    assert bounds([3, 1, 2, 9, 4], "sign") == (3, 1, 9)


def test_sign_bounds_of_eight_leave_out_one_value_on_each_side() -> None:
    """P(at most 1 of 8) = 9/256 < 5 % < P(at most 2 of 8) = 37/256: the bounds are the second and the seventh."""
    assert bounds([8, 1, 7, 2, 6, 3, 5, 4], "sign") == (4.5, 2, 7)


def test_binomial_bounds_of_nine_in_ten_are_those_of_clopper_and_pearson() -> None:
    """low solves P(X >= 9) = 10 p^9 (1 - p) + p^10 = 5 %, high solves P(X <= 9) = 1 - p^10 = 5 %."""
    estimate, low, high = bounds([1] * 9 + [0], "binomial")
    assert estimate == 0.9
    assert 10 * low**9 * (1 - low) + low**10 == pytest.approx(0.05, abs=1e-9)
    assert high == pytest.approx(0.95**0.1, abs=1e-9)


def test_binomial_bounds_of_ten_in_ten_are_the_tenth_root_and_one() -> None:
    assert bounds([1] * 10, "binomial") == pytest.approx((1, 0.05**0.1, 1))


def test_bootstrap_bounds_are_the_same_every_time_and_lie_within_the_values() -> None:
    values = [1, 2, 3, 6, 8] * 4
    first = bounds(values, "bootstrap")
    assert first == bounds(values, "bootstrap")
    assert first[0] == 4 and 1 < first[1] < 4 < first[2] < 8
    assert bounds(values[:19], "bootstrap")[1:] == (-INF, INF)


def test_bootstrap_bounds_of_many_values_come_near_the_normal_ones() -> None:
    values = [float(number % 2) for number in range(400)]  # standard error 0.025
    assert bounds(values, "bootstrap")[1:] == pytest.approx((0.5 - 1.645 * 0.025, 0.5 + 1.645 * 0.025), abs=0.005)


def test_the_worst_seed_is_the_least_above_and_the_greatest_below() -> None:
    assert bounds([1, 2, 6], "worst", "above") == (3, 1, 1)
    assert bounds([1, 2, 6], "worst", "below") == (3, 6, 6)
    assert bounds([1, 2, 6], "worst", "equivalent") == (3, 1, 6)


# Verdicts. 1, 2, 3, 6 has the t bounds 0.458 and 5.542.

SAMPLE = [1, 2, 3, 6]


@pytest.mark.parametrize(
    ("direction", "threshold", "expected"),
    [
        ("above", 0.45, "held"),
        ("above", 0.46, "inconclusive"),
        ("above", 5.54, "inconclusive"),
        ("above", 5.55, "not held"),
        ("below", 5.55, "held"),
        ("below", 5.54, "inconclusive"),
        ("below", 0.46, "inconclusive"),
        ("below", 0.45, "not held"),
        ("equivalent", 5.55, "held"),
        ("equivalent", 5.54, "inconclusive"),
        ("equivalent", 0.46, "inconclusive"),
        ("equivalent", 0.45, "not held"),
    ],
)
def test_a_verdict_needs_the_bound_on_one_side_of_the_threshold(
    direction: str, threshold: float, expected: str
) -> None:
    assert of(SAMPLE, direction=direction, threshold=threshold) == expected


@pytest.mark.parametrize(("threshold", "expected"), [(5.55, "held"), (0.46, "inconclusive"), (0.45, "not held")])
def test_equivalence_looks_at_both_sides_of_zero(threshold: float, expected: str) -> None:
    assert of([-value for value in SAMPLE], direction="equivalent", threshold=threshold) == expected


@pytest.mark.parametrize("direction", ["above", "below", "equivalent"])
@pytest.mark.parametrize("values", [[], [100.0], [0.0]])
def test_no_seed_and_one_seed_are_inconclusive(values: list[float], direction: str) -> None:
    assert of(values, direction=direction) == "inconclusive"


@pytest.mark.parametrize("direction", ["above", "below", "equivalent"])
@pytest.mark.parametrize("value", [-1, 0, 1])
def test_equal_values_decide_nothing_but_worst_cases(direction: str, value: float) -> None:
    assert of([value] * 3, direction=direction, threshold=2) == "inconclusive"
    assert of([value] * 3, direction=direction, threshold=2, interval="worst") != "inconclusive"


@pytest.mark.parametrize(
    ("least", "expected"), [(2.9, "held"), (3, "held"), (3.1, "inconclusive"), (5.6, "not held")]
)  # the estimate is 3, the upper bound 5.542
def test_at_least_asks_it_of_the_estimate_too(least: float, expected: str) -> None:
    assert of(SAMPLE, at_least=least) == expected


def test_five_seeds_on_one_side_hold_by_sign_and_four_do_not() -> None:
    assert of([1, 2, 3, 4, 5], interval="sign") == "held"
    assert of([1, 2, 3, 4], interval="sign") == "inconclusive"
    assert of([-1, 2, 3, 4, 5], interval="sign") == "inconclusive"
    assert of([-1, -2, -3, -4, -5], interval="sign") == "not held"


def test_nine_of_ten_hold_against_one_half_but_six_of_ten_do_not() -> None:
    assert of([1] * 9 + [0], interval="binomial", threshold=0.5) == "held"
    assert of([1] * 6 + [0] * 4, interval="binomial", threshold=0.5) == "inconclusive"
    assert of([0] * 10, interval="binomial", threshold=0.5) == "not held"


def test_one_bad_seed_decides_the_worst_case() -> None:
    assert of([1, 1, 1], interval="worst", threshold=0.5) == "held"
    assert of([1, 0, 1], interval="worst", threshold=0.5) == "not held"
    assert of([1, 9], interval="worst", threshold=5, direction="below") == "not held"
    assert of([1, 4], interval="worst", threshold=5, direction="below") == "held"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "> 0 (t, 95 %)"),
        ({"direction": "below", "threshold": -0.5}, "< -0.5 (t, 95 %)"),
        ({"direction": "equivalent", "threshold": 1, "interval": "sign"}, "within ±1 (sign, 95 %)"),
        ({"at_least": 5, "interval": "worst"}, "> 0 (worst), estimate ≥ 5"),
    ],
)
def test_the_rule_says_the_test_in_words(options: dict[str, Any], words: str) -> None:
    assert claim(**options).rule == words


# Judging rows


def rows(*accuracies: float) -> list[dict[str, Any]]:
    return [{"cell": {}, "seed": seed, "metrics": {"accuracy": value}} for seed, value in enumerate(accuracies)]


def test_a_claim_is_judged_on_what_it_measures_in_the_rows() -> None:
    gain = Claim("C1", "s", "abstract", "p", measure=lambda found: [row["metrics"]["accuracy"] for row in found])
    (judged,) = judge([gain], rows(1, 2, 3, 6))
    assert (judged["values"], judged["estimate"], judged["verdict"]) == ([1, 2, 3, 6], 3, "held")
    assert (judged["low"], judged["high"]) == pytest.approx((0.4581, 5.5419), abs=1e-4)
    assert {key: judged[key] for key in ("id", "source", "unit", "rule")} == {
        "id": "C1", "source": "abstract", "unit": "points", "rule": "> 0 (t, 95 %)",
    }  # fmt: skip


def absent(found: Rows) -> list[float]:
    return [row["metrics"]["robustness"] for row in found]


@pytest.mark.parametrize("measure", [absent, lambda _: [], lambda _: [1, math.nan, 3], lambda _: [1, INF]])
def test_absent_and_not_finite_measures_are_inconclusive_and_without_numbers(measure: Any) -> None:
    (judged,) = judge([Claim("C1", "s", "abstract", "p", measure=measure)], rows(1, 2))
    assert [judged[key] for key in ("values", "estimate", "low", "high")] == [[], None, None, None]
    assert (judged["verdict"], measured(judged)) == ("inconclusive", "not measured")


def test_a_judged_number_is_written_with_bounds_unit_and_count() -> None:
    (judged,) = judge([claim(SAMPLE)], [])
    assert measured(judged) == "3.00 [0.46, 5.54] points, n=4"


def test_bounds_that_are_not_there_are_written_as_infinite() -> None:
    (judged,) = judge([claim([1])], [])
    assert (judged["low"], judged["high"]) == (None, None)
    assert measured(judged) == "1.00 [-∞, ∞] points, n=1"


# The report

HOSTILE = '<script>alert("|")</script> [bold]a|b[/bold] [/] [one-sided]'
PNG = b"\x89PNG not really"


def results(**changes: Any) -> dict[str, Any]:
    samples = {"C1": SAMPLE, "C2": [-1, -1.1], "C3": [1]}
    judged = judge([claim(values, id=name) for name, values in samples.items()], rows(1, 2))
    facts = {"machine": {"cpu": "a cpu", "cores": 2, "gpus": []}, "versions": {"torch": "2"}, "revision": "abc"}
    run = {"paper": "a_paper", "scale": "demo", "date": "today", "seconds": 90.0, "rows": rows(1, 2)}
    return {**facts, **run, "claims": judged, **changes}


def hostile() -> dict[str, Any]:
    judged = judge([claim(SAMPLE, id="C<1>", statement=HOSTILE, paper=HOSTILE, unit="a|b")], [])
    row = {"cell": {"method": HOSTILE}, "seed": 0, "metrics": {}}
    return results(paper="<b>", claims=judged, rows=[row])


class Page(html.parser.HTMLParser):
    """Tags, addresses and cells of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.classes: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag == "td":
            self.cells.append("")
            self.classes += [value or "" for name, value in attrs if name == "class"]

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def no_constants(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_the_json_is_strict_and_holds_all_that_was_given(tmp_path: Path) -> None:
    write_report(results(), {}, tmp_path)
    stored = json.loads((tmp_path / "demo.json").read_text(), parse_constant=no_constants)
    assert stored == json.loads(json.dumps(results()))


def test_the_markdown_table_has_one_row_a_claim_with_all_columns(tmp_path: Path) -> None:
    write_report(results(), {}, tmp_path)
    table = [line for line in (tmp_path / "demo.md").read_text().splitlines() if line.startswith("|")]
    assert [line.count("|") for line in table] == [7] * 5
    assert [line.split(" | ")[0] for line in table[2:]] == ["| C1", "| C2", "| C3"]
    assert [line.split(" | ")[-1] for line in table[2:]] == ["held |", "not held |", "inconclusive |"]


def test_pipes_in_the_markdown_table_are_escaped(tmp_path: Path) -> None:
    write_report(hostile(), {}, tmp_path)
    (line,) = [line for line in (tmp_path / "demo.md").read_text().splitlines() if line.startswith("| C<1>")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 7
    assert line.count(r"\|") == 5


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    path = write_report(results(), {"levels": PNG, "cloud": PNG}, tmp_path)
    text = path.read_text()
    page = Page(text)
    assert path == tmp_path / "demo.html"
    assert len(page.links) == 2 and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "http" not in text and "@import" not in text


def test_the_page_has_a_row_a_claim_with_its_verdict(tmp_path: Path) -> None:
    page = Page(write_report(results(), {}, tmp_path).read_text())
    assert page.classes == ["held", "not held", "inconclusive"]
    assert page.cells[0::6] == ["C1", "C2", "C3"]
    assert page.cells[5].strip() == "held" and page.cells[3] == "3.00 [0.46, 5.54] points, n=4"


def test_hostile_text_stays_text_in_the_page(tmp_path: Path) -> None:
    text = write_report(hostile(), {"<img>": PNG}, tmp_path).read_text()
    page = Page(text)
    assert "script" not in page.tags and "bold" not in page.tags and "b" not in page.tags
    assert page.tags.count("img") == 1 and page.cells[1] == HOSTILE


def test_figures_stand_beside_the_markdown_that_shows_them(tmp_path: Path) -> None:
    write_report(results(), {"levels": PNG}, tmp_path)
    assert (tmp_path / "demo-levels.png").read_bytes() == PNG
    assert "![levels](demo-levels.png)" in (tmp_path / "demo.md").read_text()


def test_the_terminal_table_shows_every_claim_and_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(results())
    shown = re.sub(r"\s*[│┃]\s*", " ", capsys.readouterr().out)
    for word in ("a_paper, demo scale", "C1", "C3", "3.00 [0.46, 5.54] points, n=4", "not held", "inconclusive"):
        assert word in shown
    assert "[one-sided 95 % bounds]" in re.sub(r"\s+", " ", shown)


def test_square_brackets_are_shown_in_the_terminal_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(hostile())
    shown = "".join(re.split(r"[\s│]+", capsys.readouterr().out))
    assert "[bold]a|b[/bold][/][one-sided]" in shown


def studied(tmp_path: Path, failed: dict[str, Path], found: Rows) -> StudyResult:
    return StudyResult("demo", list(found), failed, 90.0, ["abc", "def"])  # type: ignore[arg-type]


def draw(found: Rows) -> dict[str, Figure]:
    figure = Figure()
    figure.subplots().plot([row["seed"] for row in found])
    return {"seeds": figure, "again": figure}


def test_a_study_without_failures_reports_with_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = report("a_paper", studied(tmp_path, {}, rows(1, 2)), [claim(SAMPLE)], draw, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["demo-again.png", "demo-seeds.png", "demo.html", "demo.json", "demo.md"]
    assert (tmp_path / "demo-seeds.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (status, capsys.readouterr().out.splitlines()[-1]) == (
        0,
        f"2 rows in 1.5 minutes; the report: {tmp_path}/demo.html",
    )
    stored = json.loads((tmp_path / "demo.json").read_text())
    keys = {"paper", "scale", "machine", "versions", "revision", "date", "seconds", "rows", "failed", "claims"}
    assert set(stored) == keys and stored["failed"] == [] and stored["rows"] == rows(1, 2)
    assert stored["revision"] == "abc, def"  # where the rows come from, not where they are reported


def test_failed_cells_are_listed_with_the_last_word_of_their_logs_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, empty = tmp_path / "a.log", tmp_path / "b.log"
    log.write_text("Traceback\nValueError: broken\n")
    status = report("a_paper", studied(tmp_path, {"a": log, "b": empty}, []), [claim()], draw, tmp_path / "results")
    assert status == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"failed: a: ValueError: broken (log: {log})",
        f"failed: b: died without a word (log: {empty})",
    ]
    assert not (tmp_path / "results").exists()


def test_a_report_names_the_cells_that_it_lacks(tmp_path: Path) -> None:
    report("a_paper", studied(tmp_path, {"b": tmp_path / "b.log"}, rows(1, 2)), [claim(SAMPLE)], draw, tmp_path)
    assert json.loads((tmp_path / "demo.json").read_text())["failed"] == ["b"]
    for name in ("demo.md", "demo.html"):
        assert "Failed, and in no number below: b." in (tmp_path / name).read_text()


def test_results_stay_where_a_study_has_no_rows_and_old_figures_go_with_new_ones(tmp_path: Path) -> None:
    report("a_paper", studied(tmp_path, {}, rows(1, 2)), [claim(SAMPLE)], draw, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    report("a_paper", studied(tmp_path, {"a": tmp_path / "a.log"}, []), [claim(SAMPLE)], draw, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "demo_2-again.png").write_bytes(b"of another scale")
    report("a_paper", studied(tmp_path, {}, rows(1, 2)), [claim(SAMPLE)], lambda found: {"seeds": Figure()}, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["demo-seeds.png", "demo_2-again.png"]


@pytest.mark.parametrize(
    ("interval", "values", "shown"),
    [
        ("t", [0.0031, 0.0033, 0.0032], "0.0032 [0.003, 0.0034] points, n=3"),
        ("worst", [0.5, 2.0], "1.25, worst 0.50 points, n=2"),
        ("worst", [0.5], "0.50 [-∞, ∞] points, n=1"),
    ],
)
def test_numbers_are_shown_as_finely_as_they_are_decided(interval: Any, values: list[float], shown: str) -> None:
    (judged,) = judge([claim(values, interval=interval)], [])
    assert measured(judged) == shown


def test_a_study_may_be_judged_in_another_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def strict(claims: Sequence[Claim], found: Rows) -> list[dict[str, Any]]:
        assert len(found) == 2
        return [{**judged, "verdict": "not held"} for judged in judge(claims, found)]

    report("a_paper", studied(tmp_path, {}, rows(1, 2)), [claim(SAMPLE)], draw, tmp_path, strict)
    assert [judged["verdict"] for judged in json.loads((tmp_path / "demo.json").read_text())["claims"]] == ["not held"]
    assert "not held" in capsys.readouterr().out


def test_a_report_is_written_again_from_its_results_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report("a_paper", studied(tmp_path, {}, rows(1, 2)), [claim(SAMPLE)], draw, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("demo.md", "demo.html"):
        (tmp_path / name).unlink()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["claims", str(tmp_path / "demo.json")])
    assert main() == 0
    assert capsys.readouterr().out == f"{tmp_path}/demo.html\n"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", [None, "{"])
def test_results_that_are_not_there_or_damaged_end_in_one_line(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "demo.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["claims", str(path)])
    with pytest.raises(SystemExit) as ended:
        command(claims.main)
    err = capsys.readouterr().err
    assert ended.value.code in (1, 2) and err.startswith(f"error: {path}: ") and err.count("\n") == 1


# Measures of arms


ARMS = [
    {"cell": {"arm": arm, "density": density}, "seed": seed, "metrics": {"accuracy": accuracy}}
    for arm, density, seed, accuracy in (
        ("dense", 1.0, 3, 90.0),
        ("dense", 1.0, 4, 91.0),
        ("sparse", 0.1, 4, 95.0),
        ("sparse", 0.1, 5, 70.0),
        ("sparse", 0.2, 4, 99.0),
    )
]


def accuracy(metrics: Metrics) -> float:
    return float(metrics["accuracy"])


def test_an_arm_is_found_by_its_name_or_by_what_its_cells_hold() -> None:
    assert by_seed(ARMS, "dense") == {3: {"accuracy": 90.0}, 4: {"accuracy": 91.0}}
    assert by_seed(ARMS, {"arm": "sparse", "density": 0.2}) == {4: {"accuracy": 99.0}}
    assert each({"density": 0.1}, accuracy)(ARMS) == [95.0, 70.0]


def test_differences_are_of_the_seeds_that_both_arms_have() -> None:
    assert difference({"arm": "sparse", "density": 0.1}, "dense", accuracy)(ARMS) == [4.0]


@pytest.mark.parametrize("arm", ["sparser", {"arm": "dense", "density": 0.1}, {"method": "dense"}])
def test_an_arm_without_rows_is_a_key_error(arm: str | dict[str, Any]) -> None:
    with pytest.raises(KeyError, match="no rows of"):
        by_seed(ARMS, arm)
