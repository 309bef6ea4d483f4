"""Facts about the study: its rows, claims and report, and that it does no work twice and loses none when killed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from common.config import ConfigError
from common.study import Cell
from common.tests.paper_checks import (
    check_a_killed_study_goes_on,
    check_a_second_call_runs_nothing,
    check_report,
    check_study_refuses,
    report,
    rows,
    study_options,
)
from sparse_gan.claims import CLAIMS
from sparse_gan.eval import packed_sheet
from sparse_gan.figures import unpacked_sheet
from sparse_gan.reproduce import arm_config, reproduce, run_cell
from sparse_gan.settings import Config, GanStudy, SparsityConfig
from sparse_gan.tests.runs import smoke

ARMS = [("dense", 1.0, 1.0), ("static", 0.05, 0.3), ("stu", 0.05, 0.3)]
SEEDS = [0, 1]
PART = ["--study.arms", "[dense]", "--study.workers", "1"]


class Study(NamedTuple):
    place: Path
    status: int


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    place = tmp_path_factory.mktemp("study")
    return Study(place, reproduce(study_options(place)))


def test_the_study_has_one_row_for_every_arm_at_every_seed(study: Study) -> None:
    assert study.status == 0
    found = [(row["seed"], *row["cell"].values()) for row in rows(study.place)]
    assert found == [(seed, *arm) for seed in SEEDS for arm in ARMS]


def test_all_cells_are_measured_by_one_classifier(study: Study) -> None:
    assert len(list((study.place / "runs").rglob("classifier-*.pt"))) == 1
    assert len({row["metrics"]["floor"] for row in rows(study.place)}) == 1


def test_claims_without_rows_are_inconclusive_and_the_others_judged_on_every_seed(study: Study) -> None:
    values = {claim["id"]: len(claim["values"]) for claim in report(study.place)["claims"]}
    judged = {"SG1a", "SG5a", "SG5b", "SG6", "SG8"}
    assert {name for name, count in values.items() if count == len(SEEDS)} == judged
    assert all(count == 0 for name, count in values.items() if name not in judged)


def test_the_report_has_data_text_page_and_figures(study: Study) -> None:
    check_report(study.place, CLAIMS, ["curves", "samples", "topology"])


def test_a_second_call_runs_nothing_again_and_gives_the_same_rows(study: Study) -> None:
    check_a_second_call_runs_nothing(reproduce, study.place, [])


def test_a_killed_study_gives_the_rows_of_an_undisturbed_one_when_called_again(study: Study, tmp_path: Path) -> None:
    wanted = [row for row in rows(study.place) if row["cell"]["arm"] == "dense"]
    check_a_killed_study_goes_on("sparse_gan", reproduce, tmp_path, PART, wanted)


def test_an_arm_sets_its_method_and_densities_and_nothing_else() -> None:
    settings = {"arm": "oneshot-uniform-both", "density_g": 0.1, "density_d": 0.5}
    config = replace(Config(), sparsity=SparsityConfig(update_every=7, tune_steps=3))
    sparsity = SparsityConfig("oneshot", 0.1, 0.5, update_every=7, tune_steps=3, scope="uniform", prune="both")
    assert arm_config(config, settings, 5) == replace(config, seed=5, sparsity=sparsity)


@pytest.mark.parametrize(
    ("arm", "wanted"),
    [
        ("static", SparsityConfig("static")),
        ("static-uniform", SparsityConfig("static", distribution="uniform")),
        ("stu", SparsityConfig("dynamic", explore="g", growth_g="gradient", growth_d="random")),
        ("stu-dense-moments", SparsityConfig("dynamic", moments="dense")),
        ("set", SparsityConfig("dynamic", growth_g="random")),
        ("only-d", SparsityConfig("dynamic", explore="d")),
        ("both", SparsityConfig("dynamic", explore="both", growth_d="random")),
        ("balanced", SparsityConfig("dynamic", balance=0.05)),
    ],
)
def test_an_ablation_differs_from_stu_gan_by_what_its_name_says(arm: str, wanted: SparsityConfig) -> None:
    settings = {"arm": arm, "density_g": 0.2, "density_d": 0.3}
    assert arm_config(Config(), settings, 0).sparsity == wanted


@pytest.mark.parametrize(("density", "rounds"), [(0.8, 1), (0.64, 2), (0.5, 4), (0.2, 8), (1.0, 1)])
def test_an_imp_arm_has_the_rounds_that_end_at_its_density(density: float, rounds: int) -> None:
    settings = {"arm": "imp", "density_g": density, "density_d": 0.3}

    def of_rounds(count: int) -> Config:
        return replace(Config(), sparsity=SparsityConfig(rounds=count))

    assert arm_config(of_rounds(rounds), settings, 0).sparsity.rounds == rounds
    for wrong in {1, rounds + 1} - {rounds}:
        with pytest.raises(ConfigError, match=rf"sparsity\.rounds must be {rounds} for the arm imp"):
            arm_config(of_rounds(wrong), settings, 0)


def test_a_cell_tells_its_progress(tmp_path: Path) -> None:
    told: list[float] = []
    cell = Cell({"arm": "static", "density_g": 0.5, "density_d": 0.5}, 1)
    (row,) = run_cell(smoke(), cell, tmp_path / "cell", told.append)
    assert told == sorted(told) and 0.9 < told[-1] <= 1 and row["metrics"]["fd"] > 0


def test_arms_are_read_with_their_densities() -> None:
    arms = GanStudy(arms=["dense", "stu 0.05 0.3"]).parsed()
    assert [(arm.name, arm.density_g, arm.density_d) for arm in arms] == [("dense", 1, 1), ("stu", 0.05, 0.3)]


def test_a_sheet_of_samples_survives_in_a_row_up_to_16_grey_levels() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    again = unpacked_sheet(packed_sheet(images))
    assert again.shape == images.shape and (again.float() - images.float()).abs().max() <= 8.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--scale", "huge"], r"--scale must be one of .*smoke"),
        (["--study.arms", "[]"], "study.arms must be at least one, none twice"),
        (["--study.arms", "[dense, imp 0.2 0.3]"], "sparsity.rounds must be 8 for the arm imp 0.2 0.3, got 1"),
        (
            ["--study.arms", "[dense, imp 0.8 0.3, gmp 0.2 0.3]", "--sparsity.update_every", "4"],
            "must be with gmp such",
        ),
        (
            ["--study.arms", "[dense, oneshot-global-g 0.2 0.3]", "--sparsity.tune_steps", "0"],
            "sparsity.tune_steps must be at least 0, with oneshot at least 1, got 0",
        ),
        (["--study.worker", "2"], "unknown key 'study.worker'; did you mean 'study.workers'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    wrong: Sequence[str], message: str, tmp_path: Path
) -> None:
    check_study_refuses(reproduce, tmp_path, wrong, message)
