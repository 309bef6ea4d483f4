"""HYDRA: which weights to keep is itself learned, under the robust loss (Sehwag et al. 2020; spec c.6).

Every weight gets a score; the forward uses the weights of the highest |score| of each layer, and the backward passes
the gradient of the mask straight to |score|. Weights, biases and batch norms are frozen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from common import distributed
from common.masks import Masks, keep_top


def popup_init(weight: Tensor) -> Tensor:
    """Initial scores sqrt(6 / fan_in) * w / max |w| of a weight (out, in[, kh, kw])."""
    return math.sqrt(6 / weight[0].numel()) * weight / weight.abs().max()


def straight_through_mask(scores: Tensor, keep: int, within: Tensor | None = None) -> Tensor:
    """1 where |score| is among the `keep` highest (and `within`), else 0; its gradient is that of |score|."""
    size = scores.abs()
    mask = keep_top({"scores": size}, keep, None if within is None else {"scores": within})["scores"]
    return mask + (size - size.detach())  # the bracket is exactly 0


class Popup(nn.Module):
    """Parametrisation of a frozen weight: weight * mask of its learned scores."""

    def __init__(self, weight: Tensor, keep: int, within: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(popup_init(weight.detach()))
        self.keep, self.within = keep, within

    def forward(self, weight: Tensor) -> Tensor:
        return weight * straight_through_mask(self.scores, self.keep, self.within)


def hydra_scores(
    model: nn.Module,
    masks: Masks,
    keep: Mapping[str, int],
    loss: Callable[[nn.Module, int], Tensor],
    steps: int,
    lr: float,
    clip: float = 8.0,
) -> dict[str, Tensor]:
    """Learned |score| of every masked weight; Adam, lr a tenth after half and again after three quarters.

    Args:
        model: the trained network; not changed.
        masks: of the round just trained; what they prune stays pruned.
        keep: weights to keep, by parameter name.
        loss: robust loss of a network on this rank's share of batch number `step`.
        steps: batches of the search. 20 epochs in the released code.
        lr: 1e-2 with FGSM, 1e-3 with CROWN-IBP in the released code.
        clip: largest gradient norm.
    """
    search = copy.deepcopy(model).train().requires_grad_(False)
    popups = {}
    for name in masks:
        weight = search.get_parameter(name)
        popups[name] = Popup(weight, keep[name], masks[name].to(weight.device))
        layer = search.get_submodule(name.rpartition(".")[0])
        parametrize.register_parametrization(layer, "weight", popups[name])
    scores = [popup.scores for popup in popups.values()]
    optimizer = torch.optim.Adam(scores, lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps))
        optimizer.zero_grad(set_to_none=True)
        loss(search, step).backward()
        distributed.synchronize(search)
        nn.utils.clip_grad_norm_(scores, clip)
        optimizer.step()
    return {name: popup.scores.detach().abs() for name, popup in popups.items()}
