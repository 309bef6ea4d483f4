"""Two ways to make a sparse generator's inference smaller on ordinary hardware, both the same function.

`compact` cuts hidden channels that no weight reads or writes; `with_csr_kernels` multiplies by sparse matrices.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_gan.models import BASE, BatchNorm, Generator, GeneratorBlock
from sparse_gan.spectral_norm import SNConv2d, normalized


class OffsetConv2d(nn.Conv2d):
    """A convolution plus a fixed map (1, out, height, width): what constant input channels used to add."""

    offset: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height, width)."""
        return super().forward(x) + self.offset


class CSRConv2d(nn.Module):
    """A convolution of stride 1 as sparse matrix (out, in * k * k) times unfolded image patches."""

    matrix: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.kernel_size, self.padding = conv.kernel_size, conv.kernel_size[0] // 2
        self.register_buffer("matrix", effective_weight(conv).flatten(1).to_sparse_csr())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height, width)."""
        patches = F.unfold(x, self.kernel_size, padding=self.padding)
        product = self.matrix @ patches.transpose(0, 1).reshape(patches.shape[1], -1)
        product = product if self.bias is None else product + self.bias[:, None]
        return product.view(len(product), len(x), *x.shape[2:]).transpose(0, 1)


@torch.no_grad()
def effective_weight(conv: nn.Conv2d) -> Tensor:
    """The weight a convolution works with in eval mode: divided by sigma where it is spectrally normalised."""
    return normalized(conv.weight, conv.left, False) if isinstance(conv, SNConv2d) else conv.weight.detach()


@torch.no_grad()
def compact(generator: Generator) -> Generator:
    """A copy for inference, without the hidden channels of its blocks that are dead: the same function to rounding.

    A channel that no weight of conv2 reads is cut. One that no weight of conv1 writes is constant: it is cut too, and
    what it adds becomes a fixed map, which keeps the zero padding exact; not where batch norm depends on the class.
    """
    small = copy.deepcopy(generator).eval().requires_grad_(False)
    for number, block in enumerate(small.blocks):
        assert isinstance(block, GeneratorBlock)
        side = 2 * BASE << number
        first, second = effective_weight(block.conv1), effective_weight(block.conv2)
        read = (second != 0).transpose(0, 1).flatten(1).any(1)
        written = (first != 0).flatten(1).any(1)
        live = read & written if not generator.classes else read
        live[0] |= ~live.any()  # a block without any keeps one
        constant = read & ~live
        bias = first.new_zeros(len(first)) if block.conv1.bias is None else block.conv1.bias
        values = torch.where(written, 0.0, bias).view(1, -1, 1, 1)
        offset = first.new_zeros(1, len(second), side, side)
        if constant.any():
            levels = F.relu(block.norm2(values))[:, constant].expand(-1, -1, side, side)
            offset = F.conv2d(levels, second[:, constant], padding=1)
        block.conv1 = _convolution(nn.Conv2d, first[live], bias[live])
        block.norm2 = _selected(block.norm2, live)
        block.conv2 = _convolution(OffsetConv2d, second[:, live], block.conv2.bias)
        block.conv2.register_buffer("offset", offset)
        block.shortcut = _convolution(nn.Conv2d, effective_weight(block.shortcut), block.shortcut.bias)
    small.output = _convolution(nn.Conv2d, effective_weight(small.output), small.output.bias)
    return small


def with_csr_kernels(generator: Generator) -> Generator:
    """A copy for inference whose convolutions multiply by sparse matrices."""
    copied = copy.deepcopy(generator).eval().requires_grad_(False)
    for name, conv in [(n, m) for n, m in copied.named_modules() if isinstance(m, nn.Conv2d)]:
        parent, _, leaf = name.rpartition(".")
        setattr(copied.get_submodule(parent), leaf, CSRConv2d(conv))
    return copied


def _convolution(kind: type[nn.Conv2d], weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    outputs, inputs, side, _ = weight.shape
    conv = kind(inputs, outputs, side, padding=side // 2, bias=bias is not None).to(weight).requires_grad_(False)
    conv.weight.copy_(weight)
    if bias is not None and conv.bias is not None:
        conv.bias.copy_(bias)
    return conv


def _selected(norm: BatchNorm, live: Tensor) -> BatchNorm:
    """The batch norm of the live channels only."""
    classes = 0 if norm.gain is None else norm.gain.num_embeddings
    small = BatchNorm(int(live.sum()), classes).to(norm.norm.running_mean).eval().requires_grad_(False)
    state = {key: value if value.ndim == 0 else value[..., live] for key, value in norm.state_dict().items()}
    small.load_state_dict(state)
    return small
