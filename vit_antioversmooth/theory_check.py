"""The paper's theorems checked on a real network: every map, every block, every image (claims C1 and C2)."""

import copy
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from vit_antioversmooth.attentions import block_of, find_attentions, value_projection
from vit_antioversmooth.bounds import bound_bd, bound_colsum, ffn_bound, logit_spread, mhsa_bound, rho
from vit_antioversmooth.frequency import hc, lowpass_curve
from vit_antioversmooth.maps import attention_maps

SLACK = 1e-5  # relative
ROUNDING = 1e-12  # of a quantity's size: HC below that is rounding, as in a network whose tokens have collapsed


@torch.no_grad()
def lowpass_share(model: nn.Module, images: Tensor, steps: int = 32) -> tuple[int, int, list[list[float]]]:
    """Low-pass theorem: does HC/DC of A^t z vanish, for every softmax map A of `model` and a random z?

    A map counts as low-pass where the ratio after `steps` applications is below 1e-3 of that after one, or below
    10 |lambda_2|^(steps - 1) of it, or 0, as for uniform maps. Maps with |pi^T z| < 1e-6 are skipped (c.1).

    Args:
        model: timm ViT without head mixing; in eval mode.
        images: its inputs.
        steps: applications; a z almost orthogonal to the map's stationary distribution decays later than that.

    Returns:
        Low-pass maps, maps judged, and by layer the mean curve of log10 of the ratio.
    """
    held, judged, curves = 0, 0, []

    def look(layer: int, softmax: Tensor, _: Tensor) -> None:
        nonlocal held, judged
        maps = softmax.double().flatten(0, 1).cpu()
        z = torch.randn(maps.shape[-1], 1, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
        curve = lowpass_curve(maps, z.expand(len(maps), -1, 1), steps)
        stationary = torch.linalg.matrix_power(maps, 1024)[:, 0] @ z
        decay = curve[:, -1] / curve[:, 0]
        second = torch.linalg.eigvals(maps).abs().sort(-1).values[:, -2]
        vanished = (decay < 1e-3) | (decay < 10 * second ** (steps - 1)) | (curve[:, -1] == 0)
        counts = stationary.abs().squeeze(-1) >= 1e-6
        held += int(vanished[counts].sum())
        judged += int(counts.sum())
        curves.append(curve[counts].clamp_min(1e-300).log10().mean(0).tolist())

    with attention_maps(model, look):
        model(images)
    return held, judged, curves


def bounds_apply(model: nn.Module) -> bool:
    """Whether `bound_violations` knows all of `model`: bare projections, and MLPs of two layers and an exact GELU."""

    def known(name: str, attention: Any) -> bool:
        mlp: Any = getattr(block_of(model, name), "mlp", None)
        bare = isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity) and not getattr(
            attention, "gate", None
        )
        two_layers = type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity)
        return bare and two_layers and type(mlp.act) is nn.GELU and mlp.act.approximate == "none"

    return all(known(*pair) for pair in find_attentions(model).items())


@torch.no_grad()
def bound_violations(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Count, over all layers, heads and images, where a measured HC factor exceeds its bound by more than 1e-5 of it.

    Args:
        model: timm VisionTransformer to which `bounds_apply`, with or without AttnScale, without FeatScale; any mode (a
            float64 copy in eval mode is measured).
        images: its inputs.

    Returns:
        `violations` and `checked` (of maps: rho against both bounds from logits; of blocks: attention with and without
        its skip, feed-forward), `tightest`, the largest measured part of a bound, and means of `map_rho`,
        `weights` (||Wo_h Wv_h|| over heads) and the two bounds from logits.
    """
    model = copy.deepcopy(model).double().eval()
    maps: dict[int, Tensor] = {}
    seen: dict[str, list[Any]] = {}
    handles = []
    names = list(find_attentions(model))
    for layer, name in enumerate(names):
        block: Any = block_of(model, name)
        for part, module in (("attention", model.get_submodule(name)), ("ffn", block.mlp), ("block", block)):

            def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, key: str = f"{part}{layer}") -> None:
                seen[key] = [args[0], output]

            handles.append(module.register_forward_hook(keep))
    totals = {"violations": 0.0, "checked": 0.0, "tightest": 0.0}
    means: dict[str, list[float]] = {"map_rho": [], "weights": [], "bound_colsum": [], "bound_bd": []}

    def check(measured: Tensor, bound: Tensor, size: Tensor | float) -> None:
        measured = torch.where(measured <= ROUNDING * size, 0, measured)
        totals["violations"] += int((measured > bound * (1 + SLACK)).sum())
        totals["checked"] += measured.numel()
        totals["tightest"] = max(totals["tightest"], (measured / bound.clamp_min(1e-200)).max().item())

    def look(layer: int, softmax: Tensor, effective: Tensor) -> None:
        alpha, keys = logit_spread(softmax), softmax.shape[-1]
        factor, columns, spread = rho(softmax), bound_colsum(alpha, keys), bound_bd(alpha, keys)
        check(factor, torch.minimum(columns, spread), 1.0)
        for name, values in (("map_rho", factor), ("bound_colsum", columns), ("bound_bd", spread)):
            means[name].append(values.mean().item())
        maps[layer] = effective

    try:
        with attention_maps(model, look):
            model(images.double())
    finally:
        for handle in handles:
            handle.remove()
    for layer, name in enumerate(names):
        attention: Any = model.get_submodule(name)
        value, _ = value_projection(attention)
        weights = mhsa_bound(torch.ones(attention.num_heads).to(value), value, attention.proj.weight)
        means["weights"].append(weights.item() / attention.num_heads)
        factor = mhsa_bound(rho(maps[layer], 300), value, attention.proj.weight)
        (x, y), (block_in, _) = seen[f"attention{layer}"], seen[f"block{layer}"]
        norm = torch.linalg.matrix_norm
        check(norm(hc(y)), factor * norm(hc(x)), norm(y))
        check(norm(hc(block_in + y)), norm(hc(block_in)) + factor * norm(hc(x)), norm(block_in + y))
        u, v = seen[f"ffn{layer}"]
        mlp: Any = block_of(model, name)
        check(norm(hc(v)), ffn_bound(mlp.mlp.fc1.weight, mlp.mlp.fc2.weight) * norm(hc(u)), norm(v))
    return {**totals, **{name: sum(values) / len(values) for name, values in means.items()}}
