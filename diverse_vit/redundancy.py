"""How redundant a vision transformer is at the levels of embedding, attention and weight (spec c.3)."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diverse_vit.capture import Capture
from diverse_vit.cosines import cosine, full
from diverse_vit.head_cosine import attention_map
from diverse_vit.timm_parts import attention_of, blocks_of, prefix_tokens, qkv_weights, queries_keys

Batch = Tensor | Sequence[Any]


@torch.no_grad()
def redundancy_report(model: nn.Module, loader: Iterable[Batch], max_images: int = 512) -> dict[str, Any]:
    """Cosines between tokens, heads and layers on clean images in eval mode, and the spectra of the weights.

    Args:
        model: a timm vision transformer or Swin; hooks are attached meanwhile, its mode is restored.
        loader: yields images as the network sees them, (batch, channels, height, width), or tuples that begin so.
        max_images: how many to look at.

    Returns:
        Means over images, by layer:
        `embedding_cosine`, `embedding_cosine_abs` (0: before the first block, ...): different patches of an image;
        `embedding_cross` (from block 1): |cos| of a patch before and after a block, None where tokens are merged;
        `embedding_first_last`: |cos| of a patch between layer 0 and the last, None likewise;
        `head_cosine`: different heads; `head_cross` (from block 2): a head and the same one a block before;
        `head_std`: N times the mean over entries of the standard deviation over heads;
        `weights`: of q, k, v, proj, fc1, fc2 the lists of `spectrum_measures`, by block.

    Raises:
        ValueError: without images; TypeError: for attention of unknown kind.
    """
    blocks, prefix, training = blocks_of(model), prefix_tokens(model), model.training
    attentions = [attention_of(block, layer) for layer, block in enumerate(blocks)]
    watched: dict[str, Any] = {"tokens 0": ("input", blocks[0])}
    for layer, block in enumerate(blocks):
        watched |= {f"tokens {layer + 1}": ("output", block), f"attention {layer}": ("input", block.attn)}
    capture, sums, seen_images = Capture(watched), _Sums(), 0
    capture.attach()
    model.eval()
    try:
        for batch in loader:
            images = (batch if isinstance(batch, Tensor) else batch[0])[: max_images - seen_images]
            if len(images) == 0:
                break
            _, seen = capture.run(model, images)
            tokens = [seen["tokens 0"][0][0], *(seen[f"tokens {layer + 1}"] for layer in range(len(blocks)))]
            _add_embeddings(sums, [full(x.flatten(1, -2)[:, prefix:]) for x in tokens], len(images))
            before = None
            for layer, attention in enumerate(attentions):
                maps = attention_map(*queries_keys(attention, *seen[f"attention {layer}"])).flatten(2)
                _add_heads(sums, layer, maps, before, len(images))
                before = maps
            seen_images += len(images)
    finally:
        capture.detach()
        model.train(training)
    if not seen_images:
        raise ValueError("loader must yield at least one image, got none")
    report = sums.means(seen_images)
    return {**report, "embedding_first_last": report["embedding_first_last"][0], "weights": weight_report(model)}


@torch.no_grad()
def weight_report(model: nn.Module) -> dict[str, dict[str, list[float]]]:
    """`spectrum_measures` of q, k, v, proj, fc1, fc2 by block, for each name as far as the blocks have it."""
    report: dict[str, dict[str, list[float]]] = {}
    for layer, block in enumerate(blocks_of(model)):
        matrices = dict(zip("qkv", [w for stack in qkv_weights(block, layer) for w in stack], strict=True))
        parts = {"proj": (block, "attn"), "fc1": (block, "mlp"), "fc2": (block, "mlp")}
        for name, (owner, part) in parts.items():
            linear = getattr(getattr(owner, part, None), name, None)
            if isinstance(linear, nn.Linear):
                matrices[name] = linear.weight
        for name, matrix in matrices.items():
            for measure, value in spectrum_measures(matrix).items():
                report.setdefault(name, {}).setdefault(measure, []).append(value)
    return report


@torch.no_grad()
def spectrum_measures(matrix: Tensor) -> dict[str, float]:
    """Of a weight matrix (out, in) with rank at most r = min(out, in); 0 everywhere for the zero matrix.

    `rre_25`, `rre_50`: ||W - W_k||_F / ||W||_F of the best approximation of rank 25 and 50 % of r (larger: less
    redundant); `k95`: smallest k / r that keeps 95 % of the squared singular values; `effective_rank`:
    (sum s^2)^2 / sum s^4 / r; `row_cosine`: mean |cos| of different rows.
    """
    matrix = matrix.double()
    energy = torch.linalg.svdvals(matrix).square()
    r, total = len(energy), energy.sum()
    if total == 0:
        return dict.fromkeys(("rre_25", "rre_50", "k95", "effective_rank", "row_cosine"), 0.0)
    kept = energy.cumsum(0) / total
    rest = [energy[max(round(share * r), 1) :].sum() / total for share in (0.25, 0.5)]
    return {
        "rre_25": rest[0].sqrt().item(),
        "rre_50": rest[1].sqrt().item(),
        "k95": (int((kept < 0.95 - 1e-12).sum()) + 1) / r,
        "effective_rank": (total.square() / energy.square().sum() / r).item(),
        "row_cosine": cosine(matrix, absolute=True, diagonal=False).item(),
    }


def spectrum(model: nn.Module) -> list[float]:
    """Singular values of all q, k, v weights over the largest of each, the mean over matrices of the first's shape."""
    stacks = [stack for layer, block in enumerate(blocks_of(model)) for stack in qkv_weights(block, layer)]
    values = [
        torch.linalg.svdvals(stack.detach().double()) for stack in stacks if stack.shape[1:] == stacks[0].shape[1:]
    ]
    shares = torch.cat([value / value[:, :1] for value in values])
    return shares.mean(0).tolist()


def gaussian_rre(shape: tuple[int, int], draws: int = 100) -> float:
    """Mean `rre_25` of Gaussian matrices of that shape: what weights without any structure have."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(draws, *shape, generator=generator, dtype=torch.float64)
    return sum(spectrum_measures(matrix)["rre_25"] for matrix in matrices) / draws


class _Sums:
    """Sums over images of numbers by name and layer."""

    def __init__(self) -> None:
        self.totals: dict[str, dict[int, float]] = {}

    def add(self, name: str, layer: int, mean: Tensor | float, images: int) -> None:
        layers = self.totals.setdefault(name, {})
        layers[layer] = layers.get(layer, 0.0) + float(mean) * images

    def means(self, images: int) -> dict[str, Any]:
        """Lists by layer; None for NaN."""
        return {
            name: [None if math.isnan(total) else total / images for _, total in sorted(layers.items())]
            for name, layers in self.totals.items()
        }


def _add_embeddings(sums: _Sums, layers: list[Tensor], images: int) -> None:
    for layer, tokens in enumerate(layers):
        sums.add("embedding_cosine", layer, cosine(tokens, diagonal=False), images)
        sums.add("embedding_cosine_abs", layer, cosine(tokens, diagonal=False, absolute=True), images)
        if layer:
            sums.add("embedding_cross", layer, _own_cosine(layers[layer - 1], tokens), images)
    sums.add("embedding_first_last", 0, _own_cosine(layers[0], layers[-1]), images)


def _own_cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a, b, dim=-1).abs().mean().item() if a.shape == b.shape else float("nan")


def _add_heads(sums: _Sums, layer: int, maps: Tensor, before: Tensor | None, images: int) -> None:
    """maps: (batch, H, N * N)."""
    tokens = round(maps.shape[2] ** 0.5)
    if maps.shape[1] > 1:
        sums.add("head_cosine", layer, cosine(maps, diagonal=False), images)
        sums.add("head_std", layer, tokens * maps.std(1, correction=0).mean(), images)
    if before is not None and before.shape == maps.shape:
        sums.add("head_cross", layer, F.cosine_similarity(before, maps, dim=-1).mean(), images)
