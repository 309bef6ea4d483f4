"""The reference vectors, and small problems that several tests use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from symbolic_l2o.problems import Problem
from symbolic_l2o.teachers import LSTMTeacher

REFERENCE = Path(__file__).parent / "reference"


def reference(name: str) -> dict[str, Tensor]:
    """The arrays of a reference file."""
    with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as archive:
        return {key: torch.from_numpy(np.asarray(archive[key])) for key in archive}


def load_teacher(kind: str, arrays: dict[str, Tensor], prefix: str) -> LSTMTeacher:
    """A teacher with the released weights under `prefix`."""
    teacher = LSTMTeacher(kind, eps=1e-12)
    state = {}
    for key, value in arrays.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix).replace("preprocNet.0", "before").replace("recurs2", "recurs.1")
            name = name.replace("recurs.w", "recurs.0.w").replace("recurs.b", "recurs.0.b").replace("recurs", "cells")
            state[name] = value
    teacher.load_state_dict(state)
    return teacher


class FixtureProblem(Problem):
    """The 8-12-10 network of the released window, with its start and its batches."""

    def __init__(self, arrays: dict[str, Tensor]) -> None:
        net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10))
        super().__init__(net, arrays["x"][0], arrays["y"][0], batch_size=16)
        self.arrays = arrays

    def init(self, rng: torch.Generator | None = None) -> Tensor:
        names = ("mat_0.weight", "mat_0.bias", "final_mat.weight", "final_mat.bias")
        return torch.cat([self.arrays[f"init.layers.{name}"].flatten() for name in names])

    def batch(self, *keys: int) -> tuple[Tensor, Tensor]:
        return self.arrays["x"][keys[-2]], self.arrays["y"][keys[-2]]


def tiny_problem(seed: int = 0, images: int = 64, **options: object) -> Problem:
    """A 6-5-3 network on random images."""
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(images, 6, generator=rng)
    labels = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return Problem(net, inputs, labels, init=0.3, batch_size=16, **options)  # type: ignore[arg-type]


def relative(found: Tensor, wanted: Tensor) -> float:
    """Distance relative to the norm of `wanted`."""
    return float((found - wanted).norm() / wanted.norm())
