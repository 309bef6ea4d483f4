"""Facts about the study: its rows, its report, and that it does no work twice and loses none when killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from certified_pruning.claims import claims
from certified_pruning.reproduce import reproduce
from common.config import ConfigError
from common.tests import children

FASTER = ["--eval.images", "2", "--verify.max_nodes", "4", "--train.epochs", "1", "--study.seeds", "[0, 1]"]
FASTER += ["--study.cells", "[{method: imp}, {method: nrs, rate: 0.25, first_round: 1}]"]
METHODS, SEEDS = ["imp", "nrs"], [0, 1]
LEVELS = [("imp", 0, 1.0), ("imp", 1, 0.5), ("nrs", 1, 0.8)]  # 8 of 10 channels


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
    rows = report(study.place)["rows"]
    found = [(r["cell"]["method"], r["cell"]["round"], r["cell"]["density"], r["seed"]) for r in rows]
    assert study.status == 0
    assert found == [(*level, seed) for seed in SEEDS for level in LEVELS]
    assert all(row["cell"]["regime"] == "fgsm" for row in rows)


def test_rows_hold_metrics_and_no_seconds(study: Study) -> None:
    wanted = {"verified", "val_verified", "ibp_verified", "val_ibp_verified", "unstable", "nodes", "gap_1", "gap_3"}
    for row in report(study.place)["rows"]:
        assert "seconds" not in row["metrics"] and wanted <= set(row["metrics"])
        assert row["metrics"]["falsified"] + row["metrics"]["verified"] <= 100


def test_every_claim_is_judged_on_every_seed_or_for_want_of_numbers_on_none(study: Study) -> None:
    judged = report(study.place)["claims"]
    assert [claim["id"] for claim in judged] == [claim.id for claim in claims(4)]
    assert "at most 4 nodes an image" in judged[0]["statement"]
    assert {claim["verdict"] for claim in judged} <= {"held", "not held", "inconclusive"}
    assert {len(claim["values"]) for claim in judged} <= {0, len(SEEDS)}


def test_the_report_has_data_text_page_and_figures(study: Study) -> None:
    names = sorted(path.name for path in (study.place / "results").iterdir())
    assert names == [
        *(f"smoke-{name}.png" for name in ("gaps", "instability", "levels")),
        *(f"smoke.{kind}" for kind in ("html", "json", "md")),
    ]


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


def test_rows_do_not_depend_on_how_many_processes_work(study: Study, tmp_path: Path) -> None:
    assert reproduce([*options(tmp_path), "--study.workers", "1", "--study.seeds", "[1]"]) == 0
    assert report(tmp_path)["rows"] == [row for row in report(study.place)["rows"] if row["seed"] == 1]


def test_another_configuration_is_another_study_beside_the_first(study: Study, tmp_path: Path) -> None:
    before = moments(study.place)
    results = [
        "--study.results",
        str(tmp_path),
        "--study.seeds",
        "[0]",
        "--study.cells",
        "[{method: imp}]",
        "--train.lr",
        "0.1",
    ]
    assert reproduce([*options(study.place), *results]) == 0
    assert len(json.loads((tmp_path / "smoke.json").read_text())["rows"]) == 2
    after = moments(study.place)
    clock = [name for name in before if name.endswith("seconds.json")]
    assert {name for name in before if after[name] != before[name]} <= set(clock)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--scale", "huge"], r"--scale must be one of .*smoke"),
        (["--study.cells", "[{method: magnitude}]"], "study.cells"),
        (["--study.cells", "[{method: imp, at_init: true}]"], "prune.at_init must be with method snip or taylor"),
        (["--study.worker", "2"], "unknown key 'study.worker'; did you mean 'study.workers'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    wrong: Sequence[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        reproduce([*options(tmp_path)[2 if "--scale" in wrong else 0 :], *wrong])
    assert list(tmp_path.iterdir()) == []
