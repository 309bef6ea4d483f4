"""Facts about the study: its rows and report, that it does no work twice and loses none when killed (check 19)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from backdoor_lth.claims import claims
from backdoor_lth.figures import summary
from backdoor_lth.pruning import survivors
from backdoor_lth.reproduce import arm_config, cells_of, reproduce
from backdoor_lth.settings import ArmConfig, Config
from backdoor_lth.tests.nets import CONFIGS, config
from common.config import parse
from common.study import Cell, StudyResult
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
        assert whats.count("dense") == 1 and whats.count("ticket") == 3 and whats.count("scan") in (3, 4, 5)
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
        "B6a",
        "B6b",
        "B7",
        "B13",
    }
    one_right = {"B5b", "K5"}  # where at some seed one is right and the other not
    assert measured - one_right == there | {"K1", "K2", "K3"}


def test_a_second_call_runs_nothing(study: Study) -> None:
    check_a_second_call_runs_nothing(reproduce, study.place, [])


def test_a_killed_study_goes_on(study: Study, tmp_path: Path) -> None:
    few = ["--study.arms", "[{name: poisoned}]", "--study.seeds", "[0]"]
    wanted = [row for row in rows(study.place) if (row["cell"]["arm"], row["seed"]) == ("poisoned", 0)]
    check_a_killed_study_goes_on("backdoor_lth", reproduce, tmp_path, few, wanted)


def test_the_demo_has_the_attack_and_three_controls() -> None:
    demo = parse(Config, ["--config", str(CONFIGS / "demo.yaml")], prog="")
    cells = [(cell.arm.name, cell.seed) for cell in cells_of(demo.study)]
    assert {arm for arm, _ in cells} == {"poisoned", "clean", "relabelled", "equalised"}
    assert [seed for arm, seed in cells if arm == "poisoned"] == demo.study.seeds and len(demo.study.seeds) >= 5


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Sequence[Cell], str]]:
    """The cells and the identity of a study that is then not run."""

    class Stop(Exception):
        pass

    def plan(*options: str) -> tuple[Sequence[Cell], str]:
        told: list[Any] = []

        def stop(cells: Sequence[Cell], run_cell: object, folder: Path, identity: str, study: object) -> None:
            told.extend((cells, identity))
            raise Stop

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr("backdoor_lth.reproduce.run_study", stop)
            reproduce([*options, "--study.runs", str(tmp_path)])
        return told[0], told[1]

    return plan


def test_the_word_full_stands_for_eight_seeds_and_more_controls(planned: Callable[..., Any]) -> None:
    counts = {}
    for seeds in ("[full]", "[10, 11]"):
        cells, _ = planned("--scale", "demo", "--study.seeds", seeds)
        arms = [cell.settings["arm"] for cell in cells]
        counts[seeds] = [arms.count(arm) for arm in ("poisoned", "clean", "relabelled", "equalised")]
        if seeds == "[full]":
            assert [cell.seed for cell in cells][:8] == list(range(10, 18))
    assert counts == {"[full]": [8, 5, 4, 4], "[10, 11]": [2, 2, 1, 1]}


@pytest.mark.parametrize(("options", "name"), [(["--study.seeds", "[full]"], "demo_full"), ([], "demo")])
def test_the_report_of_the_larger_study_leaves_that_of_the_demo_alone(
    options: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def study(*rest: Any) -> StudyResult:
        return StudyResult("demo", [], {}, 0.0, [])

    told: list[str] = []
    monkeypatch.setattr("backdoor_lth.reproduce.run_study", study)
    monkeypatch.setattr("backdoor_lth.reproduce.report", lambda paper, result, *rest: told.append(result.scale))
    reproduce(["--scale", "demo", *options])
    assert told == [name]


def test_a_scale_without_a_larger_study_stays_as_it_is(planned: Callable[..., Any]) -> None:
    assert planned("--scale", "smoke", "--study.seeds", "[full]") == planned("--scale", "smoke")


def test_a_cell_is_found_again_with_other_arms_and_not_with_another_of_its_own(planned: Callable[..., Any]) -> None:
    def names(arms: str) -> list[str]:
        cells, identity = planned("--scale", "smoke", "--study.arms", arms)
        return [f"{cell}\n{identity}" for cell in cells]

    both, one = names("[{name: a}, {name: b, kind: none, seeds: 1}]"), names("[{name: b, kind: none, full: 3}]")
    assert len(both) == 3 and len(one) == 2 and both[2] == one[0]
    assert not set(names("[{name: b, kind: none, rate: 0.4}]")) & set(one)


def test_an_arm_may_have_a_rate_and_rounds_of_its_own() -> None:
    paper = parse(Config, ["--config", str(CONFIGS / "paper.yaml")], prog="")
    left = {}
    for arm in paper.study.arms:
        prune = arm_config(paper, arm).prune
        left[arm.name] = survivors(267_696, prune.rate, prune.rounds)[-1]
    assert {left[arm] for arm in ("poisoned", "random", "rate40")} == {4} and left["rate10"] == 5


def test_an_arm_changes_what_it_says_and_nothing_else() -> None:
    base = config("--attack.place", "top_left")
    arm = ArmConfig("other", kind="relabel", equalise=True, place="random", method="snip", rate=0.3, rounds=7)
    made = arm_config(base, arm)
    attack = replace(base.attack, kind="relabel", equalise=True, place="random")
    assert made == replace(base, attack=attack, prune=replace(base.prune, method="snip", rate=0.3, rounds=7))
    assert arm_config(base, ArmConfig("same")) == base and base.attack.place == "top_left" and base.prune.rate == 0.5


def test_a_summary_says_where_an_attack_is_not_implanted(study: Study) -> None:
    found = rows(study.place)
    for row in found:
        row["metrics"]["asr"] = 95.0 if row["seed"] else 89.0
    lines = summary(found, {"poisoned": "dirty", "clean": "none"})
    assert [line for line in lines if "implanted" in line] == [
        "poisoned: attack not implanted at seeds 0 (ASR below 90 % on the dense network)"
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--scale", "huge"], r"--scale must be one of .*smoke"),
        (["--study.arms", "[]"], r"study\.arms must be at least one"),
        (["--study.arms", "[{name: a}, {name: a}]"], r"study\.arms must be at least one, of different names"),
        (["--study.arms", "[{name: a, place: middle}]"], r"study\.arms\.place must be one of"),
        (["--task", "surrogate"], "task must be chain in a study, got 'surrogate'"),
        (["--attack.target", "12"], "attack: target must be a class of the labels, got 12"),
        (["--score.extreme", "0.01"], r"score\.extreme must be at least the last ticket's density, 0\.02"),
        (["--study.worker", "2"], r"unknown key 'study\.worker'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    wrong: Sequence[str], message: str, tmp_path: Path
) -> None:
    check_study_refuses(reproduce, tmp_path, wrong, message)
