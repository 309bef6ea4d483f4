"""Facts about a chain in every regime, pruner and kind of rewinding: masks, start weights, losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from certified_pruning import train as training
from certified_pruning.channel_pruners import channel_masks
from certified_pruning.eval import evaluate
from certified_pruning.pruners import keep_of_remain
from certified_pruning.settings import Config, Method, Regime
from certified_pruning.train import train
from common.config import ConfigError, UserError, parse
from common.masks import Masks
from common.runs import load_checkpoint
from common.tests import children

SMOKE = Path(training.__file__).parent / "configs" / "smoke.yaml"
STEPS = 6  # two epochs of three batches a round
SMALL = ["--data.fraction", 0.05, "--train.batch_size", 64, "--run.checkpoint_every", 4, "--eval.images", 2]
METHODS, REGIMES = get_args(Method), get_args(Regime)
CHANNELS = ["slim", "refill", "nrs", "l1-channel"]
ADAM = ["--train.optimizer", "adam", "--train.lr", 0.005]


def config(*options: object) -> Config:
    return parse(Config, ["--config", str(SMOKE), *map(str, SMALL), *map(str, options)], prog="train.py")


def quiet(fraction: float) -> None:
    pass


def tickets(folder: Path) -> list[dict[str, Any]]:
    return [load_checkpoint(path) for path in sorted((folder / "tickets").glob("?.pt"))]


def watched(*options: object, folder: Path) -> tuple[list[dict[str, Tensor]], list[dict[str, Any]]]:
    """Train a chain; the network's weights before every step, and the tickets."""
    before, loss = [], training._loss

    def remember(config: Config, model: Any, *rest: Any) -> Any:
        before.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return loss(config, model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_loss", remember)
        train(config(*options), folder, quiet)
    return before, tickets(folder)


def masked(weights: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor * masks[name] if name in masks else tensor for name, tensor in weights.items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# Masks


@pytest.mark.parametrize("method", METHODS)
def test_the_second_round_keeps_the_share_asked_for_and_zeros_stay_zero(method: str, tmp_path: Path) -> None:
    rate = 0.25 if method in CHANNELS else 0.5
    folder = tmp_path / "run"
    train(config("--prune.method", method, "--prune.rate", rate), folder, quiet)
    dense, sparse = tickets(folder)
    for ticket in (dense, sparse):
        for name, mask in ticket["masks"].items():
            assert not ticket["model"][name][~mask].any()
    assert dense["density"] == 1 and all(mask.all() for mask in dense["masks"].values())
    masks = Masks(sparse["masks"])
    if method == "hydra":
        sizes = {name: mask.numel() for name, mask in masks.items()}
        assert {name: int(mask.sum()) for name, mask in masks.items()} == keep_of_remain(sizes, 0.5, per_layer=True)
    elif method in CHANNELS:
        assert channel_masks(masks).kept == (9 if method == "l1-channel" else 8)  # of 4 + 6
        assert sparse["density"] == channel_masks(masks).kept / 10
    else:
        assert masks.kept == masks.total // 2 and set(masks) == {"0.weight", "3.weight"}


def test_linear_layers_are_pruned_with_the_convolutions_where_asked_for(tmp_path: Path) -> None:
    for method in ("imp", "random", "snip", "hydra"):
        options = ["--prune.method", method, "--prune.prunable", "conv+linear", "--prune.rate", 0.5]
        train(config(*options), tmp_path / method, quiet)
        _, sparse = tickets(tmp_path / method)
        masks = Masks(sparse["masks"])
        assert {"0.weight", "3.weight"} < set(masks) and all(name.endswith(".weight") for name in masks)
        assert all(mask.sum() > 0 for mask in masks.values()) and abs(masks.density - 0.5) < 1e-3
        assert all(not sparse["model"][name][~mask].any() for name, mask in masks.items())


def test_snip_and_taylor_which_are_one_criterion_score_batches_of_their_own(tmp_path: Path) -> None:
    kept = []
    for method in ("snip", "taylor", "taylor"):
        train(config("--prune.method", method), tmp_path / str(len(kept)), quiet)
        first, sparse = tickets(tmp_path / str(len(kept)))
        kept.append((first["model"], sparse["masks"]))
    (before, snip), (same, taylor), (_, again) = kept
    assert_equal(before, same)
    assert any(not torch.equal(snip[name], taylor[name]) for name in snip)
    assert_equal(taylor, again)


def test_one_shot_pruning_masks_the_initial_weights_before_the_only_training(tmp_path: Path) -> None:
    options = ["--prune.method", "taylor", "--prune.rounds", 1, "--prune.at_init", "true", "--prune.rate", 0.9]
    before, (ticket,) = watched(*options, folder=tmp_path / "run")
    assert len(before) == STEPS
    masks = Masks(ticket["masks"])
    assert masks.total - masks.kept == int(0.9 * masks.total)
    assert_equal(before[0], masked(before[0], masks))


def test_channels_are_removed_before_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from certified_pruning import eval as evaluation

    sizes, verify = [], evaluation._verify

    def watching(model: Any, *rest: Any) -> Any:
        sizes.append([model[0].out_channels + model[3].out_channels, model[7].in_features])
        return verify(model, *rest)

    monkeypatch.setattr(evaluation, "_verify", watching)
    folder = tmp_path / "run"
    train(config("--prune.method", "slim", "--prune.rate", 0.25), folder, quiet)
    levels = evaluate(folder)
    second = int(tickets(folder)[1]["masks"]["4.weight"].sum())
    assert sizes == 2 * [[10, 6 * 49]] + 2 * [[8, second * 49]]
    assert [level["density"] for level in levels] == [1, 0.8]


def test_the_rounds_before_the_first_to_verify_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config("--eval.first_round", 1), folder, quiet)
    assert [level["density"] for level in evaluate(folder)] == [0.5]


# Start weights


def start_of_second_round(prune_type: str, folder: Path) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], list]:
    before, found = watched("--prune.prune_type", prune_type, "--prune.rewind_epoch", 1, folder=folder)
    assert len(before) == 2 * STEPS
    return before[STEPS], before, found


def test_lt_rewinds_to_the_initial_weights(tmp_path: Path) -> None:
    start, before, (_, sparse) = start_of_second_round("lt", tmp_path / "run")
    assert_equal(start, masked(before[0], sparse["masks"]))


def test_rewind_lt_rewinds_to_an_early_epoch_of_the_dense_round(tmp_path: Path) -> None:
    start, before, (_, sparse) = start_of_second_round("rewind_lt", tmp_path / "run")
    assert_equal(start, masked(before[STEPS // 2], sparse["masks"]))


@pytest.mark.parametrize("prune_type", ["pt", "finetune"])
def test_pt_and_finetune_go_on_from_the_dense_weights_in_the_second_round(prune_type: str, tmp_path: Path) -> None:
    start, _, (dense, sparse) = start_of_second_round(prune_type, tmp_path / "run")
    assert_equal(start, masked(dense["model"], sparse["masks"]))


def test_only_finetune_goes_on_from_the_round_before_in_the_third(tmp_path: Path) -> None:
    for prune_type, source in (("pt", 0), ("finetune", 1)):
        options = ["--prune.prune_type", prune_type, "--prune.rounds", 3]
        before, found = watched(*options, folder=tmp_path / prune_type)
        assert_equal(before[2 * STEPS], masked(found[source]["model"], found[2]["masks"]))


def test_rewind_trained_takes_only_the_convolutions_back_to_the_dense_weights(tmp_path: Path) -> None:
    options = ["--prune.prune_type", "rewind_trained", "--prune.rounds", 3]
    before, (dense, second, third) = watched(*options, folder=tmp_path / "run")
    convolutions = {name: weight for name, weight in dense["model"].items() if weight.ndim == 4}
    assert len(convolutions) == 2
    assert_equal(before[2 * STEPS], masked({**second["model"], **convolutions}, third["masks"]))


def test_fast_ibp_starts_from_its_own_weights(tmp_path: Path) -> None:
    starts = [
        watched("--train.regime", r, "--prune.rounds", 1, folder=tmp_path / r)[0][0] for r in ("fgsm", "fast_ibp")
    ]
    assert not torch.equal(starts[0]["7.weight"], starts[1]["7.weight"])
    assert starts[1]["7.weight"].std().item() * 6 * 49 == pytest.approx(2.5066, rel=0.05)


# Losses


def regime_loss(tmp_path: Path, *options: object) -> list[float]:
    folder = tmp_path / "-".join(map(str, options)).replace("/", "")
    train(config("--prune.rounds", 1, "--train.epochs", 4, *options), folder, quiet)
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in line]


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_learns(regime: str, tmp_path: Path) -> None:
    options = ["--train.eps", 0.001, "--train.eps_ramp", 0.5, "--train.epochs", 10]
    losses = regime_loss(tmp_path, "--train.regime", regime, *options)
    assert losses[-1] < losses[0] - 0.1


def test_slimming_and_stability_change_the_training_by_their_weight(tmp_path: Path) -> None:
    short = ["--train.epochs", 1]
    plain = regime_loss(tmp_path, "--prune.method", "imp", *short)
    for method, weight in (("slim", "slim"), ("nrs", "nrs"), ("imp+nrs", "nrs")):
        none, some = (regime_loss(tmp_path, "--prune.method", method, f"--train.{weight}", w, *short) for w in (0, 1.0))
        assert none == pytest.approx(plain, abs=1e-6)
        assert abs(some[0] - none[0]) > 0.1


def test_two_processes_prune_and_train_with_certified_bounds_like_one(tmp_path: Path) -> None:
    options = ["--model.name", "cnn_a", "--train.regime", "crown_ibp", "--prune.method", "hydra", *ADAM]
    train(config(*options), tmp_path / "one", quiet)
    given = ["--config", SMOKE, *SMALL, *options, "--run.folder", tmp_path / "two"]
    done = children.run(*children.TORCHRUN, Path(training.__file__), *map(str, given))
    assert done.returncode == 0, done.stderr
    one, two = tickets(tmp_path / "one"), tickets(tmp_path / "two")
    for ours, theirs in zip(one, two, strict=True):
        differ = sum(int((ours["masks"][name] ^ theirs["masks"][name]).sum()) for name in ours["masks"])
        assert differ <= 2  # scores that tie but for rounding
    for name, tensor in one[0]["model"].items():
        torch.testing.assert_close(two[0]["model"][name], tensor, rtol=0, atol=1e-4)


# Refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--prune.method", "imp", "--prune.rounds", 1, "--prune.at_init", "true"],
            "prune.at_init must be with method",
        ),
        (["--prune.prune_type", "rewind_lt", "--prune.rewind_epoch", 3], "prune.rewind_epoch must be at most"),
        (["--eval.first_round", 2], "eval.first_round must be below prune.rounds, 2, got 2"),
        (["--prune.min_channels", 2], "prune.min_channels must be 0 or 1, got 2"),
        (["--prune.method", "magnitude"], "prune.method must be .*l1-channel.*, got 'magnitude'"),
        (["--train.optimizer", "lamb"], "train.optimizer must be"),
        (["--train.eps_start", -1], "train.eps_start must be at least 0, got -1"),
        (["--train.eps_start", 2, "--train.eps_length", 0], "train.eps_length must be at least 1, got 0"),
        (["--train.eps_start", 2, "--train.eps_mid", 1.5], r"train.eps_mid must be in \[0, 1\), got 1.5"),
        (
            ["--train.epochs", 10, "--train.eps_start", 11, "--train.eps_length", 81],
            r"train.eps_start \+ train.eps_length - 1 must be at most train.epochs, 10: .*, got 91",
        ),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(options: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*options)


def test_pruning_channels_of_a_network_without_norms_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prune\.method slim: model must have a batch norm"):
        train(config("--model.name", "cnn_a", "--prune.method", "slim"), tmp_path / "run", quiet)


def test_a_chain_without_validation_images_is_refused_before_it_is_begun(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.val must be above 0: levels are chosen on validation images, got 0"):
        train(config("--data.val", 0), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_emptying_a_layer_ends_the_run_by_its_name(tmp_path: Path) -> None:
    options = ["--prune.method", "slim", "--prune.rate", 0.9, "--prune.min_channels", 0]
    with pytest.raises(UserError, match=r"prune.method slim, round 0: layer '\d' would keep nothing"):
        train(config(*options), tmp_path / "run", quiet)
