"""The networks that optimizers are trained and judged on (Sec. 5; spec d): chains of layers, and two that are not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Layer = tuple[int, int, int] | Literal[2]


@dataclass(frozen=True)
class Recipe:
    """A network: convolutions without padding (filters, kernel, stride) and 2x2 max-pools (2), or hidden units."""

    layers: tuple[Layer, ...] = ()
    hidden: tuple[int, ...] = ()
    """sigmoid units, where `layers` is empty"""
    mean_head: bool = False
    """the last layer is a mean over positions and a dense one; else all positions are flattened"""


RECIPES: dict[str, Recipe] = {
    "train": Recipe(((16, 3, 1), 2, (32, 5, 1), 2)),
    "mlp": Recipe(hidden=(20,)),
    "wider": Recipe(((32, 3, 1), 2, (64, 5, 1), 2)),
    "deeper": Recipe(((16, 3, 1), (32, 3, 1), (32, 3, 1), 2, (64, 3, 1), (64, 3, 1), 2)),
    "strided": Recipe(((16, 3, 1), (32, 3, 2), (32, 3, 1), (64, 3, 2), (64, 3, 1)), mean_head=True),
    "tiny14": Recipe(((4, 3, 1), 2, (8, 3, 1), 2)),
    "small14": Recipe(((8, 3, 1), 2, (16, 3, 1), 2)),
    "wide14": Recipe(((16, 3, 1), 2, (32, 3, 1), 2)),
    "deep14": Recipe(((8, 3, 1), (8, 3, 1), 2, (16, 3, 1), 2)),
    "mlp14": Recipe(hidden=(20,)),
}
MODULES: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet": lambda channels, classes: ResNet(channels, classes),
    "nas": lambda channels, classes: NASCell(channels, classes),
}


def chain(recipe: Recipe, channels: int, side: int, classes: int) -> nn.Sequential:
    """The network of a recipe on images (channels, side, side). Raises ValueError where they are too small for it."""
    layers: list[nn.Module] = []
    for layer in recipe.layers:
        if layer == 2:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        else:
            filters, kernel, stride = layer
            layers += [nn.Conv2d(channels, filters, kernel, stride), nn.ReLU()]
            channels, side = filters, (side - kernel) // stride + 1
        if side < 1:
            raise ValueError("images are too small for this network")
    if recipe.mean_head:
        layers.append(nn.AdaptiveAvgPool2d(1))
        side = 1
    layers.append(nn.Flatten())
    width = channels * side * side
    for units in recipe.hidden:
        layers += [nn.Linear(width, units), nn.Sigmoid()]
        width = units
    return nn.Sequential(*layers, nn.Linear(width, classes))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)  # momentum .99 in Keras' sense


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN-ReLU, then plus the input, through a 1x1 convolution where the width changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, padding=1), _norm(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, padding=1), _norm(after)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, before, h, w) to (batch, after, h, w)."""
        inner = F.relu(self.norm1(self.conv1(x)))
        return self.shortcut(x) + F.relu(self.norm2(self.conv2(inner)))


class ResNet(nn.Module):
    """28 layers: a convolution, three stages of four blocks (16, 32, 64) with max-pools between, mean, dense."""

    def __init__(self, channels: int = 3, classes: int = 10, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, widths[0], 3, padding=1), _norm(widths[0]), nn.ReLU())
        before: int = widths[0]
        stages: list[nn.Module] = []
        for number, width in enumerate(widths):
            stages += [nn.MaxPool2d(2)] if number else []
            stages += [Block(before if block == 0 else width, width) for block in range(4)]
            before = width
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, h, w)."""
        return self.head(self.stages(self.stem(images)).mean((2, 3)))


class NASCell(nn.Module):
    """A cell of the NAS search space: a = conv(x), b = conv(a), c = avg(b) + conv(a), d = a + conv(conv(b)) + c."""

    def __init__(self, channels: int = 1, classes: int = 10, filters: int = 16) -> None:
        super().__init__()
        widths = [channels, filters, filters, filters, filters]
        self.convs = nn.ModuleList([nn.Conv2d(width, filters, 3, padding=1) for width in widths])
        self.head = nn.Linear(filters, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, h, w)."""
        first, second, side, third, fourth = (lambda x, conv=conv: F.relu(conv(x)) for conv in self.convs)
        a = first(images)
        b = second(a)
        # At the borders a mean over the pixels that are there, as TF's SAME: that of borders repeated is the same.
        c = F.avg_pool2d(F.pad(b, (0, 1, 0, 1), mode="replicate"), 2, 1) + side(a)
        return self.head((a + fourth(third(b)) + c).mean((2, 3)))


def is_chain(module: nn.Module) -> bool:
    """Whether `networks.batched_logits` can run many copies of this network at once: images, flattened, dense."""
    if not isinstance(module, nn.Sequential):
        return False
    flat = False
    for layer in module:
        if isinstance(layer, nn.Conv2d):
            plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
            fits = plain and layer.bias is not None and not flat
        elif isinstance(layer, nn.Linear):
            fits = layer.bias is not None and flat
        elif isinstance(layer, nn.Flatten):
            fits, flat = (layer.start_dim, layer.end_dim) == (1, -1) and not flat, True
        else:
            spatial = isinstance(layer, (nn.MaxPool2d, nn.AdaptiveAvgPool2d)) and not flat
            fits = spatial or isinstance(layer, (nn.ReLU, nn.Sigmoid))
        if not fits:
            return False
    return flat


def glorot(module: nn.Module, generator: torch.Generator) -> Tensor:
    """Fresh parameters in one vector (n,): kernels uniform in ±sqrt(6 / (fan in + fan out)), biases 0, scales 1."""
    found = []
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            fans = (parameter.shape[0] + parameter.shape[1]) * parameter[0, 0].numel()
            bound = (6 / fans) ** 0.5
            found.append((2 * torch.rand(parameter.numel(), generator=generator) - 1) * bound)
        else:
            found.append(torch.full((parameter.numel(),), float(name.endswith("weight"))))
    return torch.cat(found)
