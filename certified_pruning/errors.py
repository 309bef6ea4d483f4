"""Errors that name the layer at fault."""

from __future__ import annotations

from torch import nn


class UnsupportedLayerError(ValueError):
    """A network holds a layer that a bound or a compression cannot handle exactly.

    Args:
        name: dotted name of the layer inside the model; "" is the model itself.
        layer: the layer.
        reason: what is wrong with it; by default that its type is not supported.
    """

    def __init__(self, name: str, layer: nn.Module, reason: str = "this type is not supported") -> None:
        self.name = name
        self.layer = layer
        where = f"layer {name!r}" if name else "the model"
        super().__init__(
            f"{where} is a {type(layer).__name__}: {reason}; allowed are (nested) nn.Sequential of "
            "Conv2d, Linear, BatchNorm2d, ReLU, Flatten, AvgPool2d, Identity, Dropout"
        )


class EmptyLayerError(ValueError):
    """Pruning left a layer without any channel or weight, so that the network's output is constant.

    Args:
        name: dotted name of the emptied layer.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"layer {name!r} would keep nothing; keep at least one channel or weight per layer")
