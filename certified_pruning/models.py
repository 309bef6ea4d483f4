"""The convolutional networks of the study, as plain nn.Sequential (from the paper's released code; spec section d).

All have the form [Conv2d, (BatchNorm2d), ReLU] * n, Flatten, Linear, ReLU, Linear. Every convolution has a bias; the
weights have torch's default initialisation. Inputs are (batch, in_channels, size, size), outputs (batch, classes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

Channels = Sequence[int] | None


def cnn_s(in_channels: int, size: int, classes: int, channels: Channels = None) -> nn.Sequential:
    """Demo network: 2 convolutions with batch norm, fc 50. On 28x28 grey images 2,402 ReLUs."""
    widths = _widths(channels, (8, 16))
    return _conv_net(in_channels, size, classes, widths, kernels=(4, 4), strides=(2, 2), hidden=50, batch_norm=True)


def cifar_model(in_channels: int, size: int, classes: int, channels: Channels = None) -> nn.Sequential:
    """2 convolutions with batch norm, fc 100 (released code)."""
    widths = _widths(channels, (8, 16))
    return _conv_net(in_channels, size, classes, widths, kernels=(4, 4), strides=(2, 2), hidden=100, batch_norm=True)


def cifar_model_deep(in_channels: int, size: int, classes: int, channels: Channels = None) -> nn.Sequential:
    """The paper's network: 5 convolutions with batch norm, fc 100 (released code).

    For 3x32x32 images: 463,712 convolution weights, 75,876 ReLUs.

    Args:
        channels: widths of the five convolutions, for compressed networks; (32, 64, 64, 128, 128) if None.
    """
    widths = _widths(channels, (32, 64, 64, 128, 128))
    kernels, strides = (3, 4, 3, 4, 4), (1, 2, 1, 2, 2)
    return _conv_net(in_channels, size, classes, widths, kernels, strides, hidden=100, batch_norm=True)


def cnn_b_adv(in_channels: int, size: int, classes: int, channels: Channels = None) -> nn.Sequential:
    """`cnn_b` with batch norm after both convolutions (released code)."""
    widths = _widths(channels, (32, 128))
    return _conv_net(in_channels, size, classes, widths, kernels=(5, 4), strides=(2, 2), hidden=250, batch_norm=True)


def cnn_7layer_bn(in_channels: int, size: int, classes: int, channels: Channels = None) -> nn.Sequential:
    """5 convolutions of kernel 3 with batch norm, fc 512 (released code)."""
    widths = _widths(channels, (64, 64, 128, 128, 128))
    kernels, strides = (3, 3, 3, 3, 3), (1, 1, 2, 1, 1)
    return _conv_net(in_channels, size, classes, widths, kernels, strides, hidden=512, batch_norm=True)


def cnn_a(in_channels: int, size: int, classes: int, channels: Channels = None) -> nn.Sequential:
    """CNN-A of alpha-beta-CROWN: 2 convolutions without batch norm, fc 100."""
    widths = _widths(channels, (16, 32))
    return _conv_net(in_channels, size, classes, widths, kernels=(4, 4), strides=(2, 2), hidden=100, batch_norm=False)


def cnn_b(in_channels: int, size: int, classes: int, channels: Channels = None) -> nn.Sequential:
    """CNN-B of alpha-beta-CROWN: 2 convolutions without batch norm, fc 250."""
    widths = _widths(channels, (32, 128))
    return _conv_net(in_channels, size, classes, widths, kernels=(5, 4), strides=(2, 2), hidden=250, batch_norm=False)


BUILDERS: dict[str, Callable[..., nn.Sequential]] = {
    builder.__name__: builder
    for builder in (cnn_s, cifar_model, cifar_model_deep, cnn_b_adv, cnn_7layer_bn, cnn_a, cnn_b)
}


def build_model(
    name: str, in_channels: int, size: int, classes: int, channels: Sequence[int] | None = None
) -> nn.Sequential:
    """Build a network by the name of its builder.

    Args:
        name: one of `BUILDERS`.
        in_channels: colour channels of the images.
        size: height and width of the images, in pixels.
        classes: number of outputs.
        channels: widths of the convolutions; the network's own if None.

    Raises:
        ValueError: unknown name, a size the strides reduce to nothing, or channels of the wrong number or sign.
    """
    if name not in BUILDERS:
        raise ValueError(f"model name must be one of {', '.join(sorted(BUILDERS))}; got {name!r}")
    return BUILDERS[name](in_channels, size, classes, channels)


def _widths(channels: Channels, default: tuple[int, ...]) -> tuple[int, ...]:
    if channels is None:
        return default
    if len(channels) != len(default) or any(width < 1 for width in channels):
        raise ValueError(f"channels must be {len(default)} positive integers (default {default}), got {list(channels)}")
    return tuple(channels)


def _conv_net(
    in_channels: int,
    size: int,
    classes: int,
    widths: tuple[int, ...],
    kernels: tuple[int, ...],
    strides: tuple[int, ...],
    hidden: int,
    batch_norm: bool,
) -> nn.Sequential:
    for argument, value in (("in_channels", in_channels), ("size", size), ("classes", classes)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    layers: list[nn.Module] = []
    channels, side = in_channels, size
    for width, kernel, stride in zip(widths, kernels, strides, strict=True):
        padding = (kernel - 1) // 2  # 1 for kernels 3 and 4, 2 for kernel 5: stride alone sets the output size
        layers.append(nn.Conv2d(channels, width, kernel, stride, padding))
        if batch_norm:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU())
        channels, side = width, (side + 2 * padding - kernel) // stride + 1
        if side < 1:
            raise ValueError(f"size must be large enough for strides {strides}, got {size}")
    fully_connected = [nn.Linear(channels * side * side, hidden), nn.ReLU(), nn.Linear(hidden, classes)]
    return nn.Sequential(*layers, nn.Flatten(), *fully_connected)
