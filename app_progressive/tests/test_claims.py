"""Facts about the claims: what they measure on rows made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from app_progressive.claims import claims
from app_progressive.figures import draw
from app_progressive.measures import peak, smooth, transition
from app_progressive.settings import Config
from common.claims import judge
from common.tests.paper_checks import varied

CLAIMS = claims(Config())
SEEDS = range(6)


def row(part: str, arm: str, seed: int, **metrics: Any) -> dict[str, Any]:
    return {"cell": {"part": part, "arm": arm, "arms": arm}, "seed": seed, "metrics": metrics}


def few(arm: str, acc: float, gap: float, cer: float, layers: list[float]) -> list[dict[str, Any]]:
    """An arm of part F on every seed, with a little noise that all arms of a seed share, and a little of its own."""
    found = []
    for seed in SEEDS:
        own = np.random.default_rng([seed, len(arm), int(acc * 10)]).normal(0, 0.1)
        metrics = {
            "final_acc": acc + seed + own,
            "gap_last": [99.0, 99.0, gap + seed + own, gap + seed + own],
            "clean_gap": gap + own,
            "cer": cer + 10 * seed + own,
            "test_acc": [50.0, 60.0, 70.0, acc],
            "density": [0.8, 0.6, 0.5, 0.4],
            "density_target": [0.8, 0.6, 0.5, 0.4],
            "per_layer": {str(n): value + 0.01 * own for n, value in enumerate(layers)},
            "weights": 23_184,
            "nonzero": 23_184 - int((1 - 0.8**4.5) * 23_184) - (arm == "osp"),
        }
        found.append(row("F", arm, seed, **metrics))
    return found


def long(arm: str, curve: list[float], density: float, seeds: Any = SEEDS) -> list[dict[str, Any]]:
    found = []
    for seed in seeds:
        own = np.random.default_rng([seed, 7]).normal(0, 0.1, len(curve))
        target = [0.8, 0.7, 0.6, *[0.5] * (len(curve) - 3)]
        effective = [0.8, 0.7, 0.6, *[density] * (len(curve) - 3)]
        metrics = {"test_gap_last": list(np.array(curve) + own), "density": effective, "density_target": target}
        metrics |= {"clean_gap": 5 + density + own[0]}
        found.append(row("L", arm, seed, **metrics, test_acc=[50.0] * len(curve)))
    return found


HILL = [0, 0, 0, 0, 0, 5, 10, 10, 10, 10, 10, 5, 2, 2, 2, 2]
ROWS = [
    *few("app", 92, 8, 2500, [0.5, 0.3]),
    *few("app-mag", 91, 9, 2550, [0.9, 0.2]),
    *few("osp", 90, 10, 2600, [0.5, 0.3]),
    *few("dense", 91.7, 12, 2700, []),
    *few("shrink", 93, 12, 2700, []),
    *long("dense", [gap + 1 for gap in HILL], 1.0),
    *long("app", HILL, 0.5),
    *long("released", [1.0] * 16, 0.05),
    *long("random", [1.3] * 16, 0.05),
]


def judged(rows: list[dict[str, Any]] = ROWS) -> dict[str, dict[str, Any]]:
    return {claim["id"]: claim for claim in judge(CLAIMS, varied(rows))}


def test_claims_measure_paired_differences_in_the_claimed_direction() -> None:
    found = judged()
    wanted = {"C1": 0.3, "C1s": -1, "C2a": 4, "C2b": 4, "C3a": 200, "C3b": 2, "C3c": 100, "C4a": 10, "C4b": 8, "C4c": 1}
    wanted |= {"R1": 0.1, "R2a": 3.6, "R2b": -0.3, "R2c": 0.45}
    for name, estimate in wanted.items():
        assert found[name]["estimate"] == pytest.approx(estimate, abs=0.8), name
    verdicts = {name: found[name]["verdict"] for name in wanted}
    assert verdicts.pop("C1s") == "not held" and set(verdicts.values()) == {"held"}
    assert found["C1w"]["verdict"] == "held" and found["C6"]["verdict"] == "held"


def test_the_final_density_must_be_exact_to_one_weight() -> None:
    found = judged()
    assert found["C5a"]["verdict"] == "held" and found["C5b"]["verdict"] == "not held"


def test_claims_without_rows_are_inconclusive_and_stay_in_the_table() -> None:
    found = judged([r for r in ROWS if r["cell"]["part"] == "F"])
    for name in ("C2n1", "C2n2", "C4a", "C4b", "C7a", "C7b", "C8a", "C8b", "R1", "R2a", "R2b", "R2c"):
        assert found[name]["verdict"] == "inconclusive" and found[name]["values"] == []
    assert list(judged([])) == [claim.id for claim in CLAIMS]


def test_replay_costs_are_compared_with_the_law() -> None:
    rows = [row("T", "app@4.5", s, macs_dense=36.0, errors=[1] * 8, final_acc=90, cer=100) for s in SEEDS]
    rows += [row("T", "app@4.5/none", s, macs_dense=8.0, errors=[1] * 8, final_acc=80, cer=300) for s in SEEDS]
    found = judged(rows)
    assert found["C8b"]["values"] == pytest.approx([0] * 6, abs=1e-3) and found["C7a"]["values"] == [10] * 6
    assert found["C8a"]["values"] == [200] * 6


def test_a_peak_is_where_rise_and_fall_are_both_large() -> None:
    assert peak(np.array([0.0, 1, 5, 2, 3, 1, 9])) == (0, 2, 5)
    assert smooth([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10]).tolist() == pytest.approx([3, 4, 5, 6, 7, 8])


def test_noise_has_no_transition_at_the_places_that_other_seeds_name() -> None:
    draws = np.random.default_rng(0)
    rows = [row("L", "app", s, test_gap_last=list(draws.normal(0, 3, 30))) for s in range(40)]
    for side in (0, 2):
        assert abs(np.mean(transition("app", side)(rows))) < 1
    with pytest.raises(KeyError):
        transition("app", 0)(rows[:1])


def test_every_figure_is_drawn_where_there_are_rows() -> None:
    assert set(draw(ROWS, CLAIMS)) == {"few", "long", "layers", "primary"}
    assert draw([row("T", "app", 0, final_acc=1)], CLAIMS) == {}
