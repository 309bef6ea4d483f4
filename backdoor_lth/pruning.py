"""Iterative magnitude pruning with rewinding, and its rivals (Sec. 3; spec c3, c11).

Round r trains under mask m_r, then removes a share of the survivors over all convolutions together: m_{r+1}. Its
*ticket* is m_{r+1} times the weights just trained, neither rewound nor trained again. The next round starts from the
weights and batch-norm statistics of an early epoch of round 0.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.masks import Masks, keep_top, prunable_weights, saliency_scores

Scores = Mapping[str, Tensor]
Fit = Callable[[nn.Module, Masks, int], Mapping[str, Tensor] | None]
Rank = Callable[[nn.Module, int], Scores]


def survivors(total: int, fraction: float, rounds: int) -> list[int]:
    """Weights left after 0, 1, ..., `rounds` rounds; each removes round(fraction * survivors), halves to even.

    Raises ValueError for a fraction not in [0, 1) or negative rounds.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    if rounds < 0:
        raise ValueError(f"rounds must be at least 0, got {rounds}")
    counts = [total]
    for _ in range(rounds):
        counts.append(counts[-1] - round(fraction * counts[-1]))
    return counts


def magnitudes(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Conv2d,)) -> dict[str, Tensor]:
    """|w| of every prunable weight. Raises ValueError naming a weight that holds NaN."""
    found = {name: weight.detach().abs() for name, weight in prunable_weights(model, kinds).items()}
    for name, value in found.items():
        if value.isnan().any():
            raise ValueError(f"weight {name} must not hold NaN, got {int(value.isnan().sum())}")
    return found


def next_masks(scores: Scores, masks: Mapping[str, Tensor] | None, fraction: float) -> Masks:
    """Remove the round(fraction * survivors) lowest scores among the survivors of `masks` (None: all).

    Raises ValueError naming the first mask whose name or shape is not a score's, or the first score without a mask.
    """
    alive = Masks(masks) if masks is not None else Masks.ones_like(scores)
    for name in [*alive, *scores]:
        if name not in scores:
            raise ValueError(f"mask {name} must name a weight to prune, got none of that name")
        if name not in alive:
            raise ValueError(f"masks must have one for every weight to prune, have none for {name}")
        if alive[name].shape != scores[name].shape:
            raise ValueError(f"mask {name} must be {tuple(scores[name].shape)}, got {tuple(alive[name].shape)}")
    return keep_top(scores, survivors(alive.kept, fraction, 1)[1], alive)


def global_magnitude(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None,
    fraction: float,
    kinds: tuple[type[nn.Module], ...] = (nn.Conv2d,),
) -> Masks:
    """One round of global magnitude pruning: masks of the survivors by parameter name; the model stays as it is.

    Raises:
        ValueError: fraction not in [0, 1), no weight of these kinds, NaN among the weights, masks of other names or
            shapes than these weights (an empty mapping too; None keeps all).
    """
    return next_masks(magnitudes(model, kinds), masks, fraction)


@dataclass(frozen=True)
class Round:
    """Round `number` of a chain: the masks found at its end, the weights it trained, and its ticket."""

    number: int
    masks: Masks
    trained: dict[str, Tensor]

    @property
    def ticket(self) -> dict[str, Tensor]:
        """State dict: the trained weights under the new masks; batch-norm statistics as trained (stale)."""
        return masked(self.trained, self.masks)


def masked(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the weights outside `masks` at zero."""
    return {name: value * masks[name].to(value) if name in masks else value for name, value in state.items()}


def prune_and_rewind(
    model: nn.Module,
    fit: Fit,
    *,
    rounds: int,
    fraction: float | Callable[[int], float] = 0.2,
    rank: Rank = lambda model, number: magnitudes(model),
    start: int = 0,
    masks: Masks | None = None,
    rewind: Mapping[str, Tensor] | None = None,
) -> Iterator[Round]:
    """Yield the rounds of a chain from `start` on.

    Args:
        model: at its random start, dense.
        fit: (model, masks, number) trains in place and keeps masked weights at zero; in round 0 it returns the complete
            state dict to rewind to.
        rounds: their number.
        fraction: of the survivors that a round removes, or a function of its number.
        rank: (trained model, number) -> scores of which the lowest go; magnitudes (IMP), or fixed scores.
        start, masks, rewind: to go on after `start` finished rounds: the last masks and the state to rewind to.

    Raises:
        ValueError: rounds below 1, a fraction out of range, or no state to rewind to.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    masks = masks if masks is not None else Masks.ones_like(prunable_weights(model))
    for number in range(start, rounds):
        if number:
            if rewind is None:
                raise ValueError("rewind must be a state dict after round 0, got None: fit must return it")
            model.load_state_dict(rewind)
            masks.apply_(model)
        early = fit(model, masks, number)
        rewind = early if not number else rewind
        masks = next_masks(rank(model, number), masks, fraction(number) if callable(fraction) else fraction)
        yield Round(number, masks, copy.deepcopy(model.state_dict()))


def snip_scores(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """|w * dL/dw| on one batch, in the model's present mode (Lee et al. 2019, Eq. 3)."""
    weights = prunable_weights(model)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(weights.values()))
    return saliency_scores(weights, gradients)


def grasp_scores(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """w * (H g) on one batch: the lowest go, as GraSP removes the largest of -w * (H g) (Wang et al. 2020, Eq. 8)."""
    weights = prunable_weights(model)
    parameters = list(weights.values())
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
    product = sum((gradient * gradient.detach()).sum() for gradient in gradients)
    flows = torch.autograd.grad(product, parameters)  # type: ignore[arg-type]
    return {name: (weight * flow).detach() for (name, weight), flow in zip(weights.items(), flows, strict=True)}


def disconnected(masks: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights of which no entry survives; the network still works, but passes only constants there."""
    return [name for name, mask in masks.items() if not mask.any()]
