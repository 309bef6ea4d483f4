"""Networks and reference vectors for the tests of the verifier."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

REFERENCE = Path(__file__).parent / "reference"
BOUNDS = ["bounds_fc", "bounds_conv", "bounds_conv3"]


def reference(name: str) -> dict[str, Tensor]:
    with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def load(net: nn.Sequential, data: dict[str, Tensor]) -> nn.Sequential:
    state = {key[3:]: value for key, value in data.items() if key.startswith("sd.")}
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    return net.eval()


def bounds_net(name: str, data: dict[str, Tensor]) -> nn.Sequential:
    if name == "bounds_fc":
        layers = [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)]
    elif name == "bounds_conv":
        layers = [nn.Conv2d(1, 2, 3, 1, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 4, 2, 1), nn.BatchNorm2d(3)]
        layers += [nn.ReLU(), nn.Flatten(), nn.Linear(27, 8), nn.ReLU(), nn.Linear(8, 4)]
    else:
        layers = [nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 4, 2, 1), nn.BatchNorm2d(6)]
        layers += [nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 0), nn.ReLU(), nn.Flatten()]
        layers += [nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 5)]
    return load(nn.Sequential(*layers), data)


def randomise_norms(net: nn.Sequential, seed: int) -> nn.Sequential:
    """Random running statistics and scales, negative and zero ones included; larger linear weights."""
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.Linear):
            m.weight.data.mul_(2.0)
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.num_features, generator=g) * 0.1)
            m.running_var.copy_(torch.rand(m.num_features, generator=g) * 0.3 + 0.05)
            m.weight.data.copy_(torch.randn(m.num_features, generator=g))
            m.weight.data[0] = -m.weight.data[0].abs()
            m.weight.data[-1] = 0.0
            m.bias.data.copy_(torch.randn(m.num_features, generator=g) * 0.1)
    return net


def odd_net(seed: int = 0) -> nn.Sequential:
    """Input (2, 9, 7), 4 classes: nesting, strides with a remainder, dilation, groups, pooling, norms everywhere."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.BatchNorm2d(2),
        nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 6, (2, 3), 1, (1, 2), groups=2, dilation=(1, 2), bias=False),
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AvgPool2d(2, stride=1, padding=1),
        nn.Identity(),
        nn.Flatten(),
        nn.Linear(6 * 7 * 5, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )
    return randomise_norms(net, seed).eval()


def small_conv(seed: int = 0, classes: int = 4) -> nn.Sequential:
    """Input (1, 6, 5): two convolutions with batch norm, two linear layers; a few dozen ReLUs."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 2, 1, 1), nn.BatchNorm2d(4)]
    layers += [nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 8), nn.ReLU(), nn.Linear(8, classes)]
    return randomise_norms(nn.Sequential(*layers), seed).eval()


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, 1, 1) for _ in range(2))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.norm(self.first(x)))))


def small_resnet() -> nn.Sequential:
    """Input (1, 8, 8), 5 classes: two residual blocks."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), Residual(4), Residual(4), nn.AvgPool2d(2), nn.Flatten()]
    return randomise_norms(nn.Sequential(*layers, nn.Linear(16, 5)), 1).eval()


def mlp(sizes: list[int], seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def worked_net(constant: float) -> nn.Sequential:
    """Logits (constant - relu(x1 + x2) - relu(x1 - x2), 0): smallest margin of class 0 on [-1, 1]^2: constant - 2."""
    net = mlp([2, 2, 2])
    net[0].weight.data.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    net[2].weight.data.copy_(torch.tensor([[-1.0, -1.0], [0.0, 0.0]]))
    net[0].bias.data.zero_()
    net[2].bias.data.copy_(torch.tensor([constant, 0.0]))
    return net


def images(shape: tuple[int, ...], n: int, seed: int = 0) -> Tensor:
    """Pixels in [0, 1], a fifth of them exactly 0 and a fifth exactly 1."""
    g = torch.Generator().manual_seed(seed)
    return (torch.rand((n, *shape), generator=g) * 1.67 - 0.33).clamp(0, 1)


def points(x_lb: Tensor, x_ub: Tensor, n: int, seed: int = 0) -> Tensor:
    """n random points of each box, half of them corners: (batch, n, inputs)."""
    g = torch.Generator().manual_seed(seed)
    u = torch.rand((len(x_lb), n, x_lb[0].numel()), generator=g, dtype=x_lb.dtype)
    u[:, ::2] = u[:, ::2].round()
    lb, ub = x_lb.flatten(1)[:, None], x_ub.flatten(1)[:, None]
    return lb + u * (ub - lb)
