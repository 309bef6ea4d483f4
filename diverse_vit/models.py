"""The networks of the studies: a small class-token ViT of free size, or any timm vision transformer."""

from functools import partial
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from common.config import ConfigError, require
from common.data import ImageSet
from diverse_vit.settings import ModelConfig


def network(model: ModelConfig, data: ImageSet) -> nn.Module:
    """The configured network for images like those of `data`, its weights drawn from the global generator or read now.

    Raises:
        ConfigError: where sizes do not fit.
    """
    channels, size = model.image_shape(data)
    if model.name == "vit":
        require(size % model.patch == 0, "model.patch", model.patch, f"a divisor of the images' side {size}")
        return VisionTransformer(
            img_size=size,
            patch_size=model.patch,
            in_chans=channels,
            num_classes=data.classes,
            embed_dim=model.dim,
            depth=model.depth,
            num_heads=model.heads,
            weight_init="jax",  # xavier: timm's default, standard deviation .02, learns far too slowly at this width
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            drop_path_rate=model.drop_path,
        )
    options: dict[str, Any] = {"img_size": size, "in_chans": channels, "num_classes": data.classes}
    if model.depth:
        options["depth"] = model.depth
    try:
        return timm.create_model(model.name, pretrained=model.pretrained, drop_path_rate=model.drop_path, **options)
    except (TypeError, RuntimeError, AssertionError, OSError) as error:  # timm's, for what a network lacks
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"model.name {model.name} cannot be built as configured: {reason}") from error
