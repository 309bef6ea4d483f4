"""What weight decay acts on."""

from typing import Any

from timm.optim import param_groups_weight_decay
from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups of a timm model: 1-D tensors and what the model itself exempts do not decay.

    Those are its position embedding, class and distillation tokens.
    """
    exempt: Any = model.no_weight_decay
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt())
