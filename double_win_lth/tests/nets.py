"""Small networks, the reference vectors, and the smoke configuration that the tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import parse
from double_win_lth.models import normalized
from double_win_lth.settings import Config

REFERENCE = Path(__file__).parent / "reference"
CONFIGS = Path(__file__).parents[1] / "configs"


def reference(name: str) -> dict[str, Tensor]:
    """Arrays of a reference file."""
    with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as archive:
        return {key: torch.from_numpy(np.asarray(archive[key])) for key in archive}


def constants() -> dict[str, Any]:
    return json.loads((REFERENCE / "constants.json").read_text())


def part(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What lies under `prefix`/, without it."""
    return {key.removeprefix(f"{prefix}/"): value for key, value in arrays.items() if key.startswith(f"{prefix}/")}


class ReferenceNet(nn.Module):
    """The tiny network of pgd.npz and train_steps.npz."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, 2, 1)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def reference_net(arrays: dict[str, Tensor], state: str) -> nn.Module:
    """That network with the reference's weights, in float64."""
    mean, std = (arrays[name].flatten().tolist() for name in ("mean", "std"))
    net = normalized(ReferenceNet(), mean, std).double()
    net.load_state_dict(part(arrays, state))
    return net


def small_net(classes: int = 4, norm: bool = True) -> nn.Module:
    """Two convolutions and a head for (n, 2, 6, 6) images; weights from a fixed seed."""
    torch.manual_seed(3)
    norms = [nn.BatchNorm2d(5), nn.BatchNorm2d(4)] if norm else [nn.Identity(), nn.Identity()]
    layers = [nn.Conv2d(2, 5, 3, padding=1), norms[0], nn.ReLU(), nn.Conv2d(5, 4, 3, stride=2), norms[1], nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, classes))


def small_batch(count: int = 12, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, 6, 6, generator=draws), torch.randint(classes, (count,), generator=draws)


def arguments(*options: object) -> list[str]:
    return ["--config", str(CONFIGS / "smoke.yaml"), *map(str, options)]


def config(*options: object) -> Config:
    return parse(Config, arguments(*options), prog="train.py")
