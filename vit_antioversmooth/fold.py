"""Folding trained scales into plain weights for inference: no scale parameter, no hook, hardly any extra work.

With w = omega of each channel's head, xbar and ybar means over tokens and y = the projected heads' outputs:

    y_i = Wo diag(1 + w) o_i + bo - Wo (w (Wv xbar + bv))        AttnScale
    y'_i = (1 + t) y_i + (s - t) ybar                            FeatScale

Wo diag(1 + w) and bo - Wo (w bv) go into the projection; what is left are two token means, one d x d matrix-vector
product an image and one pass over the output. Scaling Wo's columns instead of Wv's rows also serves grouped values.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from vit_antioversmooth.attentions import (
    block_of,
    find_attentions,
    mask_positions,
    refuse_masks,
    require_bare_projection,
    value_projection,
)
from vit_antioversmooth.attnscale import by_channel
from vit_antioversmooth.featscale import featscale
from vit_antioversmooth.scales import remove_scales


class FoldedAttention(nn.Module):
    """An attention with its scales folded: `attention` (projection already changed), then one pass over its output."""

    mean_map: Tensor | None
    s: Tensor | None
    t: Tensor | None

    def __init__(self, attention: nn.Module, mean_map: Tensor | None, prefix: int) -> None:
        super().__init__()
        self.attention = attention
        self.register_buffer("mean_map", mean_map)  # Wo diag(w) Wv, (dim, dim)
        self.register_buffer("s", None)
        self.register_buffer("t", None)
        self.prefix = self.mean_prefix = prefix
        self.masks = mask_positions(attention)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The scaled attention's output, (batch, tokens, dim). Raises ValueError for a mask or a causal call."""
        refuse_masks(self.masks, (x, *args), kwargs)
        y = self.attention(x, *args, **kwargs)
        shift = None if self.mean_map is None else F.linear(x[:, self.prefix :].mean(1, keepdim=True), self.mean_map)
        if self.s is None or self.t is None:
            return y if shift is None else y.sub_(shift)
        s, t = self.s.to(y.dtype), self.t.to(y.dtype)
        constant = (s - t) * y[:, self.mean_prefix :].mean(1, keepdim=True)
        if shift is not None:
            constant = constant - (1 + s) * shift
        return torch.addcmul(constant, y, 1 + t)


class FoldedFeatScale(nn.Module):
    """FeatScale with fixed scales in the place of Swin's drop-path, which does nothing in eval mode."""

    s: Tensor
    t: Tensor

    def __init__(self, s: Tensor, t: Tensor) -> None:
        super().__init__()
        self.register_buffer("s", s)
        self.register_buffer("t", t)

    def forward(self, y: Tensor) -> Tensor:
        """`featscale` of y, (batch, height, width, dim)."""
        return featscale(y, self.s, self.t)


@torch.no_grad()
def fold_(model: nn.Module) -> nn.Module:
    """Fold all scales of `model` into its weights, in place; outputs stay equal up to rounding. For inference only.

    Returns:
        `model`.

    Raises:
        ValueError: in train mode, for a model folded already or without scales, for the frequency-blind control of
            AttnScale and where a norm or a gate between heads and projection does not commute with the scales.
    """
    if there := [
        name for name, module in model.named_modules() if isinstance(module, FoldedAttention | FoldedFeatScale)
    ]:
        raise ValueError(f"model must not be folded already, got {there[0]} folded")
    if model.training:
        raise ValueError("model must be in eval mode to be folded, got train mode")
    attentions: dict[str, Any] = dict(find_attentions(model))
    scales: dict[str, tuple[Any, Any]] = {}
    for name, attention in attentions.items():
        attnscale = getattr(attention, "attnscale", None)
        scales[name] = attnscale, getattr(block_of(model, name), "featscale", None)
        if attnscale is None:
            continue
        if attnscale.blind:
            raise ValueError(f"{name} must have AttnScale to be folded, got its frequency-blind control")
        require_bare_projection(name, attention)
    if not any(scale is not None for pair in scales.values() for scale in pair):
        raise ValueError("model must have AttnScale or FeatScale to be folded, got none")
    folded = {name: _folded(attentions[name], *pair) for name, pair in scales.items() if pair != (None, None)}
    remove_scales(model)
    for name, module in folded.items():
        block: Any = block_of(model, name)
        _, feat = scales[name]
        if isinstance(attentions[name], WindowAttention) and feat is not None:
            block.drop_path1 = FoldedFeatScale(feat.s.detach().clone(), feat.t.detach().clone())
        if module.mean_map is not None or module.s is not None:
            setattr(block, name.rpartition(".")[2], module)
    return model


def _folded(attention: Any, attnscale: Any, feat: Any) -> FoldedAttention:
    """`attention` with `attnscale` folded into its projection, and what remains around it."""
    mean_map = None
    if attnscale is not None:
        out, (value, value_bias) = attention.proj, value_projection(attention)
        groups = getattr(attention, "num_kv_groups", 1)
        if groups > 1:
            heads = value.unflatten(0, (-1, attention.head_dim))
            value = heads.repeat_interleave(groups, dim=0).flatten(0, 1)
            if value_bias is not None:
                value_bias = value_bias.unflatten(0, (-1, attention.head_dim)).repeat_interleave(groups, 0).flatten()
        scaled = out.weight * by_channel(attnscale.omega, out.in_features)
        mean_map = scaled @ value
        weight, bias = out.weight + scaled, torch.zeros_like(out.weight[:, 0]) if out.bias is None else out.bias
        if value_bias is not None:
            bias = bias - scaled @ value_bias
        out.weight, out.bias = (nn.Parameter(tensor.clone(), out.weight.requires_grad) for tensor in (weight, bias))
    folded = FoldedAttention(attention, mean_map, attnscale.prefix if attnscale is not None else 0)
    if feat is not None and not isinstance(attention, WindowAttention):  # windows: the mean is over the image
        folded.s, folded.t, folded.mean_prefix = feat.s.detach().clone(), feat.t.detach().clone(), feat.prefix
    return folded.eval()
