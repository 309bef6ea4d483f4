"""Facts about the study: its rows, claims and report, and that it does no work twice and loses none when killed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.config import parse
from common.data import load
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
from vit_antioversmooth import reproduce as reproduction
from vit_antioversmooth.claims import CLAIMS
from vit_antioversmooth.cost import PAPER_COUNTS
from vit_antioversmooth.reproduce import HERE, TUNED, arm_config, measure_untrained, reproduce, require_arms, run_cell
from vit_antioversmooth.settings import ARMS, Config, ScaleConfig
from vit_antioversmooth.train import network, scale_count

FASTER = ["--train.epochs", "1", "--data.fraction", "0.02", "--model.depth", "2"]
STUDIED = ["--study.arms", "[plain, init]"]
SEEDS = [0, 1]
CONFIGS = HERE / "configs"
PAPER_STUDIES = {
    "paper": "DeiT-S-24",
    "paper_deit_s12_plain": "DeiT-S-12",
    "paper_cait_s24_plain_ft": "CaiT-S-24",
    "paper_swin_s_plain": "Swin-S",
}


class Study(NamedTuple):
    place: Path
    status: int


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    place = tmp_path_factory.mktemp("study")
    return Study(place, reproduce([*study_options(place), *FASTER, *STUDIED]))


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
    assert {len(claim["values"]) for claim in judged} == {0, len(SEEDS)}
    (dose,) = [claim["statement"] for claim in judged if claim["id"] == "C4c"]
    assert "omega in {0, 1, 4} before" in dose  # those of this study
    verdicts = {claim["id"]: claim["verdict"] for claim in judged}
    assert (verdicts["C1"], verdicts["C2"], verdicts["C6a"]) == ("held", "held", "held")


def test_the_report_has_data_text_page_and_figures(study: Study) -> None:
    check_report(study.place, CLAIMS, ["layers", "lowpass"])


def test_a_second_call_runs_nothing_again_and_gives_the_same_rows(study: Study) -> None:
    check_a_second_call_runs_nothing(reproduce, study.place, [*FASTER, *STUDIED])


def test_a_killed_study_gives_the_rows_of_an_undisturbed_one_when_called_again(study: Study, tmp_path: Path) -> None:
    part = [*FASTER, "--study.arms", "[plain]", "--study.workers", "1"]
    whole = [row for row in rows(study.place) if row["cell"]["arm"] != "init"]
    check_a_killed_study_goes_on("vit_antioversmooth", reproduce, tmp_path, part, whole)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageNet of two classes, each with four training images and two more."""
    root = tmp_path_factory.mktemp("photographs")
    for side, kind, count in product(("train", "val"), ("cat", "dog"), range(4)):
        if side == "train" or count < 2:
            (root / side / kind).mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(count).integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / side / kind / f"{count}.png")
    return root


@pytest.mark.parametrize(("scale", "name"), PAPER_STUDIES.items())
def test_every_network_of_a_study_at_the_papers_scale_is_the_papers(scale: str, name: str, photographs: Path) -> None:
    options = ["--data.path", str(photographs), "--model.pretrained", "false", "--data.workers", "1"]
    config = parse(Config, scale_arguments(CONFIGS, ["--scale", scale, *options]), prog="reproduce")
    data, (*_, attnscale, featscale) = load(config.data).train, PAPER_COUNTS[name]
    assert config.study.arms == ["plain", "attnscale", "featscale", "init"]
    with torch.device("meta"):
        counts = {arm: scale_count(network(arm_config(config, arm), data)) for arm in config.study.arms[:3]}
    assert counts == {"plain": 0, "attnscale": attnscale, "featscale": featscale}


@pytest.mark.parametrize("arm", ["attnscale", "init"])
def test_a_cell_of_the_papers_study_runs_on_a_small_network(
    arm: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(models: dict[str, nn.Module], *_: object, amp: bool) -> dict[str, int]:
        assert amp
        return {name: scale_count(model) for name, model in models.items()}

    monkeypatch.setattr(reproduction, "step_time_ratios", timed)
    small = {
        "data": {"path": photographs, "size": 32, "workers": 1},
        "model": {"name": "deit_tiny_patch16_224", "depth": 2},
        "train": {"epochs": 1, "warmup": 0, "batch_size": 8},
        "study": {"omegas": [0, 4]},
    }
    options = [f"--{part}.{key}={value}" for part, values in small.items() for key, value in values.items()]
    config = parse(Config, scale_arguments(CONFIGS, ["--scale", "paper", *options]), prog="reproduce")
    (row,) = run_cell(config, Cell({"arm": arm}, 0), tmp_path / "cell", lambda fraction: None)
    if arm == "init":
        assert len(row["metrics"]["dose_hc_over_dc"]) == 2 and "dose_noskip_hc_over_dc" not in row["metrics"]
        assert [row["metrics"][f"{method}_step_ratio"] for method in ("attnscale", "featscale")] == [2 * 3, 2 * 2 * 192]
    else:
        assert np.shape(row["metrics"]["omega"]) == (2, 3) and "average_accuracy" in row["metrics"]


def smoke(*options: str) -> Config:
    return parse(Config, scale_arguments(CONFIGS, ["--scale", "smoke", *FASTER, *options]), prog="reproduce")


def test_before_training_no_trained_weights_are_read_and_at_most_128_images_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed: list[int] = []

    def ratios(models: object, images: torch.Tensor, *_: object, **__: object) -> dict[str, float]:
        timed.append(len(images))
        return {"attnscale": 1.0, "featscale": 1.0}

    monkeypatch.setattr(reproduction, "step_time_ratios", ratios)
    monkeypatch.setattr(reproduction, "PAPER_COUNTS", {})
    for batch in ("100", "150"):
        metrics = measure_untrained(smoke("--model.weights", "absent.pt", "--train.batch_size", batch))
        assert len(metrics["dose_hc_over_dc"]) == 3
    assert timed == [100, 128]
    with_layer_scale = ["--model.name", "cait_xxs24_224", "--model.pretrained", "true"]
    assert "dose_hc_over_dc" not in measure_untrained(smoke(*with_layer_scale))


def test_fine_tuning_starts_from_the_plain_network_alone_and_never_at_rate_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Config] = []
    monkeypatch.setattr(reproduction, "train", lambda config, *_: tried.append(config))
    monkeypatch.setattr(reproduction, "evaluate", lambda folder: {})
    config = smoke("--model.name", "deit_tiny_patch16_224", "--model.pretrained", "true", "--study.tune_epochs", "2")
    config = replace(config, train=replace(config.train, schedule="epochs"))
    run_cell(config, Cell({"arm": "plain"}, 0), tmp_path, lambda fraction: None)
    assert [there.model.pretrained for there in tried] == [True, False, False, False]
    assert {there.model.weights for there in tried[1:]} == {str(tmp_path / "model.pt")}
    rates = [there.train.learning_rate(step, 10) for there in tried[1:] for step in range(20)]
    assert min(rates) > 0 and max(rates) == pytest.approx(config.study.tune_lr)


def test_every_arm_of_every_study_that_comes_along_can_be_configured() -> None:
    for scale in ("smoke", "demo", "cifar", *PAPER_STUDIES):
        require_arms(parse(Config, scale_arguments(CONFIGS, ["--scale", scale]), prog="reproduce"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--scale", "huge"], r"--scale must be one of .*smoke"),
        (["--study.arms", "[attnscale]"], "study.arms must be plain and any of"),
        (["--study.omegas", "[1]"], "study.omegas must be at least two finite numbers"),
        (["--study.omegas", "[0, 4, 1]"], r"each above the one before, got \[0.0, 4.0, 1.0\]"),
        (["--study.omegas", "[0, 1, 1]"], "study.omegas must be .*, each above the one before"),
        (["--study.omegas", "[0, .nan]"], "study.omegas must be at least two finite numbers"),
        (["--study.omegas", "[0, .inf]"], "study.omegas must be at least two finite numbers"),
        (["--study.noskip_init", ".inf"], "study.noskip_init must be a finite number below 1e6, got inf"),
        (["--scales.lr_mult", ".inf"], "scales.lr_mult must be positive and finite, got inf"),
        (
            ["--scale", "paper", "--study.arms", "[plain,noskip-plain]"],
            "arm noskip-plain: model.skip must be true for a timm model, got False",
        ),
        (["--study.worker", "2"], "unknown key 'study.worker'; did you mean 'study.workers'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    wrong: Sequence[str], message: str, tmp_path: Path
) -> None:
    check_study_refuses(reproduce, tmp_path, wrong, message)
