"""CROWN bounds of convolution outputs on their receptive fields instead of whole maps (spec h.2).

The coefficients of one neuron of a convolution are zero outside a window of each earlier map. Going back through a
convolution a window of size w at origin o becomes one of size (w - 1) stride + dilation (k - 1) + 1 at
o stride - padding. Beyond the border of a map the slopes are read as zero: just what zero padding means.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from certified_pruning.affine import FEW_CHANNELS, Conv, Pair, Shape
from certified_pruning.chain import ChainNet
from certified_pruning.rows import Relaxation, layers

SMALL_WINDOW = 128
"""Up to so many pixels on the input, a matrix product beats the transposed convolution of a window."""


def has_windows(head: ChainNet) -> bool:
    """Whether all maps of the chain are single convolutions and the window on the input is smaller than the input."""
    size = (1, 1)
    for affine in reversed(head.affines):
        if len(affine.ops) != 1 or not isinstance(affine.ops[0], Conv) or len(affine.out_shape) != 3:
            return False  # a map that is flattened before its ReLU has no windows either
        size = _grow(affine.ops[0], size)
    return size[0] * size[1] < head.input_shape[1] * head.input_shape[2]


def window_bounds(
    head: ChainNet, x_lb: Tensor, x_ub: Tensor, relaxation: Relaxation, image: Tensor, neuron: Tensor
) -> tuple[Tensor, Tensor]:
    """CROWN bounds (l, u), (R,) each, of output `neuron` (R,) of the chain for image `image` (R,); adaptive slopes.

    Args:
        head: a chain with `has_windows`.
        x_lb, x_ub: (B, n); relaxation: (B, N) of the ReLUs of `head`.
    """
    grid = head.affines[-1].out_shape[1:]
    channel, place = neuron // prod(grid), neuron % prod(grid)
    first = int(image.min())  # rows come image by image: only these images have windows cut
    images = slice(first, int(image.max()) + 1)
    window = (image - first) * prod(grid) + place
    last = head.affines[-1].ops[0]
    assert isinstance(last, Conv)
    # Row e_j goes back through the last convolution by reading its kernel; -e_j is its negative.
    h = _kernel_of(last, channel)
    h = torch.stack([h, -h])  # (2, R, C, w, w)
    bias = head.affines[-1].bias[neuron]
    const = torch.stack([bias, -bias])
    # The window of output place p starts at p * step + offset.
    step, offset = last.stride, (-last.padding[0], -last.padding[1])
    adaptive = relaxation.adaptive()
    for k, (start, end) in reversed(list(enumerate(layers(head)))):
        conv, shape = head.affines[k].ops[0], head.affines[k].out_shape
        assert isinstance(conv, Conv)
        maps = torch.stack([t[images, start:end] for t in (adaptive, relaxation.upper, relaxation.intercept)], 1)
        cut = _windows(maps.unflatten(2, shape), grid, step, offset, h.shape[-2:])
        lower, upper, intercept = cut.index_select(0, window).unbind(1)
        negative = h.clamp(max=0)
        const = const + (negative * intercept).flatten(2).sum(2)
        coef = torch.addcmul(h.clamp(min=0) * lower, negative, upper)
        bias = head.affines[k].bias.view(shape)[:, 0, 0]  # one number a channel
        const = const + coef.sum((3, 4)) @ bias
        h = _spread(conv, coef.flatten(0, 1)).unflatten(0, coef.shape[:2])
        step = (step[0] * conv.stride[0], step[1] * conv.stride[1])
        offset = (offset[0] * conv.stride[0] - conv.padding[0], offset[1] * conv.stride[1] - conv.padding[1])
    box = torch.stack([x_lb[images], x_ub[images]], 1).unflatten(2, head.input_shape)
    low, high = _windows(box, grid, step, offset, h.shape[-2:]).index_select(0, window).unbind(1)
    bounds = const + torch.addcmul(h.clamp(min=0) * low, h.clamp(max=0), high).flatten(2).sum(2)
    return bounds[0], -bounds[1]


def window_elements(head: ChainNet) -> int:
    """Largest number of coefficients one row needs."""
    size, most = (1, 1), 0
    for affine in reversed(head.affines):
        op = affine.ops[0]
        assert isinstance(op, Conv)
        size = _grow(op, size)
        most = max(most, op.in_shape[0] * size[0] * size[1])
    return most


def _grow(conv: Conv, size: tuple[int, int]) -> tuple[int, int]:
    h, w = ((size[i] - 1) * conv.stride[i] + conv.dilation[i] * (conv.weight.shape[2 + i] - 1) + 1 for i in (0, 1))
    return h, w


def _spread(conv: Conv, coef: Tensor) -> Tensor:
    """Coefficients (R, C, h, w) on a window of the output to those on the window of the input, unpadded."""
    size = _grow(conv, (coef.shape[2], coef.shape[3]))
    if conv.groups == 1 and conv.in_shape[0] <= FEW_CHANNELS and prod(size) <= SMALL_WINDOW:
        # One matrix for all windows: wasteful in operations, but three times as fast as convolutions this small.
        one = torch.eye(coef[0].numel(), dtype=coef.dtype, device=coef.device)
        matrix = conv.spread(one.unflatten(1, coef.shape[1:]), (0, 0), size).flatten(1)
        return (coef.flatten(1) @ matrix).unflatten(1, (conv.in_shape[0], *size))
    return conv.spread(coef, (0, 0), size)


def _kernel_of(conv: Conv, channel: Tensor) -> Tensor:
    """Coefficients (R, C, h, w) on the input window of an output channel each."""
    one = conv.weight.new_zeros(conv.weight.shape[0], conv.weight.shape[0], 1, 1)
    one[:, :, 0, 0] = torch.eye(len(one), dtype=one.dtype, device=one.device)
    return F.conv_transpose2d(one, conv.weight, None, 1, 0, 0, conv.groups, conv.dilation)[channel]


def _windows(maps: Tensor, grid: Shape, step: Pair, offset: Pair, size: Shape) -> Tensor:
    """Windows (B * places, M, C, *size) of maps (B, M, C, H, W), zero beyond the border, for every place of a grid.

    All places are cut though only some have unstable neurons: the channels of a place share its window, and rows of
    this tensor are then gathered as whole blocks of memory.
    """
    after = [max(0, offset[i] + (grid[i] - 1) * step[i] + size[i] - maps.shape[3 + i]) for i in (0, 1)]
    padded = F.pad(maps, (-offset[1], after[1], -offset[0], after[0]))
    views = padded.unfold(3, size[0], step[0]).unfold(4, size[1], step[1])[:, :, :, : grid[0], : grid[1]]
    return views.permute(0, 3, 4, 1, 2, 5, 6).reshape(-1, *maps.shape[1:3], *size)
