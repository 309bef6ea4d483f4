"""The small networks that optimisers are trained on and raced on (spec d)."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(widths: list[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Fully connected layers with an activation between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def small_conv(channels: int, side: int, classes: int, track: bool = False) -> nn.Sequential:
    """Two 3x3 convolutions (8, 16 maps) with batch norm, ReLU and 2x2 pooling, then a linear layer."""
    layers: list[nn.Module] = []
    for before, after in ((channels, 8), (8, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after, track_running_stats=track)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * (side // 4) ** 2, classes))


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a skip, 1x1 where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = before == after and stride == 1
        project = [nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)]
        self.skip = nn.Identity() if same else nn.Sequential(*project)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, before, height, width) -> (batch, after, height / stride, width / stride)."""
        return torch.relu(self.body(x) + self.skip(x))


def resnet(channels: int, classes: int, blocks: int = 3, width: int = 16) -> nn.Sequential:
    """CIFAR ResNet of depth 6 blocks + 2: three stages of `blocks` at width, 2 width and 4 width."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for stage in range(3):
        for number in range(blocks):
            after = width * 2**stage
            layers.append(Block(before, after, 2 if stage and not number else 1))
            before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
