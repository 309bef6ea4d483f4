"""The networks: the authors', for 32x32 images but for resnet18_224, and a small one for the demo.

None normalises its input.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("cnn", "resnet20s", "resnet18", "vgg16", "densenet100", "resnet18_224")
VGG16_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: pool


def conv3(inputs: int, outputs: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A 3x3 convolution with padding 1."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)


class PaddedShortcut(nn.Module):
    """Option A: every other pixel, and zero channels before and after."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c + 2 * extra, h / 2, w / 2)."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, h / stride, w / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet20s(nn.Module):
    """ResNet-20 with parameter-free shortcuts (He et al. 2016): 269,722 parameters at 10 classes."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(channels, 16), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (self._stage(*each) for each in ((16, 16), (16, 32), (32, 64)))
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Sequential:
        down = inputs != outputs
        first = BasicBlock(inputs, outputs, 1 + down, PaddedShortcut(outputs // 4) if down else nn.Identity())
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, nn.Identity()) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> (n, classes)."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class ResNet18(nn.Module):
    """ResNet-18 with a 3x3 stem, for 32x32 images: 11,173,962 parameters at 10 classes."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(channels, 64), nn.BatchNorm2d(64)
        self.layer1, self.layer2 = self._stage(64, 64, 1), self._stage(64, 128, 2)
        self.layer3, self.layer4 = self._stage(128, 256, 2), self._stage(256, 512, 2)
        self.linear = nn.Linear(512, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        shortcut: nn.Module = nn.Identity()
        if stride > 1:
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        return nn.Sequential(
            BasicBlock(inputs, outputs, stride, shortcut), BasicBlock(outputs, outputs, 1, nn.Identity())
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, 32, 32) -> (n, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


class VGG16(nn.Module):
    """VGG-16 with batch norm and one linear layer: 14,728,266 parameters at 10 classes. Biases are never pruned."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in VGG16_WIDTHS:
            if width:
                layers += [conv3(channels, width, bias=True), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        layers[-1] = nn.AvgPool2d(2)  # the released network's last pool
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, 32, 32) -> (n, classes)."""
        return self.classifier(self.features(x).flatten(1))


class Bottleneck(nn.Module):
    """DenseNet's layer: norm, 1x1 convolution to 4 * growth, norm, 3x3 to growth, beside its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), conv3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, inputs + growth, h, w)."""
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([x, out], 1)


class Transition(nn.Module):
    """Norm, 1x1 convolution and 2x2 mean between two blocks."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, h / 2, w / 2)."""
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class DenseNet100(nn.Module):
    """DenseNet-BC-100, growth 12, reduction 0.5 (Huang et al. 2017): 769,162 parameters at 10 classes."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = conv3(channels, 24)
        width = 24
        for number in (1, 2, 3):
            setattr(self, f"dense{number}", nn.Sequential(*(Bottleneck(width + 12 * i, 12) for i in range(16))))
            width += 12 * 16
            if number < 3:
                setattr(self, f"trans{number}", Transition(width, width // 2))
                width //= 2
        self.bn1 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, 32, 32) -> (n, classes)."""
        x = self.trans1(self.dense1(self.conv1(x)))  # type: ignore[operator]
        x = self.dense3(self.trans2(self.dense2(x)))  # type: ignore[operator]
        return self.fc(F.avg_pool2d(F.relu(self.bn1(x)), 8).flatten(1))


def small_cnn(channels: int, classes: int) -> nn.Sequential:
    """The demo's network: four 3x3 convolutions, 16, 32, 32 and 64 channels, strides 2, 2, 1, 2; mean pool; head."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((channels, 16, 2), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        layers += [conv3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def build_model(name: str, channels: int, classes: int) -> nn.Module:
    """The network of this name, its weights drawn now from the global generator. Raises ValueError for another name."""
    kinds = {"cnn": small_cnn, "resnet20s": ResNet20s, "resnet18": ResNet18, "vgg16": VGG16, "densenet100": DenseNet100}
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "resnet18_224":
        from torchvision.models import resnet18  # here: the import takes seconds

        return resnet18(num_classes=classes)
    return kinds[name](channels, classes)  # type: ignore[no-any-return, operator]
