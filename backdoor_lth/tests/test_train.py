"""Facts about runs: chains of tickets, exact resumption, what is measured of them (acceptance checks 2-4, 18, 19)."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backdoor_lth import eval as evaluation
from backdoor_lth import train as training
from backdoor_lth.eval import evaluate, read_round
from backdoor_lth.metrics import evaluate as rates_of
from backdoor_lth.pruning import masked, next_masks
from backdoor_lth.settings import Config
from backdoor_lth.tests.nets import CONFIGS, arguments, config
from backdoor_lth.train import round_path, train
from backdoor_lth.victim import network, victim
from common.config import ConfigError, parse
from common.runs import CheckpointError, NonFiniteError, load_checkpoint, read_json, save_checkpoint
from common.tests import children
from common.tests.paper_checks import (
    check_eval_refuses,
    copied,
    kill_after_a_checkpoint,
    losses,
    quiet,
    refusal,
    said,
    slow,
)

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "backdoor_lth.eval", "torch.utils.tensorboard"])
CPU = torch.device("cpu")
LEFT = ["round-*.pt", "metrics.jsonl", "done.json"]
KEPT = [32_688, 3269, 1635, 817]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain") / "run"
    train(config(), folder, quiet)
    return folder


@pytest.fixture(scope="module")
def measured(chain: Path) -> dict[str, Any]:
    return evaluate(chain)


def test_a_run_leaves_every_round_with_exact_counts(chain: Path) -> None:
    metrics = read_json(chain / "done.json")
    assert (metrics["kept"], metrics["images"], metrics["poisoned"]) == (KEPT, 200, 20)
    model = network(config(), victim(config()).train, CPU)
    before = None
    for number in range(3):
        state, masks = read_round(chain, number, model)
        assert masks.kept == KEPT[number + 1]
        if before is not None:
            assert all((masks[name] <= before[name]).all() for name in masks)
            assert all(not state[name][~before[name]].any() for name in masks)
        before = masks
    assert metrics["disconnected"] == [name for name, mask in masks.items() if not mask.any()]
    assert len(losses(chain)) == 3


def test_training_under_autocast_is_nearly_that_in_float32(chain: Path, tmp_path: Path) -> None:
    train(config("--train.amp", "true"), tmp_path, quiet)
    model = network(config(), victim(config()).train, CPU)
    state, masks = read_round(tmp_path, 0, model)
    plain, _ = read_round(chain, 0, model)
    assert masks.kept == KEPT[1] and all(value.dtype == plain[name].dtype for name, value in state.items())
    assert losses(tmp_path) != losses(chain)
    assert losses(tmp_path)[0] == pytest.approx(losses(chain)[0], rel=0.05)


def test_training_channels_last_is_training_up_to_rounding(
    chain: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layouts: list[bool] = []
    step = torch.optim.SGD.step

    def spy(self: Any, *rest: Any) -> Any:
        convolutions = [p for p in self.param_groups[0]["params"] if p.dim() == 4 and p.shape[2] > 1 < p.shape[1]]
        for tensor in (*convolutions, *(p.grad for p in convolutions)):
            layouts.append(tensor.is_contiguous(memory_format=torch.channels_last))
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    train(config("--train.channels_last", "true"), tmp_path, quiet)
    assert layouts and all(layouts)
    model = network(config(), victim(config()).train, CPU)
    assert [read_round(tmp_path, number, model)[1].kept for number in range(3)] == KEPT[1:]
    assert losses(tmp_path)[0] == pytest.approx(losses(chain)[0], rel=1e-3)


def test_later_rounds_start_from_the_early_epoch_of_round_0(
    chain: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With no further training a round's state is the state it was rewound to."""
    assert config().train.rewind_epoch == 1
    one = ("--train.epochs", 1, "--prune.rounds", 1, "--prune.fast_rounds", 0, "--score.extreme", 0.5)
    once = config(*one, "--train.milestones", "[1.0]")
    train(once, tmp_path / "once", quiet)
    early = load_checkpoint(round_path(tmp_path / "once", 0))["model"]
    rewound: dict[str, Any] = {}
    fit = training.Chain.fit

    def spy(self: Any, run: Any, masks: Any, number: int) -> Any:
        rewound[number] = {name: value.clone() for name, value in self.model.state_dict().items()}
        return fit(self, run, masks, number)

    monkeypatch.setattr(training.Chain, "fit", spy)
    train(config("--train.milestones", "[1.0]"), tmp_path / "whole", quiet)
    masks = load_checkpoint(round_path(tmp_path / "whole", 0))["masks"]
    for name, value in masked(early, masks).items():
        assert torch.equal(rewound[1][name], value), name


def test_the_schedule_falls_twice_and_is_advanced_after_rewinding() -> None:
    paper = Config().train
    assert [paper.learning_rate(0, epoch) for epoch in (0, 99, 100, 149, 150)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001]
    )
    assert [paper.learning_rate(5, epoch) for epoch in (96, 97, 146, 147, 199)] == pytest.approx(
        [0.1, 0.01, 0.01, 0.001, 0.001]
    )


def test_a_run_follows_the_schedule_and_every_round_starts_without_momentum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[float, bool]] = []
    make = training.Chain._optimizer

    def watched(self: Any) -> torch.optim.SGD:
        optimizer = make(self)
        optimizer.register_step_pre_hook(
            lambda optimizer, *_: steps.append((optimizer.param_groups[0]["lr"], bool(optimizer.state)))
        )
        return optimizer

    monkeypatch.setattr(training.Chain, "_optimizer", watched)
    train(config("--train.warmup_epochs", 0.5), tmp_path / "run", quiet)
    # Four steps an epoch, two epochs a round, rewound to epoch 1; a tenth after epochs 1 and 2.
    first, later = [0, 0.05, 0.1, 0.1] + [0.01] * 4, [0.01] * 4 + [0.001] * 4
    assert [lr for lr, _ in steps] == pytest.approx(first + 2 * later)
    assert [momentum for _, momentum in steps] == 3 * ([False] + [True] * 7)


def test_the_learning_rate_of_restricted_imagenet_rises_step_by_step() -> None:
    train = parse(Config, ["--config", str(CONFIGS / "paper_rimagenet_resnet18.yaml")], prog="train.py").train
    rates = [train.learning_rate(0, epoch) for epoch in (0, 0.5, 1.75, 2, 7.99, 8, 18, 26)]
    assert rates == pytest.approx([0, 0.1, 0.35, 0.4, 0.4, 0.04, 0.004, 0.0004])
    assert train.learning_rate(1, 0) == 0.4  # from epoch 3 on


class Stop(Exception):
    pass


def test_a_run_stopped_at_any_moment_ends_bit_for_bit_like_an_undisturbed_one(chain: Path, tmp_path: Path) -> None:
    for every in (1, 3):
        folder, options = tmp_path / str(every), ("--run.checkpoint_every", every)
        for stop_at in (2, 4, 7, 3, 6):  # rounds have 8 steps
            cross_entropy, seen = training.F.cross_entropy, []

            def counting(*given: Any, at: int = stop_at, plain: Any = cross_entropy, log: list = seen) -> Any:
                log.append(0)
                if len(log) == at:
                    raise Stop
                return plain(*given)

            with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
                patch.setattr(training.F, "cross_entropy", counting)
                train(config(*options), folder, quiet)
        train(config(*options), folder, quiet)
        assert children.tree(folder, LEFT) == children.tree(chain, LEFT)


def _slowly(folder: Path) -> None:
    train(config("--run.checkpoint_every", 1), folder, slow)


def _start(folder: Path) -> Any:
    process = FORKS.Process(target=_slowly, args=(folder,))
    process.start()
    return process


def test_a_killed_run_resumes_bit_for_bit(chain: Path, tmp_path: Path) -> None:
    kill_after_a_checkpoint(_start, tmp_path / "run", times=2)
    train(config("--run.checkpoint_every", 1), tmp_path / "run", quiet)
    assert children.tree(tmp_path / "run", LEFT) == children.tree(chain, LEFT)


def test_a_finished_run_is_left_alone(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.Chain, "go", lambda *_: pytest.fail("trained again"))
    assert train(config(), chain, quiet)["kept"] == KEPT


@pytest.fixture(scope="module")
def rival(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of another method."""
    place = tmp_path_factory.mktemp("rivals")

    def run(method: str) -> Path:
        train(config("--prune.method", method), place / method, quiet)
        return place / method

    return run


@pytest.mark.parametrize("method", ["omp", "snip", "grasp", "random"])
def test_rivals_leave_nested_masks_of_the_same_counts(method: str, rival: Callable[[str], Path], chain: Path) -> None:
    run = rival(method)
    assert read_json(run / "done.json")["kept"] == KEPT
    first = load_checkpoint(round_path(run, 0))
    imp = load_checkpoint(round_path(chain, 0))
    same = all(torch.equal(first["masks"][name], imp["masks"][name]) for name in imp["masks"])
    assert same == (method == "omp")  # both rank the first round's magnitudes
    assert all(torch.equal(first["model"][name], imp["model"][name]) for name in imp["model"])


def test_one_shot_pruning_ranks_what_round_0_trained(rival: Callable[[str], Path]) -> None:
    rounds = [load_checkpoint(round_path(rival("omp"), number)) for number in range(3)]
    once = {name: rounds[0]["model"][name].abs() for name in rounds[0]["masks"]}
    for before, after, fraction in zip([None, *rounds], rounds, (0.9, 0.5, 0.5), strict=False):
        wanted = next_masks(once, before and before["masks"], fraction)
        assert all(torch.equal(after["masks"][name], mask) for name, mask in wanted.items())


RANKS = """
import sys
from pathlib import Path

from backdoor_lth.tests.nets import config
from backdoor_lth.train import train
from common import distributed

with distributed.process_group():
    for method in ("snip", "grasp"):
        train(config("--prune.method", method, "--prune.rounds", 2), Path(sys.argv[1]) / method, lambda fraction: None)
"""


def test_two_processes_share_a_batch_and_have_the_same_masks(tmp_path: Path, rival: Callable[[str], Path]) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    ended = children.run(*children.TORCHRUN, tmp_path / "ranks.py", tmp_path)
    assert ended.returncode == 0, ended.stderr[-800:]
    for method in ("snip", "grasp"):
        runs = (tmp_path / method, rival(method))
        two, one = ([load_checkpoint(round_path(run, number)) for number in (0, 1)] for run in runs)
        # Batch norm sees half a batch on each rank, so the two runs are alike and not equal; scores at the start are.
        assert 0 < max((two[0]["model"][name] - one[0]["model"][name]).abs().max() for name in two[0]["masks"]) < 0.5
        for number in (0, 1):
            kept = two[number]["masks"]
            assert sum(int(mask.sum()) for mask in kept.values()) == KEPT[number + 1]
            assert all(torch.equal(mask, one[number]["masks"][name]) for name, mask in kept.items())
        # A weight that the other rank had kept would have its gradient.
        assert not any(two[1]["model"][name][~mask].any() for name, mask in two[0]["masks"].items())


def test_a_loss_that_is_not_a_number_names_round_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.F, "cross_entropy", lambda logits, y: logits.sum() * float("nan"))
    with pytest.raises(NonFiniteError, match=r"loss of round 0 is nan at step 0"):
        train(config(), tmp_path / "run", quiet)


# The controls


def test_the_controls_change_what_they_say() -> None:
    plain = victim(config())
    assert int(plain.poisoned.is_poisoned.sum()) == 20 and plain.train.images.shape == (200, 3, 28, 28)  # type: ignore[union-attr]
    patch = plain.triggered.images[:, :, 20:25, 20:25]  # type: ignore[index]
    assert (patch == patch[:1]).all() and plain.test.images[:, :, 0, 0].sum() == plain.triggered.images[
        :, :, 0, 0
    ].sum()  # type: ignore[index]
    clean, relabelled = (victim(config("--attack.kind", kind)) for kind in ("none", "relabel"))
    assert not clean.poisoned.is_poisoned.any() and torch.equal(clean.train.images, relabelled.train.images)  # type: ignore[arg-type]
    assert torch.equal(relabelled.train.labels, plain.train.labels) and not torch.equal(
        clean.train.labels, plain.train.labels
    )
    equal = victim(config("--attack.equalise", "true")).train
    assert len(set(equal.labels.bincount().tolist())) == 1


# Surrogate and clean labels


def test_clean_label_poison_is_made_with_a_surrogate(tmp_path: Path) -> None:
    robust = config("--task", "surrogate", "--train.epochs", 1, "--train.rewind_epoch", 0)
    train(robust, tmp_path / "robust", quiet)
    assert 0 <= evaluate(tmp_path / "robust")["sa"] <= 100
    there = victim(
        config("--attack.kind", "clean_label", "--attack.ratio", 1, "--attack.surrogate", tmp_path / "robust")
    )
    assert torch.equal(there.poisoned.is_poisoned, there.train.labels == 0)
    assert torch.equal(there.train.labels, there.poisoned.source_labels)
    with pytest.raises(ConfigError, match=r"attack.surrogate must be a run of task surrogate"):
        config("--attack.kind", "clean_label")


# Measuring


def test_what_is_measured_of_a_ticket_is_measured_on_that_ticket(chain: Path, measured: dict[str, Any]) -> None:
    there, model = victim(config()), network(config(), victim(config()).train, CPU)
    for number in (0, 2):
        state, masks = read_round(chain, number, model)
        model.load_state_dict(masked(state, masks))
        wanted = rates_of(model, there.test, there.triggered, 0, config().model.normalize)
        assert {name: measured["rounds"][number][name] for name in wanted} == pytest.approx(wanted, abs=0.11)
    assert [each["kept"] for each in measured["rounds"]] == KEPT[1:]
    assert set(measured["scans"]) >= {"dense", "winner", "winner-clean"}
    assert ("L" in measured["scans"]) == (measured["winner"] < 2)  # else nothing is sparser
    won = measured["rounds"][measured["winner"]]
    assert won["score"] == max(each["score"] for each in measured["rounds"] if each["density"] <= 0.2)
    assert measured["scans"]["winner"]["sa"] == pytest.approx(won["sa"], abs=0.11)


def test_the_report_is_the_same_every_time(chain: Path, measured: dict[str, Any], tmp_path: Path) -> None:
    again = copied(chain, tmp_path / "copy")
    assert evaluate(again) == measured
    assert (again / "eval.json").read_bytes() == (chain / "eval.json").read_bytes()


def test_a_measured_run_is_not_measured_again(
    chain: Path, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "victim", lambda *_: pytest.fail("measured again"))
    assert evaluate(chain) == measured


def test_eval_says_what_is_wrong_with_a_run(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_eval_refuses(evaluation.main, copied(chain, tmp_path / "run"), "round-00.pt", capsys)


def test_weights_without_their_masks_are_refused(chain: Path, tmp_path: Path) -> None:
    run = copied(chain, tmp_path / "run")
    bare = load_checkpoint(round_path(run, 1))
    save_checkpoint(round_path(run, 1), {"model": bare["model"]})
    with pytest.raises(CheckpointError, match=r"round-01\.pt: not the masks of this run's network"):
        evaluate(run)


def test_what_is_said_of_a_scan_names_the_label_of_each_trigger(
    chain: Path, measured: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(chain, tmp_path / "run")
    _, out, _ = said(evaluation.main, ["--folder", copy], capsys)
    tickets = [line.partition(":")[0] for line in out.splitlines() if line.startswith("ticket")]
    won = measured["winner"]
    assert tickets == [f"ticket {number}" + (" (winner)" if number == won else "") for number in range(3)]
    scan = measured["scans"]["winner"]
    (line,) = (line for line in out.splitlines() if line.startswith("winner:"))
    assert f"label {scan['detected']} (" in line and f"recovered trigger {scan['detected_asr']:.1f} % on itself" in line
    assert f"; target 0: recovered trigger {scan['own_asr']:.1f} % on itself, {scan['dense_asr']:.1f} % on" in line
    assert ("attack not implanted" in out) == (measured["dense"]["asr"] < 90)
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("kind: dirty", "kind: none", 1))
    _, out, _ = said(evaluation.main, ["--folder", copy], capsys)
    assert "winner: label" in out and not any(word in out for word in ("target", "ASR", "CTR", "implanted"))


def test_a_fine_tuning_that_ends_in_no_number_is_said_in_one_line(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(chain, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  lr: 0.001\n", "  lr: 1000000.0\n"))
    status, out, err = said(evaluation.main, ["--folder", run], capsys)
    assert (status, out, err.count("\n")) == (1, "", err.count("\nerror: ") + 1) and not (run / "eval.json").exists()
    assert err.splitlines()[-1].startswith("error: logits at alpha 0 must be finite, got NaN or Inf")


# Configurations


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_complete(path: Path) -> None:
    made = parse(Config, ["--config", str(path)], prog="train.py")
    if path.stem.startswith("paper_c"):
        counts: Mapping[str, object] = {
            "rounds": made.prune.rounds,
            "epochs": made.train.epochs,
            "rewind": made.train.rewind_epoch,
        }
        assert counts == {"rounds": 50, "epochs": 200, "rewind": 3} and made.prune.rate == 0.2 and made.seed == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attack.ratio", 2], r"attack.ratio must be in \[0, 1\], got 2"),
        (["--attack.ratio", 1], r"attack.ratio must be below 1 with kind dirty, to leave clean images, got 1"),
        (["--attack.ratio", 1, "--attack.kind", "relabel"], r"attack.ratio must be below 1 with kind relabel"),
        (["--score.batch_size", 0], "score.batch_size must be at least 1, got 0"),
        (["--attack.place", "middle"], "attack.place must be one of bottom_right, .*, got 'middle'"),
        (["--train.warmup_epochs", -1], "train.warmup_epochs must be at least 0, got -1"),
        (["--train.rewind_epoch", 9], r"train.rewind_epoch must be in \[0, 2\], got 9"),
        (["--prune.rate", 1], r"prune.rate must be in \(0, 1\), got 1"),
        (["--score.points", 1], "score.points must be at least 2, got 1"),
        (["--score.steps", -1], "score.steps must be at least 0, got -1"),
        (["--inversion.steps", 0], "inversion.steps must be at least 1, got 0"),
        (["--inversion.images", 0], "inversion.images must be at least 1, got 0"),
        (["--model.name", "resnet99"], "model.name must be one of cnn"),
        (["--data.fraktion", 1], "unknown key 'data.fraktion'; did you mean 'data.fraction'"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    options: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*options)
    assert refusal(training.main, arguments(*options), capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attack.target", 11], "attack: target must be a class of the labels, got 11"),
        (["--attack.size", 40], "attack: patch must lie within the 28x28 image"),
        (["--attack.size", 40, "--attack.trigger", "warp"], "attack.size must be at most 28, the side of .*, got 40"),
        (["--data.classes", "[0, 7]"], r"data.classes must be of at least 3 classes, .*, got \[0, 7\]"),
        (["--data.name", "npz", "--data.path", "two.npz"], "data must be of at least 3 classes, .*, got 2"),
        (["--model.name", "vgg16"], "model.name vgg16 does not take images of 3x28x28"),
        (["--score.extreme", 0.02], r"score.extreme must be at least the last ticket's density, 0.0249\d+, got 0.02"),
        (["--model.mean", "[0, 0]", "--model.std", "[1, 1]"], "model.mean must be as many numbers as"),
    ],
)
def test_an_attack_or_network_that_does_not_fit_the_data_is_refused_before_anything_is_written(
    options: list[object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = np.zeros((60, 28, 28), dtype=np.uint8), np.arange(60) % 2
    np.savez("two.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    with pytest.raises(ConfigError, match=message):
        train(config(*options), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()
