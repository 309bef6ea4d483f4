"""Facts about a training run: paired arms, the schedule, exact resumption, and what bad input is told."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from common.config import UserError, parse
from common.data import ImageSet, batches, in_order, pixels
from common.data import load as load_data
from common.experiment import accuracy
from common.runs import NonFiniteError, load_checkpoint, read_json, save_checkpoint, seed_everything
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
from common.vit import build_vit
from diverse_vit import eval as evaluation
from diverse_vit import train as training
from diverse_vit.redundancy import redundancy_report
from diverse_vit.regularizer import DiverseRegularizer
from diverse_vit.settings import Config
from diverse_vit.train import mixer, train

SCRIPT = Path(training.__file__)
CONFIGS = SCRIPT.parent / "configs"
LEVELS = {"--objective.emb_cos": 0.5, "--objective.emb_nce": 0.5, "--objective.attn_cos": 0.1}
EVERYTHING = [
    *LEVELS,
    "--objective.mix",
    "--objective.weight_cno",
    "--model.drop_path",
    "--train.ema",
    "--train.erasing",
]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "diverse_vit.eval", "torch.utils.tensorboard"])


def arguments(*options: object) -> list[str]:
    return ["--config", str(CONFIGS / "smoke.yaml"), *map(str, options)]


def config(*options: object) -> Config:
    return parse(Config, arguments(*options), prog="train.py")


def everything(*options: object) -> Config:
    values = [*LEVELS.values(), True, 5e-4, 0.1, 0.9, 0.25]
    return config(*(part for pair in zip(EVERYTHING, values, strict=True) for part in pair), *options)


def short(*options: object) -> Config:
    """One epoch of one step."""
    return config("--train.epochs", 1, "--data.fraction", 0.01, *options)


def lines(folder: Path, split: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(everything(), folder, quiet)
    return folder


# What a run is


def test_arms_of_one_seed_start_alike_and_see_the_same_mixed_batches(tmp_path: Path) -> None:
    arms: dict[str, list[object]] = {
        "light": ["--objective.emb_cos", 0.1],
        "weight": ["--objective.emb_cos", 0.5, "--objective.weight_cno", 0.1],
        "mix": ["--objective.emb_cos", 0.5, "--objective.mix", True, "--objective.attn_cos", 0.1],
        "other": ["--objective.emb_cos", 0.1, "--seed", 1],
    }
    first = {}
    for name, options in arms.items():
        train(short(*options), tmp_path / name, quiet)
        first[name] = lines(tmp_path / name, "train")[0]["emb_cos"]
    assert first["light"] == first["weight"] == first["mix"] != first["other"]


def test_a_second_run_of_the_same_configuration_is_the_same(finished: Path, tmp_path: Path) -> None:
    train(everything(), tmp_path / "run", quiet)
    for name in ("model.pt", "metrics.jsonl", "done.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_every_weight_is_trained_and_nothing_of_the_regularizers_is_left(finished: Path) -> None:
    seed_everything(0)
    before = build_vit(everything().model, load_data(config().data).train).state_dict()
    after = load_checkpoint(finished / "model.pt")["model"]
    assert before.keys() == after.keys()
    assert not [key for key in before if torch.equal(before[key], after[key])]
    assert read_json(finished / "done.json") == {
        "parameters": sum(value.numel() for value in after.values()),
        "skipped": 0,
        "hooks_left": 0,
        "keys_changed": 0,
    }


def test_every_term_is_in_the_log(finished: Path) -> None:
    assert {"ce", "emb_cos", "emb_nce", "attn_cos", "weight_cno", "loss", "accuracy"} <= set(
        lines(finished, "train")[0]
    )


def test_the_moving_average_follows_the_weights(tmp_path: Path) -> None:
    train(short("--train.ema", 0.5), tmp_path / "run", quiet)
    seed_everything(0)
    before = build_vit(config().model, load_data(config().data).train).state_dict()
    content = load_checkpoint(tmp_path / "run" / "model.pt")
    for key, value in content["average"].items():
        assert torch.allclose(value, (before[key] + content["model"][key]) / 2, atol=1e-7)
    assert {"test_accuracy", "average_accuracy"} <= set(evaluation.evaluate(tmp_path / "run"))


def test_no_epoch_at_all_keeps_the_starting_weights(tmp_path: Path) -> None:
    train(config("--train.epochs", 0, "--train.warmup", 0), tmp_path / "run", quiet)
    seed_everything(0)
    before = build_vit(config().model, load_data(config().data).train).state_dict()
    after = load_checkpoint(tmp_path / "run" / "model.pt")["model"]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_finished_run_is_not_trained_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_fit", lambda *_: pytest.fail("trained again"))
    assert train(everything(), finished, quiet) == read_json(finished / "done.json")


def test_training_under_autocast_gives_nearly_the_same_loss(tmp_path: Path) -> None:
    options = ["--objective.mix", True, "--objective.emb_cos", 0.5, "--objective.attn_cos", 0.1]
    for name, more in {"plain": [], "amp": ["--train.amp", True]}.items():
        train(short(*options, *more), tmp_path / name, quiet)
    assert losses(tmp_path / "amp") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)


# Augmentation


def test_each_step_and_each_rank_draws_its_own_mixup(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(step: int) -> float:
        return mixer(config(), step)(torch.rand(2, 1, 28, 28), torch.arange(2)).lam

    monkeypatch.setattr(distributed, "rank", lambda: 0)
    assert draw(0) == draw(0) != draw(1)
    alone = draw(0)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert draw(0) != alone


def test_each_rank_drops_paths_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    watched(monkeypatch, lambda *_: seeds.append(torch.initial_seed()))
    for rank in (0, 1):
        seen = SimpleNamespace(**{**vars(distributed), "rank": lambda rank=rank: rank})
        monkeypatch.setattr(training, "distributed", seen)
        train(short(), tmp_path / str(rank), quiet)
    assert len(seeds) == len(set(seeds)) == 2


def test_mixup_and_cutmix_have_the_alphas_of_their_names() -> None:
    found = mixer(config("--train.mixup", 0.3, "--train.cutmix", 0.7), 0)
    assert (found.mixup_alpha, found.cutmix_alpha) == (0.3, 0.7)


def watched(monkeypatch: pytest.MonkeyPatch, look: Callable[[Tensor, Any], object]) -> None:
    """Have `look` see the images and labels of every training step."""
    call = DiverseRegularizer.__call__

    def told(self: DiverseRegularizer, images: Tensor, mixed: Any) -> Any:
        look(images, mixed)
        return call(self, images, mixed)

    monkeypatch.setattr(DiverseRegularizer, "__call__", told)


def first_batch() -> tuple[Tensor, Tensor]:
    """Normalised images and labels of the first step of `short`, before any augmentation."""
    there = short()
    data = load_data(there.data).train
    images, labels = next(batches(data, there.train.batch_size, there.data, seed=there.seed))
    return there.model.normalize(pixels(images)), labels


def test_the_network_sees_the_images_that_are_mixed_like_their_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[Tensor, Any]] = []
    watched(monkeypatch, lambda *step: steps.append(step))
    train(short("--train.roll", 0), tmp_path / "run", quiet)
    ((seen, mixed),), (images, labels) = steps, first_batch()
    expected = mixer(short(), 0)(images, labels)
    assert expected.lam < 1 and not torch.equal(expected.x, images)
    for found, wanted in ((seen, expected.x), (mixed.y1, labels), (mixed.y2, labels.flip(0))):
        assert torch.equal(found, wanted)
    assert mixed.lam == expected.lam and torch.equal(mixed.patch_weight, expected.patch_weight)


def test_images_are_rolled_each_by_its_own_shift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[Tensor, Any]] = []
    watched(monkeypatch, lambda *step: steps.append(step))
    train(short("--train.roll", 1, "--train.mixup", 0, "--train.cutmix", 0), tmp_path / "run", quiet)
    ((seen, labels),), (images, expected) = steps, first_batch()
    assert torch.equal(labels, expected)
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    rolled = {shift: torch.roll(images, shift, (2, 3)) for shift in shifts}
    found = [[shift for shift in shifts if torch.equal(rolled[shift][i], image)] for i, image in enumerate(seen)]
    assert all(len(own) == 1 for own in found) and {own[0] for own in found} == set(shifts)


def test_labels_are_smoothed_as_configured() -> None:
    there = short("--train.smoothing", 0.3)
    model = build_vit(there.model, load_data(there.data).train).eval()
    nn.init.normal_(model.head.weight)  # it starts at 0, where smoothing changes nothing
    images, labels = first_batch()
    loss = training.regularized(model, there)(images, labels).loss
    torch.testing.assert_close(loss, F.cross_entropy(model(images), labels, label_smoothing=0.3))


# Disturbed


def started(folder: Path) -> Any:
    process = FORKS.Process(target=train, args=(everything("--run.checkpoint_every", 2), folder, slow))
    process.start()
    return process


def test_a_run_killed_again_and_again_equals_an_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    started(whole).join()
    kill_after_a_checkpoint(started, folder)
    started(folder).join()
    names = ["model.pt", "metrics.jsonl", "done.json"]
    assert children.tree(folder, names) == children.tree(whole, names) and len(children.tree(folder, names)) == 3


def test_two_processes_train_the_network_of_one_at_the_same_global_batch(tmp_path: Path) -> None:
    # Mixing and start vectors are drawn by rank, as released: without them two ranks are one.
    options = [part for pair in LEVELS.items() for part in pair]
    options += ["--objective.mix", True, "--train.mixup", 0, "--train.cutmix", 0, "--train.erasing", 0.25]
    train(config(*options), tmp_path / "one", quiet)
    done = children.run(*children.TORCHRUN, SCRIPT, *arguments(*options, "--run.folder", tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = (load_checkpoint(tmp_path / name / "model.pt")["model"] for name in ("one", "two"))
    assert all(torch.allclose(one[key], two[key], atol=1e-4) for key in one)


def broken_at(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    call = DiverseRegularizer.__call__

    def broken(self: DiverseRegularizer, *inputs: Any) -> Any:
        step, output = self.step, call(self, *inputs)
        return output._replace(loss=output.loss * float("nan")) if step in steps else output

    monkeypatch.setattr(DiverseRegularizer, "__call__", broken)


def test_a_step_without_a_finite_loss_changes_nothing_and_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--train.ema", 0.9, "--train.epochs", 1, "--train.warmup", 0]
    rates: list[float] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    train(config(*options), tmp_path / "whole", quiet)
    whole, rates = rates, []
    broken_at({1, 2}, monkeypatch)
    metrics = train(config(*options), tmp_path / "run", quiet)
    assert metrics["skipped"] == 2
    assert [(line["step"], line["skipped"]) for line in lines(tmp_path / "run", "skipped")] == [(2, 1), (3, 2)]
    assert rates == whole[: len(whole) - 2]


def test_a_run_of_nothing_but_broken_steps_keeps_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_at(set(range(100)), monkeypatch)
    train(config("--train.ema", 0.9, "--train.epochs", 1), tmp_path / "run", quiet)
    seed_everything(0)
    before = build_vit(config().model, load_data(config().data).train).state_dict()
    content = load_checkpoint(tmp_path / "run" / "model.pt")
    for weights in (content["model"], content["average"]):
        assert all(torch.equal(before[key], weights[key]) for key in before)


def test_ten_broken_steps_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_at(set(range(2, 100)), monkeypatch)
    with pytest.raises(UserError, match=r"loss is not finite at step 11, 10 steps in a row; the last good checkpoint"):
        train(config("--train.epochs", 4), tmp_path / "run", quiet)
    assert not (tmp_path / "run" / "done.json").exists()


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (1.0, r"gradient norm is (inf|nan) at step 9; the last"),
        (0.0, r"model \S+ is not finite after step 9; the last"),
    ],
)
def test_a_gradient_that_is_not_finite_leaves_no_finished_run(
    clip: float, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = DiverseRegularizer.__call__

    def broken(self: DiverseRegularizer, *inputs: Any) -> Any:
        step, output = self.step, call(self, *inputs)
        if step == 9:  # the last one
            output.loss.register_hook(lambda gradient: gradient * float("inf"))
        return output

    monkeypatch.setattr(DiverseRegularizer, "__call__", broken)
    with pytest.raises(NonFiniteError, match=message) as told:
        train(config("--train.clip", clip, "--train.ema", 0.9), tmp_path / "run", quiet)
    assert len(str(told.value).splitlines()) == 1
    assert not [name for name in ("model.pt", "done.json") if (tmp_path / "run" / name).exists()]


# The command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objective.emb_cosine", "1"], "unknown key 'objective.emb_cosine'; did you mean 'objective.emb_cos'?"),
        (["--objective.emb_cos", "-1"], "objective.emb_cos must be at least 0 and finite, got -1.0"),
        (["--objective.weight_cno", ".nan"], "objective.weight_cno must be at least 0 and finite, got nan"),
        (["--objective.mix", "0.5"], "objective.mix must be"),
        (["--objective.extra", "{emb_magic: 1}"], "objective.extra must be among emb_cos_abs, "),
        (
            ["--objective.attn_layers", "[5]", "--objective.attn_cos", "1"],
            "objective does not fit model.name vit: attn",
        ),
        (
            ["--objective.mix", "true", "--train.mixup", "0", "--train.cutmix", "0"],
            "objective.mix must be false without mixup, cutmix or an embedding term, got True",
        ),
        (["--train.batch_size", "41"], "train.batch_size must be even with mixup or cutmix, got 41"),
        (["--train.ema", "1.5"], "train.ema must be in [0, 1), got 1.5"),
        (["--train.warmup", "9"], "train.warmup must be in [0, train.epochs], got 9"),
        (["--model.name", "resnet9000"], "model.name must be vit or a timm model, got 'resnet9000'"),
        (["--model.name", "resnet18", "--model.depth", "0"], "model.name resnet18 cannot be built as configured: "),
        (["--model.pretrained", "true"], "model.pretrained must be false for vit, got True"),
        (["--model.dim", "15"], "model.dim must be a multiple of model.heads, got 15"),
        (["--model.patch", "5"], "model.patch must be a divisor of the images' side 28, got 5"),
        (["--model.mean", "[0, 0]", "--model.std", "[1, 1]"], "model.mean must be as many numbers as the images' 1"),
        (
            ["--model.name", "deit_tiny_patch16_224", "--model.depth", "1"],
            "model.patch must be 16, that of model.name deit_tiny_patch16_224, with mixup or cutmix, got 14",
        ),
        (
            ["--model.name", "deit_tiny_patch16_224", "--model.depth", "1", "--model.patch", "16"],
            "model.patch must be a divisor of the images' side 28 with mixup or cutmix, got 16",
        ),
        (["--train.batch_size", "5000"], "batch size must be at most the 200 training images, got 5000"),
    ],
)
def test_a_wrong_option_ends_in_one_line_before_anything_is_written(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refusal(training.main, arguments("--run.folder", tmp_path / "run", *options), capsys)
    assert told.startswith(message)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_is_odd_on_each_rank_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(
        UserError, match=r"train.batch_size must be even on each of 2 ranks with mixup or cutmix, got 6"
    ):
        train(config("--train.batch_size", 6), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_training_and_measuring_by_command_say_what_came_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    status, out, _ = said(training.main, arguments("--run.folder", folder), capsys)
    assert status is None and "0 steps skipped" in out and out.splitlines()[-1].endswith(f"eval.py --folder {folder}")
    status, out, _ = said(evaluation.main, ["--folder", folder], capsys)
    assert status is None and out.startswith("test accuracy ") and len(out.splitlines()) == 2 + 4 + 1


# Measuring a run


def test_absent_unfinished_and_damaged_runs_are_refused_by_name(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_eval_refuses(evaluation.main, copied(finished, tmp_path / "run"), "model.pt", capsys)


def test_measures_are_kept_and_read_again(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    metrics = evaluation.evaluate(run)
    assert read_json(run / "eval.json") == metrics
    assert [len(metrics[name]) for name in ("embedding_cosine", "head_cosine", "spectrum")] == [4, 3, 16]
    (run / "model.pt").unlink()
    assert evaluation.evaluate(run) == metrics


def test_test_accuracy_is_the_weights_own_and_all_is_measured_on_test_images(finished: Path, tmp_path: Path) -> None:
    run, there = copied(finished, tmp_path / "run"), everything()
    content, splits = load_checkpoint(run / "model.pt"), load_data(there.data)
    content["average"]["head.weight"] *= -1  # no longer what the weights say
    content["average"]["head.bias"] *= -1
    save_checkpoint(run / "model.pt", content)
    found, model = evaluation.evaluate(run), build_vit(there.model, splits.train)

    def hits(name: str, data: ImageSet) -> float:
        model.load_state_dict(content[name])
        return accuracy(model, data, there.model.normalize)

    own, average = (hits(name, splits.test) for name in ("model", "average"))
    assert len({own, average, hits("model", splits.train)}) == 3  # else the next line would say nothing
    assert (found["test_accuracy"], found["average_accuracy"]) == (own, average)
    model.load_state_dict(content["model"])
    images = next(in_order(splits.test, there.eval.images))[0]
    expected = redundancy_report(model.eval(), [there.model.normalize(pixels(images))])
    for name in ("embedding_cosine", "head_cosine"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_that_comes_along_can_be_read(name: str) -> None:
    there = parse(Config, ["--config", str(CONFIGS / f"{name}.yaml")], prog="train.py")
    first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith(("# make reproduce-diverse-vit", "# torchrun ", "# python diverse_vit/train.py"))
    assert f"{name}.yaml" in first or name in ("demo", "smoke", "cifar")
    assert there.objective.mix <= (there.train.mixup > 0)
