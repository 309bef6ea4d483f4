"""Looking at attention maps while a model runs, without keeping them: each is shown once and dropped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vit_antioversmooth.attentions import find_attentions

Look = Callable[[int, Tensor, Tensor], None]


@contextmanager
def attention_maps(model: nn.Module, look: Look) -> Iterator[None]:
    """Within the context every forward of `model` calls `look(layer, softmax map, effective map)`.

    Fused attention is off meanwhile. The effective map is the one that multiplies V: the softmax map (in CaiT after its
    head mixing), or what AttnScale makes of it; both (batch, heads, queries, keys), detached, before dropout.
    """
    attentions: dict[str, Any] = dict(find_attentions(model))
    fused = {name: attention.fused_attn for name, attention in attentions.items() if hasattr(attention, "fused_attn")}
    handles = []
    try:
        for layer, attention in enumerate(attentions.values()):

            def see(_: nn.Module, args: tuple[Tensor, ...], layer: int = layer, attention: Any = attention) -> None:
                softmax = args[0].detach()
                scale = getattr(attention, "attnscale", None)
                look(layer, softmax, softmax if scale is None else scale.edit(softmax).detach())

            # prepend: AttnScale in reference mode edits the map in a hook of its own
            handles.append(attention.attn_drop.register_forward_pre_hook(see, prepend=True))
        for name in fused:
            attentions[name].fused_attn = False
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, before in fused.items():
            attentions[name].fused_attn = before
