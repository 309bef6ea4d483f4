"""FeatScale: rescale the token mean and the rest of every attention block's output, channel by channel.

    y' = y + s DC[y] + t HC[y] = (1 + t) y + (s - t) mean(y)

on y = the attention's output after its projection, before LayerScale, drop-path and the residual sum; the mean is over
all tokens of the image.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from vit_antioversmooth.attentions import (
    Masks,
    block_of,
    find_attentions,
    mask_positions,
    prefix_tokens,
    refuse_masks,
)


def featscale(y: Tensor, s: Tensor, t: Tensor, prefix: int = 0) -> Tensor:
    """(1 + t) y + (s - t) mean(y), in one pass.

    Args:
        y: (batch, tokens..., dim); every axis between the first and the last counts as tokens.
        s: scale of the mean (DC) part, (dim,) or (1,); cast to y's dtype.
        t: scale of the rest (HC), likewise.
        prefix: leading tokens that do not enter the mean (only for one token axis).

    Returns:
        Shape and dtype of `y`; equal to `y` bit for bit where s and t are 0.
    """
    s, t = s.to(y.dtype), t.to(y.dtype)
    mean = (y[:, prefix:] if prefix else y).mean(tuple(range(1, y.ndim - 1)), keepdim=True)
    return torch.addcmul((s - t) * mean, y, 1 + t)


class FeatScale(nn.Module):
    """s and t of one block, and the hook that applies them (a bound method, so that deep copies use their own)."""

    def __init__(self, dim: int, init: tuple[float, float], *, prefix: int, masks: Masks) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.full((dim,), float(init[0])))
        self.t = nn.Parameter(torch.full((dim,), float(init[1])))
        self.prefix, self.masks = prefix, masks
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def forward(self, y: Tensor) -> Tensor:
        """`featscale` of the attention's output y (batch, tokens..., dim)."""
        return featscale(y, self.s, self.t, self.prefix)

    def scale_output(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """Forward hook of the attention."""
        refuse_masks(self.masks, args, kwargs)
        return self(y)

    def scale_input(self, drop_path: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Pre-hook of Swin's drop-path, the first place where the windows are an image again."""
        return (self(args[0]), *args[1:])


def apply_featscale(
    model: nn.Module,
    *,
    layers: Sequence[int] | None = None,
    init: tuple[float, float] = (0.0, 0.0),
    include_prefix: bool = True,
    per_channel: bool = True,
    tied: bool = False,
) -> list[str]:
    """Put FeatScale into the blocks of `model`, in place, as `<block>.featscale.s` and `.t`.

    With init (0, 0) the model's outputs stay equal bit for bit. Order as in `apply_attnscale`. The correction counts
    once, as the paper defines it (the released DeiT code adds it twice; see `load_released`).

    Args:
        model: holds timm attention modules.
        layers: which of them, by position; None takes all.
        init: of (s, t).
        include_prefix: whether class, distillation and register tokens enter the mean, as in the authors' code.
        per_channel: False learns one s and one t a layer.
        tied: the frequency-blind control s = t, a mere gain.

    Returns:
        Dotted names of the attention modules whose outputs are now scaled.

    Raises:
        RuntimeError, TypeError, ValueError, IndexError: as `apply_attnscale`; TypeError also where `init` is no pair.
    """
    try:
        two_finite = len(init) == 2 and all(map(math.isfinite, init))
    except TypeError:
        raise TypeError(f"init must be two finite numbers, (s, t), got {init!r}") from None
    if not two_finite:
        raise ValueError(f"init must be two finite numbers, (s, t), got {init}")
    if tied and init[0] != init[1]:
        raise ValueError(f"init must be two equal numbers where s and t are tied, got {init}")
    attentions: dict[str, Any] = dict(find_attentions(model, layers))
    blocks: dict[str, Any] = {name: block_of(model, name) for name in attentions}
    for name, block in blocks.items():
        if hasattr(block, "featscale"):
            raise RuntimeError(f"{name} has FeatScale already; remove_scales(model) first")
        if isinstance(block, nn.Sequential) or (
            isinstance(attentions[name], WindowAttention) and not hasattr(block, "drop_path1")
        ):
            raise TypeError(f"{name} must lie in a transformer block, got {type(block).__name__}")
    for name, attention in attentions.items():
        prefix = 0 if include_prefix else prefix_tokens(model, name)
        dim = attention.proj.out_features if per_channel else 1
        scale = FeatScale(dim, init, prefix=prefix, masks=mask_positions(attention))
        scale.to(attention.proj.weight)
        if tied:
            scale.t = scale.s
        block = blocks[name]
        block.featscale = scale
        if isinstance(attention, WindowAttention):
            scale.handles = [block.drop_path1.register_forward_pre_hook(scale.scale_input)]
        else:
            scale.handles = [attention.register_forward_hook(scale.scale_output, with_kwargs=True)]
    return list(attentions)
