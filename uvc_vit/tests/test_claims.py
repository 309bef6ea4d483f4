"""Each claim looks at its own numbers, and its threshold is the one that was fixed."""

from __future__ import annotations

from typing import Any

import pytest

from common.claims import judge
from common.tests.paper_checks import varied
from uvc_vit.claims import CLAIMS
from uvc_vit.figures import draw

SEEDS = (0, 1, 2, 3)
# Test accuracy after and before stage 2, in a world where every claim holds.
WORLD: dict[tuple[str, float], tuple[float, float]] = {
    ("start", 1.0): (95, 10),
    ("uvc", 0.25): (95, 90),
    ("prune-only", 0.25): (94, 90),
    ("no-kd", 0.25): (94.5, 90),
    ("kd-numel", 0.25): (94.5, 90),
    ("magnitude", 0.25): (94, 60),
    ("gradient", 0.25): (94, 60),
    ("random", 0.25): (94, 60),
    ("uvc", 0.5): (95, 90),
    ("prune-only", 0.5): (95, 90),
    ("skip-only", 0.5): (90, 80),
    ("dense", 0.5): (96, 95),
    ("released", 0.5): (95, 90),
}


def world(changed: dict[tuple[str, float], dict[str, float]] | None = None) -> list[dict[str, Any]]:
    """Rows of four seeds, each a little different, with other numbers for some arms."""
    rows = []
    for seed in SEEDS:
        for (arm, budget), (after, before) in WORLD.items():
            noise = 0.02 * seed if arm == "uvc" else 0.0
            metrics: dict[str, Any] = {"test_accuracy": after + noise, "before_accuracy": before + noise}
            metrics |= {"share": 1.0 if arm in ("start", "dense") else budget * (1 - 0.001 * (1 + seed))}
            metrics |= {"skipped_share": 0.99 if arm == "released" else 0.0, "latency_ratio": 0.6 + noise / 10}
            metrics |= {
                "blocks": 2,
                "stage2_ratio": 1.8 + noise,
                "heads": [1, 0.5],
                "dims": [1, 0.5],
                "neurons": [1, 0.2],
            }
            if arm == "uvc":
                metrics |= {"search_step": [1, 9], "search_R": [1, 0.5], "search_z": [0, 9], "search_target": [1, 0.5]}
            metrics |= (changed or {}).get((arm, budget), {})
            rows.append({"cell": {"arm": arm, "budget": budget}, "seed": seed, "metrics": metrics})
    return rows


def verdicts(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {claim["id"]: claim["verdict"] for claim in judge(CLAIMS, varied(rows))}


def test_every_claim_holds_where_all_is_as_it_says() -> None:
    assert set(verdicts(world()).values()) == {"held"} and len(CLAIMS) == 17


@pytest.mark.parametrize(
    ("arm", "numbers", "fails"),
    [
        (("magnitude", 0.25), {"share": 0.2514}, {"S1"}),
        (("uvc", 0.25), {"share": 0.2486}, {"S1"}),
        (("skip-only", 0.5), {"share": 0.505}, set()),  # whole blocks
        (("dense", 0.5), {"test_accuracy": 96.6}, {"S2"}),
        (("skip-only", 0.5), {"test_accuracy": 96}, {"S3", "S4"}),
        (("prune-only", 0.5), {"test_accuracy": 89}, {"S4"}),
        (("prune-only", 0.25), {"test_accuracy": 95.1}, {"S5"}),
        (("magnitude", 0.25), {"test_accuracy": 95.1}, {"S6a-after"}),
        (("gradient", 0.25), {"before_accuracy": 70.1}, {"S6b-before"}),
        (("random", 0.25), {"test_accuracy": 95.1, "before_accuracy": 70.1}, {"S6c-before", "S6c-after"}),
        (("no-kd", 0.25), {"test_accuracy": 95.4}, {"S7a"}),
        (("kd-numel", 0.25), {"test_accuracy": 95.6}, {"S7b"}),
        (("released", 0.5), {"skipped_share": 0.9}, {"S8b"}),
        (("uvc", 0.5), {"latency_ratio": 0.66}, {"S9"}),
        (("uvc", 0.5), {"stage2_ratio": 1.59}, {"S10"}),
    ],
)
def test_a_claim_falls_with_its_own_numbers_alone(
    arm: tuple[str, float], numbers: dict[str, float], fails: set[str]
) -> None:
    found = verdicts(world({arm: numbers}))
    assert {name for name, verdict in found.items() if verdict != "held"} == fails
    assert all(found[name] == "not held" for name in fails)


def test_arms_that_were_not_run_leave_their_claims_open() -> None:
    rows = [row for row in world() if row["cell"]["arm"] in ("start", "uvc")]
    found = verdicts(rows)
    assert {name for name, verdict in found.items() if verdict == "held"} == {"S1", "S8a", "S9", "S10"}
    assert set(found.values()) == {"held", "inconclusive"}


def test_saving_by_skips_is_judged_by_seeds_with_a_block_left() -> None:
    rows = world({("released", 0.5): {"blocks": 0, "skipped_share": 1.0}})
    assert verdicts(rows)["S8b"] == "inconclusive"
    for row in rows:
        if row["cell"]["arm"] == "released" and row["seed"] < 2:
            row["metrics"] |= {"blocks": 1, "skipped_share": 0.97}
    (found,) = (claim for claim in judge(CLAIMS, rows) if claim["id"] == "S8b")
    assert found["verdict"] == "held" and found["values"] == [0.97, 0.97]


def test_figures_show_every_arm() -> None:
    figures = draw(world())
    assert set(figures) == {"accuracy", "plans", "search"}
    for panel, points in zip(figures["accuracy"].axes, (48, 52, 52), strict=True):  # before stage 2 start is random
        assert len(panel.lines) == len({arm for arm, _ in WORLD})
        assert sum(len(line.get_xdata()) for line in panel.lines) == points
    plans = figures["plans"].axes[0]
    assert len(plans.get_yticklabels()) == 11 and plans.images[0].get_array().shape == (11, 2)
    assert len(figures["search"].axes[1].lines) == 8  # two arms, four seeds
