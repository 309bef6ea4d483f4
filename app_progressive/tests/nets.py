"""The reference vectors, the small networks and the smoke configuration that the tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app_progressive.settings import Config
from common.config import parse

REFERENCE = Path(__file__).parent / "reference"
CONFIGS = Path(__file__).parents[1] / "configs"
CONVS = ("conv1", "conv2")


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as archive:
        return {key: torch.from_numpy(np.array(archive[key])) for key in archive}


def facts(name: str) -> Any:
    return json.loads((REFERENCE / f"{name}.json").read_text())


def convs(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """values[prefix/conv*] under the names of the weights."""
    return {f"{name}.weight": values[f"{prefix}/{name}"] for name in CONVS}


class TinyNet(nn.Module):
    """The network of scores.npz, sgd.npz and released.npz, for (n, 3, side, side) pixels in [0, 1]."""

    def __init__(self, first: int = 6, second: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, 2, 1)
        self.bn2 = nn.BatchNorm2d(second)
        self.fc = nn.Linear(second, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def reference_net(values: dict[str, Tensor], prefix: str = "init") -> TinyNet:
    """That network in float64 with the reference's weights."""
    net = TinyNet().double()
    net.load_state_dict({k.removeprefix(f"{prefix}/"): v for k, v in values.items() if k.startswith(f"{prefix}/")})
    return net


def reference_batches(values: dict[str, Tensor], size: int = 100) -> list[tuple[Tensor, Tensor]]:
    x = values["x_u8"].double() / 255
    return list(zip(x.split(size), values["y"].split(size), strict=True))


def small_net(seed: int = 0) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet()


def batch(count: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 8, 8, generator=draws), torch.randint(10, (count,), generator=draws)


def arguments(*options: object) -> list[str]:
    return ["--config", str(CONFIGS / "smoke.yaml"), *map(str, options)]


def config(*options: object) -> Config:
    return parse(Config, arguments(*options), prog="train.py")
