"""Small networks, the reference vectors, and the smoke configuration that the tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_lth.settings import Config
from common.config import parse

REFERENCE = Path(__file__).parent / "reference"
CONFIGS = Path(__file__).parents[1] / "configs"


def reference(name: str) -> dict[str, Tensor]:
    """Numeric arrays of a reference file."""
    with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as archive:
        return {key: torch.from_numpy(np.asarray(archive[key])) for key in archive if archive[key].dtype.kind in "fiu"}


class TinyNet(nn.Module):
    """The network of lmc.npz, tabor.npz and neural_cleanse.npz."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 12, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def tiny_net(arrays: dict[str, Tensor], prefix: str = "w__") -> nn.Module:
    """That network in float64 and eval mode; a pruned weight is weight_orig * weight_mask."""
    net = TinyNet().double().eval()
    net.load_state_dict(state_of(arrays, prefix))
    return net


def state_of(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    state = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    for name in [key for key in state if key.endswith("_orig")]:
        plain = name.removesuffix("_orig")
        state[plain] = state.pop(name) * state.pop(f"{plain}_mask")
    return state


def hash_filled(model: nn.Module) -> nn.Module:
    """`model` in float64 and eval mode with the weights that the reference logits belong to."""
    model = model.double().eval()
    entries = [(key, value) for key, value in model.state_dict().items() if value.is_floating_point()]
    filled = {}
    with np.errstate(over="ignore"):
        for number, (key, value) in enumerate(entries):
            z = np.arange(1, value.numel() + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            z = z + np.uint64((number + 1) * 0xD1342543DE82EF95 % 2**64)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            u = torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53)
            if value.ndim >= 2:
                u = (6 / (value.numel() / len(value))) ** 0.5 * (2 * u - 1)
            elif key.endswith(("running_mean", "bias")):
                u = 0.2 * (u - 0.5)
            else:
                u = 0.5 + u if key.endswith("running_var") else 0.75 + 0.5 * u
            filled[key] = u.view_as(value)
    model.load_state_dict(filled, strict=False)
    return model


def waves(count: int = 2, size: int = 32) -> Tensor:
    """The input of the reference logits at its defaults."""
    return (0.05 * torch.arange(count * 3 * size * size, dtype=torch.float64)).sin().view(count, 3, size, size)


def arguments(*options: object) -> list[str]:
    """The smoke configuration with other options."""
    return ["--config", str(CONFIGS / "smoke.yaml"), *map(str, options)]


def config(*options: object) -> Config:
    return parse(Config, arguments(*options), prog="train.py")
