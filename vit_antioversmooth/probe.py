"""FrequencyProbe: how much high frequency and how much difference between tokens is left after each layer.

with FrequencyProbe(model) as probe, torch.no_grad():
    model(images)
probe.results()["patch_cosine"]  # layer 0, 1, ...
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vit_antioversmooth.attentions import block_of, find_attentions, prefix_tokens
from vit_antioversmooth.bounds import rho
from vit_antioversmooth.frequency import hc_ratio, mean_cosine
from vit_antioversmooth.maps import attention_maps

QUANTITIES = ("hc", "cos", "attn", "rho")


class FrequencyProbe:
    """Context manager that measures a model's forwards, averaged over all images seen.

    Patch tokens are measured after every block, and before the first one as layer 0; prefix tokens are left out. "attn"
    and "rho" look at attention maps and switch fused attention off meanwhile.

    Args:
        model: holds timm attention modules, with or without scales; not folded.
        what: any of "hc", "cos", "attn", "rho".

    Raises:
        ValueError: for another quantity; else as `find_attentions`.
    """

    def __init__(self, model: nn.Module, what: Sequence[str] = QUANTITIES) -> None:
        if unknown := [name for name in what if name not in QUANTITIES]:
            raise ValueError(f"what must be among {', '.join(QUANTITIES)}, got {unknown[0]!r}")
        self.model, self.what = model, tuple(what)
        names = list(find_attentions(model))
        self._blocks = [block_of(model, name) for name in names]
        self._prefix = [prefix_tokens(model, name) for name in names]
        self._sums: dict[str, dict[int, tuple[float, int]]] = {}
        self._before: Tensor | None = None  # the previous layer's effective map
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "FrequencyProbe":
        with contextlib.ExitStack() as stack:
            if "hc" in self.what or "cos" in self.what:
                first = self._blocks[0].register_forward_pre_hook(lambda _, args: self._tokens(0, args[0]))
                stack.callback(first.remove)
                for layer, block in enumerate(self._blocks, 1):

                    def after(_: nn.Module, args: Any, output: Tensor, layer: int = layer) -> None:
                        self._tokens(layer, output)

                    stack.callback(block.register_forward_hook(after).remove)
            if "attn" in self.what or "rho" in self.what:
                stack.enter_context(attention_maps(self.model, self._map))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._before = None

    def results(self) -> dict[str, list[float]]:
        """By layer: `hc_over_dc`, `hc_over_x`, `patch_cosine` (layers 0 .. depth); cosines and factors of maps (1 ..).

        `attention_cosine` is between rows of each head's effective map, `softmax_cosine` of the softmax map,
        `head_cosine` between heads, `layer_cosine` to the same head one layer before (from layer 2 on, where map sizes
        agree); `rho` is the mean, `rho_max` the largest factor of effective maps.

        Raises:
            ValueError: before the first forward.
        """
        if not self._sums:
            raise ValueError("the probe must see at least one forward of its model, got none")
        return {
            name: [total / count for _, (total, count) in sorted(layers.items())] for name, layers in self._sums.items()
        }

    @torch.no_grad()
    def _tokens(self, layer: int, x: Tensor) -> None:
        x = x.detach().flatten(1, -2)[:, self._prefix[max(layer - 1, 0)] :].float()
        if "hc" in self.what:
            ratio = hc_ratio(x)
            self._add("hc_over_dc", layer, ratio)
            # 1 where HC/DC is infinite
            self._add("hc_over_x", layer, torch.where(ratio.isinf(), 1, ratio / (1 + ratio.square()).sqrt()))
        if "cos" in self.what:
            self._add("patch_cosine", layer, mean_cosine(x))

    @torch.no_grad()
    def _map(self, layer: int, softmax: Tensor, effective: Tensor) -> None:
        softmax, effective = softmax.float(), effective.float()
        if "attn" in self.what:
            self._add("attention_cosine", layer, mean_cosine(effective))
            self._add("softmax_cosine", layer, mean_cosine(softmax))
            if effective.shape[1] > 1:
                self._add("head_cosine", layer, mean_cosine(effective.flatten(2)))
            if layer and self._before is not None and self._before.shape == effective.shape:
                alike = nn.functional.cosine_similarity(self._before.flatten(2), effective.flatten(2), dim=-1)
                self._add("layer_cosine", layer, alike)
            self._before = effective
        if "rho" in self.what:
            factors = rho(effective)
            self._add("rho", layer, factors)
            largest, _ = self._sums.get("rho_max", {}).get(layer, (0.0, 1))
            self._sums.setdefault("rho_max", {})[layer] = (max(largest, factors.max().item()), 1)

    def _add(self, name: str, layer: int, values: Tensor) -> None:
        total, count = self._sums.setdefault(name, {}).get(layer, (0.0, 0))
        self._sums[name][layer] = (total + values.double().sum().item(), count + values.numel())
