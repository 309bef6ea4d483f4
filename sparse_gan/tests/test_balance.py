"""Facts about the balance ratio and the discriminator density that follows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.data import load
from common.masks import Masks
from common.tests.paper_checks import quiet
from sparse_gan import game as games
from sparse_gan.balance import balance_ratio, changed_masks, density_change
from sparse_gan.game import Game, draw_noise
from sparse_gan.players import Player
from sparse_gan.tests.runs import smoke
from sparse_gan.train import train

BALANCED = ["--sparsity.density_g", 0.1, "--sparsity.density_d", 0.3, "--sparsity.balance", 0.1]


def test_the_ratio_is_the_share_of_the_gap_that_a_step_closes() -> None:
    assert balance_ratio(real=3.0, before=-1.0, after=1.0) == 0.5
    assert balance_ratio(real=3.0, before=-1.0, after=-2.0) == -0.25
    assert balance_ratio(real=1.0, before=1.0, after=2.0) == 0.0


@pytest.mark.parametrize(
    ("ratios", "change"), [([0.4, 0.5, 0.6], 0.0), ([0.1, 0.5], -0.05), ([0.9, 0.5], 0.05), ([], 0.0), ([0.45], 0.0)]
)
def test_density_falls_below_the_range_and_rises_above_it(ratios: list[float], change: float) -> None:
    assert density_change(ratios, 0.05) == change


WEIGHTS = {"a": torch.tensor([0.5, -0.1, 0.0, 0.0]), "b": torch.tensor([0.2, 0.0])}
MASKS = Masks({"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, False])})
GRADIENTS = {"a": torch.tensor([9.0, 9.0, 0.1, -3.0]), "b": torch.tensor([9.0, 2.0])}


def kept(change: float) -> list[list[int]]:
    return [mask.int().tolist() for mask in changed_masks(WEIGHTS, GRADIENTS, MASKS, change).values()]


def test_by_hand_the_smallest_weights_leave_and_the_largest_gradients_enter_over_all_layers() -> None:
    assert kept(-1 / 6) == [[1, 0, 0, 0], [1, 0]]
    assert kept(1 / 6) == [[1, 1, 0, 1], [1, 0]]
    assert kept(2 / 6) == [[1, 1, 0, 1], [1, 1]]
    assert kept(-2 / 6) == [[1, 0, 0, 0], [1, 0]]
    assert kept(-3 / 6) == [[1, 1, 0, 0], [1, 0]]
    assert kept(1.0) == [[1, 1, 1, 1], [1, 1]]
    assert kept(0.0) == [[1, 1, 0, 0], [1, 0]]


@pytest.mark.parametrize(("bounds", "density"), [((2.0, 3.0), 0.2), ((-3.0, -2.0), 0.4), ((-1e9, 1e9), 0.3)])
def test_the_discriminator_is_thinned_or_grown_where_the_ratio_lies_outside(
    bounds: tuple[float, float], density: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_gan.balance.LOW", bounds[0])
    monkeypatch.setattr("sparse_gan.balance.HIGH", bounds[1])
    monkeypatch.setattr(games, "EVERY", 2)
    config = smoke(*BALANCED, "--sparsity.balance_every", 4)
    metrics = train(config, tmp_path / "run", quiet)
    assert metrics["density_d"] == pytest.approx(density, abs=0.01)
    assert metrics["density_g"] == pytest.approx(0.1, abs=0.01)


def test_grown_weights_start_from_zero_without_moments_and_the_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_gan.balance.HIGH", -1e9)
    monkeypatch.setattr("sparse_gan.balance.LOW", -1e9)
    monkeypatch.setattr(games, "EVERY", 1)
    game = Game(smoke(*BALANCED, "--sparsity.balance_every", 1), load(smoke().data).train, torch.device("cpu"))
    z, labels = draw_noise(16, 16, 10, 0)
    game.discriminate(torch.zeros(16, 1, 8, 8), labels, z, labels, 1.0)
    before = {name: mask.clone() for name, mask in game.d.masks.items()}
    trained = {name: game.d.module.get_parameter(name).detach().clone() for name in before}
    game.generate(z, labels, 1.0)
    assert game.d.masks.density == pytest.approx(0.4, abs=0.01)
    for name, mask in before.items():
        weight = game.d.module.get_parameter(name)
        assert (game.d.masks[name] | ~mask).all()
        assert torch.equal(weight, trained[name])
        assert len(game.d.optimizer.state[weight]["exp_avg"].reshape(-1)) == int(game.d.masks[name].sum())


def test_ratios_are_of_scores_before_and_after_the_step_and_start_anew_after_a_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(games, "EVERY", 1)
    seen: list[tuple[float, float, float]] = []
    looks: list[int] = []
    monkeypatch.setattr(games, "balance_ratio", lambda *scores: (seen.append(scores), 0.5)[1])
    monkeypatch.setattr(games, "density_change", lambda ratios, change: (looks.append(len(ratios)), 0.0)[1])
    options = ["--sparsity.balance_every", 2, "--train.lr_g", 1e-9]
    game = Game(smoke(*BALANCED, *options), load(smoke().data).train, torch.device("cpu"))
    real = torch.ones(16, 1, 8, 8)
    for step in range(4):
        z, labels = draw_noise(16, 16, 10, step)
        game.discriminate(real, labels, z, labels, 1.0)
        game.generate(z, labels, 1.0)
    with torch.no_grad():
        scores = (
            game.d.module(real, labels).mean().item(),
            game.d.module(game.g.module(z, labels), labels).mean().item(),
        )
    assert looks == [2, 2]
    assert seen[-1] == pytest.approx((scores[0], scores[1], scores[1]), rel=0.05)
    assert seen[-1][1] == pytest.approx(seen[-1][2], abs=1e-3) and abs(seen[-1][1] - seen[-1][0]) > 0.01


def test_measuring_the_ratio_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for every in (1, 99):
        monkeypatch.setattr(games, "EVERY", every)
        options = ["--model.name", "biggan", "--sparsity.balance_every", 99]
        game = Game(smoke(*BALANCED, *options), load(smoke().data).train, torch.device("cpu"))
        for step in range(2):
            z, labels = draw_noise(16, 16, 10, step)
            game.discriminate(torch.zeros(16, 1, 8, 8), labels, z, labels, 1.0)
            game.generate(z, labels, 1.0)
        assert len(game.state_dict()["balance"]["ratios"]) == (2 if every == 1 else 0)
        states.append({**game.g.module.state_dict(), **{f"d.{k}": v for k, v in game.d.module.state_dict().items()}})
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_balanced_run_resumes_bit_for_bit_between_its_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(games, "EVERY", 2)
    monkeypatch.setattr(games, "density_change", lambda ratios, change: 100 * sum(ratios) % 0.3)
    config = smoke(*BALANCED, "--sparsity.balance_every", 5, "--run.checkpoint_every", 3)

    def stop(fraction: float) -> None:
        if fraction > 0.7:
            raise InterruptedError

    train(config, tmp_path / "whole", quiet)
    with pytest.raises(InterruptedError):
        train(config, tmp_path / "run", stop)
    train(config, tmp_path / "run", quiet)
    for name in ("model.pt", "metrics.jsonl", "done.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_player_under_other_masks_starts_what_is_new_from_zero() -> None:
    net = torch.nn.Conv2d(1, 1, 2)
    old, new = torch.tensor([[[[1, 1], [0, 0]]]]).bool(), torch.tensor([[[[1, 0], [1, 0]]]]).bool()
    player = Player(net, Masks({"weight": old}), 0.1, (0.0, 0.9))
    player.descend(net(torch.ones(1, 1, 2, 2)).sum())
    kept = net.weight.detach().clone()
    with torch.no_grad():
        net.weight[0, 0, 1, 0] = 7.0
    player.go_on_under(Masks({"weight": new}))
    assert torch.equal(net.weight.reshape(-1), torch.tensor([kept[0, 0, 0, 0].item(), 0, 0, 0]))
    assert player.optimizer.state[net.weight]["exp_avg_sq"].count_nonzero() == 1
