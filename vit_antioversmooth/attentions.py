"""Which attention modules of a timm model the scales fit, where their values come from, and which are refused.

The scales are exact wherever a head's output is A V with a map A applied to V = x Wv^T + bv; classes that compute
anything else (a difference of maps, channel attention, pooling by a query) are refused by name.
"""

import inspect
import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.cait import Cait, TalkingHeadAttn
from timm.models.eva import EvaAttention
from timm.models.pit import PoolingVisionTransformer
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

SUPPORTED = (
    Attention,
    AttentionRope,
    BeitAttention,
    EvaAttention,
    RelPosAttention,
    TalkingHeadAttn,
    WindowAttention,
)
Masks = tuple[tuple[str, int], ...]  # names and positions of mask arguments
LOOKS_LIKE_ATTENTION = re.compile(r"Attn|Attention|XCA|Parallel\w*Block")


def find_attentions(model: nn.Module, layers: Sequence[int] | None = None) -> dict[str, nn.Module]:
    """The supported attention modules of `model` by dotted name, in module order.

    CaiT's two class-attention layers are left out, as in the authors' code.

    Args:
        model: any module that holds timm attention modules.
        layers: positions in that order to keep; None keeps all.

    Raises:
        RuntimeError: if the model is compiled or wrapped for DDP or DataParallel: hooks added now would be ignored,
            parameters missed.
        TypeError: if it holds an attention, or a block with attention inside, that the scales do not fit, or if
            `layers` is no sequence of integers.
        ValueError: if it holds no attention at all, or one in two places.
        IndexError: if `layers` is out of range.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module).__name__
        if kind == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise RuntimeError("model must not be compiled yet: apply the scales first, torch.compile last")
        if kind in ("DistributedDataParallel", "DataParallel"):
            raise RuntimeError(f"model must not be wrapped in {kind} yet: apply the scales first")
        if type(module) in SUPPORTED:
            if twin := next((other for other, there in found.items() if there is module), ""):
                raise ValueError(f"{name} must be a module of its own, got the one that is {twin} too")
            found[name] = module
        elif LOOKS_LIKE_ATTENTION.search(kind) and not name.endswith("attnscale") and not _class_attention(model, name):
            supported = ", ".join(sorted({c.__name__ for c in SUPPORTED}))
            raise TypeError(f"{name} must be one of timm's {supported}, got {type(module).__module__}.{kind}")
    if not found:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(f"model must have a supported attention module, got only {', '.join(kinds)}")
    if layers is None:
        return found
    names = list(found)
    try:
        positions = [operator.index(layer) for layer in layers]
    except TypeError:
        raise TypeError(f"layers must be a sequence of integers or None, got {layers!r}") from None
    if outside := [layer for layer in positions if not 0 <= layer < len(names)]:
        raise IndexError(f"layers must be in [0, {len(names)}), got {outside[0]}")
    return {names[layer]: found[names[layer]] for layer in positions}


def block_of(model: nn.Module, name: str) -> nn.Module:
    """The module that holds the attention called `name`: its transformer block."""
    return model.get_submodule(name.rpartition(".")[0])


def prefix_tokens(model: nn.Module, name: str) -> int:
    """How many class, distillation and register tokens precede the patches in the attention called `name`."""
    count, owner = 0, model
    for part in name.split("."):
        name_of_count = "num_tokens" if isinstance(owner, PoolingVisionTransformer) else "num_prefix_tokens"
        own = getattr(owner, name_of_count, None)
        if isinstance(own, int):
            count = 0 if isinstance(owner, Cait) else own  # CaiT's trunk sees patches only
        owner = owner.get_submodule(part)
    return count


def value_projection(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Wv (heads * head_dim, dim) and bv (heads * head_dim,) or None; grouped value heads are not repeated here."""
    if getattr(attention, "qkv", None) is None:
        return attention.v_proj.weight, attention.v_proj.bias
    rows = attention.qkv.weight.shape[0] // 3
    bias = attention.qkv.bias  # beit and eva keep their biases outside of the Linear
    return attention.qkv.weight[2 * rows :], getattr(attention, "v_bias", None) if bias is None else bias[2 * rows :]


def require_bare_projection(name: str, attention: Any) -> None:
    """Raise ValueError unless the heads' outputs go straight into the projection, which can then take their scales."""
    if not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity):
        raise ValueError(f"{name} must have no norm between heads and projection, got {attention.norm}")
    if getattr(attention, "gate", None) is not None:
        raise ValueError(f"{name} must have no gate between heads and projection, got {attention.gate}")


def mask_positions(attention: nn.Module) -> Masks:
    """Names and positions of the arguments of `attention.forward` by which a ViT would mask tokens."""
    names = list(inspect.signature(attention.forward).parameters)
    return tuple((name, names.index(name)) for name in ("attn_mask", "is_causal") if name in names)


def refuse_masks(masks: Masks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ValueError where a call passes one of `masks`: DC is no longer 1/N, padding would enter the mean."""
    for name, position in masks:
        value = args[position] if position < len(args) else kwargs.get(name)
        if value is not None and value is not False:
            shown = f"a mask of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else value
            raise ValueError(f"{name} must be unset in a model with AttnScale or FeatScale, got {shown}")


def _class_attention(model: nn.Module, name: str) -> bool:
    """Whether the module called `name` lies in the class-attention layers of a CaiT."""
    before, found, _ = name.partition("blocks_token_only")
    return bool(found) and isinstance(model.get_submodule(before.rstrip(".")), Cait)
