"""Facts about runs: finding tickets and transferring them, exact resumption, and what bad input is told."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch

from common.config import UserError, parse
from common.data import load as load_data
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
from double_win_lth import TicketBook
from double_win_lth import eval as evaluation
from double_win_lth import tickets as finding
from double_win_lth import train as training
from double_win_lth import transfer as transferring
from double_win_lth.convert import load_pretrained, plain_names, read_weights
from double_win_lth.convert import main as convert
from double_win_lth.models import build_model
from double_win_lth.regimes import Regime
from double_win_lth.settings import Config
from double_win_lth.tests.nets import CONFIGS, arguments, config
from double_win_lth.tickets import conv_weights, one_shot_tickets
from double_win_lth.train import train
from double_win_lth.training import network
from double_win_lth.transfer import Source, target_images, ticket_network

SCRIPT = Path(training.__file__)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "double_win_lth.eval", "torch.utils.tensorboard"])
CPU = torch.device("cpu")
SEVERAL = "[dense, imp:1, imp:2, omp:2, random:2, reinit:2, shuffled:2]"


def to(found: Path, *options: object) -> Config:
    return config("--task", "transfer", "--transfer.run", found, *options)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("found") / "run"
    train(config(), folder, quiet)
    return folder


@pytest.fixture(scope="module")
def moved(found: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moved") / "run"
    train(to(found, "--transfer.tickets", "[imp:1, imp:2]"), folder, quiet)
    return folder


# Finding tickets


def test_a_run_pre_trains_and_leaves_nested_tickets_of_exact_counts(found: Path) -> None:
    metrics, book = read_json(found / "done.json"), TicketBook.load(found / "tickets.safetensors")
    prunable = metrics["prunable"]
    assert metrics["remaining"] == [prunable, prunable - round(prunable / 2), 1201] and prunable == 4804
    assert [book.remaining(level) for level in range(3)] == metrics["remaining"]
    lines = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "tickets"] == [4, 7]
    # The first ticket is one-shot; the second is not: its round was trained.
    net = network(config(), load_data(config().source).train, CPU)
    net.load_state_dict(load_checkpoint(found / "pretrained.pt")["model"])
    once = one_shot_tickets(net, metrics["remaining"][1:])
    assert book.iou(once, 1) == 1 and book.iou(once, 2) < 1


def test_rounds_keep_masked_weights_at_zero_and_start_their_learning_rates_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = config("--prune.rounds", 3, "--round.schedule", "triangle")
    step, rank, rates, ranked = training.checked_step, finding.keep_largest, [], []

    def stepping(
        run: Any, number: int, model: Any, optimizer: Any, batch: Any, regime: Any, lr: float, **o: Any
    ) -> Any:
        rates.append(lr)
        return step(run, number, model, optimizer, batch, regime, lr, **o)

    def ranking(weights: Any, keep: int, within: Any) -> Any:
        ranked.append([torch.equal(weight != 0, within[name]) for name, weight in weights.items()])
        return rank(weights, keep, within)

    monkeypatch.setattr(training, "checked_step", stepping)
    monkeypatch.setattr(finding, "keep_largest", ranking)
    train(there, tmp_path / "run", quiet)
    a_round = [there.round.learning_rate(number, 3) for number in range(3)]
    assert rates == [there.pretrain.learning_rate(number, 3) for number in range(4)] + 2 * a_round
    assert len(set(a_round)) > 1 and len(ranked) == 3 and all(map(all, ranked))


def test_regimes_of_one_seed_start_from_one_network_and_differ(found: Path, tmp_path: Path) -> None:
    pretrained = {"adv": load_checkpoint(found / "pretrained.pt")["model"]}
    for regime in ("std", "fast"):
        train(config("--regime", regime), tmp_path / regime, quiet)
        pretrained[regime] = load_checkpoint(tmp_path / regime / "pretrained.pt")["model"]
    steps = {name: int(state["bn1.num_batches_tracked"]) for name, state in pretrained.items()}
    assert steps == {"std": 4, "fast": 8, "adv": 16}  # K + 1 a step
    first = [losses(folder)[0] for folder in (tmp_path / "std", tmp_path / "fast", found)]
    assert len(set(first)) == 3
    seed_everything(0)
    start = network(config(), load_data(config().source).train, CPU).state_dict()["conv1.weight"]
    assert all(not torch.equal(state["conv1.weight"], start) for state in pretrained.values())


def test_a_second_run_of_the_same_configuration_is_the_same_and_a_finished_one_is_left(
    found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(), tmp_path / "run", quiet)
    assert children.tree(found, FOUND) == children.tree(tmp_path / "run", FOUND)
    monkeypatch.setattr(training.Chain, "go", lambda *_: pytest.fail("trained again"))
    assert train(config(), found, quiet) == read_json(found / "done.json")


class Stop(Exception):
    pass


FOUND = ["pretrained.pt", "tickets.safetensors", "metrics.jsonl", "done.json"]


def test_a_chain_stopped_at_any_moment_ends_bit_for_bit_like_an_undisturbed_one(tmp_path: Path) -> None:
    three = [
        "--prune.rounds",
        3,
    ]  # steps 0-3 of pre-training, 4-6 and 7-9 of rounds; rankings before 4, before 7, after 9
    train(config(*three), tmp_path / "whole", quiet)
    step, rank, trained = training.checked_step, finding.keep_largest, []
    for every in (1, 2, 50):
        folder, options = tmp_path / str(every), [*three, "--run.checkpoint_every", every]
        for stop_at in [1, 3, "ranking 1", 4, 6, "ranking 2", 7, 9, "ranking 3"]:

            def stepping(
                run: Any, number: int, *rest: Any, at: Any = stop_at, spaced: int = every, **options: Any
            ) -> Any:
                if number == at:
                    raise Stop
                trained.append((spaced, number))
                return step(run, number, *rest, **options)

            def ranking(weights: Any, keep: int, *rest: Any, at: Any = stop_at) -> Any:
                if at == f"ranking {[2402, 1201, 601].index(keep) + 1}":
                    raise Stop
                return rank(weights, keep, *rest)

            with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
                patch.setattr(training, "checked_step", stepping)
                patch.setattr(finding, "keep_largest", ranking)
                train(config(*options), folder, quiet)
        train(config(*options), folder, quiet)
        assert children.tree(folder, FOUND) == children.tree(tmp_path / "whole", FOUND)
    # Stopped at 4 and at 7, after a finished round, the steps of what was finished are not done again.
    rare = [number for spaced, number in trained if spaced == 50]
    assert rare.count(3) == 1 and rare.count(6) == 2 and [number for s, number in trained if s == 1].count(6) == 1


def test_a_chain_killed_again_and_again_finds_the_tickets_of_an_undisturbed_one(tmp_path: Path) -> None:
    longer = config("--pretrain.steps", 20, "--round.steps", 20, "--run.checkpoint_every", 3)

    def started(folder: Path) -> Any:
        process = FORKS.Process(target=train, args=(longer, folder, slow))
        process.start()
        return process

    started(tmp_path / "whole").join()
    kill_after_a_checkpoint(started, tmp_path / "run")
    started(tmp_path / "run").join()
    whole = children.tree(tmp_path / "whole", FOUND)
    assert children.tree(tmp_path / "run", FOUND) == whole and len(whole) == 4


def test_ranks_hold_one_chain_and_leave_one_set_of_files(tmp_path: Path) -> None:
    done = children.run(*children.TORCHRUN, SCRIPT, *arguments("--run.folder", tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert "ticket 2: sparsity 75.00 %, 1,201 weights" in done.stdout
    assert TicketBook.load(tmp_path / "two" / "tickets.safetensors").remaining(2) == 1201


def test_a_loss_that_is_not_finite_stops_at_its_step(tmp_path: Path) -> None:
    for regime in ("std", "adv"):
        with pytest.raises(UserError, match=r"loss is (nan|inf) at step \d+; "):
            train(config("--regime", regime, "--pretrain.lr", 1e30), tmp_path / regime, quiet)
        assert not (tmp_path / regime / "done.json").exists()


def poisoned(step: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Steps of which number `at` leaves statistics that are infinite, which logits do not show."""

    def stepping(run: Any, number: int, model: Any, *rest: Any, **options: Any) -> Any:
        values = step(run, number, model, *rest, **options)
        if number == at:
            model.get_buffer("bn1.running_var").fill_(torch.inf)
        return values

    return stepping


@pytest.mark.parametrize(("stage", "last"), [("pretraining", 3), ("round", 6)])
def test_a_stage_whose_last_step_diverges_stops_there(
    stage: str, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "checked_step", poisoned(training.checked_step, last))
    with pytest.raises(NonFiniteError, match=rf"^bn1\.running_var is inf at step {last + 1}; "):
        train(config("--run.checkpoint_every", 50), tmp_path / stage, quiet)


@pytest.mark.parametrize("kind", ["std", "adv"])
@pytest.mark.parametrize("lr", [1e30, None])  # finite weights of logits that are not; a state that is not
def test_a_transfer_whose_last_step_diverges_leaves_nothing_that_looks_finished(
    kind: str, lr: float | None, found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--transfer.kind", kind, "--transfer.fraction", 0.1, "--finetune.steps", 1]
    if lr is None:
        monkeypatch.setattr(transferring, "checked_step", poisoned(transferring.checked_step, 0))
    else:
        options += ["--finetune.lr", lr]
    with pytest.raises(NonFiniteError, match=r"^\S+ is (nan|inf) at step 1; no checkpoint had been written$"):
        train(to(found, *options), tmp_path / "run", quiet)
    assert not {"model.pt", "done.json"} & {path.name for path in (tmp_path / "run").iterdir()}


# Given weights


def test_given_weights_are_pruned_and_not_pre_trained(found: Path, tmp_path: Path) -> None:
    state = load_checkpoint(found / "pretrained.pt")["model"]
    wrapped = {f"module.model.{name}": value for name, value in state.items()}
    wrapped |= {"module.normalizer.new_mean": torch.ones(1), "module.attacker.model.conv1.weight": torch.ones(1)}
    torch.save({"model": wrapped, "epoch": 3}, tmp_path / "robust.pt")
    metrics = train(config("--init", tmp_path / "robust.pt"), tmp_path / "run", quiet)
    again = load_checkpoint(tmp_path / "run" / "pretrained.pt")["model"]
    assert all(torch.equal(value, state[name]) for name, value in again.items())
    assert metrics["remaining"][-1] == 1201 and len(losses(tmp_path / "run")) == 1  # the one trained round
    one, other = (TicketBook.load(each / "tickets.safetensors") for each in (found, tmp_path / "run"))
    assert one.iou(other, 1) == 1


def test_checkpoints_are_converted_to_safetensors(
    found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_checkpoint(found / "pretrained.pt")["model"]
    torch.save({"state_dict": {f"module.1.{name}": value for name, value in state.items()}}, tmp_path / "in.pth")
    status, out, _ = said(convert, [tmp_path / "in.pth", tmp_path / "out.safetensors"], capsys)
    assert status is None and out.startswith(f"{len(state)} tensors")
    again = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert again.keys() == state.keys() and all(torch.equal(again[name], value) for name, value in state.items())
    torch.save({"epoch": 3, "weights": state}, tmp_path / "other.pth")
    line = refusal(convert, [tmp_path / "other.pth", tmp_path / "out.safetensors"], capsys)
    assert line.endswith(
        "must hold a state dict, by itself or under state_dict, model_state_dict, model, net, got epoch, weights"
    )
    assert safetensors.torch.load_file(tmp_path / "out.safetensors").keys() == state.keys()
    assert "arguments must be the file to read" in refusal(convert, [tmp_path / "in.pth"], capsys)
    assert "output must be a .safetensors file" in refusal(convert, [tmp_path / "in.pth", "out.pt"], capsys)


def test_weights_of_another_network_are_explained_and_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Poison:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
            return open, (str(tmp_path / "executed"), "w")

    torch.save({"model": Poison()}, tmp_path / "evil.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    for name in ("evil.pth", "broken.safetensors", "absent.pth"):
        with pytest.raises(UserError) as told:
            read_weights(tmp_path / name)
        assert name in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "executed").exists()

    net = build_model("resnet8", 1, 3, [0.0], [1.0], 4)
    before, state, path = net.fc.bias.clone(), dict(net.state_dict()), Path("w.pt")
    wider = {**state, "conv1.weight": torch.ones(4, 1, 7, 7)}
    fewer = {name: value for name, value in state.items() if name != "bn1.bias"}
    for odd, message in (
        (wider, r"w\.pt: conv1\.weight must be \(4, 1, 3, 3\), got \(4, 1, 7, 7\)"),
        (fewer, r"w\.pt: lacks bn1\.bias of this network"),
        ({**state, "head.bias": torch.ones(1)}, r"w\.pt: holds head\.bias, which this network has not"),
    ):
        with pytest.raises(UserError, match=message):
            load_pretrained(net, {**odd, "fc.bias": odd["fc.bias"] + 1}, path)
        assert torch.equal(net.fc.bias, before)
    load_pretrained(net, {**state, "fc.weight": torch.ones(9, 16)}, path, without="fc")
    assert plain_names({"mean": torch.ones(1), "module.conv1.weight": torch.ones(2), "step": 3}).keys() == {
        "conv1.weight"
    }


# Transfer


def test_tickets_of_every_kind_are_what_their_name_says(found: Path) -> None:
    there = to(found)
    data, _, _ = target_images(there)
    source = Source.of(there)
    kinds = ("dense", "imp:2", "omp:2", "random:2", "reinit:2", "shuffled:2")
    tickets = {name: ticket_network(there, data, name, source, CPU) for name in kinds}
    dense = tickets["dense"][0].state_dict()
    pretrained = load_checkpoint(found / "pretrained.pt")["model"]
    assert all(torch.equal(value, pretrained[name]) for name, value in dense.items() if not name.startswith("fc."))
    assert not torch.equal(dense["fc.weight"], pretrained["fc.weight"])
    seed_everything(there.seed)
    assert not torch.equal(dense["fc.weight"], network(there, data, CPU).fc.weight)  # nor that of pre-training's start
    for name, (model, masks) in tickets.items():
        assert torch.equal(model.fc.weight, dense["fc.weight"])  # one head for all
        assert masks.kept == (4804 if name == "dense" else 1201)
        for key, weight in conv_weights(model).items():
            kept = weight[masks[key]]
            assert (weight[~masks[key]] == 0).all()
            assert torch.equal(kept, pretrained[key][masks[key]]) == (name != "reinit:2"), name
    imp, omp, shuffled, random = (tickets[f"{kind}:2"][1] for kind in ("imp", "omp", "shuffled", "random"))
    assert all(mask.sum() == shuffled[name].sum() for name, mask in imp.items())
    assert any(mask.sum() != random[name].sum() for name, mask in imp.items())
    differ = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in ((imp, omp), (imp, shuffled))]
    assert differ == [True, True]
    assert all(torch.equal(mask, tickets["reinit:2"][1][name]) for name, mask in imp.items())


def test_swapped_weights_are_those_of_the_other_run_under_the_masks_of_this(found: Path, tmp_path: Path) -> None:
    train(config("--regime", "std"), tmp_path / "std", quiet)
    there = to(found, "--transfer.weights", tmp_path / "std")
    model, masks = ticket_network(there, target_images(there)[0], "imp:2", Source.of(there), CPU)
    other = load_checkpoint(tmp_path / "std" / "pretrained.pt")["model"]
    book = TicketBook.load(found / "tickets.safetensors")
    for name, weight in conv_weights(model).items():
        assert torch.equal(masks[name], book.mask(2)[name]) and torch.equal(weight, other[name] * masks[name])


@pytest.mark.parametrize("kind", ["std", "adv"])
def test_tickets_trained_together_end_as_they_do_alone(kind: str, found: Path, tmp_path: Path) -> None:
    options = ["--transfer.kind", kind, "--transfer.fraction", 0.02]
    names = ["dense", "imp:2", "reinit:2"]
    train(to(found, *options, "--transfer.tickets", f"[{', '.join(names)}]"), tmp_path / "all", quiet)
    batch = load_checkpoint(tmp_path / "all" / "model.pt")["model"]
    sparsities = read_json(tmp_path / "all" / "done.json")["sparsity"]
    assert sparsities == {"dense": 0.0, "imp:2": 0.75, "reinit:2": 0.75}
    book = TicketBook.load(found / "tickets.safetensors")
    for index, name in enumerate(names):
        train(to(found, *options, "--transfer.tickets", f"[{name}]"), tmp_path / name, quiet)
        alone = load_checkpoint(tmp_path / name / "model.pt")["model"]
        width = len(alone["conv1.weight"])
        ours = batch["net.conv1.weight"][index * width : (index + 1) * width]
        assert torch.allclose(ours, alone["conv1.weight"], atol=1e-3)
        for key, mask in book.mask(0 if name == "dense" else 2).items():
            ours = batch[f"net.{key}"].chunk(len(names))[index]
            assert torch.equal(ours != 0, mask) and torch.equal(alone[key] != 0, mask)


@pytest.mark.parametrize(
    ("kind", "attack_bn", "passes"),
    [("std", "train", 3), ("adv", "train", 9), ("adv", "eval", 3)],  # three steps, an attack of two
)
def test_a_transfer_trains_on_the_images_of_its_kind_with_batch_norm_as_told(
    kind: str, attack_bn: str, passes: int, found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacked, attack = [], Regime.perturb

    def watch(regime: Regime, model: Any, x: Any, *rest: Any, **options: Any) -> Any:
        images = attack(regime, model, x, *rest, **options)
        if regime.name != "pgd":  # not in measuring
            attacked.append(not torch.equal(images, x))
        return images

    monkeypatch.setattr(Regime, "perturb", watch)
    options = ["--transfer.kind", kind, "--transfer.attack_bn", attack_bn, "--transfer.fraction", 0.02]
    train(to(found, *options), tmp_path / "run", quiet)
    assert attacked[:3] == [kind == "adv"] * 3
    before = load_checkpoint(found / "pretrained.pt")["model"]["bn1.num_batches_tracked"]
    assert load_checkpoint(tmp_path / "run" / "model.pt")["model"]["bn1.num_batches_tracked"] - before == passes


def test_robust_accuracy_is_measured_on_test_images_under_the_attack_of_measuring(
    found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, measure = [], transferring.accuracies

    def watch(model: Any, data: Any, attack: Regime, **options: Any) -> list[float]:
        measured.append((data.images, attack))
        return measure(model, data, attack, **options)

    monkeypatch.setattr(transferring, "accuracies", watch)
    judge = ["--eval.attack.steps", 3, "--eval.attack.eps", 0.07, "--eval.attack.step_size", 0.03]
    for split in ("test", "val"):
        train(to(found, *judge, "--transfer.fraction", 0.02, "--eval.split", split), tmp_path / split, quiet)
    test = load_data(to(found).target).test.images
    val = target_images(to(found))[1].images
    for (images, attack), wanted in zip(measured, (test, test[:40], val, val[:40]), strict=True):
        assert torch.equal(images, wanted) and attack.name in ("std", "pgd")
    assert measured[1][1] == measured[3][1] == Regime("pgd", 0.07, 0.03, 3)


def test_every_draw_has_training_images_of_its_own_and_the_test_images_of_all(found: Path) -> None:
    options = ["--transfer.fraction", 0.02, "--transfer.draw"]
    (first, val, test), (second, its_val, its_test) = (target_images(to(found, *options, draw)) for draw in (0, 1))
    assert not torch.equal(first.images, second.images) and len(first) == len(second) == 22
    assert torch.equal(val.images, its_val.images) and torch.equal(test.images, its_test.images)
    assert torch.equal(test.images, load_data(to(found).target).test.images)


def test_transfer_resumes_bit_for_bit_with_its_best_weights(found: Path, tmp_path: Path) -> None:

    there = to(
        found, "--finetune.steps", 0, "--finetune.epochs", 3, "--transfer.fraction", 0.04, "--transfer.select", "val"
    )
    train(there, tmp_path / "whole", quiet)
    step = transferring.checked_step
    for stop_at in (1, 3, 4):

        def stopping(run: Any, number: int, *rest: Any, at: int = stop_at, **options: Any) -> Any:
            if number == at:
                raise Stop
            return step(run, number, *rest, **options)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr(transferring, "checked_step", stopping)
            train(there, tmp_path / "run", quiet)
    metrics = train(there, tmp_path / "run", quiet)
    names = ["metrics.jsonl", "done.json"]
    assert children.tree(tmp_path / "run", names) == children.tree(tmp_path / "whole", names)
    one, other = (load_checkpoint(tmp_path / name / "model.pt") for name in ("run", "whole"))
    for kind in ("model", "sa", "ra"):
        assert all(torch.equal(value, other[kind][name]) for name, value in one[kind].items())
    assert set(metrics["selected"]) == {"sa", "ra"}
    # The validation set is scaled with the data: int(0.04 * 60) images.
    assert len(target_images(there)[1]) == 2 and len(target_images(to(found, "--transfer.fraction", 0.04))[1]) == 60


def test_the_best_weights_are_those_of_the_best_validation_epoch(found: Path, tmp_path: Path) -> None:
    options = ["--finetune.steps", 0, "--finetune.epochs", 4, "--transfer.fraction", 0.04]
    there = to(found, *options, "--transfer.select", "val_full", "--transfer.select_from", 1, "--eval.split", "val")
    metrics = train(there, tmp_path / "run", quiet)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if line["split"] == "val"]
    assert len(scores) == 3  # from epoch 1 on
    for name in ("sa", "ra"):
        assert metrics["selected"][name][name] == pytest.approx(max(line[name] for line in scores))
        assert metrics["tickets"]["dense"][name] == metrics["selected"][name][name]  # what the study reports
    assert metrics["last"]["dense"] == pytest.approx({name: scores[-1][name] for name in ("sa", "ra")})
    measures = evaluation.evaluate(arguments_of(tmp_path / "run"))  # on the same validation images
    assert set(measures) == {"dense", "dense, best sa", "dense, best ra"}
    assert measures["dense, best sa"]["sa"] == pytest.approx(metrics["tickets"]["dense"]["sa"])
    assert measures["dense"]["sa"] == pytest.approx(metrics["last"]["dense"]["sa"])


def test_the_attack_of_measuring_starts_where_the_run_says(
    moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, starts = copied(moved, tmp_path / "run"), []
    text = (run / "config.yaml").read_text()
    assert text.count("random_start: true") == 4  # of fast, adv, attack and eval.attack, in this order
    before, _, after = text.rpartition("random_start: true")
    (run / "config.yaml").write_text(f"{before}random_start: false{after}")

    def watch(*regime: Any) -> Regime:
        starts.append(Regime(*regime).random_start)
        return Regime(*regime)

    monkeypatch.setattr(evaluation, "Regime", watch)
    evaluation.evaluate(arguments_of(run, images=20))
    assert starts == [False, False]


# The command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prune.rate", "1.5"], "prune.rate must be in (0, 1), got 1.5"),
        (["--prune.rounds", "0"], "prune.rounds must be in [1, 255], got 0"),
        (
            ["--prune.rate", "0.99", "--prune.rounds", "200"],
            "prune: round 2 must leave at least one weight, removes all 48 at rate 0.99",
        ),
        (["--adv.step_size", "0"], "adv.step_size must be positive where there are steps, got 0"),
        (["--attack.eps", "-1"], "attack.eps must be in [0, 1], got -1"),
        (["--adv.steps", "-1"], "adv.steps must be at least 0, got -1"),
        (["--pretrain.lr", ".nan"], "pretrain.lr must be positive, got nan"),
        (["--round.epochs", "2"], "round.steps must be 0 where epochs are given, got 3"),
        (["--finetune.schedule", "cosine"], "finetune.epochs must be above 0 with cosine, got 0"),
        (["--pretrain.batch_size", "5000"], "batch size must be at most the 120 training images, got 5000"),
        (["--regime", "magic"], "regime must be"),
        (["--target.classes", "[2, 3]"], "target.classes must be disjoint from source.classes [0, 1, 2] (or set allow"),
        (["--target.classes", "[]"], "target.classes must be disjoint from source.classes"),
        (["--target.val", "0.1"], "target must be with val 0 and fraction 1"),
        (["--model.name", "resnet9"], "model.name must be one of resnet8, resnet20, resnet18, resnet50, got 'resnet9'"),
        (["--model.name", "resnet18"], "model.name resnet18 must have images of 3 channels, got 1"),
        (["--model.mean", "[0, 0]", "--model.std", "[1, 1]"], "model.mean must be as many numbers as the images' 1"),
        (["--transfer.tickets", "[imp]"], "ticket must be dense or KIND:LEVEL"),
        (["--transfer.tickets", "[imp:0]"], "ticket must be dense or KIND:LEVEL"),
        (["--transfer.select", "val", "--transfer.val", "0"], "transfer.val must be above 0 with transfer.select val"),
        (["--eval.split", "val", "--transfer.val", "0"], "transfer.val must be above 0 with eval.split val, got 0"),
        (["--pretrain.steps", "0"], "pretrain.steps must be above 0, or pretrain.epochs, got 0"),
        (["--round.steps", "0"], "round.steps must be above 0, or round.epochs, got 0"),
        (["--init", "nowhere.pt"], "nowhere.pt: no such file of weights"),
        (["--task", "transfer"], "transfer.run must be the folder of a run that found tickets, got ''"),
        (["--task", "transfer", "--transfer.run", "no"], "no: must be the folder of a finished run of task tickets"),
        (["--task", "transfer", "--transfer.fraction", "0.001"], "transfer.fraction must be enough for one image"),
        (["--task", "transfer", "--transfer.val", "9999"], "transfer.val must be below the 1200 target images"),
    ],
)
def test_a_wrong_option_ends_in_one_line_before_anything_is_written(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert refusal(training.main, arguments("--run.folder", folder, *options), capsys).startswith(message)
    assert not folder.exists()


def test_a_transfer_that_does_not_fit_its_tickets_is_refused_by_name(found: Path, tmp_path: Path) -> None:
    def told(*options: object, run: Path = found) -> str:
        with pytest.raises(UserError) as error:
            train(to(run, *options), tmp_path / "run", quiet)
        assert not (tmp_path / "run").exists() and "\n" not in str(error.value)
        return str(error.value)

    assert told("--finetune.steps", 0) == "finetune.steps must be above 0, or finetune.epochs, got 0"
    few = "transfer.select_from must be below the {} whole epochs of finetune with transfer.select {}, got {}"
    assert told("--transfer.select", "val") == few.format(0, "val", 0)
    epochs = ["--finetune.steps", 0, "--finetune.epochs", 3, "--transfer.select", "val_full"]
    assert told(*epochs, "--transfer.select_from", 3) == few.format(3, "val_full", 3)
    assert told("--transfer.tickets", "[imp:3]") == "transfer.tickets must be of a level up to 2, got 'imp:3'"
    assert "pretrained.pt: conv1.weight must be (8, 1, 3, 3), got (4, 1, 3, 3)" in told("--model.width", 8)
    assert "pretrained.pt: lacks layers" in told("--model.name", "resnet20")
    damaged = copied(found, tmp_path / "damaged")
    whole = (damaged / "tickets.safetensors").read_bytes()
    (damaged / "tickets.safetensors").write_bytes(whole[:-7])
    assert "tickets.safetensors: damaged, or not a file of tickets" in told(run=damaged)
    one_shot_tickets(torch.nn.Sequential(torch.nn.Conv2d(1, 4, 7)), [9]).save(damaged / "tickets.safetensors")
    assert told("--transfer.tickets", "[imp:1]", run=damaged).startswith("transfer.tickets imp:1: ticket must mask")
    (damaged / "pretrained.pt").write_bytes(b"no")
    assert "pretrained.pt: damaged" in told(run=damaged)
    (damaged / "done.json").write_text("{}")
    assert told(run=damaged) == f"{damaged}: must be the folder of a finished run of task tickets"


def test_tickets_of_the_targets_own_classes_are_refused(found: Path, tmp_path: Path) -> None:
    train(config("--source.classes", "[3, 4]", "--target.classes", "[0]", "--regime", "std"), tmp_path / "same", quiet)
    message = f"target.classes must be disjoint from source.classes [3, 4] of {tmp_path / 'same'} (or set allow_overlap"
    for options in (["--transfer.run", tmp_path / "same"], ["--transfer.weights", tmp_path / "same"]):
        with pytest.raises(UserError) as told:
            train(to(found, *options), tmp_path / "run", quiet)
        assert str(told.value).startswith(message) and not (tmp_path / "run").exists()
    assert Source.of(to(tmp_path / "same", "--allow_overlap", "true")).book.levels == 2
    # What counts is the run's source, not the one that is written in the transfer's configuration.
    assert Source.of(to(found, "--source.classes", "[3]")).book.levels == 2


def test_data_sets_are_one_whatever_their_name_or_the_way_to_them() -> None:
    def apart(source: list[str], target: list[str]) -> bool:
        classes = ["--source.classes", "[0, 1]", "--target.classes", "[1, 2]"]
        named = [f"--{which}.{text}" for which, texts in (("source", source), ("target", target)) for text in texts]
        try:
            config(*classes, *(word for text in named for word in text.split("="))).require_apart()
        except UserError:
            return False
        return True

    assert not apart(["name=mnist5k"], ["name=mnist"]) and not apart(["name=mnist"], ["name=mnist5k"])
    assert not apart(["name=npz", "path=a.npz"], ["name=npz", "path=b/../a.npz"])
    assert apart(["name=npz", "path=a.npz"], ["name=npz", "path=b.npz"]) and apart(["name=mnist"], ["name=kmnist"])


def test_training_by_command_says_what_came_out(
    found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", "transfer", "--transfer.run", found, "--run.folder", tmp_path / "run"]
    status, out, _ = said(training.main, arguments(*options), capsys)
    assert status is None and out.startswith("dense: SA ") and "RA " in out
    assert out.splitlines()[-1].endswith(f"eval.py --folder {tmp_path / 'run'}")
    status, out, _ = said(training.main, arguments("--run.folder", tmp_path / "tickets"), capsys)
    assert status is None and "ticket 2: sparsity 75.00 %, 1,201 weights" in out


# Measuring a run


def arguments_of(folder: Path, **options: Any) -> evaluation.EvalArguments:
    return evaluation.EvalArguments(folder=str(folder), **options)


def test_measures_of_several_attacks_are_kept_side_by_side(moved: Path, tmp_path: Path) -> None:
    run = copied(moved, tmp_path / "run")
    first = evaluation.evaluate(arguments_of(run, images=60))
    assert set(first) == {"imp:1", "imp:2"} and set(first["imp:1"]) == {"sa", "ra_pgd20_60"}
    trained = read_json(run / "done.json")["tickets"]
    assert all(first[name]["sa"] == pytest.approx(trained[name]["sa"], abs=0.4) for name in first)
    second = evaluation.evaluate(arguments_of(run, images=60, attack="worst"))
    assert all(each["ra_worst_60"] <= each["ra_pgd20_60"] for each in second.values())
    third = evaluation.evaluate(arguments_of(run, images=60, corruptions=True, slices=True))
    assert set(third["imp:2"]) == {
        *("sa", "ra_pgd20_60", "ra_worst_60", "slice"),
        *(f"sa_{name}" for name in ("noise", "blur", "contrast", "brightness")),
    }
    assert len(third["imp:2"]["slice"]) == 9 and read_json(run / "eval.json") == third
    (run / "model.pt").unlink()
    assert evaluation.evaluate(arguments_of(run, images=60)) == third  # kept: nothing is measured again


def test_a_run_that_found_tickets_is_measured_on_its_own_task(found: Path, tmp_path: Path) -> None:
    metrics = evaluation.evaluate(arguments_of(copied(found, tmp_path / "run"), images=20))
    assert set(metrics) == {"dense"} and 0 <= metrics["dense"]["ra_pgd20_20"] <= 100


def test_measuring_by_command_says_what_came_out(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(moved, tmp_path / "run")
    status, out, _ = said(evaluation.main, ["--folder", run, "--images", 20, "--slices", "true"], capsys)
    assert status is None and "imp:2: sa " in out and "imp:1: loss at -1 ... 1 along a random line: " in out


def test_absent_unfinished_and_damaged_runs_are_refused_by_name(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_eval_refuses(evaluation.main, copied(moved, tmp_path / "run"), "model.pt", capsys)


def test_auto_attack_is_asked_where_it_is_installed_and_missed_in_one_line(
    moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(moved, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "autoattack", None)
    with pytest.raises(UserError, match="attack autoattack needs the package autoattack, which is not installed"):
        evaluation.evaluate(arguments_of(run, attack="autoattack"))
    asked: list[Any] = []

    class AutoAttack:
        def __init__(self, model: Any, **options: Any) -> None:
            asked.append(options)

        def run_standard_evaluation(self, x: Any, y: Any, bs: int) -> Any:
            return torch.zeros_like(x)

    fake = ModuleType("autoattack")
    fake.AutoAttack = AutoAttack  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "autoattack", fake)
    metrics = evaluation.evaluate(arguments_of(run, attack="autoattack", images=30))
    assert asked[0]["eps"] == 0.1 and asked[0]["norm"] == "Linf" and asked[0]["version"] == "standard"
    # All images became one: the share of one class among them.
    assert all(each["ra_autoattack_30"] <= 60 for each in metrics.values())


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_that_comes_along_can_be_read(name: str) -> None:
    there = parse(Config, ["--config", str(CONFIGS / f"{name}.yaml")], prog="train.py")
    assert there.round.total(1) + there.finetune.total(1) > 0
    first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith(("# make reproduce-double-win-lth", "# torchrun "))
    there.require_apart()
    if name.startswith(("paper", "gpu")):
        assert there.source.classes == there.target.classes == []  # all there are
    if name.startswith("paper_imp"):
        assert there.prune.rounds == 19 and there.perturbation.steps == {"std": 0, "fast": 1, "adv": 3}[there.regime]


def test_checkpoints_of_another_kind_are_no_pretrained_weights(found: Path, tmp_path: Path) -> None:
    run = copied(found, tmp_path / "run")
    save_checkpoint(run / "pretrained.pt", {"weights": 1})
    with pytest.raises(UserError, match=r"pretrained\.pt: not pre-trained weights"):
        Source.of(to(run))
