"""Facts about the study: its rows and report, that it does no work twice and loses none when killed (check 19)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from backdoor_lth.claims import claims
from backdoor_lth.reproduce import arms_seeds, reproduce
from backdoor_lth.settings import Config
from backdoor_lth.tests.nets import CONFIGS, config
from common.config import parse
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


class Study(NamedTuple):
    place: Path
    status: int


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    place = tmp_path_factory.mktemp("study")
    return Study(place, reproduce(study_options(place)))


def test_the_study_has_a_row_for_every_network(study: Study) -> None:
    assert study.status == 0
    found = [(row["cell"]["arm"], row["seed"], row["cell"]["what"]) for row in rows(study.place)]
    for cell in (("poisoned", 0), ("poisoned", 1), ("clean", 0)):
        whats = [what for arm, seed, what in found if (arm, seed) == cell]
        assert whats.count("dense") == 1 and whats.count("ticket") == 3 and whats.count("scan") in (4, 5)
    assert all(0 <= row["metrics"][name] <= 100 for row in rows(study.place) for name in ("sa", "asr", "ctr"))


def test_the_report_judges_every_claim(study: Study) -> None:
    check_report(study.place, claims(config()), ["masks", "rates"])
    judged = {claim["id"]: claim for claim in report(study.place)["claims"]}
    measured = {name for name, claim in judged.items() if claim["values"]}
    there = {
        "B1a",
        "B1b",
        "B2a",
        "B2b",
        "B3a",
        "B3b",
        "B3c",
        "B3d",
        "B4",
        "B5a",
        "B5b",
        "B6a",
        "B6b",
        "B7",
        "B8",
        "B13",
    }
    assert measured == there | {"K2", "K3", "K5"}


def test_a_second_call_runs_nothing(study: Study) -> None:
    check_a_second_call_runs_nothing(reproduce, study.place, [])


def test_a_killed_study_goes_on(study: Study, tmp_path: Path) -> None:
    few = ["--study.arms", "[{name: poisoned}]", "--study.seeds", "[0]"]
    wanted = [row for row in rows(study.place) if (row["cell"]["arm"], row["seed"]) == ("poisoned", 0)]
    check_a_killed_study_goes_on("backdoor_lth", reproduce, tmp_path, few, wanted)


def test_the_demo_has_the_attack_and_three_controls() -> None:
    demo = parse(Config, ["--config", str(CONFIGS / "demo.yaml")], prog="")
    cells = [(arm.name, seed) for arm, seed in arms_seeds(demo.study)]
    assert {arm for arm, _ in cells} == {"poisoned", "clean", "relabelled", "equalised"}
    assert [seed for arm, seed in cells if arm == "poisoned"] == demo.study.seeds and len(demo.study.seeds) >= 5


def test_the_word_full_stands_for_eight_seeds_and_more_controls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    told: list[Sequence[Cell]] = []

    def stop(cells: Sequence[Cell], *_: object) -> None:
        told.append(cells)
        raise Stop

    monkeypatch.setattr("backdoor_lth.reproduce.run_study", stop)
    counts = {}
    for seeds in ("[full]", "[10, 11]"):
        with pytest.raises(Stop):
            reproduce(["--scale", "demo", "--study.seeds", seeds, "--study.runs", str(tmp_path)])
        arms = [cell.settings["arm"] for cell in told[-1]]
        counts[seeds] = [arms.count(arm) for arm in ("poisoned", "clean", "relabelled", "equalised")]
    assert counts == {"[full]": [8, 5, 4, 4], "[10, 11]": [2, 2, 1, 1]}
    assert [cell.seed for cell in told[0]][:8] == list(range(10, 18))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--scale", "huge"], r"--scale must be one of .*smoke"),
        (["--study.arms", "[]"], r"study\.arms must be at least one"),
        (["--study.arms", "[{name: a}, {name: a}]"], r"study\.arms must be at least one, of different names"),
        (["--study.arms", "[{name: a, place: middle}]"], r"study\.arms\.place must be one of"),
        (["--task", "surrogate"], "task must be chain in a study, got 'surrogate'"),
        (["--attack.target", "12"], "attack: target must be a class of the labels, got 12"),
        (["--study.worker", "2"], r"unknown key 'study\.worker'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    wrong: Sequence[str], message: str, tmp_path: Path
) -> None:
    check_study_refuses(reproduce, tmp_path, wrong, message)
