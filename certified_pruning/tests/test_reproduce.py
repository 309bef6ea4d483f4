"""Facts about the study: its rows, its report, and that it does no work twice and loses none when killed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import pytest

from certified_pruning.claims import claims
from certified_pruning.reproduce import HERE, chain_config, reproduce
from certified_pruning.settings import Config, PruningStudy
from common.study import study_config
from common.tests.paper_checks import (
    check_a_killed_study_goes_on,
    check_a_second_call_runs_nothing,
    check_report,
    check_study_refuses,
    moments,
    report,
    rows,
    study_options,
)

CONFIGS = HERE / "configs"

FASTER = ["--eval.images", "2", "--verify.max_nodes", "4", "--train.epochs", "1", "--study.seeds", "[0, 1]"]
FASTER += ["--study.cells", "[{method: imp}, {method: nrs, rate: 0.25, first_round: 1}]"]
METHODS, SEEDS = ["imp", "nrs"], [0, 1]
LEVELS = [("imp", 0, 1.0), ("imp", 1, 0.5), ("nrs", 1, 0.8)]  # 8 of 10 channels


class Study(NamedTuple):
    place: Path
    status: int


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    place = tmp_path_factory.mktemp("study")
    return Study(place, reproduce([*study_options(place), *FASTER]))


def test_the_study_has_one_row_a_round_of_every_method_and_seed(study: Study) -> None:
    there = rows(study.place)
    found = [(r["cell"]["method"], r["cell"]["round"], r["cell"]["density"], r["seed"]) for r in there]
    assert study.status == 0
    assert found == [(*level, seed) for seed in SEEDS for level in LEVELS]
    assert all(row["cell"]["regime"] == "fgsm" for row in there)


def test_rows_hold_metrics_and_no_seconds(study: Study) -> None:
    wanted = {"verified", "val_verified", "ibp_verified", "val_ibp_verified", "unstable", "nodes", "gap_1", "gap_3"}
    for row in rows(study.place):
        assert "seconds" not in row["metrics"] and wanted <= set(row["metrics"])
        assert row["metrics"]["falsified"] + row["metrics"]["verified"] <= 100


def test_every_claim_is_judged_on_every_seed_or_for_want_of_numbers_on_none(study: Study) -> None:
    judged = report(study.place)["claims"]
    assert "at most 4 nodes an image" in judged[0]["statement"]
    counts = {claim["id"]: len(claim["values"]) for claim in judged}
    assert counts.pop("C3") in (1, len(SEEDS))  # one, where of too few pruners enough is known
    assert set(counts.values()) <= {0, len(SEEDS)}


def test_the_report_has_data_text_page_and_figures(study: Study) -> None:
    check_report(study.place, claims(4), ["gaps", "instability", "levels"])


def test_a_second_call_runs_nothing_again_and_gives_the_same_rows(study: Study) -> None:
    check_a_second_call_runs_nothing(reproduce, study.place, FASTER)


def test_a_killed_study_gives_the_rows_of_an_undisturbed_one_when_called_again(study: Study, tmp_path: Path) -> None:
    check_a_killed_study_goes_on("certified_pruning", reproduce, tmp_path, FASTER, rows(study.place))


def test_rows_do_not_depend_on_how_many_processes_work(study: Study, tmp_path: Path) -> None:
    assert reproduce([*study_options(tmp_path), *FASTER, "--study.workers", "1", "--study.seeds", "[1]"]) == 0
    assert rows(tmp_path) == [row for row in rows(study.place) if row["seed"] == 1]


def test_another_configuration_is_another_study_beside_the_first(study: Study, tmp_path: Path) -> None:
    before = moments(study.place)
    results = ["--study.results", str(tmp_path), "--study.seeds", "[0]", "--study.cells", "[{method: imp}]"]
    assert reproduce([*study_options(study.place), *FASTER, *results, "--train.lr", "0.1"]) == 0
    assert len(json.loads((tmp_path / "smoke.json").read_text())["rows"]) == 2
    after = moments(study.place)
    assert {name: after[name] for name in before} == before


def chains(scale: str) -> list[Config]:
    """The chains of a scale's study, at its first seed."""
    config = study_config(Config, CONFIGS, ["--scale", scale])
    shared, found = replace(config, study=PruningStudy()), []
    for cell in config.study.cells:
        changes = {name: value for name, value in asdict(cell).items() if value is not None}
        found.append(chain_config(shared, changes, config.study.seeds[0]))
    return found


@pytest.mark.parametrize("scale", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_cell_of_every_scale_is_a_possible_chain(scale: str) -> None:
    assert chains(scale)


def test_the_exact_scales_have_the_weight_decays_and_schedules_of_the_release() -> None:
    fgsm, certified = chains("paper_exact"), chains("paper_exact_cibp")
    for chain in fgsm:
        one_shot = chain.prune.at_init
        assert chain.train.weight_decay == (0 if one_shot else 5e-4) and chain.train.milestones_early == 8
        assert (chain.train.eps_start, chain.train.eps_ramp) == (0 if one_shot else 11, 0)
    free = {"random", "imp+nrs", "nrs"}
    for chain in certified:
        without = chain.prune.method in free or chain.prune.at_init
        assert chain.train.weight_decay == (0 if without else 1e-5) and chain.train.milestones_early == 0
    assert {chain.train.weight_decay for chain in chains("paper_cibp")} == {1e-5}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--scale", "huge"], r"--scale must be one of .*smoke"),
        (["--study.cells", "[{method: magnitude}]"], "study.cells"),
        (["--study.cells", "[{method: imp}, {method: imp, eps: 0.2}]"], "study.cells must be one chain of imp and of"),
        (["--study.cells", "[{method: imp, at_init: true}]"], "prune.at_init must be with method snip or taylor"),
        (["--study.worker", "2"], "unknown key 'study.worker'; did you mean 'study.workers'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    wrong: Sequence[str], message: str, tmp_path: Path
) -> None:
    check_study_refuses(reproduce, tmp_path, wrong, message)
