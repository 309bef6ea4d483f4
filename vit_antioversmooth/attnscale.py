"""AttnScale: rescale the high-frequency part of every attention map by 1 + omega, one omega a head.

    A_hat = 11^T/N + (1 + omega) (A - 11^T/N)

Attention is linear in V and the rows of 11^T/N V all equal the mean value, so the map is never needed:
A_hat V = (1 + omega) A V - omega mean(V), with A V from fused attention and mean(V) = mean(x) Wv^T + bv.

With o = A V of all heads side by side and w = omega of each channel's head, the projection Wo can also take the gain:
Wo ((1 + w) o - w mean(V)) = (Wo diag(1 + w)) o - Wo (w mean(V)), which keeps no scaled copy of o for backward.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_antioversmooth.attentions import (
    Masks,
    find_attentions,
    mask_positions,
    prefix_tokens,
    refuse_masks,
    require_bare_projection,
    value_projection,
)

MODES = ("auto", "folded", "reference")


def attnscale_reference(attn_map: Tensor, omega: Tensor, prefix: int = 0) -> Tensor:
    """A_hat by its definition.

    Args:
        attn_map: A, (batch, heads, queries, keys).
        omega: (heads,), or (1,) for all heads.
        prefix: leading keys without a share in the DC part.

    Returns:
        A_hat, as `attn_map`. Rows that sum to 1 still do; entries may be negative.
    """
    keys = attn_map.shape[-1]
    direct = attn_map.new_full((keys,), 1 / (keys - prefix))
    direct[:prefix] = 0
    return direct + (1 + omega.to(attn_map.dtype).view(-1, 1, 1)) * (attn_map - direct)


def attnscale_combine(o: Tensor, v_mean: Tensor, omega: Tensor) -> Tensor:
    """(1 + omega) o - omega v_mean: the heads' outputs under A_hat from those under A, in one pass.

    Args:
        o: A V of all heads side by side, (batch, tokens, heads * head_dim).
        v_mean: mean value, (batch, 1, heads * head_dim).
        omega: (heads,), or (1,) for all heads; cast to o's dtype.

    Returns:
        A_hat V, shape and dtype of `o`; equal to `o` bit for bit where omega is 0.
    """
    w = by_channel(omega.to(o.dtype), o.shape[-1])
    return torch.addcmul(-w * v_mean.to(o.dtype), o, 1 + w)


def by_channel(omega: Tensor, channels: int) -> Tensor:
    """w: the omega of each channel's head, (channels,)."""
    return omega.repeat_interleave(channels // len(omega))


class GainedLinear(nn.Linear):
    """The projection of an attention in mode "folded": the Linear it was, with AttnScale inside."""

    def forward(self, o: Tensor, w: Tensor, v_mean: Tensor) -> Tensor:  # type: ignore[override]
        """Wo ((1 + w) o - w v_mean) + bo; o (batch, tokens, channels), w (channels,), v_mean (batch, 1, channels)."""
        y = F.linear(o, self.weight * (1 + w), self.bias)
        return y.sub_(F.linear(w * v_mean, self.weight))


class AttnScale(nn.Module):
    """omega of one attention module, and the two hooks that apply it.

    The hooks are bound methods: a deep copy of the model (EMA) rebinds them to its own omega, which closures would not.
    """

    def __init__(self, heads: int, init: float, *, prefix: int, blind: bool, masks: Masks) -> None:
        super().__init__()
        self.omega = nn.Parameter(torch.full((heads,), float(init)))
        self.prefix, self.blind, self.masks = prefix, blind, masks
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.fused_before: bool | None = None  # in reference mode, what `fused_attn` was
        self._v_mean: Tensor | None = None  # lives from the attention's first line to its last but one

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_v_mean": None}  # left there by a forward that failed; it cannot be copied

    def edit(self, attn_map: Tensor) -> Tensor:
        """The map that takes the place of `attn_map` (batch, heads, queries, keys)."""
        if self.blind:
            return (1 + self.omega.to(attn_map.dtype).view(-1, 1, 1)) * attn_map
        return attnscale_reference(attn_map, self.omega, self.prefix)

    def average_values(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the attention: mean(V) from its input."""
        refuse_masks(self.masks, args, kwargs)
        x = args[0] if args else kwargs["x"]
        v_mean = F.linear(x[:, self.prefix :].mean(1, keepdim=True), *value_projection(attention))
        groups = getattr(attention, "num_kv_groups", 1)
        if groups > 1:
            v_mean = v_mean.unflatten(-1, (-1, attention.head_dim)).repeat_interleave(groups, dim=-2).flatten(-2)
        self._v_mean = torch.zeros_like(v_mean) if self.blind else v_mean  # blind: nothing is put back

    def mix(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Pre-hook of what follows the heads: A V becomes A_hat V."""
        return (attnscale_combine(args[0], self._take_v_mean(), self.omega), *args[1:])

    def hand_on(self, projection: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Pre-hook of a `GainedLinear`: what it needs beside A V."""
        return (args[0], by_channel(self.omega, args[0].shape[-1]), self._take_v_mean())

    def _take_v_mean(self) -> Tensor:
        if self._v_mean is None:
            raise RuntimeError(
                "one forward at a time: AttnScale hands mean(V) on inside the model, after fold_ no more"
            )
        v_mean, self._v_mean = self._v_mean, None
        return v_mean

    def check_call(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the attention in reference mode."""
        refuse_masks(self.masks, args, kwargs)

    def edit_map(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Pre-hook of the attention dropout in reference mode: A becomes A_hat."""
        return (self.edit(args[0]), *args[1:])


def apply_attnscale(
    model: nn.Module,
    *,
    layers: Sequence[int] | None = None,
    init: float = 0.0,
    include_prefix: bool = True,
    mode: Literal["auto", "folded", "reference"] = "auto",
    share: Literal["none", "heads", "layers"] = "none",
    blind: bool = False,
) -> list[str]:
    """Put AttnScale into the attention modules of `model`, in place, as `<attention>.attnscale.omega`.

    With init 0 the model's outputs stay equal bit for bit. Order: apply, then optimiser, EMA and DDP, torch.compile
    last. torch.jit.script does not know such hooks. With attention dropout the fused form drops entries of A, the
    authors' form entries of A_hat: equal in expectation.

    Args:
        model: holds timm attention modules.
        layers: which of them, by position; None takes all.
        init: of omega.
        include_prefix: whether class, distillation and register tokens count among the N keys, as in the authors' code.
        mode: "auto" keeps fused attention; so does "folded", which puts the gain into the projection's weight: the same
            training up to rounding with fewer bytes kept for backward; "reference" edits the map itself, for tests.
        share: "heads" learns one omega a layer, "layers" one a head for all layers.
        blind: the frequency-blind control (1 + omega) A, which scales DC as well.

    Returns:
        Dotted names of the attention modules now scaled.

    Raises:
        RuntimeError, TypeError, ValueError, IndexError: see `find_attentions`; RuntimeError also where a scale is there
            already, ValueError also where `init` is not finite, `mode` or `share` unknown, or mode "folded" meets a
            norm or a gate between heads and projection, or a projection that is no mere Linear.
    """
    if not math.isfinite(init):
        raise ValueError(f"init must be finite, got {init}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if share not in ("none", "heads", "layers"):
        raise ValueError(f"share must be none, heads or layers, got {share!r}")
    attentions: dict[str, Any] = dict(find_attentions(model, layers))
    if there := [name for name, attention in attentions.items() if hasattr(attention, "attnscale")]:
        raise RuntimeError(f"{there[0]} has AttnScale already; remove_scales(model) first")
    if share == "layers" and len({attention.num_heads for attention in attentions.values()}) > 1:
        raise ValueError("share must not be layers in a model whose layers differ in their number of heads")
    if mode == "folded":
        for name, attention in attentions.items():
            require_bare_projection(name, attention)
            if type(attention.proj) is not nn.Linear:
                raise ValueError(f"{name} must have a Linear as projection, got {type(attention.proj).__name__}")
    shared: nn.Parameter | None = None
    for name, attention in attentions.items():
        prefix = 0 if include_prefix else prefix_tokens(model, name)
        heads = 1 if share == "heads" else attention.num_heads
        scale = AttnScale(heads, init, prefix=prefix, blind=blind, masks=mask_positions(attention))
        scale.to(attention.proj.weight)
        if share == "layers":
            shared = scale.omega = scale.omega if shared is None else shared
        attention.attnscale = scale
        _hook(attention, scale, mode)
    return list(attentions)


def remove_hooks(attention: Any, scale: AttnScale) -> None:
    """Undo what `apply_attnscale` changed in `attention` besides giving it `scale`."""
    for handle in scale.handles:
        handle.remove()
    if scale.fused_before is not None:
        attention.fused_attn = scale.fused_before
    if isinstance(attention.proj, GainedLinear):
        attention.proj.__class__ = nn.Linear  # type: ignore[assignment]


def _hook(attention: Any, scale: AttnScale, mode: str) -> None:
    pairs: tuple[tuple[nn.Module, Any], tuple[nn.Module, Any]]
    if mode == "reference":
        scale.fused_before = getattr(attention, "fused_attn", None)
        if scale.fused_before is not None:
            attention.fused_attn = False
        pairs = ((attention, scale.check_call), (attention.attn_drop, scale.edit_map))
    elif mode == "folded":
        attention.proj.__class__ = GainedLinear
        pairs = ((attention, scale.average_values), (attention.proj, scale.hand_on))
    else:
        after_heads = attention.norm if hasattr(attention, "norm") else attention.proj
        pairs = ((attention, scale.average_values), (after_heads, scale.mix))
    scale.handles = [
        pairs[0][0].register_forward_pre_hook(pairs[0][1], with_kwargs=True),
        pairs[1][0].register_forward_pre_hook(pairs[1][1]),
    ]
