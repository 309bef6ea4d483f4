"""Facts about the claims: what each measures, on rows worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from common.claims import judge
from common.tests.paper_checks import varied
from sparse_gan.claims import CLAIMS, POST_HOC
from sparse_gan.eval import packed_sheet
from sparse_gan.figures import draw

BY_ID = {claim.id: claim for claim in CLAIMS}
E = math.e


def gan(fd: float, density: float = 0.05, **more: Any) -> dict[str, Any]:
    metrics = {"fd": fd, "density_g": density, "density_d": 0.3, "explored_g": 3 * density, "floor": 1.0}
    metrics |= {"inference_flops": 10.0, "inference_flops_dense": 100.0}
    metrics |= {"training_flops": 30.0, "training_flops_dense": 100.0}
    metrics |= {"curve": [[1, 9.0], [2, fd]], "layer_density": {"a": density, "b": 1.0}}
    return {**metrics, "sheet": packed_sheet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)), **more}


def rows() -> list[dict[str, Any]]:
    """Two seeds of every arm; the second is worse by a factor of e where arms differ."""
    found = []
    for seed in (0, 1):
        arms = {
            ("dense", 1.0, 1.0): gan(10.0, 1.0),
            ("static", 0.05, 0.3): gan(100 * E**seed),
            ("stu", 0.05, 0.3): gan(100 / E, masked_average_fd=100 * E**seed),
            ("static", 0.1, 0.3): gan(50.0, 0.1),
            ("stu", 0.1, 0.3): gan(50 / E**0.5, 0.1),
            ("static", 0.2, 0.3): gan(20.0, 0.2),
            ("stu", 0.2, 0.3): gan(10 * 1.01**seed, 0.2),
            ("static", 0.05, 1.0): gan(100 * E ** (2 * seed)),
            ("set", 0.05, 0.3): gan(100.0),
            ("both", 0.05, 0.3): gan(100 / E),
            ("only-d", 0.05, 0.3): gan(100.0),
            ("snip", 0.2, 0.3): gan(30.0, 0.2),
            ("gmp", 0.2, 0.3): gan(20.0 if seed else 5.0, 0.2),
        }
        for arm, metrics in arms.items():
            cell = dict(zip(("arm", "density_g", "density_d"), arm, strict=True))
            found.append({"cell": cell, "seed": seed, "metrics": metrics})
    return found


@pytest.mark.parametrize(
    ("name", "values", "verdict"),
    [
        ("SG1a", [1, 2], "inconclusive"),
        ("SG1b", [0.5, 0.5], "held"),
        ("SG1c", [math.log(2), math.log(2 / 1.01)], "held"),
        ("SG1d", [0.5, 1.5], "inconclusive"),
        ("SG2a", [0, -math.log(1.01)], "held"),
        ("SG2b", [0, -math.log(1.01)], "inconclusive"),
        ("SG3", [0, 1], "inconclusive"),
        ("SG4", [math.log(0.5), math.log(20 / 10.1)], "inconclusive"),
        ("SG5a", [0.1, 0.1], "held"),
        ("SG5b", [0.3 - 0.175] * 2, "held"),
        ("SG6", [1, 2], "inconclusive"),
        ("SG7a", [0, 0], "held"),
        ("SG7b", [1, 1], "held"),
        ("SG8", [3, 3], "held"),
        ("SG9", [1, 1], "held"),
    ],
)
def test_a_claim_measures_and_decides_what_it_says(name: str, values: list[float], verdict: str) -> None:
    (judged,) = judge([BY_ID[name]], varied(rows()))
    assert judged["values"] == pytest.approx(values, abs=1e-3) and judged["verdict"] == verdict


def test_the_table_above_has_every_claim_and_each_carries_the_papers_setting() -> None:
    assert len(BY_ID) == len(CLAIMS) == 15
    assert all("CIFAR-10" in claim.paper or "recalled" in claim.paper or "no number" in claim.paper for claim in CLAIMS)


def test_every_way_of_pruning_afterwards_is_compared_with() -> None:
    for cell in POST_HOC:
        better = {"cell": cell, "seed": 0, "metrics": gan(1.0)}
        found = [row for row in rows() if row["seed"] == 0 and row["cell"] != cell]
        assert BY_ID["SG4"].measure([*found, better]) == pytest.approx([math.log(0.1)])


def test_differences_are_of_one_seed_and_against_the_arm_at_its_densities() -> None:
    def without(seed: int, *arm: Any) -> list[dict[str, Any]]:
        return [row for row in rows() if (row["seed"], *row["cell"].values()) != (seed, *arm)]

    assert BY_ID["SG1d"].measure(without(0, "stu", 0.05, 0.3)) == pytest.approx([1.5])
    assert BY_ID["SG4"].measure(without(0, "gmp", 0.2, 0.3)) == pytest.approx([math.log(20 / 10.1)])
    elsewhere = {"cell": {"arm": "oneshot-global-g", "density_g": 0.1, "density_d": 0.3}, "seed": 0, "metrics": gan(1)}
    assert BY_ID["SG4"].measure([*rows(), elsewhere]) == BY_ID["SG4"].measure(rows())


def test_without_rows_every_claim_is_inconclusive_and_nothing_is_drawn() -> None:
    assert {claim["verdict"] for claim in judge(CLAIMS, [])} == {"inconclusive"} and draw([]) == {}


def test_three_figures_are_drawn_from_the_rows() -> None:
    assert sorted(draw(rows())) == ["curves", "samples", "topology"]
