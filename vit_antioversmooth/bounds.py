"""How fast attention, heads and feed-forward shrink the high-frequency part, and bounds on it (the paper's theory).

All are upper bounds on ||HC[f(X)]||_F / ||HC[X]||_F. They say how large HC can be, not that it shrinks. rho is the
exact factor of one attention map and the measurement; the bounds from logits exceed 1 for realistic trained logits.
"""

import math

import torch
from torch import Tensor

# Largest slope of the exact GELU, at x = sqrt(2): Phi(x) + x phi(x).
GELU_LIPSCHITZ = 0.5 * (1 + math.erf(1)) + math.exp(-1) / math.sqrt(math.pi)


def rho(attention: Tensor, steps: int = 100) -> Tensor:
    """sigma_max((I - J) A): the largest factor by which one application of A scales HC, as A 1 = 1.

    By power iterations on the Gram matrix with matrix-vector products; never a decomposition.

    Args:
        attention: (..., n, n), float32 or float64.
        steps: power iterations, at least 1; the error is at most of the order log(n) / steps, much less with a
            spectral gap.

    Returns:
        (...,), from below.

    Raises:
        ValueError: for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    n = attention.shape[-1]
    start = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(attention)
    vector = (start - start.mean()).expand(*attention.shape[:-2], n, 1)  # constants are mapped to 0
    size = torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
    for _ in range(steps):
        vector = vector / size.clamp_min(torch.finfo(attention.dtype).tiny)
        image = attention @ vector
        image = image - image.mean(-2, keepdim=True)
        vector = attention.mT @ image
        size = torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
    return torch.linalg.vector_norm(image, dim=-2).squeeze(-1)


def logit_spread(attention: Tensor) -> Tensor:
    """alpha = max_i (max_j P_ij - min_j P_ij) / 2 of the logits P behind a softmax map (..., n, n): (...,)."""
    logits = attention.log()
    return ((logits.amax(-1) - logits.amin(-1)) / 2).amax(-1)


def bound_colsum(alpha: Tensor | float, n: int) -> Tensor:
    """rho <= sqrt(n u), u = e^{2 alpha} / (e^{2 alpha} + n - 1) the largest possible entry of an n x n map.

    Rows sum to 1, columns to at most n u. At least 1 always: it proves no decay by itself. Also valid, if weaker, with
    the paper's alpha = max |P_ij|.
    """
    spread = torch.exp(-2 * torch.as_tensor(alpha, dtype=torch.float64))
    return (n / (1 + (n - 1) * spread)).sqrt()


def bound_bd(alpha: Tensor | float, n: int) -> Tensor:
    """rho <= ||A - J||_F <= n sqrt((u - 1/n) (1/n - l)), l = 1 / (1 + (n - 1) e^{2 alpha}) the smallest possible entry.

    The Bhatia-Davis inequality in each row; tends to 0 with alpha.
    """
    growth = torch.exp(2 * torch.as_tensor(alpha, dtype=torch.float64))
    largest, smallest = 1 / (1 + (n - 1) / growth), 1 / (1 + (n - 1) * growth)
    return n * ((largest - 1 / n) * (1 / n - smallest)).clamp_min(0).sqrt()


def mhsa_bound(rhos: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """sum_h rho_h ||Wo_h Wv_h||_2: factor of multi-head attention without skip; with the skip it is 1 plus that.

    Args:
        rhos: of each head's map, (..., heads).
        value: Wv, (heads * head_dim, dim). Biases drop out of HC.
        out: Wo, (dim, heads * head_dim).

    Returns:
        (...,).
    """
    heads = rhos.shape[-1]
    products = torch.einsum("ohk,hki->hoi", out.unflatten(1, (heads, -1)), value.unflatten(0, (heads, -1)))
    return (rhos * torch.linalg.matrix_norm(products, ord=2)).sum(-1)


def ffn_bound(first: Tensor, second: Tensor, lipschitz: float = GELU_LIPSCHITZ) -> Tensor:
    """||W1||_2 ||W2||_2 Lip(activation): factor of the tokenwise feed-forward net, whatever its biases.

    Any Lipschitz map of tokens shrinks HC no less than distances: the mean minimises the sum of squares.

    Args:
        first: W1, (hidden, dim).
        second: W2, (dim, hidden).
        lipschitz: of the activation; exact GELU by default, 1 for ReLU.
    """
    return torch.linalg.matrix_norm(first, ord=2) * torch.linalg.matrix_norm(second, ord=2) * lipschitz
