"""CROWN bounds of convolution outputs on their receptive fields instead of whole maps (spec h.2).

The coefficients of one neuron of a convolution are zero outside a window of each earlier map. Going back through a
convolution a window of size w at origin o becomes one of size (w - 1) stride + dilation (k - 1) + 1 at
o stride - padding. Beyond the border of a map the slopes are read as zero: just what zero padding means.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from certified_pruning.affine import Conv
from certified_pruning.chain import ChainNet
from certified_pruning.rows import Relaxation, layers


def has_windows(head: ChainNet) -> bool:
    """Whether all maps of the chain are single convolutions and the window on the input is smaller than the input."""
    size = (1, 1)
    for affine in reversed(head.affines):
        if len(affine.ops) != 1 or not isinstance(affine.ops[0], Conv):
            return False
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
    _, height, width = head.affines[-1].out_shape
    channel, place = neuron // (height * width), neuron % (height * width)
    origin = torch.stack([place // width, place % width], 1)
    last = head.affines[-1].ops[0]
    assert isinstance(last, Conv)
    # Row e_j goes back through the last convolution by reading its kernel; -e_j is its negative.
    h = _kernel_of(last, channel)
    h = torch.stack([h, -h])  # (2, R, C, w, w)
    bias = head.affines[-1].bias[neuron]
    const = torch.stack([bias, -bias])
    origin = _shift(last, origin)
    adaptive = relaxation.adaptive()
    for k, (start, end) in reversed(list(enumerate(layers(head)))):
        conv, shape = head.affines[k].ops[0], head.affines[k].out_shape
        assert isinstance(conv, Conv)
        maps = torch.stack([t[:, start:end] for t in (adaptive, relaxation.upper, relaxation.intercept)], 1)
        lower, upper, intercept = _cut(maps.unflatten(2, shape), image, origin, h.shape[-2:]).unbind(1)
        const = const + (h.clamp(max=0) * intercept).flatten(2).sum(2)
        coef = torch.where(h >= 0, lower, upper) * h
        bias = head.affines[k].bias.view(shape)[:, 0, 0]  # one number a channel
        const = const + coef.sum((3, 4)) @ bias
        h = F.conv_transpose2d(
            coef.flatten(0, 1), conv.weight, None, conv.stride, 0, 0, conv.groups, conv.dilation
        ).unflatten(0, coef.shape[:2])
        origin = _shift(conv, origin)
    box = torch.stack([(x_ub + x_lb) / 2, (x_ub - x_lb) / 2], 1).unflatten(2, head.input_shape)
    mid, rad = _cut(box, image, origin, h.shape[-2:]).unbind(1)
    bounds = const + (h * mid).flatten(2).sum(2) - (h.abs() * rad).flatten(2).sum(2)
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


def _shift(conv: Conv, origin: Tensor) -> Tensor:
    return origin * origin.new_tensor(conv.stride) - origin.new_tensor(conv.padding)


def _kernel_of(conv: Conv, channel: Tensor) -> Tensor:
    """Coefficients (R, C, h, w) on the input window of an output channel each."""
    one = conv.weight.new_zeros(conv.weight.shape[0], conv.weight.shape[0], 1, 1)
    one[:, :, 0, 0] = torch.eye(len(one), dtype=one.dtype, device=one.device)
    return F.conv_transpose2d(one, conv.weight, None, 1, 0, 0, conv.groups, conv.dilation)[channel]


def _cut(maps: Tensor, image: Tensor, origin: Tensor, size: tuple[int, ...]) -> Tensor:
    """Windows (R, M, C, h, w) at `origin` (R, 2) of maps (B, M, C, H, W) of image (R,); zero beyond the border."""
    before = (-origin.amin(0)).clamp(min=0).tolist()
    after = [max(0, int(origin[:, i].max()) + size[i] - maps.shape[3 + i]) for i in (0, 1)]
    padded = F.pad(maps, (before[1], after[1], before[0], after[0]))
    views = padded.unfold(3, size[0], 1).unfold(4, size[1], 1)
    return views[image, :, :, origin[:, 0] + before[0], origin[:, 1] + before[1]]
