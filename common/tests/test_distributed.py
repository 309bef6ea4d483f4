"""Facts about data-parallel runs: two ranks do what one process does, and only the first leaves traces."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common import distributed
from common.config import UserError
from common.runs import CheckpointError, Interrupted, Run, RunConfig, load_checkpoint
from common.tests import children, tiny_training

TINY = Path(tiny_training.__file__)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", __name__, "common.tests.test_runs", "torch.utils.tensorboard"])
Task = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)


# Two ranks: this process and a child


def as_rank(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank of two."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


def second_rank(task: Task, folder: Path, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(as_rank(1, port))
    pipe.send(task(folder))


def on_two_ranks(task: Task, folder: Path) -> list[dict[str, Any]]:
    """What `task` returns here, as rank 0, and in a child, as rank 1."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    pipe, far_end = FORKS.Pipe()
    process = FORKS.Process(target=second_rank, args=(task, folder, port, far_end))
    process.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in as_rank(0, port).items():
            patch.setenv(name, value)
        mine = task(folder)
    assert pipe.poll(30)
    other = pipe.recv()
    process.join()
    return [mine, other]


def small_net(rank: int) -> Any:
    """A linear layer with gradients and a batch norm with statistics that differ by rank; a layer without gradient."""
    net = nn.ModuleDict({"linear": nn.Linear(2, 1), "norm": nn.BatchNorm1d(2), "unused": nn.Linear(1, 1)})
    for parameter in [*net["linear"].parameters(), *net["norm"].parameters()]:
        parameter.grad = torch.full_like(parameter, 2.0 * rank)
    net["norm"].running_mean.fill_(rank)
    net["norm"].running_var.fill_(3 - rank)
    net["norm"].num_batches_tracked.fill_(7)
    return net


def refused(batch: Tensor) -> str:
    try:
        distributed.shard(batch)
    except UserError as error:
        return str(error)
    return ""


def exercise(folder: Path) -> dict[str, Any]:
    with distributed.process_group() as device, distributed.process_group():
        rank = distributed.rank()
        wide, narrow = torch.full((2, 3), float(rank)), torch.tensor([1.0, -2.0], dtype=torch.float64) * rank
        flat = torch.arange(6.0)[::2] * rank  # not contiguous
        distributed.average_([wide, narrow, flat])
        net = small_net(rank)
        distributed.synchronize(net)
        found = {
            "device": device.type,
            "rank": rank,
            "world size": distributed.world_size(),
            "averages": [wide.tolist(), narrow.tolist(), flat.tolist()],
            "gradients": {name: None if p.grad is None else p.grad.tolist() for name, p in net.named_parameters()},
            "buffers": {name: buffer.tolist() for name, buffer in net.named_buffers()},
            "mean": distributed.mean(1.0 + rank),
            "any": [distributed.any_rank(rank == 1), distributed.any_rank(rank == 0), distributed.any_rank(False)],
            "shard": distributed.shard(torch.arange(6)).tolist(),
            "uneven": refused(torch.arange(5)),
        }
    return {**found, "after": [distributed.rank(), distributed.world_size()]}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(exercise, tmp_path_factory.mktemp("exercise"))


def test_two_ranks_know_their_place_while_the_group_lasts(both: list[dict[str, Any]]) -> None:
    assert [(found["rank"], found["world size"], found["device"]) for found in both] == [(0, 2, "cpu"), (1, 2, "cpu")]
    assert [found["after"] for found in both] == [[0, 1], [0, 1]]


def test_tensors_of_any_shape_and_type_become_their_mean_over_ranks(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["averages"] == [[[0.5] * 3] * 2, [0.5, -1.0], [0.0, 1.0, 2.0]]


def test_gradients_are_averaged_and_absent_ones_stay_absent(both: list[dict[str, Any]]) -> None:
    expected = {"linear.weight": [[1.0, 1.0]], "linear.bias": [1.0], "norm.weight": [1.0, 1.0], "norm.bias": [1.0, 1.0]}
    for found in both:
        assert found["gradients"] == {**expected, "unused.weight": None, "unused.bias": None}


def test_batch_norm_statistics_are_averaged_and_counters_left_alone(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["buffers"] == {
            "norm.running_mean": [0.5, 0.5],
            "norm.running_var": [2.5, 2.5],
            "norm.num_batches_tracked": 7,
        }


def test_numbers_are_averaged_and_a_flag_on_any_rank_is_seen_on_all(both: list[dict[str, Any]]) -> None:
    assert [(found["mean"], found["any"]) for found in both] == [(1.5, [True, True, False])] * 2


def test_each_rank_takes_its_equal_part_of_a_batch(both: list[dict[str, Any]]) -> None:
    assert [found["shard"] for found in both] == [[0, 1, 2], [3, 4, 5]]


def test_a_batch_that_does_not_divide_is_refused(both: list[dict[str, Any]]) -> None:
    assert [found["uneven"] for found in both] == ["batch size must be a multiple of the 2 processes, got 5"] * 2


def interrupted(folder: Path) -> dict[str, Any]:
    """A run on both ranks, each in a folder of its own, with a Ctrl-C on the second alone."""
    told: list[float] = []
    with distributed.process_group():
        mine = folder / str(distributed.rank())
        with Run(mine, Config(), total_steps=9, checkpoint_every=2, progress=told.append) as run:
            assert run.restore() is None
            try:
                for step in run.steps(0, 9, lambda: {}):
                    run.log(step + 1, "train", loss=1.0)
                    if step == 4 and distributed.rank() == 1:
                        signal.raise_signal(signal.SIGINT)
            except Interrupted as error:
                run.finish({})
                return {"message": str(error).replace(str(mine), "FOLDER"), "writes": run.writes, "steps": len(told)}
    return {}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("interrupted")
    return folder, on_two_ranks(interrupted, folder)


def test_ctrl_c_on_one_rank_stops_all_after_the_same_step(stopped: tuple[Path, list[dict[str, Any]]]) -> None:
    message = "stopped after step 5 of 9, saved in FOLDER; the same command resumes it"
    assert [(found["message"], found["steps"]) for found in stopped[1]] == [(message, 5)] * 2
    assert load_checkpoint(stopped[0] / "0" / "checkpoint.pt")["step"] == 5


def test_the_first_rank_alone_writes_a_run_folder(stopped: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [found["writes"] for found in stopped[1]] == [True, False]
    assert [path.name for path in stopped[0].iterdir()] == ["0"]


# One process


def on_own_disks(folder: Path) -> dict[str, Any]:
    """A run resumed on two ranks of which only the first finds the checkpoint."""
    with distributed.process_group():
        mine = folder / str(distributed.rank())
        with Run(mine, Config(), total_steps=9, progress=lambda fraction: None) as run:
            run.save(4, {})
            try:
                run.restore()
            except CheckpointError as error:
                return {"message": str(error).replace(str(mine), "FOLDER")}
    return {}


def test_a_run_on_disks_that_are_not_shared_is_not_resumed(tmp_path: Path) -> None:
    message = "FOLDER/checkpoint.pt: not the same for all processes, it must lie on a disk that all share"
    assert [found["message"] for found in on_two_ranks(on_own_disks, tmp_path)] == [message] * 2


def test_one_process_is_rank_0_of_1_and_keeps_what_it_has() -> None:
    tensor, batch = torch.tensor([1.0, 2.0]), torch.arange(5)
    with distributed.process_group() as device:
        distributed.average_([tensor])
        assert (distributed.rank(), distributed.world_size(), device.type) == (0, 1, "cpu")
    assert (tensor.tolist(), distributed.shard(batch).tolist()) == ([1, 2], [0, 1, 2, 3, 4])
    assert (distributed.mean(2.5), distributed.any_rank(True), distributed.any_rank(False)) == (2.5, True, False)


# Whole runs under torchrun


def tiny(folder: Path, *options: object) -> list[object]:
    return [TINY, "--run.folder", folder, "--steps", 40, "--run.checkpoint_every", 3, *options]


def train_both(folder: Path) -> dict[str, Any]:
    tiny_training.main([str(argument) for argument in tiny(folder)[1:]])
    return {}


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The same run without dropout, by one process and by two at the same global batch."""
    place = tmp_path_factory.mktemp("runs")
    one, two = place / "one", place / "two"
    tiny_training.main([str(argument) for argument in tiny(one, "--dropout", 0)[1:]])
    done = children.run(*children.TORCHRUN, *tiny(two, "--dropout", 0))
    assert done.returncode == 0, done.stderr
    yield one, two


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_have_the_losses_of_one_at_the_same_global_batch(one_and_two: tuple[Path, Path]) -> None:
    one, two = map(losses, one_and_two)
    assert len(one) == 40
    assert two == pytest.approx(one, abs=1e-5, rel=0)


@pytest.mark.parametrize("name", ["model", "average"])
def test_two_processes_end_with_the_weights_of_one(name: str, one_and_two: tuple[Path, Path]) -> None:
    one, two = (load_checkpoint(folder / "final.pt")[name] for folder in one_and_two)
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5)


def test_masks_found_after_training_are_the_same_on_both_ranks_and_in_one_process(
    one_and_two: tuple[Path, Path],
) -> None:
    one, two = one_and_two
    files = [one / "final.pt", two / "final.pt", two.with_suffix(".other-rank.pt")]
    masks = [load_checkpoint(file)["masks"]["0.weight"] for file in files]
    assert int(masks[0].sum()) == 50
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[1], masks[2])


def test_both_ranks_have_equal_weights_bit_for_bit(one_and_two: tuple[Path, Path]) -> None:
    two = one_and_two[1]
    first, second = (load_checkpoint(path)["model"] for path in (two / "final.pt", two.with_suffix(".other-rank.pt")))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_under_torchrun_killed_and_resumed_equals_an_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    on_two_ranks(train_both, tmp_path / "undisturbed")
    folder = tmp_path / "killed"
    process = children.start(*children.TORCHRUN, *tiny(folder))
    children.until((folder / "checkpoint.pt").exists)
    children.kill(process)
    assert not (folder / "done.json").exists()
    assert children.run(*children.TORCHRUN, *tiny(folder)).returncode == 0
    files = ["final.pt", "metrics.jsonl", "done.json"]
    assert children.tree(folder, files) == children.tree(tmp_path / "undisturbed", files)
