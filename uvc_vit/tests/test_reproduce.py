"""Facts about the study: its rows, claims and report, and that it does no work twice and loses none when killed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from common.config import ConfigError, parse
from common.data import ImageFiles, ImageSet, load
from common.runs import load_checkpoint
from common.study import scale_arguments
from common.tests.paper_checks import (
    check_a_killed_study_goes_on,
    check_a_second_call_runs_nothing,
    check_report,
    check_study_refuses,
    rows,
    study_options,
)
from uvc_vit.adapter import BlockDims, ViTAdapter
from uvc_vit.audit import log_error, skipped_share
from uvc_vit.choose import build
from uvc_vit.claims import CLAIMS, overshoot
from uvc_vit.macs import block_macs
from uvc_vit.plan import Plan
from uvc_vit.reproduce import HERE, arm_config, reproduce, shared_logits, trajectory, whole_blocks, whole_grid
from uvc_vit.settings import STUDY_ARMS, UNSTRUCTURED, Config

PAIRS = [("start", 1.0), ("uvc", 0.5), ("skip-only", 0.5), ("magnitude", 0.5)]
PAIRS += [("dense", 0.7), ("released", 0.7)]


class Study(NamedTuple):
    place: Path
    status: int


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    place = tmp_path_factory.mktemp("study")
    return Study(place, reproduce(study_options(place)))


def test_the_study_has_one_row_for_every_arm_and_budget_at_every_seed(study: Study) -> None:
    assert study.status == 0
    found = [(row["seed"], row["cell"]["arm"], row["cell"]["budget"]) for row in rows(study.place)]
    assert found == [(seed, *pair) for seed in (0, 1) for pair in PAIRS]


def test_arms_of_groups_meet_the_budget_and_arms_of_blocks_get_at_least_as_much(study: Study) -> None:
    for row in rows(study.place):
        arm, budget, share = row["cell"]["arm"], row["cell"]["budget"], row["metrics"]["share"]
        if arm in ("uvc", "magnitude"):
            assert budget - 0.02 < share <= budget
        if arm == "skip-only":
            assert budget <= share < budget + 1 / 3
            assert row["metrics"]["skipped_share"] == 1
    assert max(overshoot(rows(study.place))) < 0.02


def test_every_arm_starts_from_the_dense_network_of_its_seed(study: Study) -> None:
    starts = sorted(study.place.glob("runs/**/start/model.pt"))
    assert len(starts) == 2
    for path in starts:
        start = load_checkpoint(path)["model"]
        before = load_checkpoint(path.parent.parent / "dense-0.7" / "before.pt")["model"]
        assert start.keys() == before.keys() and all(torch.equal(start[key], before[key]) for key in start)


@pytest.mark.parametrize(("budget", "blocks"), [(0.9, 3), (1.0, 3), (0.5, 2), (0.4, 1)])
def test_arms_of_whole_blocks_get_the_fewest_that_cost_enough_and_never_more_than_all(
    budget: float, blocks: int
) -> None:
    config = parse(Config, scale_arguments(HERE / "configs", ["--scale", "smoke"]), prog="reproduce")
    splits = load(config.data)
    adapter = ViTAdapter(build(config, splits.train))
    tokens, embed = adapter.tokens((28, 28)), adapter.embed_macs((28, 28))
    block = block_macs(adapter.dims[0], tokens).total
    found = whole_blocks(config, splits, budget)
    share = (embed + blocks * block) / (embed + 3 * block)
    assert found == (1.0 if blocks == 3 else pytest.approx(share + 1e-9, abs=1e-12))
    assert arm_config(config, "skip-only", found).method.budget == found


def test_the_report_is_whole_and_judges_every_claim(study: Study) -> None:
    check_report(study.place, CLAIMS, ("accuracy", "plans", "search"))


def test_a_finished_study_is_not_run_again(study: Study) -> None:
    check_a_second_call_runs_nothing(reproduce, study.place, [])


def test_a_killed_study_goes_on(study: Study, tmp_path: Path) -> None:
    check_a_killed_study_goes_on("uvc_vit", reproduce, tmp_path, [], rows(study.place))


def test_wrong_options_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for wrong, message in (
        (["--study.arms", "[uvc, magic]"], "study.arms must be some of uvc"),
        (["--study.budget", "0"], r"study.budget must be in \(0, 1\], got 0"),
        (["--method.skip", "false"], "method.prune must be true where skip is false"),  # of arm skip-only
        (["--scale", "huge"], "--scale must be one of"),
    ):
        check_study_refuses(reproduce, tmp_path, wrong, message)


@pytest.mark.parametrize("name", STUDY_ARMS)
def test_an_arm_differs_from_the_full_method_only_in_its_own_setting(name: str) -> None:
    config = parse(Config, scale_arguments(HERE / "configs", ["--scale", "smoke"]), prog="reproduce")
    expected: dict[str, Any] = {
        "prune-only": {"skip": False},
        "skip-only": {"prune": False},
        "released": {"mode": "released", "accounting": "released"},
    }.get(name, {})
    found = arm_config(config, name, 0.4)
    differing = {key: value for key, value in vars(found.method).items() if value != vars(config.method)[key]}
    assert differing == {"budget": 0.4, **expected}
    kd = {"no-kd": ("none", "batchmean"), "kd-numel": ("soft", "numel")}.get(name, ("soft", "batchmean"))
    assert (found.kd.kind, found.kd.reduction) == kd
    arms = ("dense", "magnitude", "random", "gradient", "drop-last", *UNSTRUCTURED)
    assert found.arm == (name if name in arms else "uvc")
    assert (found.train, found.search, found.seed) == (config.train, config.search, config.seed)


def test_the_released_arm_counts_as_released_where_the_others_are_timed() -> None:
    config = parse(Config, scale_arguments(HERE / "configs", ["--scale", "smoke"]), prog="reproduce")
    timed = replace(config, method=replace(config.method, accounting="latency", table="table.json"))
    assert arm_config(timed, "released", 0.5).method == arm_config(config, "released", 0.5).method


def test_the_teachers_logits_are_kept_where_they_are_few() -> None:
    config = parse(Config, scale_arguments(HERE / "configs", ["--scale", "demo"]), prog="reproduce")
    images, labels = torch.zeros(4000, 1, 28, 28, dtype=torch.uint8), torch.zeros(4000, dtype=torch.long)
    assert shared_logits(config, ImageSet(images, labels, 10)) == {}
    assert shared_logits(config, ImageSet(images, labels, 100_000)) is None
    assert shared_logits(config, ImageSet(ImageFiles(["file"] * 4000, config.data), labels, 10)) is None


def test_seeds_full_stand_for_the_whole_grid() -> None:
    make = ["--scale", "demo", "--study.workers", "2", "--study.seeds", "[full]", "--train.lr", "1e-3"]
    assert whole_grid(make) == ["--study.workers", "2", "--train.lr", "1e-3", "--scale", "demo_full"]
    with pytest.raises(ConfigError, match="--scale must be demo with seeds full"):
        whole_grid(["--scale", "cifar", *make[2:]])
    assert whole_grid(make[:4]) == make[:4] and whole_grid(["--study.seeds", "[0,1]"]) == ["--study.seeds", "[0,1]"]
    config = parse(Config, scale_arguments(HERE / "configs", whole_grid(make)), prog="reproduce")
    assert set(config.study.arms) | set(config.study.wide_arms) == set(STUDY_ARMS) and config.train.lr == 1e-3


def test_rows_keep_the_course_of_stage_1(study: Study, tmp_path: Path) -> None:
    for row in rows(study.place):
        searched = row["cell"]["arm"] in ("uvc", "skip-only", "released")
        assert ("search_R" in row["metrics"]) == searched
        if searched:
            assert row["metrics"]["search_step"] == [1, 2, 3, 4, 5] and len(row["metrics"]["search_z"]) == 5
    lines = [{"step": step, "split": "search", "R": 1 - step / 1000, "z": 0, "target": 0.5} for step in range(1, 151)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = trajectory(tmp_path, points=60)
    assert found["search_step"] == list(range(1, 151, 3)) and found["search_R"][1] == 1 - 4 / 1000


def test_the_authors_log_is_that_of_skipped_blocks() -> None:
    assert log_error() < 1e-5


def test_the_share_that_skipped_blocks_save_is_counted() -> None:
    sizes = (BlockDims(8, 4, (4, 4), 16),) * 2
    full = Plan.full(sizes)
    assert skipped_share(full, 5, 100) == 0
    half = Plan(sizes, (True, False), full.keep_head, full.keep_dim, (tuple(range(8)), tuple(range(16))))
    assert skipped_share(half, 5, 100) == pytest.approx(2960 / (2960 + 640))  # 8 of 16 neurons: 2 * 5 * 8 * 8
