"""Facts about the classifier behind fd_classifier: trained once, the same each time, refused where it is no measure."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.config import UserError
from common.data import load
from common.runs import CheckpointError
from sparse_gan import fd_classifier as module
from sparse_gan.fd_classifier import fd_classifier, real_images
from sparse_gan.settings import Config
from sparse_gan.tests.runs import smoke

FORKS = multiprocessing.get_context("forkserver")


def ask(config: Config, folder: Path) -> None:
    fd_classifier(config, load(config.data), folder)


def kept(folder: Path) -> Path:
    (path,) = folder.glob("classifier-*.pt")
    return path


def test_it_is_trained_once_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = smoke()
    splits = load(config.data)
    _, report = fd_classifier(config, splits, tmp_path)
    state = torch.get_rng_state()
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("trained again"))
    evaluator, again = fd_classifier(config, splits, tmp_path)
    assert report == again and set(report) == {"classifier_accuracy", "floor", "noise", "blur"}
    images = real_images(splits.test, 8)
    assert evaluator.distance(images, real_images(splits.train, 8)) == pytest.approx(report["floor"])
    assert torch.equal(state, torch.get_rng_state())


def test_two_processes_that_ask_at_once_get_the_one_that_one_alone_gets(tmp_path: Path) -> None:
    config = smoke()
    both = [FORKS.Process(target=ask, args=(config, tmp_path / "two")) for _ in range(2)]
    for process in both:
        process.start()
    torch.manual_seed(5)  # nothing of the caller's random state may matter
    ask(config, tmp_path / "one")
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert kept(tmp_path / "two").read_bytes() == kept(tmp_path / "one").read_bytes()


def test_the_distance_rises_from_the_floor_with_blur(tmp_path: Path) -> None:
    config = smoke()
    _, report = fd_classifier(config, load(config.data), tmp_path)
    distances = [report["floor"], *report["blur"]]
    assert distances == sorted(distances) and report["noise"] > 3 * report["floor"]


def test_a_classifier_that_is_too_weak_or_no_measure_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = smoke("--eval.min_accuracy", 100)
    with pytest.raises(
        UserError, match=r"classifier of fd_classifier must reach 100.0 % on test images, got \d\d\.\d\d %"
    ):
        ask(strict, tmp_path)
    monkeypatch.setattr(module, "BLURS", (2.0, 0.5))
    with pytest.raises(UserError, match="fd_classifier must rise from the floor with blur"):
        ask(smoke(), tmp_path)
    assert not list(tmp_path.glob("*.pt"))


def test_a_damaged_classifier_is_refused(tmp_path: Path) -> None:
    config = smoke()
    ask(config, tmp_path)
    kept(tmp_path).write_bytes(b"damaged" * 99)
    with pytest.raises(CheckpointError, match="damaged"):
        ask(config, tmp_path)


def test_other_settings_get_another_classifier(tmp_path: Path) -> None:
    config = smoke()
    ask(config, tmp_path)
    ask(replace(config, eval=replace(config.eval, epochs=13)), tmp_path)
    assert len(list(tmp_path.glob("classifier-*.pt"))) == 2
