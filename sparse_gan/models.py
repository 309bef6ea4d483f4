"""SNGAN and BigGAN for small images, by width (Miyato et al. 2018; Brock et al. 2019; spec d).

Both have the same residual blocks. BigGAN adds class-conditional batch norm and spectral norm in the generator and a
projection of the class in the discriminator. 1x1 shortcuts are computed at the smaller resolution: they commute with
nearest up-sampling and with average pooling, so the function is the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_gan.spectral_norm import SNConv2d, SNEmbedding, SNLinear, SNPooledConv2d

Architecture = Literal["sngan", "biggan"]
Conv = Callable[..., nn.Conv2d]
Network = TypeVar("Network", bound=nn.Module)
BASE = 4  # side of the smallest feature map


class BatchNorm(nn.Module):
    """Batch norm (eps 1e-5); with classes, gain 1 + a and bias b are looked up by class."""

    def __init__(self, channels: int, classes: int = 0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=not classes)
        self.gain = nn.Embedding(classes, channels) if classes else None
        self.bias = nn.Embedding(classes, channels) if classes else None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """(batch, channels, height, width), labels (batch,)."""
        x = self.norm(x)
        if self.gain is None or self.bias is None:
            return x
        gain, bias = (table(labels)[:, :, None, None] for table in (self.gain, self.bias))
        return torch.addcmul(bias, x, 1 + gain)


class GeneratorBlock(nn.Module):
    """Doubles the resolution."""

    def __init__(self, inputs: int, outputs: int, classes: int, conv: Conv) -> None:
        super().__init__()
        self.norm1, self.norm2 = BatchNorm(inputs, classes), BatchNorm(outputs, classes)
        self.conv1, self.conv2 = conv(inputs, outputs, 3, padding=1), conv(outputs, outputs, 3, padding=1)
        self.shortcut = conv(inputs, outputs, 1)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """(batch, inputs, side, side) -> (batch, outputs, 2 side, 2 side)."""
        hidden = self.conv1(_upsample(F.relu(self.norm1(x, labels), inplace=True)))
        hidden = self.conv2(F.relu(self.norm2(hidden, labels), inplace=True))
        return hidden + _upsample(self.shortcut(x))


class Generator(nn.Module):
    """Noise (and classes) to images in [-1, 1] through log2(size / 4) up-sampling blocks of one width."""

    def __init__(self, z_dim: int, width: int, size: int, channels: int, classes: int, conv: Conv) -> None:
        super().__init__()
        self.z_dim, self.classes, self.width = z_dim, classes, width
        dense: Callable[..., nn.Linear] = SNLinear if conv is SNConv2d else nn.Linear
        self.input = dense(z_dim, width * BASE**2)
        self.blocks = nn.ModuleList(GeneratorBlock(width, width, classes, conv) for _ in range(_doublings(size)))
        self.norm = BatchNorm(width)
        self.output = conv(width, channels, 3, padding=1)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """(batch, z_dim), labels (batch,) where conditional -> (batch, channels, size, size)."""
        x = self.input(z).view(-1, self.width, BASE, BASE).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, labels)
        return torch.tanh(self.output(F.relu(self.norm(x), inplace=True)))


class DiscriminatorBlock(nn.Module):
    """Residual block; `down` halves the resolution, `first` has no activation in front."""

    def __init__(self, inputs: int, outputs: int, down: bool, first: bool = False) -> None:
        super().__init__()
        self.down, self.first = down, first
        self.conv1 = SNConv2d(inputs, outputs, 3, padding=1)
        self.conv2 = (SNPooledConv2d if down else SNConv2d)(outputs, outputs, 3, padding=1)
        self.shortcut = SNConv2d(inputs, outputs, 1) if down or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, side, side) -> (batch, outputs, side or side / 2, same)."""
        hidden = self.conv1(x if self.first else F.relu(x))
        hidden = self.conv2(F.relu(hidden, inplace=True))
        return hidden + self.shortcut(F.avg_pool2d(x, 2) if self.down else x)


class Discriminator(nn.Module):
    """Images to one number each: two halving blocks, two more, ReLU, sum over space, linear (plus class projection)."""

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        first = DiscriminatorBlock(channels, width, down=True, first=True)
        rest = [DiscriminatorBlock(width, width, down=down) for down in (True, False, False)]
        self.blocks = nn.Sequential(first, *rest)
        self.output = SNLinear(width, 1)
        self.embed = SNEmbedding(classes, width) if classes else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """(batch, channels, side, side), labels (batch,) where conditional -> (batch,)."""
        hidden = self.blocks(images.contiguous(memory_format=torch.channels_last))
        hidden = F.relu(hidden).sum((2, 3))
        score = self.output(hidden).squeeze(1)
        return score if self.embed is None else score + (self.embed(labels) * hidden).sum(1)


def build_generator(
    name: Architecture, width: int, size: int, channels: int = 3, classes: int = 10, z_dim: int = 128
) -> Generator:
    """The generator of "sngan" (unconditional) or "biggan" (conditional, spectral norm), freshly initialised.

    Args:
        width: channels of every block; in the papers 256 for both (BigGAN: 4 ch).
        size: side of the images, 4 times a power of two, else ValueError.
        channels, classes: of the images.
        z_dim: of the noise.
    """
    conditional = _conditional(name)
    conv: Conv = SNConv2d if conditional else nn.Conv2d
    return _initialized(Generator(z_dim, width, size, channels, classes if conditional else 0, conv), name)


def build_discriminator(name: Architecture, width: int, channels: int = 3, classes: int = 10) -> Discriminator:
    """The discriminator of "sngan" (papers' width 128) or "biggan" (256, with class projection)."""
    return _initialized(Discriminator(width, channels, classes if _conditional(name) else 0), name)


def _conditional(name: str) -> bool:
    if name not in ("sngan", "biggan"):
        raise ValueError(f"name must be sngan or biggan, got {name!r}")
    return name == "biggan"


def _doublings(size: int) -> int:
    doublings = (size // BASE).bit_length() - 1
    if doublings < 1 or BASE << doublings != size:
        raise ValueError(f"size must be 4 times a power of two, at least 8, got {size}")
    return doublings


def _initialized(network: Network, name: str) -> Network:
    """SNGAN: Glorot-uniform, gain sqrt(2) in front of ReLUs; BigGAN: N(0, 0.02)."""
    for key, module in network.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            continue
        if name == "biggan":
            nn.init.normal_(module.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(module.weight, 2**0.5 if key.endswith(("conv1", "conv2")) else 1.0)
        if not isinstance(module, nn.Embedding) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return network


_upsample = partial(F.interpolate, scale_factor=2, mode="nearest")
