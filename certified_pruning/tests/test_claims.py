"""Facts about the claims: what each measures on a small table worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from certified_pruning.claims import best_sparse, certified_ticket, claims, ticket_level
from certified_pruning.figures import draw
from common.claims import judge
from common.tests.paper_checks import varied


def row(
    seed: int, method: str, number: int, verified: float, val: float, regime: str = "fgsm", **metrics: float
) -> dict[str, Any]:
    standard = {
        "test_accuracy": 97.0,
        "val_accuracy": 97.0,
        "unstable": 0.5 - verified / 1000,
        "nodes": 1000 - 10 * verified,
        "gap_1": 0.1,
    }
    of_test, of_val = ({name: float(x) for name in ("verified", "ibp_verified")} for x in (verified, val))
    values = {**of_test, **{f"val_{name}": x for name, x in of_val.items()}, **standard}
    cell = {"regime": regime, "method": method, "round": number, "density": 0.5**number}
    return {"cell": cell, "seed": seed, "metrics": {**values, **metrics}}


def table() -> list[dict[str, Any]]:
    rows = []
    for seed, shift in ((0, 0.0), (1, 1.0), (2, -1.0)):
        rows += [row(seed, "imp", 0, 50, 40), row(seed, "imp", 1, 60 + shift, 55), row(seed, "imp", 2, 70, 45)]
        rows += [row(seed, "imp+nrs", 0, 52, 41), row(seed, "imp+nrs", 1, 64 + 2 * shift, 60)]
        rows += [row(seed, "imp+nrs", 2, 72, 59)]
        rows += [row(seed, "random", 1, 62, 58), row(seed, "slim", 1, 50 + 9 * shift, 30)]
        rows += [row(seed, "imp", 0, 30, 9, "standard"), row(seed, "imp", 1, 28 + shift, 9, "standard")]
        rows += [row(seed, "imp", 0, 70, 9, "crown_ibp"), row(seed, "imp", 1, 75 + shift, 9, "crown_ibp")]
    return rows


def judged() -> dict[str, dict[str, Any]]:
    return {claim["id"]: claim for claim in judge(claims(100), varied(table()))}


@pytest.mark.parametrize(
    ("claim", "values", "verdict"),
    [
        ("C1", [14, 16, 12], "held"),  # IMP+NRS, round 1, is best on validation, and not round 2 of test
        ("C2", [-2, -1, -3], "not held"),
        ("C3", [0.75, 0.75, 0.75], "held"),  # all but slim, whose gains 0, 9, -9 bound nothing
        ("C4a", [3, 3.5, 2.5], "held"),
        ("C4b", [2, 4, 0], "inconclusive"),  # random, chosen on validation too, verifies 62
        ("C6a", [-0.014, -0.016, -0.012], "held"),
        ("C6b", [-140, -160, -120], "held"),
        ("C7", [5, 6, 4], "held"),
    ],
)
def test_claims_measure_what_they_say(claim: str, values: list[float], verdict: str) -> None:
    found = judged()[claim]
    assert found["values"] == pytest.approx(values, abs=0.01)
    assert found["verdict"] == verdict


def test_correlations_are_judged_where_they_are_normal() -> None:
    rows = []
    for seed, verified in enumerate(([1, 2, 3, 4, 5], [1, 2, 3, 5, 4], [2, 1, 3, 5, 4])):
        rows += [row(seed, "imp", n, value, 1, unstable=1 - n / 10) for n, value in enumerate(verified)]
    (claim,) = [claim for claim in claims(None) if claim.id == "C6c"]
    (found,) = judge([claim], rows)
    assert found["values"][1:] == pytest.approx([math.atanh(-0.9), math.atanh(-0.8)])
    assert found["high"] > found["estimate"] and found["rule"].startswith("< -0.549306 (t, 95 %)")


def set_metrics(rows: list[dict[str, Any]], seed: int, number: int, **metrics: float) -> None:
    """Change the metrics of one round of IMP under FGSM."""
    for each in rows:
        if each["seed"] == seed and each["cell"] == row(seed, "imp", number, 0, 0)["cell"]:
            each["metrics"] |= metrics


def test_a_ticket_is_the_sparsest_that_matches_on_validation_and_must_hold_on_test_in_every_seed() -> None:
    assert judged()["C5"]["verdict"] == "held"
    rows = table()
    assert ticket_level(rows) == 0.25
    set_metrics(rows, 1, 2, val_verified=39.0)  # dense: 40
    assert ticket_level(rows) == 0.5 and certified_ticket(rows) == [1, 1, 1]
    set_metrics(rows, 2, 1, verified=49.0)  # round 2 matches on test in all seeds still, which chooses nothing
    assert {claim["id"]: claim for claim in judge(claims(100), rows)}["C5"]["values"] == [1, 1, 0]


def test_a_ticket_may_lose_a_point_of_clean_accuracy_or_in_the_strict_sense_none() -> None:
    rows = table()
    for seed in range(3):
        set_metrics(rows, seed, 2, val_accuracy=96.0, test_accuracy=96.0)
    assert (ticket_level(rows), ticket_level(rows, 0.0)) == (0.25, 0.5)
    set_metrics(rows, 0, 1, test_accuracy=96.5)
    assert certified_ticket(rows, 1.0) == [1, 1, 1] and certified_ticket(rows, 0.0) == [0, 1, 1]


def test_of_two_adversarial_regimes_the_claims_judge_the_first() -> None:
    more = [row(seed, "imp", number, 99 * number, 0, "fgsm_gradalign") for seed in range(3) for number in range(2)]
    assert judge(claims(100), [*more, *table()]) == judge(claims(100), table())


def test_levels_are_chosen_on_validation_and_of_equals_the_sparsest() -> None:
    rows = [row(0, "imp", 1, 90, 10), row(0, "imp", 2, 20, 30), row(0, "imp", 3, 10, 30)]
    assert best_sparse(rows)["cell"]["round"] == 3


def test_pruners_of_which_too_little_is_known_do_not_fail_to_help() -> None:
    def c3(*gains: tuple[float, float, float]) -> tuple[list[float], str]:
        found = [row(seed, "imp", 0, 50, 40) for seed in range(3)]
        for number, of_method in enumerate(gains):
            name = f"p{number}" if number else "imp"
            found += [row(seed, name, 1, 50 + gain, 9) for seed, gain in enumerate(of_method)]
        (claim,) = (claim for claim in judge(claims(100), varied(found)) if claim["id"] == "C3")
        return claim["values"], claim["verdict"]

    helps, unknown, harms = (9.0, 10.0, 11.0), (2.0, 20.0, 9.0), (-9.0, -10.0, -11.0)
    assert c3(helps, helps, harms) == ([pytest.approx(2 / 3)] * 3, "held")
    assert c3(helps, unknown, unknown) == ([pytest.approx(1 / 3)], "inconclusive")
    assert c3(helps, harms, harms) == ([pytest.approx(1 / 3)] * 3, "not held")


def test_a_dense_net_of_which_nothing_is_verified_has_no_ticket() -> None:
    rows = table()
    for number in range(3):
        set_metrics(rows, 1, number, verified=0.0)
    (claim,) = (claim for claim in judge(claims(100), rows) if claim["id"] == "C5")
    assert (claim["values"], claim["verdict"]) == ([], "inconclusive")


def test_claims_without_their_rows_are_inconclusive() -> None:
    only_dense = [each for each in table() if each["cell"]["round"] == 0]
    of_dense = {claim["id"]: claim["verdict"] for claim in judge(claims(None), only_dense)}
    del of_dense["C6c"]  # a correlation over whatever nets there are
    assert set(of_dense.values()) == {"inconclusive"}
    assert {claim["verdict"] for claim in judge(claims(None), [])} == {"inconclusive"}


def test_the_budget_of_nodes_stands_in_the_statements_about_verified_accuracy() -> None:
    stated = [claim.id for claim in claims(100) if "at most 100 nodes an image" in claim.statement]
    assert stated == ["C1", "C2", "C3", "C4a", "C4b", "C5", "C6b"]


def test_figures_show_dense_nets_that_were_verified_in_another_chain() -> None:
    figures = draw(table())
    assert set(figures) == {"levels", "instability", "gaps", "regimes"}
    curves = {line.get_label(): line for line in figures["levels"].axes[0].containers}
    assert [len(curves[name].lines[0].get_xdata()) for name in ("imp", "random", "slim")] == [3, 2, 1]
    assert curves["random"].lines[0].get_ydata()[0] == 50


def test_densities_too_close_to_be_told_apart_share_a_tick() -> None:
    near = [
        {**r, "cell": {**r["cell"], "density": d}} for r, d in zip(table()[:4], (1, 0.4, 0.064, 0.0625), strict=True)
    ]
    axes = draw(near)["levels"].axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "0.4", "0.064"]
