"""Facts about the claims: what each measures, on rows worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from common.claims import judge
from common.tests.paper_checks import varied
from diverse_vit.claims import CLAIMS, judge_at
from diverse_vit.figures import draw

BY_ID = {claim.id: claim for claim in CLAIMS}


def network(accuracy: float, last: float, head: float, rre: float, **more: Any) -> dict[str, Any]:
    weights = {name: {"rre_25": [rre - 0.01, rre + 0.01]} for name in ("q", "k", "v", "fc1")}
    weights["fc1"] = {"rre_25": [9.0, 9.0]}
    return {
        "test_accuracy": accuracy,
        "embedding_cosine": [0.1, 0.2, last],
        "embedding_cross": [0.9, 0.8],
        "head_cosine": [head, 0.6],
        "weights": weights,
        "spectrum": [1.0, 0.5],
        "gaussian_rre_25": 0.6,
        "parameters": 100,
        "hooks_left": 0,
        "keys_changed": 0,
        "inference_ratio": 1.01,
        **more,
    }


def rows() -> list[dict[str, Any]]:
    """Two seeds of every arm."""
    found = []
    for seed in (0, 1):
        up = 0.01 * seed
        arms = {
            "plain": network(70.0 + seed, 0.5, 0.4, 0.58),
            "all": network(69.0, 0.1 + up, 0.5, 0.59),
            "embedding": network(71.0 + seed, 0.2, 0.4, 0.58),
            "attention": network(70.5 + seed, 0.5, 0.1 + up, 0.58),
            "weight": network(68.0 + seed, 0.5, 0.4, 0.60 + up),
        }
        found += [{"cell": {"arm": arm}, "seed": seed, "metrics": metrics} for arm, metrics in arms.items()]
    return found


@pytest.mark.parametrize(
    ("name", "values", "verdict"),
    [
        ("D1", [-1, -2], "inconclusive"),
        ("D2a", [1, 1], "held"),
        ("D2b", [0.5, 0.5], "held"),
        ("D2c", [0.02, 0.02], "held"),
        ("D3a", [-0.4, -0.39], "held"),
        ("D3b", [-0.3, -0.29], "held"),
        ("D3c", [0.02, 0.03], "held"),
        ("D4a", [1, 1], "held"),
        ("D4b", [0.5, 0.5], "held"),
        ("D4c", [-2, -2], "not held"),
        ("D4d", [-2, -3], "inconclusive"),
        ("D5a", [0, 0], "held"),
        ("D5b", [0.01, 0.01], "held"),
    ],
)
def test_a_claim_measures_what_it_says(name: str, values: list[float], verdict: str) -> None:
    (judged,) = judge([BY_ID[name]], varied(rows()))
    assert judged["values"] == pytest.approx(values, abs=1e-3) and judged["verdict"] == verdict


def test_the_table_above_has_every_claim_and_each_carries_the_papers_setting() -> None:
    assert len(BY_ID) == len(CLAIMS) == 13
    assert all("ImageNet" in claim.paper or "by construction" in claim.paper for claim in CLAIMS)
    assert all("unverified" in claim.paper for claim in CLAIMS if claim.id.startswith("D4"))


def test_what_is_left_behind_is_compared_seed_by_seed() -> None:
    found = [row for row in rows() if (row["cell"]["arm"], row["seed"]) != ("plain", 0)]
    next(row for row in found if row["seed"] == 1 and row["cell"]["arm"] == "all")["metrics"]["hooks_left"] = 1
    assert BY_ID["D5a"].measure(found) == [1]


def test_one_hook_key_or_parameter_too_many_is_seen() -> None:
    for change in ({"hooks_left": 1}, {"keys_changed": 1}, {"parameters": 101}):
        found = rows()
        next(row for row in found if row["cell"]["arm"] == "all")["metrics"].update(change)
        (judged,) = judge([BY_ID["D5a"]], found)
        assert judged["values"] == [1, 0] and judged["verdict"] == "not held"


def test_one_seed_that_does_not_grow_with_depth_is_seen() -> None:
    found = rows()
    found[0]["metrics"]["embedding_cosine"] = [0.5, 0.2, 0.1]
    (judged,) = judge([BY_ID["D2a"]], found)
    assert judged["values"] == [-1, 1] and judged["verdict"] == "not held"


def test_the_demo_reports_what_it_cannot_decide_without_a_verdict() -> None:
    plain, demo, cifar = judge(CLAIMS, rows()), judge_at("demo", CLAIMS, rows()), judge_at("cifar", CLAIMS, rows())
    assert cifar == plain
    changed = [found["id"] for found, other in zip(demo, plain, strict=True) if found != other]
    assert changed == ["D2c", "D4a", "D4b", "D4c", "D4d"]
    for found, other in zip(demo, plain, strict=True):
        if found["id"] in changed:
            assert found["verdict"] == "inconclusive" and found["rule"].endswith("; not judged at demo scale")
            assert [found[key] for key in ("estimate", "low", "high")] == [
                other[k] for k in ("estimate", "low", "high")
            ]


def test_without_rows_every_claim_is_inconclusive_and_nothing_is_drawn() -> None:
    assert {claim["verdict"] for claim in judge(CLAIMS, [])} == {"inconclusive"} and draw([]) == {}


def test_three_figures_are_drawn_from_the_rows() -> None:
    figures = draw(rows())
    assert sorted(figures) == ["depth", "patches", "spectra"]
    assert [line.get_label() for line in figures["depth"].axes[0].lines] == [
        "plain",
        "all",
        "embedding",
        "attention",
        "weight",
    ]
    assert figures["depth"].axes[1].lines[0].get_ydata().tolist() == pytest.approx([0.4, 0.6])
