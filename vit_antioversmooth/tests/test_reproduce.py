"""Facts about the study: its rows, claims and report, and that it does no work twice and loses none when killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from common.config import ConfigError, parse
from common.study import Cell, scale_arguments
from common.tests import children
from vit_antioversmooth.claims import CLAIMS
from vit_antioversmooth.reproduce import HERE, TUNED, arm_config, reproduce, run_cell
from vit_antioversmooth.settings import ARMS, Config, ScaleConfig

FASTER = ["--train.epochs", "1", "--data.fraction", "0.02", "--model.depth", "2"]
STUDIED = ["--study.arms", "[plain, init]"]
SEEDS = [0, 1]
CONFIGS = HERE / "configs"


def options(place: Path) -> list[str]:
    return ["--scale", "smoke", "--study.runs", f"{place}/runs", "--study.results", f"{place}/results", *FASTER]


def report(place: Path) -> dict[str, Any]:
    return json.loads((place / "results" / "smoke.json").read_text())


def rows(place: Path) -> list[dict[str, Any]]:
    """The rows without the only numbers that may differ: times."""
    found = report(place)["rows"]
    for row in found:
        row["metrics"] = {name: value for name, value in row["metrics"].items() if not name.endswith("_ratio")}
    return found


def moments(place: Path) -> dict[str, int]:
    """When each file of the cells was last written."""
    return {str(path): path.stat().st_mtime_ns for path in (place / "runs").rglob("*") if path.is_file()}


class Study(NamedTuple):
    place: Path
    status: int


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    place = tmp_path_factory.mktemp("study")
    return Study(place, reproduce([*options(place), *STUDIED]))


def test_the_study_has_one_row_for_every_network_at_every_seed(study: Study) -> None:
    arms = ["plain", *TUNED, "init"]
    assert study.status == 0
    assert [(row["seed"], row["cell"]["arm"]) for row in rows(study.place)] == [(s, arm) for s in SEEDS for arm in arms]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_yields_its_layers_and_its_scales(arm: str, tmp_path: Path) -> None:
    config = parse(Config, scale_arguments(CONFIGS, ["--scale", "smoke", *FASTER]), prog="reproduce")
    told: list[float] = []
    found = run_cell(config, Cell({"arm": arm}, 1), tmp_path / "cell", told.append)
    assert [row.get("cell", {}).get("arm", arm) for row in found] == [arm, *(TUNED if arm == "plain" else [])]
    if arm == "init":
        (row,) = found
        assert len(row["metrics"]["dose_hc_over_dc"]) == len(row["metrics"]["dose_noskip_hc_over_dc"]) == 3
        return
    assert told == sorted(told) and told[-1] == pytest.approx(1)
    for row in found:
        name, metrics = row.get("cell", {}).get("arm", arm), row["metrics"]
        assert len(metrics["patch_cosine"]) == 3 and 0 <= metrics["test_accuracy"] <= 100
        assert ("omega" in metrics) == ("attnscale" in name or name == "both")
        assert ("s" in metrics) == ("featscale" in name or name == "both")
        assert ("violations" in metrics) == ("plain" in name)


def test_controls_are_blind_and_arms_without_skip_have_their_own_size() -> None:
    config = Config()
    assert arm_config(config, "featscale-control").scales == ScaleConfig(method="featscale", blind=True)
    assert arm_config(config, "attnscale").scales == ScaleConfig(method="attnscale")
    noskip = arm_config(config, "noskip-attnscale")
    assert (noskip.model.skip, noskip.model.depth, noskip.train.epochs) == (False, 8, 6)
    assert noskip.scales == ScaleConfig(method="attnscale", init=20.0)
    assert arm_config(config, "noskip-plain").scales == ScaleConfig(method="plain")
    assert arm_config(config, "plain") == config


def test_every_claim_is_judged_on_every_seed_or_for_want_of_rows_on_none(study: Study) -> None:
    judged = report(study.place)["claims"]
    assert [claim["id"] for claim in judged] == [claim.id for claim in CLAIMS]
    assert {claim["verdict"] for claim in judged} <= {"held", "not held", "inconclusive"}
    assert {len(claim["values"]) for claim in judged} == {0, len(SEEDS)}
    verdicts = {claim["id"]: claim["verdict"] for claim in judged}
    assert (verdicts["C1"], verdicts["C2"], verdicts["C6a"]) == ("held", "held", "held")


def test_the_report_has_data_text_page_and_figures(study: Study) -> None:
    names = sorted(path.name for path in (study.place / "results").iterdir())
    figures = ["smoke-layers.png", "smoke-lowpass.png"]
    assert names == [*figures, "smoke.html", "smoke.json", "smoke.md"]


def test_a_second_call_runs_nothing_again_and_gives_the_same_rows(study: Study) -> None:
    before, there = moments(study.place), report(study.place)["rows"]
    assert reproduce([*options(study.place), *STUDIED]) == 0
    assert report(study.place)["rows"] == there
    assert moments(study.place) == before


def test_a_killed_study_gives_the_rows_of_an_undisturbed_one_when_called_again(study: Study, tmp_path: Path) -> None:
    part = [*options(tmp_path), "--study.arms", "[plain]", "--study.workers", "1"]
    process = children.start("-m", "vit_antioversmooth.reproduce", *part)
    children.until(lambda: list(tmp_path.rglob("*.rows.json")), seconds=120)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "results").exists()
    assert reproduce(part) == 0
    whole = [row for row in rows(study.place) if row["cell"]["arm"] != "init"]
    assert rows(tmp_path) == whole


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--scale", "huge"], r"--scale must be one of .*smoke"),
        (["--study.arms", "[attnscale]"], "study.arms must be plain and any of"),
        (["--study.omegas", "[1]"], "study.omegas must be at least two numbers"),
        (["--study.worker", "2"], "unknown key 'study.worker'; did you mean 'study.workers'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    wrong: Sequence[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        reproduce([*options(tmp_path)[2 if "--scale" in wrong else 0 :], *wrong])
    assert list(tmp_path.iterdir()) == []
