"""The networks: a residual network for small images at free width, and torchvision's ResNet-18 and -50.

All normalise inside, so that attacks work on pixels in [0, 1], and keep the parameter names of the plain network.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("resnet8", "resnet20", "resnet18", "resnet50")


class Normalize(nn.Module):
    """(x - mean) / std by channel; not part of the state dict, so that weights can move between data sets."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width)."""
        return (x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


def normalized(net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """`net` itself, which from now on normalises its input as its first act."""
    net.add_module("normalize", Normalize(mean, std))
    net.register_forward_pre_hook(lambda module, inputs: (module.get_submodule("normalize")(inputs[0]),))
    return net


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm; where the shape changes, a 1x1 convolution with batch norm around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, width, height / stride, width / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class SmallResNet(nn.Module):
    """A 3x3 stem, three stages of `blocks` at `width`, 2 `width`, 4 `width` channels, mean pool, head.

    Weights are drawn now from the global generator: Kaiming-normal (fan out) convolutions.
    """

    def __init__(self, channels: int, classes: int, *, width: int, blocks: int, stem_stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        inputs = width
        for stage in range(3):
            outputs = width << stage
            for block in range(blocks):
                layers.append(BasicBlock(inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> logits (batch, classes)."""
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def build_model(name: str, channels: int, classes: int, mean: Sequence[float], std: Sequence[float], width: int) -> Any:
    """The network of this name, normalising inside, its weights drawn now.

    Args:
        name: resnet8 (stem stride 2, for 28x28), resnet20 (for 32x32), torchvision's resnet18 or resnet50.
        channels: of the images; 3 for torchvision's.
        classes: of the head.
        mean, std: of the pixels, by channel, or one number for all.
        width: channels of the first stage of resnet8 and resnet20.

    Raises:
        ValueError: another name, or channels that it cannot take.
    """
    mean, std = (list(values) * (channels // len(values)) for values in (mean, std))
    if name in ("resnet8", "resnet20"):
        shape = {"blocks": 1, "stem_stride": 2} if name == "resnet8" else {"blocks": 3, "stem_stride": 1}
        return normalized(SmallResNet(channels, classes, width=width, **shape), mean, std)
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    if channels != 3:
        raise ValueError(f"name {name} must have images of 3 channels, got {channels}")
    from torchvision import models  # here: its import takes a second

    return normalized(getattr(models, name)(num_classes=classes), mean, std)


def head_name(model: nn.Module) -> str:
    """The name of the classifier: the last Linear. Raises ValueError where there is none."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ValueError("model must have a Linear head, got none")
    return names[-1]
