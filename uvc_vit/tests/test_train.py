"""Facts about a run: its arms, exact resumption, two ranks, and what bad input is told."""

from __future__ import annotations

import json
import math
import multiprocessing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from common.augment import roll
from common.config import ConfigError, parse
from common.data import load, pixels
from common.runs import NonFiniteError, generator, load_checkpoint, read_json, seed_everything
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
from uvc_vit import eval as evaluation
from uvc_vit import train as training
from uvc_vit.adapter import ViTAdapter
from uvc_vit.choose import choose, network
from uvc_vit.controller import UVCController
from uvc_vit.plan import Plan
from uvc_vit.settings import UNSTRUCTURED, Config
from uvc_vit.tests import two_ranks
from uvc_vit.train import train

SCRIPT = Path(training.__file__)
CONFIGS = SCRIPT.parent / "configs"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "uvc_vit.eval", "torch.utils.tensorboard"])
ARMS = ("dense", "uvc", "magnitude", "random", "gradient", "drop-last", *UNSTRUCTURED)


def arguments(*options: object) -> list[str]:
    return ["--config", str(CONFIGS / "smoke.yaml"), *map(str, options)]


def config(*options: object) -> Config:
    return parse(Config, arguments(*options), prog="train.py")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(config(), folder, quiet)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a trained network: a fresh classifier is zero, and so is every gradient below it."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    train(config("--arm", "dense"), folder, quiet)
    return folder / "model.pt"


# What a run is


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_ends_within_the_budget_by_torchs_count(arm: str, weights: Path, tmp_path: Path) -> None:
    train(config("--arm", arm, "--method.budget", 0.6, "--model.weights", weights), tmp_path / "run", quiet)
    metrics = evaluation.evaluate(tmp_path / "run")
    assert metrics["macs"] == metrics["counted_macs"]
    whole = arm in ("dense", *UNSTRUCTURED)
    assert metrics["share"] == 1 if whole else metrics["share"] <= 0.6
    assert whole or arm == "drop-last" or metrics["share"] > 0.58
    assert (metrics["parameter_share"] < 1) == (not whole)
    assert metrics["density"] == pytest.approx(0.6 if arm in UNSTRUCTURED else 1, abs=1e-3)
    assert len(losses(tmp_path / "run")) == 2
    before = load_checkpoint(tmp_path / "run" / "before.pt")["model"]
    there = before["blocks.0.mlp.fc1.weight"] != 0
    assert there.all() != (arm in ("omp", "taylor"))  # gone before stage 2; gmp begins in it
    assert before["patch_embed.proj.weight"].any()  # the first to go where all scores are equal


@pytest.mark.parametrize(("name", "left"), [("prune", 3), ("skip", None)])
def test_an_ablation_moves_only_its_own_variables(name: str, left: int | None, tmp_path: Path) -> None:
    other = {"prune": "skip", "skip": "prune"}[name]
    train(config(f"--method.{other}", "false", "--method.budget", 0.7), tmp_path / "run", quiet)
    metrics = evaluation.evaluate(tmp_path / "run")
    if left:
        assert metrics["blocks"] == left and min(metrics["neurons"]) < 1
    else:
        assert set(metrics["neurons"]) == {0.0, 1.0} and metrics["share"] <= 0.7


def test_the_released_mode_runs_to_its_end(tmp_path: Path) -> None:
    options = ("--method.mode", "released", "--method.accounting", "released", "--method.warmup_steps", 1)
    train(config(*options), tmp_path / "run", quiet)
    assert evaluation.evaluate(tmp_path / "run")["macs"] > 0


def test_a_run_starts_from_the_weights_it_is_given(weights: Path, tmp_path: Path) -> None:
    train(config("--arm", "drop-last", "--model.weights", weights, "--method.budget", 0.8), tmp_path / "run", quiet)
    dense, before = (load_checkpoint(path)["model"] for path in (weights, tmp_path / "run" / "before.pt"))
    assert len(before) < len(dense) and all(torch.equal(value, dense[key]) for key, value in before.items())
    assert read_json(tmp_path / "run" / "done.json")["blocks"] == 2


def test_a_second_run_of_the_same_configuration_is_the_same(finished: Path, tmp_path: Path) -> None:
    train(config(), tmp_path / "run", quiet)
    for name in ("model.pt", "before.pt", "plan.json", "metrics.jsonl", "done.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()
    train(config("--seed", 1), tmp_path / "other", quiet)
    assert losses(tmp_path / "other") != losses(finished)


def test_a_teacher_that_was_asked_before_is_not_asked_again_and_changes_nothing(finished: Path, tmp_path: Path) -> None:
    logits: dict[int, torch.Tensor] = {}
    train(config("--arm", "magnitude"), tmp_path / "one", quiet, logits)
    assert sorted(logits) == list(range(10))
    asked = {step: value.clone() for step, value in logits.items()}
    train(config(), tmp_path / "run", quiet, logits)
    assert all(torch.equal(logits[step], value) for step, value in asked.items())
    assert (tmp_path / "run" / "model.pt").read_bytes() == (finished / "model.pt").read_bytes()
    train(config(), tmp_path / "other", quiet, dict.fromkeys(range(10), torch.randn(40, 10)))
    assert (tmp_path / "other" / "model.pt").read_bytes() != (finished / "model.pt").read_bytes()


# Disturbed


def started(folder: Path) -> Any:
    process = FORKS.Process(target=train, args=(config("--run.checkpoint_every", 1), folder, slow))
    process.start()
    return process


def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill_after_a_checkpoint(started, run, times=4)  # 5 steps of each stage
    train(config("--run.checkpoint_every", 1), run, quiet)
    for name in ("model.pt", "before.pt", "plan.json", "metrics.jsonl", "done.json"):
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name


class Stopped(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("arm", ["gmp", "taylor", "gradient"])
def test_a_baseline_that_stops_in_the_middle_ends_as_an_undisturbed_one(
    arm: str, weights: Path, tmp_path: Path
) -> None:
    start = ("--model.weights", weights, "--run.checkpoint_every", 1)
    options = config("--arm", arm, "--method.budget", 0.6, *start)  # 10 steps, 3 prunings

    def stop(fraction: float) -> None:
        if fraction == 0.5:
            raise Stopped

    train(options, tmp_path / "whole", quiet)
    with pytest.raises(Stopped):
        train(options, tmp_path / "run", stop)
    assert not (tmp_path / "run" / "done.json").exists() and (tmp_path / "run" / "checkpoint.pt").exists()
    train(options, tmp_path / "run", quiet)
    for name in ("model.pt", "before.pt", "plan.json", "metrics.jsonl", "done.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_two_ranks_make_the_plan_of_one_process(tmp_path: Path) -> None:
    options = ("--method.task_weight", 100)  # [23] the gates then follow the loss, whose gradient is of both ranks
    one, two = tmp_path / "one", tmp_path / "two"
    train(config(*options), one, quiet)
    done = children.run(*children.TORCHRUN, SCRIPT, *arguments(*options, "--run.folder", two))
    assert done.returncode == 0, done.stderr
    assert (one / "plan.json").read_bytes() == (two / "plan.json").read_bytes()
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    multipliers = []
    for folder in (one, two):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        multipliers.append([line["z"] for line in lines if "z" in line])
    assert multipliers[1] == pytest.approx(multipliers[0], rel=2e-5) and max(multipliers[0]) > 0


def test_two_ranks_score_as_one_process_and_end_with_what_rank_0_holds(tmp_path: Path) -> None:
    two_ranks.main(tmp_path / "one")  # [23]
    done = children.run(*children.TORCHRUN, two_ranks.__file__, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, first, second = (
        torch.load(tmp_path / name, weights_only=True) for name in ("one/0.pt", "two/0.pt", "two/1.pt")
    )
    assert {"gradient", "taylor", "plan", "s", "r", "y", "p", "z", "gates"} == set(first)
    for name, value in first.items():
        assert torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name], name
    assert first["gradient"] == one["gradient"]
    assert (first["taylor"] != one["taylor"]).sum() <= 2  # at the threshold, by rounding


def test_positions_and_tokens_do_not_decay(tmp_path: Path) -> None:
    pace = (
        "--search.lr",
        1e-9,
        "--train.lr",
        1e-9,
        "--train.weight_decay",
        1e8,
    )  # decay by a tenth a step, little else
    train(config(*pace), tmp_path / "run", quiet)
    seed_everything(0)
    start = network(config(), load(config().data).train).state_dict()
    for stage in ("before.pt", "model.pt"):
        found = load_checkpoint(tmp_path / "run" / stage)["model"]
        for name in ("pos_embed", "cls_token", "blocks.0.norm1.weight"):
            torch.testing.assert_close(found[name], start[name], rtol=0, atol=1e-6)
        assert found["patch_embed.proj.weight"].norm() < 0.9 * start["patch_embed.proj.weight"].norm()


class Seen(NamedTuple):
    """Of one step of stage 1."""

    w_lr: float
    norm: float
    """of the gradients of weights and gates together"""
    gates_norm: float
    gates: torch.Tensor


RELEASED = ("--method.mode", "released", "--method.accounting", "released")


def search(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: object) -> list[Seen]:
    """What the method sees at each step of stage 1."""
    seen, step = [], UVCController.step

    def watched(method: UVCController, w_lr: float, draws: torch.Generator) -> Any:
        gates = method.parameters()[0]
        norms = [p.grad.norm() for p in [*method.adapter.model.parameters(), gates] if p.grad is not None]
        assert gates.grad is not None
        seen.append(Seen(w_lr, torch.stack(norms).norm().item(), gates.grad.norm().item(), gates.detach().clone()))
        return step(method, w_lr, draws)

    with monkeypatch.context() as patch:
        patch.setattr(UVCController, "step", watched)
        train(config(*options), folder, quiet)
    return seen


def test_the_weights_optimizer_moves_the_gates_in_mode_released_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start = torch.tensor([[-1.0, 1.0]]).repeat(3, 1)  # [c5.1]
    released = search(monkeypatch, tmp_path / "one", *RELEASED, "--method.released.glr", 0)
    assert all((seen.gates != before.gates).any() for before, seen in pairwise(released))
    assert (released[0].gates != start).any()
    solved = search(monkeypatch, tmp_path / "two", "--method.eg", 0)
    assert all(torch.equal(seen.gates, start) for seen in solved)


def test_the_clip_of_stage_1_is_over_the_gates_too_in_mode_released_alone(
    weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clip = ("--train.clip", 1e-4, "--model.weights", weights)  # [c5.1]
    for seen in search(monkeypatch, tmp_path / "one", *RELEASED, *clip):
        assert seen.norm == pytest.approx(1e-4, rel=1e-2) and seen.gates_norm > 0
    for seen in search(monkeypatch, tmp_path / "two", *clip):
        assert math.sqrt(seen.norm**2 - seen.gates_norm**2) == pytest.approx(1e-4, rel=1e-2)


def test_the_proximal_step_is_at_the_learning_rate_after_its_schedules_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = search(monkeypatch, tmp_path / "run", *RELEASED, "--search.warmup_steps", 2)  # [c5.2]
    cosine = [(1 + math.cos(math.pi * step / 3)) / 2 for step in (0, 1, 2, 3)]
    assert [seen.w_lr / 1e-3 for seen in found] == pytest.approx([0.5, *cosine])


def test_stage_2_clips_its_gradients(tmp_path: Path) -> None:
    norms = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())

    hook = register_optimizer_step_pre_hook(look)
    try:
        for arm, clip in (("magnitude", 1e-4), ("dense", 0)):
            train(config("--arm", arm, "--train.clip", clip), tmp_path / arm, quiet)
    finally:
        hook.remove()
    assert norms[:10] == pytest.approx([1e-4] * 10, rel=1e-2) and min(norms[10:]) > 1e-3


def test_images_are_rolled_and_labels_smoothed() -> None:
    options = config("--kd.kind", "none", "--train.roll", 2, "--train.smoothing", 0.3, "--seed", 4)
    images, labels = (part[:40] for part in (load(options.data).train.images, load(options.data).train.labels))
    logits, seen = torch.randn(40, 10), []

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs)
        return logits

    value = training._loss(options, None, 10, forward, images, labels, 7)
    rolled = roll(images, 2, generator(4, 1, 7))
    assert not torch.equal(rolled, images) and torch.equal(seen[0], options.model.normalize(pixels(rolled)))
    smooth = torch.full((40, 10), 0.03).scatter_(1, labels[:, None].long(), 0.73)
    assert value.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, smooth).item(), rel=1e-6)


def test_accuracy_is_measured_on_the_test_images(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(evaluation, "accuracy", lambda model, data, *_: seen.append(data) or 1.0)
    evaluation.evaluate(copied(finished, tmp_path / "run"))
    splits = load(config().data)
    assert len(seen) == 2 and not torch.equal(splits.test.images[0], splits.train.images[0])
    assert all(torch.equal(data.images, splits.test.images) for data in seen)


def test_both_stages_run_compiled_where_asked_for(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def eager(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=eager))
    torch._dynamo.reset()
    train(config("--train.compile", "true"), tmp_path / "run", quiet)
    assert len(graphs) == 2  # one a stage: the gates' noise, drawn outside of it, compiles nothing again
    for name in ("model.pt", "before.pt", "plan.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_single_weights_may_go_below_the_floor_of_groups() -> None:
    options = config("--arm", "omp", "--method.budget", 0.01)
    data = load(options.data).train
    model = network(options, data)
    assert choose(options, model, data) == Plan.full(ViTAdapter(model).dims)


def test_a_loss_that_is_no_number_stops_the_run_with_its_step(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"(loss is nan|weights are not finite) at step \d"):
        train(config("--search.lr", 1e30), tmp_path / "run", quiet)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method.budget", 0), "method.budget must be in (0, 1], got 0.0"),
        (("--method.budget", 0.01), "method: budget must be at least 0.2355 for this model, got 0.01"),
        (("--method.protect_blocks", "[5]"), "method: protect_blocks must be below 3, got 5"),
        (("--method.warmup_steps", 5), "method: warmup_steps must be below the 5 steps of stage 1, got 5"),
        (("--method.accounting", "latency"), "method.table must be set for accounting latency, got ''"),
        (("--method.table", "t"), "method.table must be empty but for accounting latency, got 't'"),
        (("--method.released.gating_interval", 0), "method.released.gating_interval must be at least 1, got 0"),
        (("--method.released.zlr", -1), "method.released.zlr must be at least 0 and finite, got -1.0"),
        (("--method.released.gate_momentum", 1), "method.released.gate_momentum must be in [0, 1), got 1.0"),
        (("--method.released.tau", 0), "method.released.tau must be positive, got 0.0"),
        (("--arm", "magic"), "arm must be"),
        (("--search.epochs", 0), "search.epochs must be positive for arm uvc, got 0"),
        (("--train.ema", 0.9), "train.ema must be 0 here, got 0.9"),
        (("--method.budgte", 0.5), "unknown key 'method.budgte'; did you mean 'method.budget'?"),
        (("--model.weights", "no.pt"), "no.pt: no such checkpoint"),
        (("--model.name", "swin_tiny_patch4_window7_224"), "model.name"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    options: tuple[object, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(training.main, arguments("--run.folder", tmp_path / "run", *options), capsys)
    assert message in line


def test_the_commands_say_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(training.main, arguments("--run.folder", tmp_path / "run", "--arm", "magnitude"), capsys)
    assert status is None and "parameters in 3 blocks" in out
    status, out, _ = said(evaluation.main, ["--folder", tmp_path / "run"], capsys)
    assert status is None and "of the multiply-adds (exact, budget 50%)" in out


def test_eval_refuses_runs_that_are_not_whole(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_eval_refuses(evaluation.main, copied(finished, tmp_path / "run"), "model.pt", capsys)
    for content, message in (("{", "damaged (not a plan"), ('{"sizes": []}', "damaged (not a plan")):
        run = copied(finished, tmp_path / f"plan{len(content)}")
        (run / "plan.json").write_text(content)
        assert message in refusal(evaluation.main, ["--folder", run], capsys)


def test_configurations_are_readable() -> None:
    for path in CONFIGS.glob("*.yaml"):
        assert parse(Config, ["--config", str(path)], prog="train.py")
    with pytest.raises(ConfigError):
        config("--method.mode", "released")
