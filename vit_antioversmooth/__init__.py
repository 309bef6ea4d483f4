"""Anti-oversmoothing for deep vision transformers (arXiv 2203.05962): AttnScale and FeatScale on any timm ViT."""

from vit_antioversmooth.attnscale import apply_attnscale
from vit_antioversmooth.featscale import apply_featscale
from vit_antioversmooth.fold import fold_
from vit_antioversmooth.probe import FrequencyProbe
from vit_antioversmooth.released import load_released
from vit_antioversmooth.scales import param_groups, remove_scales, scale_parameters

__all__ = [
    "FrequencyProbe",
    "apply_attnscale",
    "apply_featscale",
    "fold_",
    "load_released",
    "param_groups",
    "remove_scales",
    "scale_parameters",
]
