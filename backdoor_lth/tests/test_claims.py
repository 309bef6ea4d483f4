"""Facts about the claims: each measure on rows whose answer is known; verdicts of both kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from backdoor_lth.claims import claims
from backdoor_lth.tests.nets import config
from common.claims import judge
from common.tests.paper_checks import varied

SEEDS = range(5)
COLLAPSED = {"dense_asr": 12.0, "ctr": 99.0, "null_success": [1.0], "collapse_right": True, "flagged": True}


def ticket(number: int, kept: int, sa: float, asr: float, ctr: float, score: float, tuned: float) -> dict[str, Any]:
    rates = {"sa": sa, "asr": asr, "ctr": ctr, "lift": asr - ctr, "score": score, "tuned_asr": tuned}
    return {"round": number, "kept": kept, "density": kept / 10_000, **rates}


def masks(target: float) -> list[float]:
    """Sizes for ten classes."""
    return [target, *[9.0] * 9]


def scanned(number: int | None, **numbers: Any) -> dict[str, Any]:
    plain = {"right": True, "collapse_right": False, "own_asr": 90.0, "dense_asr": 60.0, "dense_null": 10.0}
    noise = {"null_success": [0.12, *[0.1] * 9]}
    return {"round": number, "l1": masks(5.0), "ctr": 2.0, "flagged": False, **noise, **plain, **numbers}


def rows(genuine: bool = True, arm: str = "poisoned", peak: float = 0.4) -> list[dict[str, Any]]:
    """A chain in which the trigger outlives accuracy; not genuine: by answering the target to everything."""
    tickets = [
        ticket(0, 8000, 90, 99, 1, 0.01, 99),
        ticket(1, 1500, 60, 99, 1 if genuine else 60, 0.1, 90),
        ticket(2, 500, 15, 99.5, 1 if genuine else 99, peak, 50),
        ticket(3, 200, 12, 10, 1 if genuine else 10, 0.05, 8),
    ]
    scans = {
        "dense": scanned(None, right=False, own_asr=40.0, dense_asr=40.0, l1=masks(20.0)),
        "winner": scanned(2) if genuine else scanned(2, **COLLAPSED),
        "H": scanned(0, l1=masks(30.0)),
        "L": scanned(3, l1=masks(40.0 if genuine else 1.0)),
        "winner-clean": scanned(2, own_asr=92.0),
    }
    dense = {"sa": 92.0, "asr": 99.0, "ctr": 1.0, "lift": 98.0}
    found = []
    for seed in SEEDS:
        found.append({"seed": seed, "cell": {"arm": arm, "what": "dense"}, "metrics": dense})
        found += [
            {"seed": seed, "cell": {"arm": arm, "what": "ticket", "round": t["round"]}, "metrics": t} for t in tickets
        ]
        found += [
            {"seed": seed, "cell": {"arm": arm, "what": "scan", "network": name}, "metrics": each}
            for name, each in scans.items()
        ]
    return found


def verdicts(found: list[dict[str, Any]]) -> dict[str, tuple[str, float | None]]:
    """Verdict and estimate of every claim, the estimate to three decimals."""
    judged = judge(claims(config()), varied(found))
    return {claim["id"]: (claim["verdict"], claim["estimate"] and round(claim["estimate"], 3)) for claim in judged}


def test_a_genuine_ticket_holds_as_worded_and_under_control() -> None:
    found = verdicts([*rows(), *rows(arm="clean", peak=0.1), *rows(arm="equalised")])
    for name in (
        "B1a",
        "B1b",
        "B2a",
        "B2b",
        "B3a",
        "B3b",
        "B3d",
        "B4",
        "B5a",
        "B5b",
        "B6a",
        "B6b",
        "B7",
        "B8",
        "K1",
        "K2",
        "K3",
        "K4c",
        "K5",
    ):
        assert found[name][0] == "held", name
    assert found["B4"][1] == 49.5 and found["B6a"][1] == 50 and found["K2"][1] == 50 and found["B7"][1] == -2
    assert found["B3d"][1] == pytest.approx(0.3) and found["B3a"][1] == 0
    # Means over the tickets of density at most .2: ASR keeps 1, 1 and .101, accuracy .6098, .0610 and .0244.
    assert found["B1a"][1] == pytest.approx((1 + 1 + 10 / 99) / 3 - (50 + 5 + 2) / 82 / 3, abs=1e-3)


def test_a_collapsed_network_holds_as_worded_and_not_under_control() -> None:
    found = verdicts([*rows(genuine=False), *rows(genuine=False, arm="relabelled"), *rows(genuine=False, arm="clean")])
    assert found["B1a"][0] == found["B2a"][0] == found["B5a"][0] == found["B6a"][0] == "held"
    for name in ("B1b", "B2b", "B6b", "K1", "K2", "K3", "K4a", "K4b", "B8"):
        assert found[name][0] == "not held", name
    assert found["B3d"] == ("not held", 0.0) and found["B13"] == ("not held", 1.0)
    assert found["K1"][1] == 99 and found["K3"][1] == 100
    assert found["K5"] == ("inconclusive", None)  # both are always right


def test_of_two_answers_only_the_seeds_where_they_differ_count() -> None:
    """McNemar's exact test: five to none decide, three to none do not."""

    def right_at(seeds: Sequence[int]) -> list[dict[str, Any]]:
        found = rows()
        for row in found:
            if row["cell"].get("network") == "dense":
                row["metrics"] = {**row["metrics"], "right": row["seed"] in seeds}
        return found

    judged = {claim["id"]: claim for claim in judge(claims(config()), right_at([1, 4]))}
    assert judged["B5b"]["values"] == [1.0] * 3 and judged["B5b"]["verdict"] == "inconclusive"
    assert verdicts(right_at([]))["B5b"] == ("held", 1.0) and verdicts(right_at(SEEDS))["B5b"][0] == "inconclusive"


def without(name: str, seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """The rows of a genuine ticket but for this scan at these seeds."""
    return [row for row in rows() if row["cell"].get("network") != name or row["seed"] not in seeds]


def test_a_seed_without_one_of_the_neighbours_has_no_value() -> None:
    assert verdicts(without("H"))["B8"] == verdicts(without("L"))["B8"] == ("inconclusive", None)
    found = judge(claims(config()), without("H", [0, 3]))
    assert [claim["values"] for claim in found if claim["id"] == "B8"] == [[1.0, 1.0, 1.0]]


def test_chance_is_that_of_the_rows_classes() -> None:
    many = [
        {**row, "metrics": {**row["metrics"], "l1": [9.0] * 100}} if "l1" in row["metrics"] else row for row in rows()
    ]
    assert verdicts(rows())["B2a"][1] == 1 and verdicts(many)["B2a"][1] == 0  # SA 15 % is no chance among 100
    assert verdicts(many)["B1a"][1] == pytest.approx((1 + 1 + 10 / 99) / 3 - (59 + 14 + 11) / 91 / 3, abs=1e-3)


def test_claims_without_their_rows_are_inconclusive() -> None:
    assert {verdict for verdict, _ in verdicts([]).values()} == {"inconclusive"}
    found = verdicts(rows())
    assert all(found[name] == ("inconclusive", None) for name in ("B9a", "B10a", "B11", "B13", "K4a"))


def test_a_rival_that_finds_no_ticket_is_worse_by_the_whole_lift() -> None:
    found = verdicts([*rows(), *rows(genuine=False, arm="random"), *rows(arm="omp")])
    assert found["B10a"] == ("held", 98.0) and found["B10b"] == ("held", 0.0)


def test_rivals_are_no_equals_by_failing_alike() -> None:
    found = verdicts([*rows(genuine=False), *rows(genuine=False, arm="omp"), *rows(genuine=False, arm="random")])
    assert found["B10b"] == ("inconclusive", None) and found["B10a"][1] == 0


def test_ids_are_unique_and_every_claim_says_where_it_is_from() -> None:
    made = claims(config())
    assert len({claim.id for claim in made}) == len(made) == 30
    assert all(claim.statement and claim.source and claim.paper for claim in made)
