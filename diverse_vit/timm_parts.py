"""Where a timm vision transformer keeps its blocks, its patches, its q, k, v and the path from tokens to logits."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from timm.layers.classifier import ClassifierHead
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from diverse_vit.cosines import full

KNOWN = (Attention, AttentionRope, BeitAttention, EvaAttention, RelPosAttention, WindowAttention)


def bare(model: nn.Module) -> Any:
    """The network inside the wrappers of torch.compile and DistributedDataParallel."""
    while type(model).__name__ in ("OptimizedModule", "DistributedDataParallel"):
        model = getattr(model, "_orig_mod", None) or model.module  # type: ignore[assignment]
    return model


def blocks_of(model: nn.Module) -> list[Any]:
    """The transformer blocks in order; a Swin's stages one after another. Raises TypeError where there are none."""
    model = bare(model)
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks):
        return list(blocks)
    found = [block for stage in getattr(model, "layers", ()) for block in getattr(stage, "blocks", ())]
    if not found:
        raise TypeError(f"model must be a timm vision transformer with blocks, got {type(model).__name__}")
    return found


def stages(model: nn.Module) -> int:
    """How many stages, between which tokens are merged, the network has: 1 for all but Swin and its like."""
    found = bare(model)
    return 1 if hasattr(found, "blocks") else len(found.layers)


def prefix_tokens(model: nn.Module) -> int:
    """Class, distillation and register tokens in front of the patches inside the blocks."""
    model = bare(model)
    return 0 if hasattr(model, "blocks_token_only") else getattr(model, "num_prefix_tokens", 0)  # CaiT's trunk has none


def attention_of(block: nn.Module, layer: int) -> Any:
    """The block's attention. Raises TypeError unless its map can be recomputed."""
    attention = getattr(block, "attn", None)
    if type(attention) not in KNOWN:
        names = ", ".join(sorted({kind.__name__ for kind in KNOWN}))
        raise TypeError(f"attention of block {layer} must be one of timm's {names}, got {type(attention).__name__}")
    return attention


def qkv_weights(block: nn.Module, layer: int) -> list[Tensor]:
    """Wq, Wk, Wv of a block as stacks of matrices (m, out, in): one stack where timm keeps them fused, else three.

    Raises:
        TypeError: for an attention of unknown kind; ValueError: for sharded weights, of which no rank has a whole one.
    """
    attention = attention_of(block, layer)
    if getattr(attention, "qkv", None) is not None:
        names, parts = ["qkv"], 3
    else:
        names, parts = ["q_proj", "k_proj", "v_proj"], 1
    weights = [getattr(attention, name).weight for name in names]
    for weight in weights:
        if weight.ndim != 2 or hasattr(weight, "full_tensor"):
            raise ValueError(f"weight_cno needs whole matrices, got sharded q, k, v weights in block {layer}")
    return [weight.unflatten(0, (parts, -1)) for weight in weights]


def queries_keys(
    attention: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scaled queries and keys (batch, H, N, head_dim) and the bias of the logits, as in a call of the attention.

    Args:
        attention: of a kind in KNOWN.
        args, kwargs: of its call: tokens (batch, N, d), and rope or a bias where the network has one.

    Raises:
        ValueError: for a masked or causal call.
    """
    call = inspect.signature(attention.forward).bind(*args, **kwargs).arguments
    if call.get("attn_mask") is not None or call.get("is_causal"):
        raise ValueError("attention must see all tokens, got a masked or causal call")
    x, heads = call["x"], attention.num_heads
    if getattr(attention, "qkv", None) is not None:
        weight = attention.qkv.weight
        rows, bias = weight.shape[0] // 3 * 2, attention.qkv.bias
        if bias is not None:
            bias = bias[:rows]
        elif getattr(attention, "q_bias", None) is not None:  # beit and eva keep theirs apart
            bias = torch.cat([attention.q_bias, attention.k_bias])
        q, k = F.linear(x.to(weight.dtype), weight[:rows], bias).unflatten(-1, (2, heads, -1)).transpose(1, 3).unbind(2)
    else:
        x = x.to(attention.q_proj.weight.dtype)
        kv_heads = getattr(attention, "num_kv_heads", heads)
        q = attention.q_proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        k = attention.k_proj(x).unflatten(-1, (kv_heads, -1)).transpose(1, 2)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    if (rope := call.get("rope")) is not None:
        half, first = getattr(attention, "rotate_half", False), attention.num_prefix_tokens
        q, k = (
            torch.cat([t[:, :, :first], apply_rot_embed_cat(t[:, :, first:], rope, half=half)], 2).to(t) for t in (q, k)
        )
    if k.shape[1] != heads:  # grouped queries
        k = k.repeat_interleave(heads // k.shape[1], 1)
    return full(q) * attention.scale, full(k), _logit_bias(attention, call, len(x))


def _logit_bias(attention: Any, call: Mapping[str, Any], batch: int) -> Tensor | None:
    """Relative position bias and Swin's mask of shifted windows: (1 or batch, 1 or H, N, N)."""
    parts = []
    if getattr(attention, "relative_position_bias_table", None) is not None:
        parts.append(attention._get_rel_pos_bias())
    if getattr(attention, "rel_pos", None) is not None:
        parts.append(attention.rel_pos.get_bias())
    parts += [call[name] for name in ("shared_rel_pos_bias", "shared_rel_pos") if call.get(name) is not None]
    if (mask := call.get("mask")) is not None:  # (windows, N, N)
        parts.append(mask.repeat(batch // len(mask), 1, 1)[:, None])
    if not parts:
        return None
    bias = full(sum(parts[1:], start=parts[0]))
    return bias[None] if bias.ndim == 3 else bias


def token_path(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], nn.Linear]:
    """What the network does to a token between the last block and the classifier, and the classifier.

    Raises:
        ValueError: where no such path exists: two heads, attention pooling, class-attention layers.
    """
    model = bare(model)
    head = getattr(model, "head", None)
    odd = hasattr(model, "head_dist") or getattr(model, "attn_pool", None) is not None
    if isinstance(head, ClassifierHead):
        modules, linear = [getattr(model, "norm", None), head.drop], head.fc
    else:
        modules, linear = [getattr(model, name, None) for name in ("norm", "fc_norm", "head_drop")], head
    if odd or hasattr(model, "blocks_token_only") or not isinstance(linear, nn.Linear):
        name = type(model).__name__
        raise ValueError(f"mix needs a network that classifies a token by itself, or token_head, got {name}")
    return nn.Sequential(*[module for module in modules if module is not None]), linear
