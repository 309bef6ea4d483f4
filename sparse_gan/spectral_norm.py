"""Spectrally normalised layers whose parameter stays `weight`, so that masks find it (Miyato et al. 2018).

sigma belongs to the weight as it is, masked: mask first, then normalise. A layer that is zero altogether is left as it
is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-8


def normalized(weight: Tensor, left: Tensor, update: bool) -> Tensor:
    """weight / sigma, sigma = u^T W v after one power iteration from `left`; gradients flow through sigma too.

    Args:
        weight: (out, ...), seen as a matrix W with one row an output.
        left: the running left singular vector u, (out,).
        update: keep the new u in `left`.
    """
    matrix = weight.flatten(1)
    with torch.no_grad():
        right = F.normalize(matrix.T @ left, dim=0, eps=EPS)
        new = F.normalize(matrix @ right, dim=0, eps=EPS)
        if update:
            left.copy_(new)
    sigma = new.dot(matrix @ right)
    return weight / torch.where(sigma > EPS, sigma, 1.0)


def _singular_vector(size: int) -> Tensor:
    return F.normalize(torch.randn(size), dim=0)


class SNConv2d(nn.Conv2d):
    """`nn.Conv2d` with weight / sigma."""

    left: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int = 0) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=padding)
        self.register_buffer("left", _singular_vector(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height, width)."""
        return self._conv_forward(x, normalized(self.weight, self.left, self.training), self.bias)


class SNPooledConv2d(SNConv2d):
    """`SNConv2d` of 3x3 and a 2x2 mean-pooling behind it, as one 4x4 convolution of stride 2: 4/9 of the work."""

    pooling = 4  # each weight works at so many positions for one output

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height / 2, width / 2)."""
        padded = F.pad(normalized(self.weight, self.left, self.training), (1, 1, 1, 1))
        rows = padded[..., 1:, :] + padded[..., :-1, :]
        kernel = (rows[..., 1:] + rows[..., :-1]) / 4
        return F.conv2d(x, kernel, self.bias, stride=2, padding=1)


class SNLinear(nn.Linear):
    """`nn.Linear` with weight / sigma."""

    left: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("left", _singular_vector(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in) -> (batch, out)."""
        return F.linear(x, normalized(self.weight, self.left, self.training), self.bias)


class SNEmbedding(nn.Embedding):
    """`nn.Embedding` with weight / sigma."""

    left: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.register_buffer("left", _singular_vector(num_embeddings))

    def forward(self, labels: Tensor) -> Tensor:
        """(batch,) -> (batch, dim)."""
        return F.embedding(labels, normalized(self.weight, self.left, self.training))
