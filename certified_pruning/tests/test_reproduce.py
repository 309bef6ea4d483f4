"""Facts about the study: its rows, its report, and that it does no work twice and loses none when killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from certified_pruning.claims import CLAIMS
from certified_pruning.reproduce import reproduce
from common.config import ConfigError
from common.tests import children

FASTER = ["--eval.images", "2", "--verify.max_nodes", "4", "--train.epochs", "1"]
METHODS, SEEDS, ROUNDS = ["imp", "imp+nrs"], [0, 1], [0, 1]


def options(place: Path) -> list[str]:
    return ["--scale", "smoke", "--study.runs", f"{place}/runs", "--study.results", f"{place}/results", *FASTER]


def report(place: Path) -> dict[str, Any]:
    return json.loads((place / "results" / "smoke.json").read_text())


def moments(place: Path) -> dict[str, int]:
    """When each file of the cells was last written."""
    return {str(path): path.stat().st_mtime_ns for path in (place / "runs").rglob("*") if path.is_file()}


class Study(NamedTuple):
    place: Path
    status: int


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    place = tmp_path_factory.mktemp("study")
    return Study(place, reproduce(options(place)))


def test_the_study_has_one_row_a_round_of_every_method_and_seed(study: Study) -> None:
    found = [(row["cell"]["method"], row["seed"], row["cell"]["round"]) for row in report(study.place)["rows"]]
    assert study.status == 0
    assert found == [(method, seed, number) for seed in SEEDS for method in METHODS for number in ROUNDS]


def test_rows_carry_the_density_of_their_round_and_no_seconds(study: Study) -> None:
    for row in report(study.place)["rows"]:
        assert row["cell"]["density"] == 0.5 ** row["cell"]["round"]
        assert "seconds" not in row["metrics"] and {"verified", "val_verified", "unstable", "nodes"} <= set(
            row["metrics"]
        )


def test_the_two_methods_train_differently_from_the_same_seed(study: Study) -> None:
    rows = report(study.place)["rows"]
    assert rows[0]["metrics"] != rows[2]["metrics"]


def test_every_claim_is_judged_on_every_seed_or_for_want_of_numbers_on_none(study: Study) -> None:
    judged = report(study.place)["claims"]
    assert [claim["id"] for claim in judged] == [claim.id for claim in CLAIMS]
    assert {claim["verdict"] for claim in judged} <= {"held", "not held", "inconclusive"}
    assert {len(claim["values"]) for claim in judged} <= {0, len(SEEDS)}


def test_the_report_has_data_text_page_and_figures(study: Study) -> None:
    names = sorted(path.name for path in (study.place / "results").iterdir())
    assert names == ["smoke-instability.png", "smoke-levels.png", "smoke.html", "smoke.json", "smoke.md"]


def test_a_second_call_runs_nothing_again_and_gives_the_same_rows(study: Study) -> None:
    rows, before = report(study.place)["rows"], moments(study.place)
    assert reproduce(options(study.place)) == 0
    assert report(study.place)["rows"] == rows
    assert moments(study.place) == before


def test_a_killed_study_gives_the_rows_of_an_undisturbed_one_when_called_again(study: Study, tmp_path: Path) -> None:
    process = children.start("-m", "certified_pruning.reproduce", *options(tmp_path))
    children.until(lambda: list(tmp_path.rglob("*.rows.json")), seconds=120)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "results").exists()
    assert reproduce(options(tmp_path)) == 0
    assert report(tmp_path)["rows"] == report(study.place)["rows"]


def test_another_configuration_is_another_study_beside_the_first(study: Study, tmp_path: Path) -> None:
    before = moments(study.place)
    results = [
        "--study.results",
        str(tmp_path),
        "--study.seeds",
        "[0]",
        "--study.methods",
        "[imp]",
        "--train.lr",
        "0.1",
    ]
    assert reproduce([*options(study.place), *results]) == 0
    assert len(json.loads((tmp_path / "smoke.json").read_text())["rows"]) == len(ROUNDS)
    after = moments(study.place)
    clock = [name for name in before if name.endswith("seconds.json")]
    assert {name for name in before if after[name] != before[name]} <= set(clock)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--scale", "huge"], r"--scale must be one of .*smoke"),
        (["--study.methods", "[random]"], "study.methods must be imp and any of"),
        (["--study.worker", "2"], "unknown key 'study.worker'; did you mean 'study.workers'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    wrong: Sequence[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        reproduce([*options(tmp_path)[2 if "--scale" in wrong else 0 :], *wrong])
    assert list(tmp_path.iterdir()) == []
