"""Facts about the claims: what each measures, on rows worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from common.claims import holm, judge
from common.tests.paper_checks import varied
from vit_antioversmooth.claims import CLAIMS, claims_of
from vit_antioversmooth.cost import PAPER_COUNTS
from vit_antioversmooth.figures import draw
from vit_antioversmooth.holm import judge_together
from vit_antioversmooth.settings import ScaleStudy

BY_ID = {claim.id: claim for claim in CLAIMS}


def network(cosines: list[float], accuracy: float, **more: Any) -> dict[str, Any]:
    curves = {"patch_cosine": cosines, "hc_over_dc": [1 - cosine for cosine in cosines]}
    return {**curves, "attention_cosine": cosines[1:], "test_accuracy": accuracy, **more}


def rows() -> list[dict[str, Any]]:
    """Two seeds of every arm."""
    counts = {name: [attn, feat, 1] for name, (_, _, attn, feat) in PAPER_COUNTS.items()}
    theory = {"lowpass_maps": 6, "judged_maps": 6, "violations": 0, "lowpass_curves": [[-1.0, -2.0]] * 3}
    theory |= {"map_rho": 0.2, "bound_bd": 2.0, "bound_colsum": 2.0, "weights": 1.0}
    found = []
    for seed in (0, 1):
        up, plain = 0.01 * seed, network([0.1, 0.2, 0.3, 0.5], 70.0, **theory)
        arms = {
            "plain": plain,
            "attnscale": network([0.1, 0.2, 0.3, 0.6 + up], 71.0, omega=[[0.2, 0.4]] * 3),
            "attnscale-control": network([0.1, 0.2, 0.3, 0.7], 70.5, omega=[[0.0, 0.1]] * 3),
            "featscale": network([0.1, 0.2, 0.3, 0.4 + up], 69.0, s=[-0.1] * 3, t=[0.3] * 3),
            "featscale-control": network([0.1, 0.2, 0.3, 0.45], 70.0, s=[0.0] * 3, t=[0.0] * 3),
            "noskip-plain": network([0.1, 1.0], 20.0),
            "noskip-attnscale": network([0.1, 0.5], 30.0, omega=[[20.0]]),
            "tuned-plain": network([0.1, 0.2], 72.0),
            "tuned-attnscale": network([0.1, 0.2], 73.0 + seed),
            "tuned-featscale": network([0.1, 0.2], 71.0),
            "init": {
                "dose_hc_over_dc": [0.8, 0.9, 1.2],
                "added_parameters": counts,
                "attnscale_step_ratio": 1.02,
                "featscale_step_ratio": 1.05 + up,
            },
        }
        found += [{"cell": {"arm": arm}, "seed": seed, "metrics": metrics} for arm, metrics in arms.items()]
    return found


@pytest.mark.parametrize(
    ("name", "values", "verdict"),
    [
        ("C1", [0, 0], "held"),
        ("C2", [0, 0], "held"),
        ("C3", [1, 1], "held"),
        ("C4a1", [0.1, 0.11], "not held"),
        ("C4a2", [-0.1, -0.09], "held"),
        ("C4b1", [-0.1, -0.09], "held"),
        ("C4b2", [-0.05, -0.04], "held"),
        ("C4c", [0.1, 0.1], "held"),
        ("C4d", [0.5, 0.5], "held"),
        ("C5a1", [1, 1], "held"),
        ("C5a2", [0.5, 0.5], "held"),
        ("C5b1", [-1, -1], "not held"),
        ("C5b2", [-1, -1], "not held"),
        ("C6a", [1, 1], "held"),
        ("C6b", [1.05, 1.06], "held"),
        ("C7a", [1, 2], "inconclusive"),
        ("C7b", [-1, -1], "not held"),
        ("C8a", [0.25, 0.25], "held"),
        ("C8b", [0.1, 0.1], "held"),
    ],
)
def test_a_claim_measures_what_it_says(name: str, values: list[float], verdict: str) -> None:
    (judged,) = judge([BY_ID[name]], varied(rows()))
    assert judged["values"] == pytest.approx(values, abs=1e-3) and judged["verdict"] == verdict


def test_the_table_above_has_every_claim_and_each_carries_the_papers_setting() -> None:
    assert len(BY_ID) == len(CLAIMS) == 19
    assert all("ImageNet" in claim.paper or "%" not in claim.paper for claim in CLAIMS)
    recalled = [claim for claim in CLAIMS if "79.8" in claim.paper or "82.6" in claim.paper]
    assert len(recalled) == 4 and all("unverified" in claim.paper for claim in recalled)


def test_the_dose_response_states_the_omegas_of_its_study_and_no_other_claim_changes() -> None:
    words = "Causal: last-block HC/DC rises with omega in {%s} before any training (smallest rise)"
    assert BY_ID["C4c"].statement == words % "0, 1, 4, 20"  # of demo
    own = claims_of(ScaleStudy(omegas=[-0.5, 2.0, 1e3]))
    assert [claim.id for claim in own] == [claim.id for claim in CLAIMS]
    assert [claim.statement for claim in own if claim not in CLAIMS and claim.id == "C4c"] == [words % "-0.5, 2, 1000"]
    assert all(claim in CLAIMS for claim in own if claim.id != "C4c")


def test_without_rows_every_claim_is_inconclusive_and_nothing_is_drawn() -> None:
    assert {claim["verdict"] for claim in judge(CLAIMS, [])} == {"inconclusive"} and draw([]) == {}


def test_one_wrong_count_one_violation_or_one_stubborn_map_is_seen() -> None:
    found = rows()
    for row in (row for row in found if row["seed"] == 1):
        if row["cell"]["arm"] == "init":
            row["metrics"]["added_parameters"] = {**row["metrics"]["added_parameters"], "Swin-S": [281, 18048, 1]}
        if row["cell"]["arm"] == "plain":
            row["metrics"] |= {"violations": 1, "lowpass_maps": 5}
    verdicts = {claim["id"]: claim["verdict"] for claim in judge(CLAIMS, found)}
    assert [verdicts[name] for name in ("C1", "C2", "C6a")] == ["not held"] * 3


def test_stages_with_different_numbers_of_heads_are_averaged_over_all_heads_and_drawn() -> None:
    found = [row for row in rows() if row["cell"]["arm"] in ("attnscale", "attnscale-control")]
    for row in found:
        row["metrics"]["omega"] = [[0.1], [0.2, 0.3, 0.6]] if row["cell"]["arm"] == "attnscale" else [[0.0], [0.1] * 3]
    (judged,) = judge([BY_ID["C8a"]], found)
    assert judged["values"] == pytest.approx([0.3 - 0.075] * 2)
    _, scales = sorted(draw(found).items())
    (shown,) = scales[1].axes[0].images
    assert shown.get_array().filled(-1).tolist() == [[0.1, 0.2], [-1, 0.3], [-1, 0.6]]


def test_where_the_network_has_no_bounds_or_no_dose_response_its_claims_are_inconclusive() -> None:
    found = rows()
    for row in found:
        for name in ("violations", "map_rho", "bound_bd", "bound_colsum", "weights", "dose_hc_over_dc"):
            row["metrics"].pop(name, None)
    verdicts = {claim["id"]: claim["verdict"] for claim in judge(CLAIMS, found)}
    assert [verdicts[name] for name in ("C1", "C2", "C4c")] == ["held", "inconclusive", "inconclusive"]
    assert "lowpass" in draw(found)


# The family of C4, C5 and C7


def gained(**differences: list[float]) -> list[dict[str, Any]]:
    """Rows whose accuracies differ from the plain network's by so much, seed by seed; cosines say nothing."""
    names = {arm: [0.0] * 3 for arm in ("plain", "attnscale", "attnscale-control", "featscale", "featscale-control")}
    return [
        {"cell": {"arm": arm}, "seed": seed, "metrics": {"test_accuracy": 70 + value}}
        for arm, values in {**names, **{key.replace("_", "-"): value for key, value in differences.items()}}.items()
        for seed, value in enumerate(values)
    ]


def verdicts_of(found: list[dict[str, Any]], *names: str) -> list[str]:
    judged = {claim["id"]: claim["verdict"] for claim in judge_together(CLAIMS, found)}
    return [judged[name] for name in names]


def test_a_gain_is_held_only_over_both_references() -> None:
    clear = [9.0, 9.01, 9.02]
    assert verdicts_of(gained(attnscale=clear, attnscale_control=[0, 0.01, 0]), "C5a1", "C5a2") == ["held"] * 2
    assert verdicts_of(gained(attnscale=clear, attnscale_control=[9, 3, 15]), "C5a1", "C5a2") == ["inconclusive"] * 2
    alone = [row for row in gained(attnscale=clear) if not row["cell"]["arm"].endswith("control")]
    assert verdicts_of(alone, "C5a1", "C5a2") == ["inconclusive"] * 2


def test_equal_differences_of_discrete_accuracies_decide_nothing() -> None:
    found = gained(attnscale=[0.1, 0.1, 0.1 + 1e-13], featscale=[-0.1] * 3)
    assert verdicts_of(found, "C5a1", "C5a2", "C5b1", "C5b2") == ["inconclusive"] * 4


def test_of_many_tests_one_that_just_passes_alone_does_not_stand() -> None:
    found = gained(attnscale=[2.9, 5.8, 4.4], attnscale_control=[-8.9, 4.3, -1.5])
    alone = {claim["id"]: claim["verdict"] for claim in judge(CLAIMS, found)}
    assert alone["C5a1"] == "held" and verdicts_of(found, "C5a1") == ["inconclusive"]
    (told,) = [claim for claim in judge_together(CLAIMS, found) if claim["id"] == "C5a1"]
    assert told["holm"]["held"] == pytest.approx(4 * 0.01742, rel=1e-3)
    assert told["rule"] == "> 0 (t, 95 %), Holm over C4, C5, C7, over both references"


def test_the_family_is_the_ten_t_tests_and_the_others_are_judged_as_ever() -> None:
    judged, alone = judge_together(CLAIMS, rows()), judge(CLAIMS, rows())
    family = [claim["id"] for claim in judged if "holm" in claim]
    assert family == ["C4a1", "C4a2", "C4b1", "C4b2", "C5a1", "C5a2", "C5b1", "C5b2", "C7a", "C7b"]
    assert [claim for claim in judged if "holm" not in claim] == [claim for claim in alone if claim["id"] not in family]
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_three_figures_are_drawn_from_the_rows() -> None:
    assert sorted(draw(rows())) == ["layers", "lowpass", "scales"]
