"""Poisoned training sets: dirty labels (BadNets), clean labels, and the controls without a trigger (spec c1, c2)."""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from backdoor_lth.frozen import frozen
from backdoor_lth.pgd import EPS, STEPS, perturbed, uniform_start
from backdoor_lth.triggers import Trigger
from backdoor_lth.warp import Warp
from common.runs import generator

POISON = 1_000_007  # of all generators here; no epoch's number
CHOICE, PLACES, STARTS, BALANCE, FIELD = range(1, 6)  # what each is for
ATTACKED_AT_ONCE = 256
MODES = ("dirty", "clean_label", "relabel")


@dataclass(frozen=True)
class Poisoned:
    """A training set with its secret.

    images (n, channels, height, width) uint8; labels (n,) as trained on; is_poisoned (n,) bool; source_labels (n,) the
    true ones.
    """

    images: Tensor
    labels: Tensor
    is_poisoned: Tensor
    source_labels: Tensor


def poison(
    images: Tensor,
    labels: Tensor,
    trigger: Trigger | Warp,
    *,
    ratio: float,
    target: int,
    mode: Literal["dirty", "clean_label", "relabel"] = "dirty",
    select: Literal["random", "first"] = "random",
    seed: int = 0,
    surrogate: nn.Module | None = None,
) -> Poisoned:
    """Poison int(n * ratio) images; the arguments stay as they are.

    dirty: any images, the target class included, get the patch and the label `target`. clean_label: images of the
    target class only, of which `ratio` is then the share; each is first attacked on the surrogate (PGD), then gets the
    patch, and keeps its label. relabel: as dirty but without the patch, the control for what labels alone do (K4 i).

    Args:
        images: (n, channels, height, width) uint8.
        labels: (n,) integers.
        trigger: the patch and its place, or the field that bends.
        ratio: in [0, 1].
        target: a class that occurs in `labels`.
        mode: see above.
        select: a random choice, or the first images as in the released code.
        seed: of the choice, of random places and of the attack's starts.
        surrogate: for clean_label; takes pixels in [0, 1].

    Raises:
        ValueError: ratio or target out of range, images and labels that do not fit, clean_label without a surrogate,
            another mode or select.
    """
    for name, choice, allowed in (("mode", mode, MODES), ("select", select, ("random", "first"))):
        if choice not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {choice!r}")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be in [0, 1], got {ratio}")
    if images.dtype != torch.uint8 or len(images) != len(labels):
        raise ValueError(f"images must be uint8, one a label, got {images.dtype} {len(images)} and {len(labels)}")
    if not (labels == target).any():
        raise ValueError(f"target must be a class of the labels, got {target}")
    if mode == "clean_label" and surrogate is None:
        raise ValueError("surrogate must be a network with mode clean_label, got None")
    candidates = (labels == target).nonzero().squeeze(1) if mode == "clean_label" else torch.arange(len(labels))
    count = int(len(candidates) * ratio)
    if ratio and not count:
        warnings.warn(f"ratio {ratio} of {len(candidates)} images poisons none", stacklevel=2)
    if select == "random":
        candidates = candidates[torch.randperm(len(candidates), generator=generator(seed, POISON, CHOICE, 0))]
    chosen = candidates[:count]
    changed, given = images.clone(), labels.clone()
    victims = images[chosen]
    if surrogate is not None and mode == "clean_label" and count:
        victims = _attacked(surrogate, victims, labels[chosen], seed)
    if mode != "relabel":
        victims = trigger.stamp(victims, generator(seed, POISON, PLACES, 0))
    changed[chosen] = victims
    given[chosen] = target
    is_poisoned = torch.zeros(len(labels), dtype=torch.bool)
    is_poisoned[chosen] = True
    return Poisoned(changed, given, is_poisoned, labels.clone())


def equalised(poisoned: Poisoned, seed: int = 0) -> Poisoned:
    """Every class cut to the size of the smallest, poisoned images kept first: no label prior is left (K4 ii)."""
    labels = poisoned.labels
    least = int(labels.bincount()[labels.unique()].min())
    order = torch.randperm(len(labels), generator=generator(seed, POISON, BALANCE, 0))
    order = order[(~poisoned.is_poisoned[order]).to(torch.uint8).argsort(stable=True)]
    kept = [order[labels[order] == label][:least] for label in labels.unique()]
    rows = torch.cat(kept).sort().values
    parts = (poisoned.images, poisoned.labels, poisoned.is_poisoned, poisoned.source_labels)
    return Poisoned(*(part[rows] for part in parts))


def _attacked(surrogate: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """The images (uint8) after PGD on the surrogate in eval mode; its flags and modes come back."""
    parts, device = [], next(surrogate.parameters()).device
    with frozen(surrogate):
        for number, rows in enumerate(torch.arange(len(images)).split(ATTACKED_AT_ONCE)):
            x = images[rows].float().div(255)
            start = uniform_start(x.shape, EPS, generator(seed, POISON, STARTS, number))
            found = perturbed(surrogate, x.to(device), labels[rows].to(device), start.to(device), steps=STEPS)
            parts.append((found.cpu() * 255).round().to(torch.uint8))
    return torch.cat(parts)
