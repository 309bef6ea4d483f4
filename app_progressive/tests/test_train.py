"""Facts about a run along a stream: order of its acts, resumption, bad input (checks 8, 9, 12, 13, 17, 18, 19)."""

from __future__ import annotations

import copy
import json
import multiprocessing
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from app_progressive import eval as evaluation
from app_progressive import pruner as pruning
from app_progressive import train as training
from app_progressive.configured import another, network
from app_progressive.images import epoch_batches, pool_and_test
from app_progressive.prunable import prunable
from app_progressive.schedules import density_schedule
from app_progressive.scores import scores
from app_progressive.settings import Config
from app_progressive.tests.nets import CONFIGS, arguments, config
from app_progressive.threshold import threshold
from app_progressive.train import train
from common.config import UserError, dump, load
from common.data import DataConfig, ImageSet
from common.runs import generator, load_checkpoint, read_json, seed_everything
from common.tests import children
from common.tests.paper_checks import check_eval_refuses, copied, kill_after_a_checkpoint, quiet, refusal, said, slow

SCRIPT = Path(training.__file__)
FILES = ["model.pt", "metrics.jsonl", "done.json"]
RELEASED = ["--prune.score_weights", "fresh", "--prune.update", "intersect", "--prune.subset", "first"]
RELEASED += ["--prune.ties", "threshold", "--train.val_augment", "true"]
AUGMENTED = ["--data.crop_padding", 2, "--data.flip", "true"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "app_progressive.eval", "torch.utils.tensorboard"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(config(), folder, quiet)
    return folder


def logged(folder: Path, split: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


# What a run is


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("released", [[], [*RELEASED, *AUGMENTED]])
def test_autocast_is_for_training_and_validation_and_never_for_scores_and_test(
    amp: bool, released: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[bool]] = {"train": set(), "val": set(), "test": set(), "score": set()}
    doing = ["train"]

    def marked(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            doing.append(name)
            try:
                return act(*args, **options)
            finally:
                doing.pop()

        return wrapped

    def note(module: torch.nn.Module, inputs: object) -> None:
        seen[doing[-1]].add(torch.is_autocast_enabled("cpu"))

    for name, act in (("val", "_val_accuracy"), ("test", "_end")):
        monkeypatch.setattr(training, act, marked(name, getattr(training, act)))
    monkeypatch.setattr(pruning, "scores", marked("score", pruning.scores))
    made = training.network

    def network(*args: Any) -> torch.nn.Module:
        model = made(*args)
        model.net.register_forward_pre_hook(note)
        return model

    monkeypatch.setattr(training, "network", network)
    monkeypatch.setattr(training, "layer_macs", marked("test", training.layer_macs))
    train(config("--train.amp", str(amp).lower(), "--train.epochs", 1, *released), tmp_path / "run", quiet)
    assert seen == {"train": {amp}, "val": {amp}, "test": {False}, "score": {False}}


def test_a_run_tests_after_every_megabatch_and_ends_at_its_density_exactly(finished: Path) -> None:  # 3, 8
    metrics = evaluation.evaluate(finished)
    assert metrics["weights"] == 18 + 72 + 288 and metrics["nonzero"] == 378 - int((1 - 0.8**4.5) * 378)
    assert metrics["cer"] == sum(metrics["errors"]) and len(metrics["errors"]) == len(logged(finished, "test")) == 3
    assert metrics["test_accuracy"] == metrics["final_acc"] == 100 - metrics["errors"][-1] / 10
    assert metrics["train_images"] == 2 * 18 * (1 + 2 + 3) and metrics["score_images"] == 30
    assert metrics["macs"] < metrics["macs_dense"]


def plain_run(there: Config) -> dict[str, list[float]]:
    """The metrics of a stream by one loop without a pruner; the draws are the run's."""
    pool, test = pool_and_test(there)
    stream, options, seed = training.megabatches(there, pool), there.train, there.seed
    seed_everything(seed)
    model = network(there, pool)
    optimizer = torch.optim.SGD(model.parameters(), options.lr, options.momentum, weight_decay=options.weight_decay)
    weights = prunable(model)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    released, found = there.prune.score_weights == "fresh", defaultdict(list)

    def masked(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.data[~masks[name]] = 0

    def right(batches: Any) -> float:
        model.eval()
        answers = torch.cat([(model(x).argmax(1) == y).float() for x, y in batches])
        return 100 * answers.mean().item()

    for state, density in enumerate(density_schedule(there.stream.states, there.prune.tau), 1):
        rows, held = stream.state(state)
        chosen = rows[: int(0.5 * there.stream.size)] if released else stream.score_idx(state, 0.5)
        keys, scored = (seed, 3, state), dict(weights)
        batches = list(epoch_batches(pool, chosen, 100, there.data, keys, shuffle=False))
        if released and state > 1:
            scored = pruning.fresh_weights(weights, generator(seed, 4, state))
        values = scores(model, batches, "snip", params=scored, masks=masks)
        rule = ("threshold", masks, "intersect") if released else ("rank", masks, "nested")
        masks = threshold(values, density, "global", *rule)
        masked(weights)
        kept: list[tuple[float, float, dict[str, Tensor]]] = []
        for epoch in range(options.epochs):
            optimizer.param_groups[0]["lr"] = options.lr * (0.1 if epoch >= 1 else 1)
            answers = []
            model.train()
            for x, y in epoch_batches(pool, rows, options.batch_size, there.data, (seed, 1, state, epoch)):
                logits = model(x)
                optimizer.zero_grad()
                F.cross_entropy(logits, y).backward()
                masked({name: weight.grad for name, weight in weights.items()})
                optimizer.step()
                masked(weights)
                answers.append((logits.argmax(1) == y).float())
            plain = [(pool.images[held].float() / 255, pool.labels[held])]
            drawn = epoch_batches(pool, held, 500, there.data, (seed, 2, state, epoch), shuffle=False)
            running, val = 100 * torch.cat(answers).mean().item(), right(drawn if released else plain)
            kept.append((running, val, copy.deepcopy(model.state_dict())))
        best = max(range(len(kept)), key=lambda epoch: (kept[epoch][1], -epoch))
        model.load_state_dict(kept[best][2])
        found["test_acc"].append(right([(test.images.float() / 255, test.labels)]))
        found["gap_best"].append(kept[best][0] - kept[best][1])
        found["gap_last"].append(kept[-1][0] - kept[-1][1])
        found["test_gap_last"].append(kept[-1][0] - found["test_acc"][-1])
        found["memory"].append(sum(int(p.count_nonzero()) if p.ndim == 4 else p.numel() for p in model.parameters()))
    seen = pool.subset(rows)
    found["clean_train_acc"] = [right([(seen.images.float() / 255, seen.labels)])]
    return found


@pytest.mark.parametrize("options", [[], [*AUGMENTED], [*RELEASED, *AUGMENTED]])
def test_the_metrics_are_those_of_a_plain_loop(options: list[Any], tmp_path: Path) -> None:  # 15, 17
    there = config(*options, "--train.epochs", 3, "--stream.size", 60, "--stream.val_fraction", 0.5)
    train(there, tmp_path / "run", quiet)
    metrics, plain = evaluation.evaluate(tmp_path / "run"), plain_run(there)
    for name in ("test_acc", "gap_best", "gap_last", "test_gap_last"):
        assert metrics[name] == pytest.approx(plain[name], abs=1e-4), name
    assert metrics["clean_train_acc"] == pytest.approx(plain["clean_train_acc"][0], abs=1e-4)
    assert metrics["clean_gap"] == pytest.approx(plain["clean_train_acc"][0] - plain["test_acc"][-1], abs=1e-4)
    assert metrics["memory"] == sum(plain["memory"])
    assert len(set(metrics["gap_best"])) > 1 and metrics["gap_best"] != metrics["gap_last"]


@pytest.mark.parametrize("method", ["dense", "osp"])
def test_dense_training_has_no_mask_and_one_shot_pruning_one(method: str, tmp_path: Path) -> None:  # 7
    metrics = train(config("--prune.method", method), tmp_path / "run", quiet)
    assert set(metrics["density"]) == ({1.0} if method == "dense" else {139 / 378})
    assert metrics["score_images"] == (0 if method == "dense" else 10)


def test_methods_of_one_seed_see_the_same_start_and_stream(finished: Path, tmp_path: Path) -> None:
    for method in ("dense", "osp"):
        train(config("--prune.method", method), tmp_path / method, quiet)
    first = [logged(folder, "train")[0] for folder in (finished, tmp_path / "dense", tmp_path / "osp")]
    assert len({line["loss"] for line in first}) == 3
    kept: list[list[Tensor]] = []
    for method in ("dense", "app"):
        pool, _ = pool_and_test(config("--prune.method", method))
        there = config("--prune.method", method)
        rows, _ = training.megabatches(there, pool).state(2)
        kept.append([x for x, _ in training._batches(there, pool, rows, (1, 2, 0))])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_the_learning_rate_starts_anew_in_every_state(tmp_path: Path) -> None:  # 12
    options = ["--train.epochs", 4, "--train.milestones", "[1, 3]", "--train.lr", 0.05]
    train(config(*options), tmp_path / "run", quiet)
    assert [line["lr"] for line in logged(tmp_path / "run", "train")] == pytest.approx([0.05, 0.005, 0.005, 5e-4] * 3)


def test_the_papers_rates_are_twenty_twenty_and_ten_epochs_in_every_state(tmp_path: Path) -> None:  # 12
    there = load(Config, CONFIGS / "paper_c10_resnet18_s8.yaml").train
    options = ["--train.epochs", there.epochs, "--train.milestones", there.milestones, "--train.lr", there.lr]
    options += ["--stream.states", 2, "--train.batch_size", 40, "--prune.method", "dense"]
    train(config(*options, "--run.checkpoint_every", 100), tmp_path / "run", quiet)
    rates = [line["lr"] for line in logged(tmp_path / "run", "train")]
    assert rates == pytest.approx(2 * ([0.1] * 20 + [0.01] * 20 + [0.001] * 10))


def forced(values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation accuracies as told, again and again."""
    told = iter(values * 10)
    monkeypatch.setattr(training, "_val_accuracy", lambda *_: next(told))


@pytest.mark.parametrize(("values", "best"), [([50, 60, 60, 55], 1), ([0, 0, 0, 0], 0)])
def test_the_first_best_epoch_is_kept(
    values: list[float], best: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # 13
    forced(values, monkeypatch)
    metrics = train(config("--train.epochs", 4), tmp_path / "run", quiet)
    assert metrics["best_epoch"] == [best] * 3


@pytest.mark.parametrize("released", [False, True])
def test_scores_are_of_the_best_weights_of_the_state_before(
    released: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # 9
    forced([90, 10, 10], monkeypatch)  # the best epoch is never the last
    original, end = pruning.scores, training._end
    scored: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    best: list[dict[str, Tensor]] = []
    last: list[dict[str, Tensor]] = []

    def scoring(
        model: Any, batches: Any, criterion: str, loss: Any, params: dict[str, Tensor], *rest: Any, **more: Any
    ):
        weights = {name: value.detach().clone() for name, value in params.items()}
        scored.append((weights, copy.deepcopy(model.state_dict())))
        return original(model, batches, criterion, loss, params, *rest, **more)

    def ending(config: Any, now: dict[str, Any], model: Any, *rest: Any) -> dict[str, Any]:
        best.append(copy.deepcopy(now["best"]["model"]))
        last.append(copy.deepcopy(model.state_dict()))
        return end(config, now, model, *rest)

    monkeypatch.setattr(pruning, "scores", scoring)
    monkeypatch.setattr(training, "_end", ending)
    train(config("--train.epochs", 3, *(RELEASED if released else [])), tmp_path / "run", quiet)
    assert len(scored) == 3
    for (weights, state), kept, final in zip(scored[1:], best, last, strict=False):
        assert all(torch.equal(state[name], kept[name]) for name in kept)  # batch norm and head too
        for name, weight in weights.items():
            assert torch.equal(weight, kept[name]) != released
            assert not torch.equal(kept[name], final[name])
            if released and weight.numel() > 100:
                assert abs(np.corrcoef(weight.flatten(), kept[name].flatten())[0, 1]) < 0.3


def test_the_released_preset_is_sparser_than_it_says(tmp_path: Path) -> None:  # 10
    metrics = train(config(*RELEASED, "--stream.states", 8), tmp_path / "run", quiet)
    assert metrics["density"][0] == pytest.approx(metrics["density_target"][0], abs=0.01)
    ratios = [a / b for a, b in zip(metrics["density"], metrics["density_target"], strict=True)]
    assert max(ratios[3:]) < 0.6 and ratios[-1] < 0.2


def weights_at(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(folder / "model.pt")["model"]


@pytest.mark.parametrize("method", ["dense", "app"])
@pytest.mark.parametrize("start", ["scratch", "shrink", "rewind"])
def test_states_start_from_what_was_asked_for(
    start: str, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored = ["--prune.update", "replace", "--prune.keep_stored", "true", "--prune.criterion", "random"]
    there = config("--train.start", start, "--prune.method", method, *stored)
    begin, seen, key = training._begin, [], "net.features.8.weight"

    def beginning(config: Any, pool: Any, stream: Any, model: Any, pruner: Any, optimizer: Any, state: int) -> Any:
        before = (model.state_dict() if pruner is None else pruner.stored)[key].clone()
        told = begin(config, pool, stream, model, pruner, optimizer, state)
        after = model.state_dict()[key].clone()
        mask = torch.ones_like(after, dtype=torch.bool) if pruner is None else pruner.masks[key]
        seen.append((before, after, mask, bool(optimizer.state)))
        return told

    monkeypatch.setattr(training, "_begin", beginning)
    train(there, tmp_path / "run", quiet)
    pool, _ = pool_and_test(there)
    for state in (2, 3):
        (*_, old, _), (before, after, mask, momentum) = seen[state - 2 : state]
        fresh = another(there, pool, network(there, pool), state).state_dict()[key]
        wanted = {"scratch": fresh, "shrink": 0.6 * before + 0.1 * fresh, "rewind": seen[0][0]}[start]
        assert torch.allclose(after, wanted * mask, rtol=0, atol=1e-7) and momentum == (start == "shrink")
        assert (mask & ~old).any() == (method == "app")  # weights came back


def test_noisy_labels_are_as_many_as_told_and_of_other_classes() -> None:
    clean, _ = pool_and_test(config("--data.fraction", 1.0))
    noisy, _ = pool_and_test(config("--data.fraction", 1.0, "--stream.noise", 0.3))
    assert torch.equal(clean.images, noisy.images)
    wrong = (clean.labels != noisy.labels).double().mean()
    assert wrong == pytest.approx(0.3, abs=0.02)


def test_shots_and_groups_choose_the_pool() -> None:
    groups = "[[0, 1, 2], [7], [3, 4]]"
    pool, test = pool_and_test(config("--stream.groups", groups, "--stream.shots", 4))
    assert pool.classes == test.classes == 3 and pool.labels.bincount().tolist() == [4, 4, 4]
    assert test.labels.bincount().tolist() == [300, 100, 200]
    other, _ = pool_and_test(config("--stream.groups", groups, "--stream.shots", 4, "--seed", 1))
    assert not torch.equal(pool.images, other.images)


def test_image_files_are_decoded_into_memory(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for label in range(3):
            (tmp_path / split / str(label)).mkdir(parents=True)
            for number in range(14):
                Image.new("RGB", (20, 20), (80 * label, number, 0)).save(
                    tmp_path / split / str(label) / f"{number}.png"
                )
    options = ["--data.name", "imagefolder", "--data.path", tmp_path, "--data.size", 8, "--data.fraction", 1.0]
    options += ["--data.workers", 1, "--stream.groups", "[[2], [0]]", "--stream.shots", 12]
    pool, test = pool_and_test(config(*options))
    assert pool.images.shape == (24, 3, 8, 8) and len(test) == 28
    assert all(
        int(image[0].float().mean()) == (160, 0)[label] for image, label in zip(pool.images, pool.labels, strict=True)
    )


def test_batches_cover_the_rows_once_with_uniform_crops() -> None:
    pool = ImageSet(torch.arange(200, dtype=torch.uint8).view(50, 1, 2, 2), torch.arange(50), 50)
    seen = [y for _, y in epoch_batches(pool, torch.arange(3, 48), 16, DataConfig(), (0, 1))]
    assert [len(y) for y in seen] == [16, 16, 13] and sorted(torch.cat(seen).tolist()) == list(range(3, 48))
    again = [y for _, y in epoch_batches(pool, torch.arange(3, 48), 16, DataConfig(), (0, 2))]
    assert not torch.equal(torch.cat(seen), torch.cat(again))
    image = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    image[0, 0, 15, 20] = 255
    pool = ImageSet(image.repeat(8100, 1, 1, 1), torch.zeros(8100, dtype=torch.int64), 1)
    options = DataConfig(crop_padding=4, flip=True)
    (x, _), *_ = epoch_batches(pool, torch.arange(8100), 8100, options, (0,), shuffle=False)
    places = (x > 0).nonzero()
    down = places[:, 2].bincount(minlength=32)
    assert len(places) == 8100 and (down > 0).sum() == 9 and down[down > 0].min() > 800
    flipped = (places[:, 3] < 16).double().mean()  # 20 becomes 11; both move by up to 4
    assert flipped == pytest.approx(0.5, abs=0.03)


# Disturbed


def test_a_second_run_of_the_same_configuration_is_the_same(finished: Path, tmp_path: Path) -> None:  # 17
    train(config(), tmp_path / "run", quiet)
    assert children.tree(tmp_path / "run", FILES) == children.tree(finished, FILES)
    train(config("--seed", 1), tmp_path / "other", quiet)
    assert logged(tmp_path / "other", "train") != logged(finished, "train")


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:  # 17
    there = config("--seed", 5, "--prune.tau", 7.5, "--stream.replay", "one", "--prune.criterion", "taylor", *RELEASED)
    (tmp_path / "config.yaml").write_text(dump(there))
    assert load(Config, tmp_path / "config.yaml") == there


class Stop(Exception):
    pass


@pytest.mark.parametrize("options", [[], ["--prune.update", "replace", "--prune.keep_stored", "true"]])
@pytest.mark.parametrize("every", [1, 3])
def test_a_run_stopped_in_any_epoch_ends_bit_for_bit_like_an_undisturbed_one(
    options: list[str], every: int, tmp_path: Path
) -> None:  # 17
    train(config(*options), tmp_path / "whole", quiet)
    for stop_at in ((1, 1, 1), (1, 2, 0), (1, 3, 1)):  # before an epoch: within a state, at its start, at the end
        plain = training._batches

        def stopping(there: Any, pool: Any, rows: Any, place: Any, at: Any = stop_at, go_on: Any = plain) -> Any:
            if place == at:
                raise Stop
            return go_on(there, pool, rows, place)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr(training, "_batches", stopping)
            train(config(*options, "--run.checkpoint_every", every), tmp_path / "run", quiet)
    train(config(*options, "--run.checkpoint_every", every), tmp_path / "run", quiet)
    assert children.tree(tmp_path / "run", FILES) == children.tree(tmp_path / "whole", FILES)


def test_a_run_killed_again_and_again_equals_an_undisturbed_one(tmp_path: Path) -> None:  # 17
    there = config(*AUGMENTED, *RELEASED, "--train.epochs", 4)

    def started(folder: Path) -> Any:
        process = FORKS.Process(target=train, args=(there, folder, slow))
        process.start()
        return process

    started(tmp_path / "whole").join()
    kill_after_a_checkpoint(started, tmp_path / "run")
    started(tmp_path / "run").join()
    whole = children.tree(tmp_path / "whole", FILES)
    assert children.tree(tmp_path / "run", FILES) == whole and len(whole) == 3


def test_two_processes_prune_as_one_and_train_close_to_it(tmp_path: Path) -> None:  # 18
    options = ["--stream.states", 2, "--stream.size", 40, "--prune.q", 0.3, *AUGMENTED]
    one = train(config(*options), tmp_path / "one", quiet)
    done = children.run(*children.TORCHRUN, SCRIPT, *arguments(*options, "--run.folder", tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    two = read_json(tmp_path / "two" / "done.json")
    for name in ("density", "density_target", "train_images", "score_images"):
        assert two[name] == one[name]
    losses = [[line["loss"] for line in logged(tmp_path / name, "train")] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=0.3)  # batch norm sees half a batch on each rank
    assert "density nominal 0.3664, effective 0.3677" in done.stdout


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step \d+; "):
        train(config("--train.lr", 1e30), tmp_path / "run", quiet)
    assert not (tmp_path / "run" / "done.json").exists()


def test_a_finished_run_is_not_trained_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_fit", lambda *_: pytest.fail("trained again"))
    assert train(config(), finished, quiet) == read_json(finished / "done.json")


# The command line


def test_commands_say_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(training.main, arguments("--run.folder", tmp_path / "run"), capsys)
    assert status is None and "density nominal 0.3664, effective 0.3677" in out
    status, out, _ = said(evaluation.main, ["--folder", tmp_path / "run"], capsys)
    assert status is None and "139 of 378 prunable weights are not zero" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.epoch", 3], "unknown key 'train.epoch'; did you mean 'train.epochs'?"),
        (["--prune.tau", 0], "prune.tau must be a finite number, at least 1, got 0"),
        (["--prune.scope", "l"], "prune.scope must be"),
        (["--prune.update", "replace"], "prune.keep_stored must be true with prune.update replace, got False"),
        (["--prune.densities", "[0.5]"], "prune.densities must be empty or one for each of the 3 states, got [0.5]"),
        (["--stream.size", 400], "stream.size must be in [1, n_pool / n_states = 133], got 400"),
        (["--stream.shots", 41], "stream.shots must be at most the 40 examples of the rarest class, got 41"),
        (["--stream.groups", "[[0], [12]]"], "stream.groups must be of classes within [0, 10), got [12]"),
        (["--stream.groups", "[[0], [0]]"], "stream.groups must be without repetition"),
        (
            ["--stream.replay", "buffer"],
            "stream.buffer must be within the parts of a megabatch, (18, 2), got (182, 182)",
        ),
        (["--prune.q", 0.95], "prune.q must give 1 to 18 of 20 examples, got 0.95"),
        (["--prune.q", -1], "prune.q must be in (0, 1), got -1"),
        (["--prune.criterion", "grasp"], "prune.criterion grasp in state 1: batches must hold 10 samples of class"),
        (["--train.milestones", "[3, 2]"], "train.milestones must be rising epochs, at least 1, got [3, 2]"),
        (["--model.name", "resnet18"], "model.name resnet18 must have images of 3 channels, got 1"),
        (["--model.name", "resnet9000"], "model.name must be one of tinycnn"),
        (
            ["--prune.method", "osp", "--prune.schedule", "cubic"],
            "prune.schedule must be left out with prune.method osp",
        ),
        (
            ["--prune.method", "osp", "--prune.growth", 1],
            "prune.growth must be left out with prune.method osp, got 1.0",
        ),
        (
            ["--prune.densities", "[0.5, 0.4, 0.3]", "--prune.growth", 1],
            "prune.growth must be left out with prune.densities, got 1.0",
        ),
        (["--data.repeats", 3], "data.repeats must be 1: an epoch has every example once, got 3"),
        (
            ["--data.name", "imagefolder", "--data.path", "images", "--data.auto_augment", "rand-m9"],
            "data.auto_augment must be empty: images are decoded once, then cropped and flipped, got 'rand-m9'",
        ),
        (
            ["--model.name", "vgg16_bn", "--train.batch_size", 17],
            "train.batch_size must leave no batch of one image, on which vgg16_bn cannot train at 28 pixels, got 17",
        ),
        (["--data.val", 0.1], "data.val must be 0: megabatches hold their own validation parts, got 0.1"),
        (["--data.name", "npz", "--data.path", "nowhere.npz"], "nowhere.npz: No such file"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    options: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # 19
    line = refusal(training.main, arguments("--run.folder", tmp_path / "run", *options), capsys)
    assert line.startswith(message), line


def test_a_finished_run_that_is_damaged_is_told_apart(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_eval_refuses(evaluation.main, copied(finished, tmp_path / "run"), "model.pt", capsys)


def test_a_network_of_the_exported_weights_has_no_trace_of_masks(finished: Path) -> None:  # 21
    pool, _ = pool_and_test(config())
    net = network(config(), pool)
    net.load_state_dict(weights_at(finished))  # strictly
    assert sum(int(weight.count_nonzero()) for weight in prunable(net).values()) == 139


def test_nothing_in_a_checkpoint_is_executed(finished: Path, tmp_path: Path) -> None:
    class Poison:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
            return open, (str(tmp_path / "executed"), "w")

    run = copied(finished, tmp_path / "run")
    torch.save({"model": Poison()}, run / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt: damaged, or not a checkpoint"):
        evaluation.evaluate(run)
    assert not (tmp_path / "executed").exists()
