"""Peak memory of one meta-step, in a process of its own (Sec. 3.3; spec h3, h5)."""

import ctypes
import gc
import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from common.data import DataConfig, load
from common.runs import generator
from optimizer_amalgamation.episode import begin
from optimizer_amalgamation.meta_gradient import meta_gradient
from optimizer_amalgamation.networks import image_problem
from optimizer_amalgamation.pool import LARGE_TEACHERS
from optimizer_amalgamation.problems import Problem
from optimizer_amalgamation.rule import Context
from optimizer_amalgamation.students import StudentRule
from optimizer_amalgamation.unroll import unroll

BATCH = 32
PROCESS = Path("/proc") / "self"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
Work = Callable[..., Any]


class MetaStep:
    """A meta-step of R students on an image problem, ready to run.

    Args:
        name: of the network; its images are 14x14.
        steps: N.
        teachers: how many of the large pool.
        replicates: R.
    """

    def __init__(self, name: str, steps: int, teachers: int, replicates: int = 1) -> None:
        self.problem: Problem = image_problem(name, load(DataConfig(val=0.0)), BATCH, shrink=True)
        self.rule, self.teachers = StudentRule(), LARGE_TEACHERS.teachers[:teachers]
        self.context = Context.of(self.problem.shapes)
        self.weights = self.rule.init(generator(0), replicates)
        rngs = [generator(1, number) for number in range(replicates)]
        start = torch.stack([self.problem.init(rng) for rng in rngs])
        self.scale = torch.ones_like(start)
        self.rows = torch.stack([self.problem.draw(steps, rng) for rng in rngs], 1)
        self.path = begin(self.problem, self.rule, self.context, start, self.scale, self.teachers)

    def policy(self, weights: Any, state: Any, grad: Any, number: int) -> Any:
        """The student."""
        return self.rule.step(weights, state, grad, self.context)

    def run(self) -> Any:
        """Loss and meta-gradient."""
        shared = (self.rows, self.scale)
        found = unroll(self.problem, self.policy, self.weights, self.path, *shared, self.teachers)
        return meta_gradient(self.problem, self.policy, self.weights, found, *shared, 0.1)


def peak_bytes(work: Work, *arguments: Any) -> int:
    """How much memory `work(*arguments)`, a function of a module, takes at its peak beyond what it begins with.

    It is called with arguments (network, N, teachers, ...) twice in a fresh process: first with N = 2, unmeasured.
    Raises EOFError where that process fails.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(there, work, arguments))
    process.start()
    there.close()
    try:
        return int(here.recv())
    finally:
        process.join()


def plain_step(name: str, steps: int, teachers: int, replicates: int = 1) -> Callable[[], Any]:
    """For `peak_bytes`: the meta-step as `MetaTraining` makes it."""
    return MetaStep(name, steps, teachers, replicates).run


def _measured(pipe: Connection, work: Work, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    library = ctypes.CDLL(None)
    # glibc shall give back at once what is freed: else the peak is that of its caches, which between equal runs differs
    # by a quarter.
    if hasattr(library, "mallopt"):
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            library.mallopt(option, 1 << 16)
    name, _, *rest = arguments
    work(name, 2, *rest)()
    step = work(*arguments)
    gc.collect()
    if hasattr(library, "malloc_trim"):  # what is free is given back, or a part of the need would not be seen
        library.malloc_trim(0)
    before = _peak(reset=True)
    step()
    pipe.send(_peak() - before)


def _peak(reset: bool = False) -> int:
    """The most resident memory of this process, since it was last reset where the system can do that."""
    status = PROCESS / "status"
    if reset and status.exists():
        (PROCESS / "clear_refs").write_text("5")
        return _status("VmRSS")
    return _status("VmHWM") if status.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(key: str) -> int:
    (line,) = (one for one in (PROCESS / "status").read_text().splitlines() if one.startswith(key))
    return int(line.split()[1]) * 1024
