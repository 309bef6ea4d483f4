"""The scale parameters of a model: finding them, grouping them for an optimiser, taking them out again."""

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from vit_antioversmooth.attnscale import AttnScale, remove_hooks
from vit_antioversmooth.featscale import FeatScale

UNDECAYED = ("pos_embed", "cls_token", "dist_token", "reg_token")


def scale_modules(model: nn.Module) -> Iterator[tuple[str, AttnScale | FeatScale]]:
    """Every AttnScale and FeatScale of `model` with its dotted name."""
    for name, module in model.named_modules():
        if isinstance(module, AttnScale | FeatScale):
            yield name, module


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """omega, s and t of all layers, shared ones once."""
    return list(dict.fromkeys(parameter for _, module in scale_modules(model) for parameter in module.parameters()))


def param_groups(
    model: nn.Module, lr: float, weight_decay: float, scale_lr_mult: float = 1.0
) -> list[dict[str, object]]:
    """Optimiser groups: decayed weights; undecayed ones (1-D, position and class tokens); scales, undecayed too.

    Args:
        model: frozen parameters are left out.
        lr: base learning rate; each group also keeps its own as "initial_lr".
        weight_decay: of the first group.
        scale_lr_mult: the scales learn at lr * scale_lr_mult. 1 at the paper's scale; AdamW moves a parameter by at
            most the sum of all learning rates, so short runs need more for the scales to move at all.

    Raises:
        ValueError: where `scale_lr_mult` is negative or not finite.
    """
    if not 0 <= scale_lr_mult < math.inf:
        raise ValueError(f"scale_lr_mult must be finite and at least 0, got {scale_lr_mult}")
    scales = {id(parameter) for parameter in scale_parameters(model)}
    own: Any = getattr(model, "no_weight_decay", set)
    undecayed = {*UNDECAYED, *own()}
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "undecayed": [], "scales": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        bare = parameter.ndim <= 1 or name in undecayed or name.rpartition(".")[2] in undecayed
        group = "scales" if id(parameter) in scales else "undecayed" if bare else "decayed"
        groups[group].append(parameter)
    rates = {"decayed": lr, "undecayed": lr, "scales": lr * scale_lr_mult}
    return [
        {
            "name": name,
            "params": members,
            "lr": rates[name],
            "initial_lr": rates[name],
            "weight_decay": weight_decay if name == "decayed" else 0.0,
        }
        for name, members in groups.items()
        if members
    ]


def remove_scales(model: nn.Module) -> None:
    """Take every scale and its hooks out of `model`, in place: it is as it was before, bit for bit."""
    for name, scale in list(scale_modules(model)):
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(scale, AttnScale):
            remove_hooks(owner, scale)
        else:
            for handle in scale.handles:
                handle.remove()
        delattr(owner, name.rpartition(".")[2])
