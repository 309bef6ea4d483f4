"""Facts about a chain of lottery rounds: what each round starts from and leaves, and that no disturbance changes it."""

from __future__ import annotations

import json
import multiprocessing
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from certified_pruning import eval as evaluation
from certified_pruning import objective
from certified_pruning import train as training
from certified_pruning.settings import Config
from certified_pruning.train import learning_rate, train
from common.config import UserError, load, parse
from common.data import load as load_data
from common.runs import load_checkpoint, read_json
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

SCRIPT = Path(training.__file__)
SMOKE = SCRIPT.parent / "configs" / "smoke.yaml"
ROUNDS, STEPS = 3, 12  # two epochs of six batches a round
FASTER = ["--prune.rounds", ROUNDS, "--data.fraction", 0.05, "--run.checkpoint_every", 5, "--eval.images", 2]
WITHOUT_NORMS = ["--model.name", "cnn_a", "--train.regime", "fgsm"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "certified_pruning.eval", "torch.utils.tensorboard"])


def arguments(*options: object) -> list[str]:
    return ["--config", str(SMOKE), *map(str, FASTER), *map(str, options)]


def config(*options: object) -> Config:
    return parse(Config, arguments(*options), prog="train.py")


class Chain(NamedTuple):
    """A finished chain; of the start of each round the network's weights and the number of momenta in the optimiser."""

    folder: Path
    starts: list[dict[str, Tensor]]
    momenta: list[int]

    def tickets(self) -> list[dict[str, Any]]:
        return [load_checkpoint(self.folder / "tickets" / f"{number}.pt") for number in range(ROUNDS)]


@pytest.fixture(scope="module", params=["imp", "random", "imp+nrs"])
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder, starts, momenta = tmp_path_factory.mktemp("chain") / "run", [], []
    loss, build, optimizers = training._loss, training._optimizer, []

    def watched(config: Config, model: Any, raw: Tensor, labels: Tensor, step: int, steps: int, *rest: Any) -> Any:
        assert steps == STEPS
        if step % steps == 0:
            starts.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            momenta.append(len(optimizers[-1].state))
        return loss(config, model, raw, labels, step, steps, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_loss", watched)
        patch.setattr(training, "_optimizer", lambda *args: (optimizers.append(build(*args)), optimizers[-1])[1])
        train(config("--prune.method", request.param), folder, quiet)
    return Chain(folder, starts, momenta)


# Rounds


def test_every_round_starts_from_the_initial_weights_under_its_mask(chain: Chain) -> None:
    assert len(chain.starts) == ROUNDS
    for start, ticket in zip(chain.starts, chain.tickets(), strict=True):
        for name, initial in chain.starts[0].items():
            assert torch.equal(start[name], initial * ticket["masks"].get(name, torch.tensor(1))), name


def test_every_round_starts_without_momentum(chain: Chain) -> None:
    assert chain.momenta == [0] * ROUNDS


def test_training_moves_every_weight_tensor(chain: Chain) -> None:
    for start, ticket in zip(chain.starts, chain.tickets(), strict=True):
        assert not any(torch.equal(start[name], ticket["model"][name]) for name in start)


def test_masks_are_nested(chain: Chain) -> None:
    tickets = chain.tickets()
    for wider, narrower in pairwise(tickets):
        for name, mask in narrower["masks"].items():
            assert not (mask & ~wider["masks"][name]).any()


def test_every_round_prunes_exactly_half_of_what_is_left(chain: Chain) -> None:
    kept = [sum(int(mask.sum()) for mask in ticket["masks"].values()) for ticket in chain.tickets()]
    total = (1 * 4 + 4 * 6) * 4 * 4  # 1 -> 4 -> 6 channels, kernels of 4 x 4
    assert kept == [total, total // 2, total // 4]


def test_masked_weights_are_exactly_zero_in_every_ticket_and_no_others_are(chain: Chain) -> None:
    for ticket in chain.tickets():
        for name, mask in ticket["masks"].items():
            assert torch.equal(ticket["model"][name] != 0, mask)


def test_only_convolution_weights_are_pruned(chain: Chain) -> None:
    for ticket in chain.tickets():
        assert all(ticket["model"][name].ndim == 4 for name in ticket["masks"])
        others = [tensor for name, tensor in ticket["model"].items() if name not in ticket["masks"]]
        assert all(tensor.ndim != 4 for tensor in others)
        assert all((tensor != 0).all() for tensor in others if tensor.ndim == 2)


def test_metrics_of_every_round_are_left_and_returned(chain: Chain) -> None:
    levels = read_json(chain.folder / "done.json")["levels"]
    assert [level["density"] for level in levels] == [1, 0.5, 0.25]
    logged = [json.loads(line) for line in (chain.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if line["split"] == "train"] == [6, 12, 18, 24, 30, 36]
    assert [line["val_accuracy"] for line in logged if line["split"] == "val"] == [
        level["val_accuracy"] for level in levels
    ]


def test_a_finished_chain_is_not_trained_again(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "_loss", fail)
    there = load(Config, chain.folder / "config.yaml")
    assert train(there, chain.folder, quiet) == read_json(chain.folder / "done.json")


@pytest.mark.parametrize("chain", ["imp", "imp+nrs"], indirect=True)
def test_magnitude_pruning_removes_the_smallest_weights(chain: Chain) -> None:
    for wider, narrower in pairwise(chain.tickets()):
        trained = torch.cat([wider["model"][name].abs().flatten() for name in wider["masks"]])
        before, after = (torch.cat([m.flatten() for m in ticket["masks"].values()]) for ticket in (wider, narrower))
        assert trained[before & ~after].max() <= trained[after].min()


# Schedules


def test_the_learning_rate_rises_and_falls_in_straight_lines() -> None:
    there = config("--train.lr", 1.0, "--train.warmup", 0.25, "--train.epochs", 2)
    rates = [learning_rate(there, step, 8) for step in range(8)]
    assert rates == pytest.approx([1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_milestones_divide_the_learning_rate_by_ten() -> None:
    there = config("--train.lr", 1.0, "--train.epochs", 4, "--train.milestones", "[1, 3]")
    rates = [learning_rate(there, step, 8) for step in range(8)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_milestones_of_rounds_after_the_first_come_earlier_by_the_epochs_asked_for() -> None:
    there = config(
        "--train.lr", 1.0, "--train.epochs", 4, "--train.milestones", "[2, 3]", "--train.milestones_early", 1
    )
    first, second = ([learning_rate(there, step, 8) for step in range(start, start + 8)] for start in (0, 8))
    assert first == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert second == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01])


def test_every_round_ramps_eps_anew() -> None:
    there = config("--train.eps", 0.1, "--train.eps_ramp", 0.5)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "fgsm_random_start_loss", lambda *args, **_: (seen.append(args[3]), (None, None))[1])
        for step in (0, 3, 6, 11, 12, 15):
            training._loss(there, None, torch.zeros(2, 1, 4, 4), torch.zeros(2), step, 12)  # type: ignore[arg-type]
    assert seen[:4] == sorted(seen[:4]) and seen[3] == 0.1
    assert seen[4:] == seen[:2]


# Disturbed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(config(), folder, quiet)
    return results(folder)


def results(folder: Path) -> dict[str, bytes]:
    return children.tree(folder, ["tickets/*.pt", "metrics.jsonl", "done.json"])


def started(folder: Path) -> Any:
    process = FORKS.Process(target=train, args=(config(), folder, slow))
    process.start()
    return process


def test_a_chain_killed_within_and_between_rounds_equals_an_undisturbed_one_bit_for_bit(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    folder = tmp_path / "run"
    kill_after_a_checkpoint(started, folder, times=1)  # within round 0
    for number in range(ROUNDS - 1):  # not after the last round: the run is then over
        process = started(folder)
        children.until(lambda number=number: (folder / "tickets" / f"{number}.pt").exists())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    kill_after_a_checkpoint(started, folder, times=1)  # within the last round
    started(folder).join()
    assert results(folder) == undisturbed and len(undisturbed) == ROUNDS + 2


def test_two_processes_train_the_chain_of_one_at_the_same_global_batch(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(config(*WITHOUT_NORMS), one, quiet)
    done = children.run(*children.TORCHRUN, SCRIPT, *arguments(*WITHOUT_NORMS, "--run.folder", two))
    assert done.returncode == 0, done.stderr
    assert len(losses(one)) == 6 and losses(two) == pytest.approx(losses(one), abs=1e-5, rel=0)
    last = [load_checkpoint(folder / "tickets" / f"{ROUNDS - 1}.pt")["masks"] for folder in (one, two)]
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_a_loss_that_is_not_finite_stops_at_its_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step \d+; "):
        train(config("--train.lr", 1e30, "--train.clip", 1e30), tmp_path / "run", quiet)
    assert not (tmp_path / "run" / "done.json").exists()


# The command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.epoch", "3"], "unknown key 'train.epoch'; did you mean 'train.epochs'?"),
        (["--prune.rate", "1.5"], "prune.rate must be in (0, 1), got 1.5"),
        (["--model.name", "resnet"], "model.name must be one of"),
        (["--prune.method", "slim", "--prune.prunable", "conv+linear"], "prune.prunable must be conv with method slim"),
    ],
)
def test_a_wrong_option_ends_in_one_line_before_anything_is_written(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert refusal(training.main, arguments("--run.folder", folder, *options), capsys).startswith(message)
    assert not folder.exists()


def test_training_and_verifying_a_chain_by_command_say_what_came_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = ["--run.folder", folder, "--run.threads", torch.get_num_threads(), "--train.epochs", 1]
    status, out, _ = said(training.main, arguments(*options), capsys)
    assert status is None
    assert [line.split(",")[0] for line in out.splitlines()[:-1]] == [
        "round 0: density 1.0000",
        "round 1: density 0.5000",
        "round 2: density 0.2500",
    ]
    assert out.splitlines()[-1].endswith(f"eval.py --folder {folder}")
    status, out, _ = said(evaluation.main, ["--folder", str(folder)], capsys)
    assert status is None
    assert [line.split(",")[0] for line in out.splitlines()] == [
        "round 0: density 1.0000",
        "round 1: density 0.5000",
        "round 2: density 0.2500",
    ]


# Verifying a run


only_imp = pytest.mark.parametrize("chain", ["imp"], indirect=True)


@pytest.fixture
def run(chain: Chain, tmp_path: Path) -> Path:
    """A copy of the finished chain, to damage."""
    return copied(chain.folder, tmp_path / "run")


@only_imp
def test_absent_unfinished_and_damaged_runs_are_refused_by_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_eval_refuses(evaluation.main, run, "tickets/0.pt", capsys)


@only_imp
def test_verifying_goes_on_after_the_rounds_that_are_done_and_keeps_their_numbers(run: Path) -> None:
    told: list[float] = []
    whole = evaluation.evaluate(run, told.append)
    assert told == sorted(told) and told[-1] == 1
    assert read_json(run / "eval.json") == whole
    assert evaluation.evaluate(run) == whole
    (run / "eval.json").write_text(json.dumps(whole[:2]))
    resumed = evaluation.evaluate(run)
    assert resumed[:2] == whole[:2]
    assert {**resumed[2], "seconds": 0} == {**whole[2], "seconds": 0}


@only_imp
def test_verified_falsified_and_unknown_images_are_the_correctly_classified_ones(run: Path) -> None:
    there = load(Config, run / "config.yaml")
    splits = load_data(there.data)
    images, model = splits.test.subset(torch.arange(there.eval.images)), training.network(there, splits.train)
    levels = read_json(run / "done.json")["levels"]
    for number, (metrics, level) in enumerate(zip(evaluation.evaluate(run), levels, strict=True)):
        assert (metrics["density"], metrics["val_accuracy"]) == (level["density"], level["val_accuracy"])
        model.load_state_dict(load_checkpoint(run / "tickets" / f"{number}.pt")["model"])
        correct = training.accuracy(model, images)
        assert metrics["verified"] + metrics["falsified"] + metrics["unknown"] == pytest.approx(correct)
        assert metrics["alpha_verified"] <= metrics["verified"] <= 100
        assert 0 <= metrics["unstable"] <= 1


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weights_decay_by_the_configured_share_under_either_optimiser(optimizer: str) -> None:
    """Without a gradient of the loss the step is along the decay: of SGD lr * decay * w, of Adam lr * sign(w)."""
    model = torch.nn.Linear(1, 1)
    model.weight.data.fill_(2.0)
    chosen = config("--train.optimizer", optimizer, "--train.lr", 0.1, "--train.weight_decay", 0.25)
    step = training._optimizer(chosen, model)
    model.weight.grad = torch.zeros_like(model.weight)
    step.step()
    assert model.weight.item() == pytest.approx(2 - 0.1 * (0.25 * 2 if optimizer == "sgd" else 1), abs=1e-6)
