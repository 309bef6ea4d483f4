"""Facts about a training run: budgets of every method, exact resumption, ranks, and what bad input is told."""

from __future__ import annotations

import copy
import json
import multiprocessing
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import UserError, parse
from common.data import ImageSet, load
from common.masks import Masks
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
from sparse_gan import eval as evaluation
from sparse_gan import train as training
from sparse_gan.dynamic_sparsity import DynamicSparsity
from sparse_gan.fd_classifier import real_images
from sparse_gan.game import Game, build_networks, draw_noise, phase_lengths
from sparse_gan.players import Player
from sparse_gan.reproduce import METHODS
from sparse_gan.settings import ARMS, Config
from sparse_gan.sparse_state import unpack
from sparse_gan.tests.runs import CONFIGS, arguments, smoke
from sparse_gan.train import dequantisation, snapshot_path, snapshot_steps, train

SCRIPT = Path(training.__file__)
STU = ["--sparsity.density_g", 0.1, "--sparsity.density_d", 0.3]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "sparse_gan.eval", "torch.utils.tensorboard"])


def of_arm(arm: str, *options: object) -> Config:
    parts = [text for key, value in METHODS[arm].items() for text in (f"--sparsity.{key}", value)]
    return smoke(*STU, *parts, *options)


def run(config: Config, folder: Path) -> Path:
    train(config, folder, quiet)
    return folder


def weights(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], Any]:
    return unpack(load_checkpoint(folder / "model.pt")[name])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(smoke(*STU), tmp_path_factory.mktemp("finished") / "run")


# Methods


def test_every_arm_of_the_study_has_its_method() -> None:
    assert tuple(METHODS) == ARMS


SPARSE = {"static": (0.1, 0.3), "snip": (0.1, 0.3), "stu": (0.1, 0.3), "gmp": (0.1, 1), "imp": (0.8, 1)}
SPARSE |= {
    "both": (0.1, 0.3),
    "balanced": (0.1, 0.3),
    "only-d": (0.1, 0.3),
    "set": (0.1, 0.3),
    "stu-dense-moments": (0.1, 0.3),
}
SPARSE |= {
    "oneshot-global-g": (0.1, 1),
    "oneshot-uniform-both": (0.1, 0.3),
    "dense": (1, 1),
    "static-uniform": (0.1, 0.3),
}
SPARSE |= {"oneshot-uniform-g": (0.1, 1), "oneshot-global-both": (0.1, 0.3)}


DENSE_FIRST = dict.fromkeys(ARMS, "") | {arm: "gd" for arm in ARMS if arm.startswith(("gmp", "imp", "oneshot"))}


@pytest.mark.parametrize("arm", ARMS)
def test_every_method_ends_at_its_densities_and_its_weights_are_zero_elsewhere(arm: str, tmp_path: Path) -> None:
    config = of_arm(arm)
    metrics = train(config, tmp_path / "run", quiet)
    for net, wanted in zip("gd", SPARSE[arm], strict=True):
        state, masks = weights(tmp_path / "run", net)
        layers = [name for name, tensor in state.items() if tensor.ndim == 4]
        total = sum(state[name].numel() for name in layers)
        kept = sum(int(masks[name].sum()) if name in masks else state[name].numel() for name in layers)
        assert kept == pytest.approx(wanted * total, abs=len(layers))
        assert metrics[f"density_{net}"] == pytest.approx(kept / total)
        moves = config.sparsity.method == "dynamic" and config.sparsity.explore in (net, "both")
        assert (metrics[f"explored_{net}"] > metrics[f"density_{net}"]) == (
            moves or (wanted < 1 and net in DENSE_FIRST[arm])
        )
        assert net not in DENSE_FIRST[arm] or metrics[f"explored_{net}"] == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == snapshot_steps(config) and steps[-1] == sum(phase_lengths(config))


@pytest.mark.parametrize(("prune", "d"), [("g", 1.0), ("both", 0.75)])
def test_the_last_round_of_imp_prunes_no_more_than_its_density_asks(prune: str, d: float, tmp_path: Path) -> None:
    options = ["--sparsity.rounds", 2, "--sparsity.density_g", 0.7, "--sparsity.density_d", 0.75]
    metrics = train(of_arm("imp", *options, "--sparsity.prune", prune), tmp_path / "run", quiet)
    assert metrics["density_g"] == pytest.approx(0.7, abs=1e-3)
    assert metrics["density_d"] == pytest.approx(d, abs=1e-3)


@pytest.mark.parametrize(("arm", "rewinds"), [("oneshot-global-g", False), ("imp", True)])
def test_a_phase_starts_from_the_largest_trained_weights_where_they_are_or_rewound(arm: str, rewinds: bool) -> None:
    config = of_arm(arm, "--sparsity.rewind_step", 0, "--train.lr_g", 0.05)
    game = Game(config, load(config.data).train, torch.device("cpu"))
    nets = {"g": game.g.module, "d": game.d.module}
    initial = {name: copy.deepcopy(net.state_dict()) for name, net in nets.items()}
    for step in range(1, 4):
        z, labels = draw_noise(16, 16, 10, step)
        game.discriminate(torch.zeros(16, 1, 8, 8), labels, z, labels, 1.0)
        game.generate(z, labels, 1.0)
        game.follow(step)
    trained = {name: copy.deepcopy(net.state_dict()) for name, net in nets.items()}
    game.enter(1)
    wanted = initial if rewinds else trained
    for name, net in nets.items():
        assert not all(torch.equal(initial[name][key], trained[name][key]) for key in initial[name])
        for key, value in net.state_dict().items():
            mask = game.g.masks.get(key, torch.tensor(True)) if name == "g" else torch.tensor(True)
            assert torch.equal(value, wanted[name][key] * mask)
    scores = {key: trained["g"][key].abs() for key in game.g.masks}
    least = min(float(scores[key][mask].min()) for key, mask in game.g.masks.items() if mask.any())
    assert least >= max(float(scores[key][~mask].max()) for key, mask in game.g.masks.items() if not mask.all())


def test_static_training_at_density_1_is_dense_training_bit_for_bit(tmp_path: Path) -> None:
    ones = ["--sparsity.density_g", 1, "--sparsity.density_d", 1]
    dense, static = run(of_arm("dense"), tmp_path / "dense"), run(of_arm("static", *ones), tmp_path / "static")
    for name in ("model.pt", "metrics.jsonl"):
        assert (dense / name).read_bytes() == (static / name).read_bytes()


def test_arms_of_one_seed_share_initial_weights_masks_and_noise(tmp_path: Path) -> None:
    still = ["--train.lr_g", 1e-12, "--train.lr_d", 1e-12]
    static, moving = run(of_arm("static", *still), tmp_path / "a"), run(of_arm("only-d", *still), tmp_path / "b")
    (one, masks_one), (two, masks_two) = weights(static, "g"), weights(moving, "g")
    assert all(torch.equal(masks_one[name], masks_two[name]) for name in masks_one)
    assert all(torch.allclose(one[name], two[name], atol=1e-9) for name in masks_one)


def test_the_moving_averages_are_of_the_trained_generator_and_differ_only_where_weights_grew(finished: Path) -> None:
    (average, masks), (masked, _) = weights(finished, "average"), weights(finished, "masked_average")
    differing = [name for name in average if not torch.equal(average[name], masked[name])]
    assert differing and set(differing) <= set(masks)
    last = load_checkpoint(snapshot_path(finished, snapshot_steps(smoke())[-1]))
    assert all(torch.equal(average[name], tensor) for name, tensor in unpack(last["average"])[0].items())


def test_conditional_training_with_decay_and_dequantised_images_runs_through(tmp_path: Path) -> None:
    options = ["--model.name", "biggan", "--train.decay", True, "--train.dequantize", True, "--train.ema_start", 3]
    folder = run(smoke(*STU, *options), tmp_path / "run")
    assert len(losses(folder)) == 2
    state, masks = weights(folder, "g")
    assert "blocks.0.norm1.gain.weight" in state and all(
        (state[name][~mask] == 0).all() for name, mask in masks.items()
    )


def test_the_discriminator_is_told_real_from_generated_images_each_with_its_classes() -> None:
    game = Game(smoke(*STU, "--model.name", "biggan"), load(smoke().data).train, torch.device("cpu"))
    d, g = copy.deepcopy(game.d.module), copy.deepcopy(game.g.module)
    z, fake_labels = draw_noise(16, 16, 10, 0)
    real, labels = torch.rand(16, 1, 8, 8), (fake_labels + 1 + torch.arange(16) % 9) % 10
    with torch.no_grad():
        fake = g(z, fake_labels)

        def loss(real_labels: torch.Tensor, fake_labels: torch.Tensor, sign: int = 1) -> float:
            reals, fakes = copy.deepcopy(d)(real, real_labels), copy.deepcopy(d)(fake, fake_labels)
            return float((1 - sign * reals).relu().mean() + (1 + sign * fakes).relu().mean())

        wanted = loss(labels, fake_labels)
        others = loss(labels, fake_labels, -1), loss(fake_labels, labels), loss(labels, labels)
    assert all(abs(other - wanted) > 5e-5 for other in others)
    assert game.discriminate(real, labels, z, fake_labels, 1.0) == pytest.approx(wanted, abs=1e-5)


def played(config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """What each step is given: real images and the rate's factor the discriminator's, the factor the generator's."""
    turns, factors = [], []
    discriminate, generate = Game.discriminate, Game.generate

    def judge(game: Game, real: torch.Tensor, labels: Any, z: Any, fakes: Any, factor: float, check: Any) -> float:
        turns.append((real.clone(), factor))
        return discriminate(game, real, labels, z, fakes, factor, check)

    def make(game: Game, z: Any, labels: Any, factor: float, check: Any) -> float:
        factors.append(factor)
        return generate(game, z, labels, factor, check)

    with monkeypatch.context() as patch:
        patch.setattr(Game, "discriminate", judge)
        patch.setattr(Game, "generate", make)
        train(config, folder, quiet)
    return turns, factors


def test_learning_rates_fall_in_a_straight_line_in_each_phase_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for decay, falling in ((False, [1.0] * 8), (True, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 1, 1 / 2])):
        config = of_arm("oneshot-global-g", "--train.decay", decay)
        turns, factors = played(config, tmp_path / str(decay), monkeypatch)
        assert factors == pytest.approx(falling)
        assert [factor for _, factor in turns] == pytest.approx([factor for factor in falling for _ in range(2)])


def test_real_images_are_dequantised_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = smoke(*STU), smoke(*STU, "--train.dequantize", True)
    plain, noisy = (played(config, tmp_path / str(n), monkeypatch)[0] for n, config in enumerate(configs))
    shape = plain[0][0].shape[1:]
    for number, ((bare, _), (real, _)) in enumerate(zip(plain, noisy, strict=True)):
        assert torch.equal(real, bare + dequantisation(configs[1], shape, number // 2, number % 2))
        assert not torch.equal(real, bare)


# Disturbed


def disturbed(arm: str) -> Config:
    return of_arm(arm, "--run.checkpoint_every", 1, "--sparsity.update_every", 1, "--train.steps", 12)


def start(arm: str, folder: Path) -> Any:
    process = FORKS.Process(target=train, args=(disturbed(arm), folder, slow))
    process.start()
    return process


NAMES = ["model.pt", "metrics.jsonl", "done.json", "generator-*.pt"]


def test_a_run_killed_again_and_again_equals_an_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    whole, broken = run(disturbed("both"), tmp_path / "whole"), tmp_path / "run"
    kill_after_a_checkpoint(lambda folder: start("both", folder), broken, times=2)
    start("both", broken).join()
    assert children.tree(broken, NAMES) == children.tree(whole, NAMES) and len(children.tree(broken, NAMES)) == 5
    assert evaluation.evaluate(whole)["fd"] == evaluation.evaluate(broken)["fd"]


@pytest.mark.parametrize("arm", ARMS)
def test_every_method_resumes_bit_for_bit_from_its_last_checkpoint(arm: str, tmp_path: Path) -> None:
    def stop(fraction: float) -> None:
        if fraction > 0.7:
            raise InterruptedError

    config = of_arm(arm, "--run.checkpoint_every", 3, "--sparsity.update_every", 1)
    whole, broken = run(config, tmp_path / "whole"), tmp_path / "run"
    with pytest.raises(InterruptedError):
        train(config, broken, stop)
    assert (broken / "checkpoint.pt").exists()
    assert children.tree(run(config, broken), NAMES) == children.tree(whole, NAMES)


def test_two_processes_agree_on_masks_and_on_every_weight(tmp_path: Path) -> None:
    options = [*STU, "--sparsity.explore", "both", "--sparsity.growth_d", "gradient"]
    done = children.run(*children.TORCHRUN, Path(__file__).parent / "two_ranks.py", tmp_path, *options)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank-{rank}", weights_only=True) for rank in range(2)]
    for one, two in zip(*ranks, strict=True):
        for mine, theirs in zip(one, two, strict=True):  # weights, then masks
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    metrics = read_json(tmp_path / "run" / "done.json")
    assert metrics["explored_g"] > metrics["density_g"] == pytest.approx(0.1, abs=0.01)


def test_the_ranks_share_the_noise_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    config, shape = smoke(), torch.Size([1, 8, 8])
    whole = dequantisation(config, shape, 3, 1)
    monkeypatch.setattr("common.distributed.world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("common.distributed.rank", lambda rank=rank: rank)
        parts.append(dequantisation(config, shape, 3, 1))
    assert torch.equal(torch.cat(parts), whole) and 0 <= whole.min() < whole.max() < 1 / 128


def test_masks_that_differ_between_ranks_are_noticed_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    config = of_arm("snip")
    data = load(config.data).train
    monkeypatch.setattr("common.distributed.world_size", lambda: 2)
    monkeypatch.setattr("common.distributed.average_", lambda tensors: None)
    monkeypatch.setattr("common.distributed.mean", lambda value: value + 0.5)
    with pytest.raises(RuntimeError, match="masks must be equal on all ranks"):
        Game(config, data, torch.device("cpu"))


def test_masks_that_differ_between_ranks_are_noticed_when_they_move(monkeypatch: pytest.MonkeyPatch) -> None:
    def player() -> Player:
        net = torch.nn.Conv2d(2, 2, 3)
        masks = Masks({"weight": torch.rand(2, 2, 3, 3) < 0.5})
        return Player(net, masks, 0.1, (0.0, 0.9), partial(DynamicSparsity, update_every=1, total_steps=9))

    monkeypatch.setattr("common.distributed.world_size", lambda: 2)
    monkeypatch.setattr("common.distributed.average_", lambda tensors: None)
    images = torch.ones(1, 2, 3, 3)
    for shift, outcome in ((0, nullcontext()), (0.5, pytest.raises(RuntimeError, match="masks must be equal on all"))):
        monkeypatch.setattr("common.distributed.mean", lambda value, shift=shift: value + shift)
        monkeypatch.setattr("common.distributed.any_rank", bool)
        one = player()
        with outcome:
            one.descend(one.module(images).sum())


def test_what_a_player_explores_is_the_union_of_its_masks() -> None:
    first, second = (Masks({"weight": torch.arange(8).view(2, 4, 1, 1) % 4 == number}) for number in range(2))
    player = Player(torch.nn.Conv2d(4, 2, 1), Masks(first), 0.1, (0.0, 0.9))
    player.go_on_under(second)
    assert player.masks.density == 0.25 and player.explored == 0.5
    again = Player(torch.nn.Conv2d(4, 2, 1), Masks(first), 0.1, (0.0, 0.9))
    again.load_state_dict(player.state_dict())
    assert again.explored == 0.5


@pytest.mark.parametrize("every", [2, 1])
def test_a_loss_that_is_not_finite_stops_at_its_step(every: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss_[dg] is (nan|inf|-inf) at step \d+; "):
        lrs = ["--train.lr_g", 1e38, "--train.lr_d", 1e38]
        train(smoke(*lrs, "--sparsity.update_every", every), tmp_path / "run", quiet)
    assert not (tmp_path / "run" / "done.json").exists()


# The command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.step", "3"], "unknown key 'train.step'; did you mean 'train.steps'?"),
        (["--sparsity.density_g", "0"], "sparsity.density_g must be in (0, 1], got 0.0"),
        (["--sparsity.density_d", "1.2"], "sparsity.density_d must be in (0, 1], got 1.2"),
        (["--sparsity.density_g", ".nan"], "sparsity.density_g must be in (0, 1], got nan"),
        (["--sparsity.update_every", "0"], "sparsity.update_every must be at least 1, got 0"),
        (["--sparsity.growth_g", "magic"], "sparsity.growth_g must be"),
        (["--sparsity.method", "gmp", "--sparsity.moments", "dense"], "sparsity.moments must be sparse unless"),
        (
            ["--sparsity.method", "oneshot", "--sparsity.tune_steps", "0"],
            "sparsity.tune_steps must be at least 0, with",
        ),
        (["--sparsity.balance", "1"], "sparsity.balance must be in [0, 1), got 1.0"),
        (
            ["--sparsity.balance", "0.1", "--sparsity.explore", "both"],
            "sparsity.balance must be 0 unless sparsity is dyn",
        ),
        (["--sparsity.balance_every", "0"], "sparsity.balance_every must be at least 1, got 0"),
        (
            ["--sparsity.method", "gmp", "--sparsity.update_every", "4"],
            "sparsity.update_every must be with gmp such that",
        ),
        (["--sparsity.method", "imp", "--sparsity.rewind_step", "9"], "sparsity.rewind_step must be less than"),
        (["--model.size", "20"], "model.size must be a power of two, at least 8, got 20"),
        (["--data.name", "mnist5k", "--train.batch_size", "5000"], "batch size must be at most the"),
        (["--eval.samples", "10"], "eval.samples must be more than eval.feature_dim, got 10"),
        (["--eval.split", "val", "--data.val", "0"], "eval.split must be test unless data.val is above 0, got 'val'"),
        (["--train.ema", "1"], "train.ema must be in [0, 1), got 1.0"),
        (["--study.arms", "[stu 2 1]"], "study.arms must be with densities in (0, 1], got 'stu 2 1'"),
        (["--study.arms", "[stu 0.1]"], "study.arms must be name density_g density_d, got 'stu 0.1'"),
        (["--study.arms", "[magic]"], "study.arms must be a name of dense"),
        (["--study.arms", "[dense 0.2 0.3]"], "study.arms must be dense without densities below 1, got 'dense 0.2"),
        (["--study.arms", "[dense, dense 1 1]"], "study.arms must be at least one, none twice"),
        (["--study.arms", "[stu .05 .3, stu 0.05 0.3]"], "study.arms must be at least one, none twice"),
        (["--eval.widths", "[8, 8, 8, 8]"], "eval.widths must be at most 3 stages for images of side 8, got [8, 8"),
    ],
)
def test_a_wrong_option_ends_in_one_line_before_anything_is_written(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert refusal(training.main, arguments("--run.folder", folder, *options), capsys).startswith(message)
    assert not folder.exists()


def test_training_and_measuring_by_command_say_what_came_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    status, out, _ = said(training.main, arguments("--run.folder", folder, *STU), capsys)
    assert status is None and "% ever active; discriminator: " in out
    assert out.splitlines()[-1].endswith(f"eval.py --folder {folder}")
    status, out, _ = said(evaluation.main, ["--folder", folder], capsys)
    assert status is None and out.startswith("fd_classifier ") and len(out.splitlines()) == 2


# Measuring a run


def test_absent_unfinished_and_damaged_runs_are_refused_by_name(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_eval_refuses(evaluation.main, copied(finished, tmp_path / "run"), "model.pt", capsys)


@pytest.mark.parametrize("arm", ["gmp", "balanced", "snip"])
def test_training_flops_are_counted_only_where_densities_last(arm: str, tmp_path: Path) -> None:
    config = of_arm(arm)
    g, d = build_networks(config, 1, 10)
    assert ("training_flops" in evaluation.costs(config, g, Masks(), d, Masks())) == (arm == "snip")


def test_measures_are_kept_and_read_again(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path / "run")
    metrics = evaluation.evaluate(folder)
    assert read_json(folder / "eval.json") == metrics
    assert [step for step, _ in metrics["curve"]] == [3, 6] and metrics["fd"] > metrics["floor"]
    assert metrics["masked_average_fd"] != metrics["fd"]
    assert (folder / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert 0.1 < metrics["inference_flops"] / metrics["inference_flops_dense"] < 0.5
    sparse = sum(density < 1 for density in metrics["layer_density"].values())
    assert len(metrics["layer_density"]) == 4 and sparse >= 2
    (folder / "model.pt").unlink()
    assert evaluation.evaluate(folder) == metrics


def test_what_is_measured_is_the_averaged_generator_at_the_end(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path / "run")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("curve_samples: 100", "curve_samples: 200"))
    metrics = evaluation.evaluate(folder)
    assert metrics["curve"][-1] == [6, metrics["fd"]] and metrics["curve"][0][1] != metrics["fd"]


def test_validation_images_give_another_score(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path / "run")
    test = evaluation.evaluate(folder)["fd"]
    (folder / "eval.json").unlink()
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("split: test", "split: val"))
    assert evaluation.evaluate(folder)["fd"] != test


@pytest.mark.parametrize("split", ["test", "val"])
def test_the_images_compared_with_are_those_of_the_split(
    split: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(finished, tmp_path / "run")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("split: test", f"split: {split}"))
    seen: list[ImageSet] = []
    monkeypatch.setattr(evaluation, "real_images", lambda data, size: (seen.append(data), real_images(data, size))[1])
    evaluation.evaluate(folder)
    (compared,) = seen
    wanted = real_images(getattr(load(smoke().data), split), 8)
    assert torch.equal(real_images(compared, 8), wanted)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_that_comes_along_can_be_read(name: str) -> None:
    there = parse(Config, ["--config", str(CONFIGS / f"{name}.yaml")], prog="train.py")
    assert there.train.steps >= 1
    first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# make reproduce-sparse-gan") or first.startswith("# torchrun ")
