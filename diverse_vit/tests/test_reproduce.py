"""Facts about the study: its rows, claims and report, and that it does no work twice and loses none when killed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from common.config import parse
from common.study import Cell, scale_arguments
from common.tests.paper_checks import (
    check_a_killed_study_goes_on,
    check_a_second_call_runs_nothing,
    check_report,
    check_study_refuses,
    report,
    rows,
    study_options,
)
from diverse_vit import cost
from diverse_vit.claims import CLAIMS
from diverse_vit.reproduce import HERE, reproduce, run_cell
from diverse_vit.settings import Config, ObjectiveConfig
from diverse_vit.tests.nets import build, images, labels
from diverse_vit.train import hook_count

FASTER = ["--train.epochs", "1", "--data.fraction", "0.02", "--model.depth", "2"]
ARMS = ["--study.arms", "{plain: {}, all: {mix: true, emb_cos: 0.5, attn_cos: 0.1}}"]
SEEDS = [0, 1]


class Study(NamedTuple):
    place: Path
    status: int


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    place = tmp_path_factory.mktemp("study")
    return Study(place, reproduce([*study_options(place), *FASTER, *ARMS]))


def test_the_study_has_one_row_for_every_arm_at_every_seed_with_its_objective(study: Study) -> None:
    everything = {"arm": "all", "mix": True, "emb_cos": 0.5, "attn_cos": 0.1}
    wanted = [(seed, cell) for seed in SEEDS for cell in ({"arm": "plain"}, everything)]
    assert study.status == 0
    assert [(row["seed"], row["cell"]) for row in rows(study.place)] == wanted


def test_arms_differ_in_their_objective_and_seeds_in_their_weights(study: Study) -> None:
    found = [row["metrics"]["embedding_cosine"] for row in rows(study.place)]
    assert len({tuple(curve) for curve in found}) == 4


def test_every_arm_but_plain_is_timed(tmp_path: Path) -> None:
    configs = HERE / "configs"
    config = parse(Config, scale_arguments(configs, ["--scale", "smoke", *FASTER]), prog="reproduce")
    told: list[float] = []
    (row,) = run_cell(config, Cell({"arm": "weight", "weight_cno": 5e-3}, 1), tmp_path / "cell", told.append)
    assert told == sorted(told) and told[-1] == pytest.approx(0.95)
    assert row["metrics"]["step_ratio"] > 0.5 and row["metrics"]["inference_ratio"] > 0.3
    (row,) = run_cell(config, Cell({"arm": "plain"}, 1), tmp_path / "plain", told.append)
    assert "step_ratio" not in row["metrics"]


def test_inference_is_timed_on_the_network_that_made_the_steps_once_its_hooks_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained, hooks = build(), []

    def note(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
        called: list[int] = []
        monkeypatch.setattr(trained, "forward", lambda x: called.append(1) or type(trained).forward(trained, x))
        works["ours"]()
        hooks.append((len(called), hook_count(trained)))
        return {"plain": [1.0], "ours": [2.0]}

    monkeypatch.setattr(cost, "interleaved", note)
    config = Config(objective=ObjectiveConfig(emb_cos=0.5, attn_cos=0.1))
    found = cost.cost_ratios(config, trained, build(), images(), labels())
    assert hooks == [(1, 2), (1, 0)] and found == {"step_ratio": 2.0, "inference_ratio": 2.0}


def test_every_claim_is_judged_on_every_seed_or_for_want_of_rows_on_none(study: Study) -> None:
    judged = {claim["id"]: claim for claim in report(study.place)["claims"]}
    assert {name for name, claim in judged.items() if not claim["values"]} == {"D3b", "D3c", "D4a", "D4b", "D4c", "D4d"}
    assert {len(claim["values"]) for claim in judged.values()} == {0, len(SEEDS)}
    assert judged["D5a"]["verdict"] == "held"


def test_the_report_has_data_text_page_and_figures(study: Study) -> None:
    check_report(study.place, CLAIMS, ["depth", "patches", "spectra"])


def test_a_second_call_runs_nothing_again_and_gives_the_same_rows(study: Study) -> None:
    check_a_second_call_runs_nothing(reproduce, study.place, [*FASTER, *ARMS])


def test_a_killed_study_gives_the_rows_of_an_undisturbed_one_when_called_again(study: Study, tmp_path: Path) -> None:
    options = [*FASTER, "--study.arms", "{plain: {}}", "--study.workers", "1"]
    wanted = [row for row in rows(study.place) if row["cell"]["arm"] == "plain"]
    check_a_killed_study_goes_on("diverse_vit", reproduce, tmp_path, options, wanted)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--scale", "huge"], r"--scale must be one of .*smoke"),
        (["--study.arms", "{all: {mix: true}}"], "study.arms must be arms that begin with plain: {}"),
        (["--study.arms", "{plain: {}, a: {emb_cosine: 1}}"], "study.arms.a must be among mix, emb_cos, "),
        (["--study.arms", "{plain: {}, a: {mix: 0.5}}"], "study.arms.a.mix must be a bool, got 0.5"),
        (["--study.arms", "{plain: {}, a: {emb_cos: true}}"], "study.arms.a.emb_cos must be a float, got True"),
        (["--study.arms", "{plain: {}, a: {emb_cos: -1}}"], "study.arms.a: objective.emb_cos must be at least 0"),
        (["--study.worker", "2"], "unknown key 'study.worker'; did you mean 'study.workers'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    wrong: Sequence[str], message: str, tmp_path: Path
) -> None:
    check_study_refuses(reproduce, tmp_path, [*FASTER, *wrong], message)


def test_an_arm_that_mixes_labels_of_unmixed_images_alone_is_refused_by_name(tmp_path: Path) -> None:
    wrong = ["--train.mixup", "0", "--train.cutmix", "0", "--study.arms", "{plain: {}, ce_all: {mix: true}}"]
    message = "study.arms.ce_all.mix must be false without mixup, cutmix or an embedding term, got True"
    check_study_refuses(reproduce, tmp_path, [*FASTER, *wrong], message)
