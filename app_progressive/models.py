"""The networks, normalising inside: TinyCNN-16, ResNet-20s to -110s with option-A shortcuts, torchvision's for CIFAR.

Weights are drawn now from the global generator. Definition order is that of the forward pass.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = {"resnet20s": 3, "resnet32s": 5, "resnet44s": 7, "resnet56s": 9, "resnet110s": 18}
LARGE = ("resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "wide_resnet101_2")
NAMES = ("tinycnn", *SMALL, *LARGE, "vgg16_bn")


class Normalized(nn.Module):
    """(x - mean) / std by channel, then the network; the constants are no part of the state dict."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1], (batch, channels, height, width) -> logits (batch, classes)."""
        return self.net((x - self.mean) / self.std)  # type: ignore[no-any-return]


class TinyCNN(nn.Module):
    """Three 3x3 convolutions with batch norm, width w, 2w, 4w, pooled in between; mean, Linear (spec i, demo)."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        sizes = [channels, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for index, (ins, outs) in enumerate(pairwise(sizes)):
            layers += [nn.Conv2d(ins, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if index < 2 else []
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(4 * width, classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, classes)."""
        out = self.features(x)
        return self.fc(F.avg_pool2d(out, out.shape[2:]).flatten(1))  # type: ignore[no-any-return]


class OptionABlock(nn.Module):
    """Two 3x3 convolutions; where the shape changes the shortcut takes every second pixel and pads channels by zero."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.pad = (outs - ins) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ins, height, width) -> (batch, outs, height / stride, width / stride)."""
        # In place: no backward pass reads the outputs of a batch norm or of the sum. Pooling pixels one by one gives
        # x[..., ::2, ::2] with a gradient that stays channels-last, as pooling the whole map does at the end.
        out = self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x)))))
        out += F.pad(F.avg_pool2d(x, 1, 2), (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x
        return F.relu_(out)


class ResNetS(nn.Module):
    """ResNet-(6n+2) for 32x32 images: stem of 16, three stages of n blocks at 16, 32, 64, mean, Linear."""

    def __init__(self, channels: int, classes: int, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages = []
        ins = 16
        for outs in (16, 32, 64):
            for index in range(blocks):
                stages.append(OptionABlock(ins, outs, 2 if index == 0 and outs > 16 else 1))
                ins = outs
        self.layers = nn.Sequential(*stages)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, classes)."""
        out = self.layers(F.relu_(self.bn1(self.conv1(x))))
        return self.fc(F.avg_pool2d(out, out.shape[2:]).flatten(1))  # type: ignore[no-any-return]


def _large(name: str, classes: int, imagenet: bool) -> nn.Module:
    """torchvision's ResNet; for CIFAR its stem is a 3x3 convolution without pooling."""
    from torchvision import models  # here: its import takes a second

    net: nn.Module = getattr(models, name)(num_classes=classes)
    if not imagenet:
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net


class VGG16(nn.Module):
    """VGG-16 with batch norm for small images: 13 convolutions with bias, four poolings, mean, one Linear."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        ins = channels
        for item in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
            if item == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            conv = nn.Conv2d(ins, item, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers += [conv, nn.BatchNorm2d(item), nn.ReLU(inplace=True)]
            ins = item
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, classes)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, classes)."""
        out = self.features(x)
        return self.classifier(F.avg_pool2d(out, out.shape[2:]).flatten(1))  # type: ignore[no-any-return]


def build_model(
    name: str,
    channels: int,
    classes: int,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    width: int = 16,
    imagenet: bool = False,
) -> Normalized:
    """The network of this name.

    Args:
        name: one of NAMES.
        channels: of the images; 3 for torchvision's.
        classes: of the head.
        mean, std: of the pixels, by channel, or one number for all.
        width: of tinycnn's first convolution.
        imagenet: torchvision's 7x7 stem with pooling.

    Raises:
        ValueError: another name, or channels that it cannot take.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    if name in LARGE and channels != 3:
        raise ValueError(f"name {name} must have images of 3 channels, got {channels}")
    if name == "tinycnn":
        net: nn.Module = TinyCNN(channels, classes, width)
    elif name in SMALL:
        net = ResNetS(channels, classes, SMALL[name])
    elif name == "vgg16_bn":
        net = VGG16(channels, classes)
    else:
        net = _large(name, classes, imagenet)
    return Normalized(net, mean, std)
