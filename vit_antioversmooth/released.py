"""Loading state dicts with the names of the authors' code: lamb = omega, lamb1 = s, lamb2 = t."""

import re
from collections.abc import Mapping

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as swin_names
from torch import Tensor, nn

from vit_antioversmooth.attentions import find_attentions
from vit_antioversmooth.attnscale import apply_attnscale
from vit_antioversmooth.featscale import apply_featscale

OURS = {"lamb": "attnscale.omega", "lamb1": "featscale.s", "lamb2": "featscale.t"}
BUFFERS = ("relative_position_index", "attn_mask")  # of the released Swin; timm computes them
LAMB = re.compile(r"(?:^|(?<=\.))lamb[12]?$")


def load_released(model: nn.Module, state_dict: Mapping[str, Tensor], featscale_count: int) -> None:
    """Load released weights into `model`, in place; the scales that `state_dict` holds are applied where missing.

    Args:
        model: the timm counterpart of the released network.
        state_dict: keys may carry `module.` in front; a plain checkpoint may leave out the scales, and nothing else.
        featscale_count: how often the code that made the weights adds FeatScale's correction: 2 for the released DeiT
            block (s = 2 lamb1, t = 2 lamb2), 1 for CaiT and Swin.

    Raises:
        ValueError: if featscale_count is neither 1 nor 2, or a key or a shape does not fit; the model then computes
            what it did before.
    """
    if featscale_count not in (1, 2):
        raise ValueError(f"featscale_count must be 1 or 2, got {featscale_count}")
    bare = {key.removeprefix("module."): value for key, value in state_dict.items()}
    scales = {key: value for key, value in bare.items() if LAMB.search(key)}
    base = {key: value for key, value in bare.items() if key not in scales}
    if isinstance(model, SwinTransformer):
        base = {key: value for key, value in swin_names(base, model).items() if not key.endswith(BUFFERS)}
    renamed = {LAMB.sub(lambda found: OURS[found[0]], key): value for key, value in scales.items()}
    weights = {**base, **{key: value if "omega" in key else value * featscale_count for key, value in renamed.items()}}
    _apply_missing(model, weights)
    there = model.state_dict()
    optional = {key for key in there if key.endswith(tuple(OURS.values()))}
    if missing := sorted(there.keys() - weights.keys() - optional):
        raise ValueError(f"state_dict must hold every weight of the model, lacks {len(missing)}: {missing[0]}, ...")
    if odd := sorted(weights.keys() - there.keys()):
        raise ValueError(f"state_dict must hold only weights of the model, has {len(odd)} others: {odd[0]}, ...")
    for key, value in weights.items():
        if value.shape != there[key].shape:
            raise ValueError(f"{key} must have shape {tuple(there[key].shape)}, got {tuple(value.shape)}")
    model.load_state_dict(weights, strict=False)


def _apply_missing(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Apply the scales that `weights` holds and `model` lacks, in the layers where `weights` holds them."""
    attentions = find_attentions(model)
    for end, apply in (("attnscale.omega", apply_attnscale), ("featscale.s", apply_featscale)):
        owners = [name if end == "attnscale.omega" else name.rpartition(".")[0] for name in attentions]
        keys = [f"{owner}.{end}" for owner in owners]
        there = model.state_dict()
        layers = [layer for layer, key in enumerate(keys) if key in weights and key not in there]
        if layers:
            apply(model, layers=layers)  # type: ignore[operator]
