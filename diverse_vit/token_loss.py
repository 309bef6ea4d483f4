"""Cross-entropy of every token against its own mixed label, without one-hot targets (spec c.1.1, h).

A target has two classes and uniform smoothing, so a token costs logsumexp(z) - eps mean(z) - (1 - eps) (w z_y1 +
(1 - w) z_y2): two gathers. Class token and patches count alike: the mean over all 1 + n tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diverse_vit.cosines import full
from diverse_vit.patch_mixup import MixedBatch


def image_cross_entropy(logits: Tensor, mixed: MixedBatch, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy of logits (batch, K) against lam y1 + (1 - lam) y2, smoothed, the mean over images."""
    return soft_cross_entropy(logits[:, None], mixed.y1, mixed.y2, _image_weight(mixed), smoothing)


def token_cross_entropy(token_logits: Tensor, mixed: MixedBatch, smoothing: float = 0.1) -> Tensor:
    """The mean of the class token's and all patches' cross-entropies.

    Args:
        token_logits: (batch, 1 + n, K), the class token first.
        mixed: the labels; the class token has weight `lam`, patch i `patch_weight[i]`.
        smoothing: share of the target spread over all K classes.

    Raises:
        ValueError: where the number of patches or of images differs.
    """
    _check(token_logits, mixed)
    return soft_cross_entropy(token_logits, mixed.y1, mixed.y2, _weights(mixed), smoothing)


def fused_token_cross_entropy(
    tokens: Tensor, head: nn.Linear, mixed: MixedBatch, smoothing: float = 0.1, chunk: int = 64
) -> Tensor:
    """`token_cross_entropy(head(tokens), ...)` with the logits of at most `chunk` tokens an image at a time.

    Gradients are made in the forward pass, chunk by chunk, so that logits are neither kept nor computed twice.

    Args:
        tokens: normalised, (batch, 1 + n, d), the class token first.
        head: from d to K.
        mixed, smoothing: as for `token_cross_entropy`.
        chunk: tokens of each image at a time.

    Returns:
        A scalar; differentiable once.
    """
    _check(tokens, mixed)
    return linear_cross_entropy(tokens, head, mixed.y1, mixed.y2, _weights(mixed), smoothing, chunk)


def soft_cross_entropy(z: Tensor, y1: Tensor, y2: Tensor, weight: Tensor, smoothing: float) -> Tensor:
    """Mean over images and tokens of the cross-entropy against weight y1 + (1 - weight) y2, smoothed.

    Args:
        z: logits, (batch, t, K).
        y1, y2: labels, (batch,).
        weight: of y1 by token, (t,).
        smoothing: in [0, 1).
    """
    z = full(z)
    first, second = (z.gather(2, y[:, None, None].expand(-1, z.shape[1], 1)).squeeze(2) for y in (y1, y2))
    hit = torch.lerp(second, first, weight.to(z))
    return (z.logsumexp(2) - smoothing * z.mean(2) - (1 - smoothing) * hit).mean()


def linear_cross_entropy(
    tokens: Tensor, head: nn.Linear, y1: Tensor, y2: Tensor, weight: Tensor, smoothing: float, chunk: int
) -> Tensor:
    """`soft_cross_entropy(head(tokens), ...)`, chunk by chunk; see `fused_token_cross_entropy`."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    return _LinearCrossEntropy.apply(tokens, head.weight, head.bias, y1, y2, weight, smoothing, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        y1: Tensor,
        y2: Tensor,
        weight: Tensor,
        smoothing: float,
        chunk: int,
    ) -> Tensor:
        count, classes = tokens.shape[0] * tokens.shape[1], matrix.shape[0]
        needs = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=full(tokens).dtype, device=tokens.device)
        d_tokens = torch.empty_like(tokens) if needs else None
        d_matrix = torch.zeros_like(matrix, dtype=total.dtype) if needs else None
        d_bias = torch.zeros(classes, dtype=total.dtype, device=tokens.device) if needs and bias is not None else None
        for start in range(0, tokens.shape[1], chunk):
            part, share = tokens[:, start : start + chunk], weight[start : start + chunk].to(total)
            logits = nn.functional.linear(part, matrix, bias)
            z = full(logits)
            total = total + soft_cross_entropy(z, y1, y2, share, smoothing) * (z.shape[0] * z.shape[1] / count)
            if d_tokens is None or d_matrix is None:
                continue
            step = z.softmax(2).sub_(smoothing / classes)
            for y, own in ((y1, share), (y2, 1 - share)):
                index = y[:, None, None].expand(-1, step.shape[1], 1)
                step.scatter_add_(2, index, ((smoothing - 1) * own)[None, :, None].expand_as(index))
            low = logits.dtype
            wide = torch.float32 if low == torch.float16 else low  # a sum over all tokens overflows float16
            with torch.autocast(tokens.device.type, enabled=False):
                d_tokens[:, start : start + chunk] = step.to(low) @ matrix.to(low)
                d_matrix += step.flatten(0, 1).to(wide).mT @ part.flatten(0, 1).to(wide)
            if d_bias is not None:
                d_bias += step.sum((0, 1))
        ctx.save_for_backward(d_tokens, d_matrix, d_bias)
        ctx.count = count
        ctx.dtypes = matrix.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_tokens, d_matrix, d_bias = ctx.saved_tensors
        kind, bias_kind = ctx.dtypes
        gradient = gradient / ctx.count  # not before: a token's share alone is too small for float16
        own_bias = None if d_bias is None else (gradient * d_bias).to(bias_kind)
        return (gradient * d_tokens).to(d_tokens.dtype), (gradient * d_matrix).to(kind), own_bias, *[None] * 5


def _weights(mixed: MixedBatch) -> Tensor:
    """Of y1 by token: the class token's, then the patches', (1 + n,)."""
    return torch.cat([_image_weight(mixed), mixed.patch_weight])


def _image_weight(mixed: MixedBatch) -> Tensor:
    return mixed.patch_weight.new_full((1,), mixed.lam)


def _check(tokens: Tensor, mixed: MixedBatch) -> None:
    batch, count = len(mixed.y1), 1 + len(mixed.patch_weight)
    if tokens.shape[:2] != (batch, count):
        raise ValueError(
            f"tokens must be {batch} images of {count}, got {tuple(tokens.shape[:2])}: is patch_size right?"
        )
