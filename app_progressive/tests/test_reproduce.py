"""Facts about the study: its rows and report, that it does no work twice and loses none when killed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from app_progressive.claims import claims
from app_progressive.reproduce import arm_config, part_config, reproduce
from app_progressive.settings import Config, PartConfig, split_arm
from app_progressive.tests.nets import CONFIGS, config
from common.config import ConfigError, load
from common.tests.paper_checks import (
    check_a_killed_study_goes_on,
    check_a_second_call_runs_nothing,
    check_report,
    check_study_refuses,
    report,
    rows,
    study_options,
)

SIZES = "states: 6, size: 20, epochs: 1, milestones: [], q: 0.5"
F_PART = f"{{name: F, arms: [dense], seeds: 1, {SIZES}}}"
PARTS = [
    f"{{name: F, arms: [dense, osp, app, app-mag], seeds: 2, {SIZES}}}",
    f"{{name: L, arms: [app, released, random], seeds: 1, {SIZES}}}",
]
FASTER = ["--study.parts", f"[{', '.join(PARTS)}]"]


class Study(NamedTuple):
    place: Path
    status: int


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    place = tmp_path_factory.mktemp("study")
    return Study(place, reproduce([*study_options(place), *FASTER]))


def test_the_study_has_a_row_for_every_arm_of_every_part_and_seed(study: Study) -> None:
    assert study.status == 0
    found = sorted((row["cell"]["part"], row["cell"]["arm"], row["seed"]) for row in rows(study.place))
    few = [("F", arm, seed) for arm in ("app", "app-mag", "dense", "osp") for seed in (0, 1)]
    assert found == few + [("L", arm, 0) for arm in ("app", "random", "released")]


def test_random_masks_have_the_density_of_the_released_ones_in_every_state(study: Study) -> None:
    long = {row["cell"]["arm"]: row["metrics"] for row in rows(study.place) if row["cell"]["part"] == "L"}
    assert long["random"]["density"] == long["released"]["density"]
    assert long["released"]["density"][-1] < 0.5 * long["released"]["density_target"][-1]
    assert long["random"]["per_layer"] != long["released"]["per_layer"]


def test_the_report_judges_every_claim(study: Study) -> None:
    check_report(study.place, claims(config()), ["few", "layers", "long", "primary"])
    judged = {claim["id"]: claim for claim in report(study.place)["claims"]}
    assert judged["C5a"]["verdict"] == judged["C5b"]["verdict"] == "held"
    assert set(judged["C1"]["holm"]) == {"held", "not held"} and "Holm" in judged["C1w"]["rule"]
    assert {name for name, claim in judged.items() if not claim["values"]} == {
        "C1s", "C2n1", "C2n2", "C4a", "C4b", "C4c", "C7a", "C7b", "C8a", "C8b",
    }  # fmt: skip


def test_the_smoke_and_demo_studies_hold_all_claims_arms() -> None:
    for scale in ("smoke", "demo"):
        there = load(Config, CONFIGS / f"{scale}.yaml").study.parts
        arms = {(part.name, arm) for part in there for arm in part.arms}
        assert {("F", arm) for arm in ("dense", "osp", "app", "app-mag", "released", "shrink")} <= arms
        assert {("N", arm) for arm in ("dense", "app", "app@9.5")} <= arms
        assert {("L", arm) for arm in ("dense", "app", "released", "random")} <= arms
        assert {("T", arm) for arm in ("app@4.5", "app@14", "app@4.5/none")} <= arms


def test_arms_are_what_their_names_say() -> None:
    part = PartConfig("N", ["app"], 1, 5, 20, 3, [2], q=0.5, noise=0.3)
    base = part_config(config("--seed", 4), part)
    assert (base.stream.states, base.stream.noise, base.train.epochs, base.prune.q, base.seed) == (5, 0.3, 3, 0.5, 4)
    assert arm_config(base, "app") == base
    assert arm_config(base, "app-mag@9.5/none").prune.criterion == "mag"
    assert arm_config(base, "app-mag@9.5/none").prune.tau == 9.5
    assert arm_config(base, "app-mag@9.5/none").stream.replay == "none"
    assert {arm: arm_config(base, arm).prune.method for arm in ("dense", "osp", "shrink", "scratch", "imp")} == {
        "dense": "dense", "osp": "osp", "shrink": "dense", "scratch": "dense", "imp": "app",
    }  # fmt: skip
    assert [arm_config(base, arm).train.start for arm in ("shrink", "scratch", "imp", "app")] == [
        "shrink", "scratch", "rewind", "continue",
    ]  # fmt: skip
    released = arm_config(base, "released")
    assert (released.prune.score_weights, released.prune.update, released.prune.subset, released.prune.ties) == (
        "fresh", "intersect", "first", "threshold",
    )  # fmt: skip
    assert released.train.val_augment
    assert arm_config(base, "cubic").prune.schedule == "cubic" and arm_config(base, "open").prune.growth > 0
    random = arm_config(base, "random", [0.5] * 5).prune
    assert random.criterion == "random" and random.densities == [0.5] * 5


@pytest.mark.parametrize("arm", ["magic", "dense-snip", "app@", "app/some", "app-mag@9.5/"])
def test_unknown_arms_are_refused(arm: str) -> None:
    with pytest.raises(ConfigError, match=r"study\.parts\.arms must be of dense, .* got '"):
        split_arm(arm)


def test_a_second_call_runs_nothing_and_more_seeds_keep_what_is_there(study: Study) -> None:
    check_a_second_call_runs_nothing(reproduce, study.place, FASTER)


def test_a_killed_study_goes_on(study: Study, tmp_path: Path) -> None:
    wanted = [row for row in rows(study.place) if row["cell"]["part"] == "F"]
    few = ["--study.parts", f"[{PARTS[0]}]"]
    check_a_killed_study_goes_on("app_progressive", reproduce, tmp_path, few, wanted)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_is_whole(name: str) -> None:
    there = load(Config, CONFIGS / f"{name}.yaml")
    assert there.prune.tau == 4.5 and there.prune.base == 0.8 and there.train.weight_decay == 1e-4
    if name.startswith("paper_"):
        assert (there.train.epochs, there.train.milestones) == (50, [20, 40])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--scale", "huge"], r"--scale must be one of .*smoke"),
        (["--study.parts", "[]"], r"study\.parts must be at least one part"),
        (["--study.parts", f"[{{name: F, arms: [], seeds: 1, {SIZES}}}]"], r"study\.parts\.arms must be at least one"),
        (["--study.parts", f"[{{name: F, arms: [app, app], seeds: 1, {SIZES}}}]"], "without repetition"),
        (["--study.parts", f"[{{name: L, arms: [random], seeds: 1, {SIZES}}}]"], "released before random"),
        (["--study.parts", f"[{{name: F, arms: [app], seeds: 1, {SIZES.replace('20', '2000')}}}]"], r"stream\.size"),
        (["--study.parts", f"[{{name: F, arms: [app@0], seeds: 1, {SIZES}}}]"], "with an exponent of at least 1, got"),
        (["--study.parts", f"[{{name: F, arms: [app@1.2.3], seeds: 1, {SIZES}}}]"], r"study\.parts\.arms must be of"),
        (["--study.parts", f"[{{name: F, arms: [app-magic], seeds: 1, {SIZES}}}]"], "with a criterion of snip, taylor"),
        (
            ["--study.parts", f"[{F_PART}, {F_PART.replace('dense', 'app').replace('states: 6', 'states: 5')}]"],
            r"study\.parts must be of one stream and length of training wherever it is named, got 'F'",
        ),
        (["--study.parts", f"[{F_PART}, {F_PART}]"], r"study\.parts must be without an arm twice in parts of one name"),
        (["--study.worker", "2"], r"unknown key 'study\.worker'"),
        (["--study.margin", "0"], r"study\.margin must be positive, got 0"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    wrong: Sequence[str], message: str, tmp_path: Path
) -> None:
    check_study_refuses(reproduce, tmp_path, wrong, message)
