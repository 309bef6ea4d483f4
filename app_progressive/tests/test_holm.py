"""Facts about Holm's correction of the verdicts, on p-values computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from app_progressive.claims import claims
from app_progressive.holm import judge_together, of_family, p_values
from app_progressive.settings import Config
from common.claims import Claim, holm


def two(p: float, mean: float = 1.0) -> list[float]:
    """Two values whose mean differs from 0 with this one-sided p: t has one degree of freedom, p = arctan(1/t) / pi."""
    half = math.tan(math.pi * p)
    return [mean * (1 - half), mean * (1 + half)]


def claim(name: str, values: list[float], **options: Any) -> Claim:
    return Claim(id=name, statement="", source="", paper="", measure=lambda rows: values, **options)


def verdicts(these: list[Claim]) -> dict[str, str]:
    return {found["id"]: found["verdict"] for found in judge_together(these, [])}


def test_p_values_grow_by_the_number_of_tests_left_and_never_fall() -> None:
    # .005 * 4, .01 * 3, .03 * 2; .04 * 1 would lie below the one before
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}, rel=1e-12
    )
    assert holm({"a": 0.4, "b": 0.6}) == {"a": 0.8, "b": 0.8} and holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert list(holm({"b": 0.2, "a": 0.1})) == ["b", "a"] and holm({}) == {}


def test_both_sides_are_tested_one_sided() -> None:
    above = claim("C1", [])
    assert p_values(above, two(0.02)) == pytest.approx({"held": 0.02, "not held": 0.98})
    assert p_values(above, two(0.02, -1)) == pytest.approx({"held": 0.98, "not held": 0.02})
    shifted = claim("C1", [], threshold=3.0)
    assert p_values(shifted, [value + 3 for value in two(0.02)])["held"] == pytest.approx(0.02)
    assert p_values(above, [0.5, 0.5]) == {"held": 0.0, "not held": 1.0}
    assert p_values(above, [0.0, 0.0]) == {"held": 1.0, "not held": 1.0}


def test_an_equivalence_is_as_sure_as_the_nearer_edge() -> None:
    same = claim("C1w", [], threshold=2.0, direction="equivalent")
    near = [
        value + 1 for value in two(0.1, -1)
    ]  # mean 0, tan(.1 pi) to either side: 2 / tan(.1 pi) errors from an edge
    outside = math.atan(math.tan(0.1 * math.pi) / 2) / math.pi
    assert p_values(same, near) == pytest.approx({"held": outside, "not held": 1 - outside})
    beyond = p_values(same, [value + 2 for value in two(0.03)])
    assert beyond["not held"] == pytest.approx(0.03) and beyond["held"] == pytest.approx(0.97)
    assert p_values(same, [-value for value in [value + 2 for value in two(0.03)]])["not held"] == pytest.approx(0.03)


def test_a_verdict_stands_where_its_corrected_p_is_below_the_level() -> None:
    # three tests: .01 * 3 = .03, .022 * 2 = .044, .03 * 1, which becomes .044
    strong = [claim("C1", two(0.03)), claim("C2a", two(0.01)), claim("C4b", two(0.022))]
    assert set(verdicts(strong).values()) == {"held"}
    # .02 * 3 = .06 stops all
    weak = [claim("C1", two(0.03)), claim("C2a", two(0.02)), claim("C4b", two(0.022))]
    assert set(verdicts(weak).values()) == {"inconclusive"}
    # .01 * 3 = .03 stands, .03 * 2 = .06 stops it and the rest
    mixed = [claim("C1", two(0.03)), claim("C2a", two(0.01)), claim("C4b", two(0.04))]
    assert verdicts(mixed) == {"C1": "inconclusive", "C2a": "held", "C4b": "inconclusive"}


def test_what_does_not_hold_is_corrected_too_and_no_verdict_is_added() -> None:
    these = [claim("C1", two(0.02, -1)), claim("C2a", two(0.01, -1)), claim("C3a", two(0.3)), claim("C3b", two(0.06))]
    # against: .01 * 4 = .04; .02 * 3 = .06
    assert verdicts(these) == {"C1": "inconclusive", "C2a": "not held", "C3a": "inconclusive", "C3b": "inconclusive"}


def test_other_claims_and_those_not_measured_count_nothing() -> None:
    these = [
        claim("C1", two(0.03)),
        claim("C2a", []),
        claim("C2b", [5.0]),
        claim("C7a", two(0.04)),
        claim("R1", [1, 1]),
    ]
    found = {each["id"]: each for each in judge_together(these, [])}
    assert found["C1"]["verdict"] == "held" and found["C1"]["holm"]["held"] == pytest.approx(0.03)
    assert found["C7a"]["verdict"] == "held" and not any("holm" in found[name] for name in ("C2a", "C2b", "C7a", "R1"))
    assert "Holm over C1 to C4" in found["C2a"]["rule"] and "Holm" not in found["C7a"]["rule"]


def test_the_family_is_all_that_is_numbered_one_to_four() -> None:
    members = [claim for claim in claims(Config()) if of_family(claim)]
    assert [claim.id for claim in members] == [
        "C1", "C1w", "C1s", "C2a", "C2b", "C2n1", "C2n2", "C3a", "C3b", "C3c", "C4a", "C4b", "C4c",
    ]  # fmt: skip
    assert {(claim.interval, claim.direction) for claim in members} == {("t", "above"), ("t", "equivalent")}


DEMO = Path(__file__).parents[1] / "results" / "demo.json"


@pytest.mark.skipif(not DEMO.exists(), reason="results are not carried away")
def test_the_measured_demo_has_the_verdicts_of_its_rows() -> None:
    there = json.loads(DEMO.read_text())
    these = claims(Config())
    again = judge_together(these, there["rows"])
    assert [(found["id"], found["verdict"]) for found in again] == [(c["id"], c["verdict"]) for c in there["claims"]]
