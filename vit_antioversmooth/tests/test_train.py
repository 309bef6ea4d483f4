"""Facts about a training run: paired arms, the schedule, exact resumption, and what bad input is told."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.augment import mix
from common.config import UserError, parse
from common.data import batches
from common.data import load as load_data
from common.runs import generator, load_checkpoint, read_json, seed_everything
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
from vit_antioversmooth import eval as evaluation
from vit_antioversmooth import train as training
from vit_antioversmooth.attnscale import apply_attnscale
from vit_antioversmooth.featscale import apply_featscale
from vit_antioversmooth.scales import scale_parameters
from vit_antioversmooth.settings import Config
from vit_antioversmooth.tests import nets
from vit_antioversmooth.train import network, train

SCRIPT = Path(training.__file__)
CONFIGS = SCRIPT.parent / "configs"
STEPS = 10
EVERYTHING = ["--scales.method", "both", "--model.drop", 0.1, "--model.drop_path", 0.1, "--train.ema", 0.9]
AUGMENTED = ["--train.mixup", 0.8, "--train.cutmix", 1, "--train.erasing", 0.25, "--data.crop_padding", 2]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "vit_antioversmooth.eval", "torch.utils.tensorboard"])


def arguments(*options: object) -> list[str]:
    return ["--config", str(CONFIGS / "smoke.yaml"), *map(str, options)]


def config(*options: object) -> Config:
    return parse(Config, arguments(*options), prog="train.py")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(config("--scales.method", "both"), folder, quiet)
    return folder


# What a run is


def test_methods_of_one_seed_start_from_the_same_function_and_see_the_same_batches(tmp_path: Path) -> None:
    first, splits, seen = {}, load_data(config().data), {}
    for method in ("plain", "attnscale", "featscale", "both"):
        there = config("--scales.method", method, "--train.epochs", 1, "--data.fraction", 0.01)
        with pytest.MonkeyPatch.context() as patch:  # the loss of an untrained head says nothing of the images
            patch.setattr(training, "mix", lambda *given, at=method: seen.update({at: given[0].clone()}) or mix(*given))
            train(there, tmp_path / method, quiet)  # one epoch of one step
        seed_everything(there.seed)
        model = network(there, splits.train).eval()
        model.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        first[method] = losses(tmp_path / method), model(torch.ones(1, 1, 28, 28)).tolist()
    assert len(first["plain"][0]) == 1 and all(value == first["plain"] for value in first.values())
    assert seen["plain"].std() > 0.5 and all(torch.equal(images, seen["plain"]) for images in seen.values())


def test_a_second_run_of_the_same_configuration_is_the_same(finished: Path, tmp_path: Path) -> None:
    train(config("--scales.method", "both"), tmp_path / "run", quiet)
    for name in ("model.pt", "metrics.jsonl", "done.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()
    train(config("--scales.method", "both", "--seed", 1), tmp_path / "other", quiet)
    assert losses(tmp_path / "other") != losses(finished)


def nearly_equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Weights equal up to rounding, of which AdamW makes steps as large as any where a gradient is near 0."""
    apart = (one - two).abs()
    return bool(apart.mean() < 3e-5 and apart.max() < 1e-3)


def test_a_run_takes_the_steps_of_its_configuration_worked_out_here(tmp_path: Path) -> None:
    options = {"weight_decay": 3, "clip": 0.3, "smoothing": 0.4, "roll": 5, "lr": 0.004}
    there = config("--scales.method", "both", *(part for key in options for part in (f"--train.{key}", options[key])))
    train(there, tmp_path / "run", quiet)
    data = load_data(there.data).train
    seed_everything(there.seed)
    model = network(there, data).train()
    scales = {id(parameter) for parameter in scale_parameters(model)}
    groups: dict[str, list[nn.Parameter]] = {"scales": [], "matrices": [], "others": []}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        groups["scales" if id(parameter) in scales else "matrices" if matrix else "others"].append(parameter)
    optimizer = torch.optim.AdamW([{"params": group} for group in groups.values()], weight_decay=0)
    optimizer.param_groups[1]["weight_decay"] = 3
    stream = batches(data, 40, there.data, seed=there.seed)
    for step in range(STEPS):  # two epochs of five, half an epoch of warm-up
        images, labels = next(stream)
        shifts = torch.randint(-5, 6, (2, 40), generator=generator(there.seed, 1, step)).T.tolist()
        rolled = torch.stack([image.roll(shift, (1, 2)) for image, shift in zip(images, shifts, strict=True)])
        loss = F.cross_entropy(model((rolled / 255 - 0.1307) / 0.3081), labels, label_smoothing=0.4)
        optimizer.zero_grad()
        loss.backward()
        size = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= min(1.0, 0.3 / size.item())
        rise = (step + 1) / 2.5 if step < 2.5 else (1 + math.cos(math.pi * (step - 2.5) / 7.5)) / 2
        for group, factor in zip(optimizer.param_groups, (30, 1, 1), strict=True):
            group["lr"] = 0.004 * min(rise, 1.0) * factor
        optimizer.step()
    saved = load_checkpoint(tmp_path / "run" / "model.pt")["model"]
    for key, value in model.state_dict().items():
        assert nearly_equal(saved[key], value), key


def test_without_skip_nothing_of_a_blocks_input_passes_its_attention_by() -> None:
    there = config("--model.skip", False)
    model = network(there, load_data(there.data).train).eval()
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    assert len(model.blocks) == 3
    for block in model.blocks:
        y = block.attn(block.norm1(x))
        assert torch.equal(block(x), y + block.mlp(block.norm2(y)))


def test_every_weight_and_every_scale_is_trained(finished: Path) -> None:
    there = config("--scales.method", "both")
    seed_everything(there.seed)
    before = network(there, load_data(there.data).train).state_dict()
    after = load_checkpoint(finished / "model.pt")["model"]
    assert before.keys() == after.keys() and sum("scale." in key for key in after) == 9
    assert not [key for key in before if torch.equal(before[key], after[key])]


def test_scales_that_shall_not_learn_stay_as_they_start(tmp_path: Path) -> None:
    train(config("--scales.method", "attnscale", "--scales.learn", False, "--scales.init", 2), tmp_path / "run", quiet)
    omegas = [value for key, value in load_checkpoint(tmp_path / "run" / "model.pt")["model"].items() if "omega" in key]
    assert len(omegas) == 3 and all((omega == 2).all() for omega in omegas)


def test_the_moving_average_follows_the_weights(tmp_path: Path) -> None:
    train(config("--train.ema", 0.5, "--train.epochs", 1, "--data.fraction", 0.01), tmp_path / "run", quiet)
    there = config("--train.ema", 0.5)
    seed_everything(there.seed)
    before = network(there, load_data(there.data).train).state_dict()
    content = load_checkpoint(tmp_path / "run" / "model.pt")
    for key, value in content["average"].items():
        assert torch.allclose(value, (before[key] + content["model"][key]) / 2, atol=1e-7)
    assert {"test_accuracy", "average_accuracy"} <= set(evaluation.evaluate(tmp_path / "run"))


def test_a_finished_run_is_not_trained_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_fit", lambda *_: pytest.fail("trained again"))
    assert train(config("--scales.method", "both"), finished, quiet) == read_json(finished / "done.json")


# Disturbed


def disturbed() -> Config:
    return config(*EVERYTHING, *AUGMENTED, "--run.checkpoint_every", 2)


def started(folder: Path) -> Any:
    process = FORKS.Process(target=train, args=(disturbed(), folder, slow))
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
    options = ["--scales.method", "both", *AUGMENTED]
    train(config(*options), tmp_path / "one", quiet)
    done = children.run(*children.TORCHRUN, SCRIPT, *arguments(*options, "--run.folder", tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = (load_checkpoint(tmp_path / name / "model.pt")["model"] for name in ("one", "two"))
    assert all(nearly_equal(one[key], two[key]) for key in one)


def test_a_loss_that_is_not_finite_stops_at_its_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step \d+; "):
        train(config("--train.lr", 1e30, "--train.clip", 0), tmp_path / "run", quiet)
    assert not (tmp_path / "run" / "done.json").exists()


# Starting weights


def test_a_run_starts_from_the_weights_of_another_with_fresh_scales(finished: Path, tmp_path: Path) -> None:
    splits = load_data(config().data)
    model = network(config("--scales.method", "both", "--model.weights", finished / "model.pt"), splits.train)
    saved = load_checkpoint(finished / "model.pt")["model"]
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    train(config("--train.epochs", 1), tmp_path / "plain", quiet)
    weights = tmp_path / "plain" / "model.pt"
    model = network(config("--scales.method", "both", "--model.weights", weights), splits.train)
    assert all((value == 0).all() for key, value in model.state_dict().items() if "scale." in key)
    train(config("--train.epochs", 1, "--model.weights", weights), tmp_path / "tuned", quiet)
    weights.unlink()  # a finished run needs them no more
    assert 0 <= evaluation.evaluate(tmp_path / "tuned")["test_accuracy"] <= 100


@pytest.mark.parametrize("count", [1, 2])
def test_released_weights_are_read_with_their_count(count: int, tmp_path: Path) -> None:
    splits = load_data(config().data)
    plain = network(config(), splits.train).state_dict()
    torch.save({"model": {**plain, "blocks.1.lamb1": torch.full((16,), 0.5)}}, tmp_path / "released.pth")
    options = ["--model.weights", tmp_path / "released.pth", "--model.featscale_count", count]
    model = network(config(*options, "--scales.method", "featscale"), splits.train)
    assert (model.get_parameter("blocks.1.featscale.s") == 0.5 * count).all()
    assert (model.get_parameter("blocks.0.featscale.s") == 0).all()
    with pytest.raises(UserError, match=r"released\.pth: holds scales that scales.method plain has not"):
        network(config(*options), splits.train)


def test_weights_that_hold_more_than_data_are_refused_and_not_executed(tmp_path: Path) -> None:
    class Poison:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
            return open, (str(tmp_path / "executed"), "w")

    torch.save(Poison(), tmp_path / "evil.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    torch.save({"head.bias": torch.zeros(3)}, tmp_path / "other.pth")
    for name in ("evil.pth", "broken.safetensors", "other.pth", "absent.pth"):
        with pytest.raises(UserError) as told:
            network(config("--model.weights", tmp_path / name), load_data(config().data).train)
        assert name in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "executed").exists()


# The command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.epoch", "3"], "unknown key 'train.epoch'; did you mean 'train.epochs'?"),
        (["--train.ema", "1.5"], "train.ema must be in [0, 1), got 1.5"),
        (["--train.warmup", "9"], "train.warmup must be in [0, train.epochs], got 9"),
        (["--scales.method", "magic"], "scales.method must be"),
        (["--scales.init", ".nan"], "scales.init must be a finite number below 1e6, got nan"),
        (["--scales.blind", "true"], "scales.blind must be false unless scales.method is attnscale or featscale"),
        (["--model.name", "resnet9000"], "model.name must be vit or a timm model, got 'resnet9000'"),
        (["--model.name", "resnet18", "--model.depth", "0"], "model.name resnet18 cannot be built as configured: "),
        (["--model.dim", "15"], "model.dim must be a multiple of model.heads, got 15"),
        (["--model.patch", "5"], "model.patch must be a divisor of the images' side 28, got 5"),
        (["--model.mean", "[0, 0]", "--model.std", "[1, 1]"], "model.mean must be as many numbers as the images' 1"),
        (["--train.batch_size", "5000"], "batch size must be at most the 200 training images, got 5000"),
        (["--model.weights", "nowhere.pt"], "model.weights must be an existing file, got 'nowhere.pt'"),
    ],
)
def test_a_wrong_option_ends_in_one_line_before_anything_is_written(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert refusal(training.main, arguments("--run.folder", folder, *options), capsys).startswith(message)
    assert not folder.exists()


@pytest.mark.parametrize("method", ["plain", "attnscale"])
def test_a_network_whose_attention_does_not_fit_is_refused_in_one_line_before_anything_is_written(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.name", "levit_128s", "--model.depth", 0, "--scales.method", method]
    told = refusal(training.main, arguments("--run.folder", tmp_path / "run", *options), capsys)
    assert (
        f"scales.method {method} does not fit model.name levit_128s: " in told and "timm.models.levit.Attention" in told
    )
    assert not (tmp_path / "run").exists()


def test_training_and_measuring_by_command_say_what_came_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    status, out, _ = said(training.main, arguments("--run.folder", folder, "--scales.method", "attnscale"), capsys)
    assert status is None and "6 of them scales" in out and out.splitlines()[-1].endswith(f"eval.py --folder {folder}")
    status, out, _ = said(evaluation.main, ["--folder", str(folder)], capsys)
    assert status is None and out.startswith("test accuracy ") and len(out.splitlines()) == 2 + 4


# Measuring a run


def test_absent_unfinished_and_damaged_runs_are_refused_by_name(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_eval_refuses(evaluation.main, copied(finished, tmp_path / "run"), "model.pt", capsys)


def test_measures_are_kept_and_read_again(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    metrics = evaluation.evaluate(run)
    assert read_json(run / "eval.json") == metrics
    assert [len(metrics[name]) for name in ("omega", "s", "t", "rho", "patch_cosine")] == [3, 3, 3, 3, 4]
    assert "violations" not in metrics
    (run / "model.pt").unlink()
    assert evaluation.evaluate(run) == metrics


def test_the_test_accuracy_is_that_of_all_test_images_and_of_no_others(finished: Path, tmp_path: Path) -> None:
    there = config("--scales.method", "both")
    splits, model = load_data(there.data), network(there, load_data(there.data).train).eval()
    model.load_state_dict(load_checkpoint(finished / "model.pt")["model"])
    right = {}
    for name, part in (("train", splits.train), ("test", splits.test)):
        with torch.no_grad():
            answers = model((part.images / 255 - 0.1307) / 0.3081).argmax(1)
        right[name] = 100 * (answers == part.labels).double().mean().item()
    assert len(splits.test) == 1000 and abs(right["train"] - right["test"]) > 0.2
    assert evaluation.evaluate(copied(finished, tmp_path / "run"))["test_accuracy"] == pytest.approx(right["test"])


def test_learnt_scales_are_told_by_layer_each_under_its_own_name() -> None:
    model = nets.build("plain")
    apply_attnscale(model)
    apply_featscale(model)
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            block.attn.attnscale.omega.copy_(layer + torch.tensor([0.25, 0.5, 0.75]))
            block.featscale.s.copy_(torch.linspace(0, 2 * layer, 24))
            block.featscale.t.copy_(torch.linspace(10, 20 + 2 * layer, 24))
    told = evaluation.learnt_scales(model)
    assert told["omega"] == [[0.25, 0.5, 0.75], [1.25, 1.5, 1.75], [2.25, 2.5, 2.75]]
    assert told["s"] == pytest.approx([0, 1, 2], abs=1e-5) and told["t"] == pytest.approx([15, 16, 17], rel=1e-6)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_that_comes_along_can_be_read(name: str) -> None:
    there = parse(Config, ["--config", str(CONFIGS / f"{name}.yaml")], prog="train.py")
    assert there.train.epochs >= 1
    first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# make reproduce-vit-antioversmooth") or first.startswith("# torchrun ")


def test_the_reference_networks_are_the_tests_own() -> None:
    assert sorted(path.name for path in nets.REFERENCE.glob("*.npz")) == [
        "attnscale_attention.npz",
        "attnscale_cait_talking_head.npz",
        "attnscale_swin_window.npz",
        "featscale_block_cait.npz",
        "featscale_block_deit_released.npz",
        "featscale_block_swin.npz",
        "theory_derived.npz",
        "vit_attnscale_small.npz",
        "vit_featscale_small.npz",
    ]
