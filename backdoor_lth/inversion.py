"""Trigger inversion on any network: which small picture turns every input into a given label (Sec. 4; spec c7, c8)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from backdoor_lth.frozen import frozen
from backdoor_lth.neural_cleanse import neural_cleanse
from backdoor_lth.tabor import AttackLoss, Search, tabor
from backdoor_lth.traced import anchor
from common.runs import generator

INVERSION = 1_000_011  # of the generators here; no epoch's number


@dataclass(frozen=True)
class Inversion:
    """The recovered trigger of each label, in the network's input space.

    labels (K,); mark (K, channels, height, width) and mask (K, height, width), both in [0, 1]; success (K, steps), the
    share of images that each step's trigger turned; null_success (K,), the share that has the label without a trigger.
    """

    labels: list[int]
    mark: Tensor
    mask: Tensor
    success: Tensor
    null_success: Tensor

    @property
    def l1(self) -> Tensor:
        """Size of each mask, (K,): what the paper's tables list."""
        return self.mask.sum((1, 2))

    @property
    def trigger_l1(self) -> Tensor:
        """Size of mask * mark, (K,): what the paper's text minimises."""
        return (self.mask[:, None] * self.mark).sum((1, 2, 3))


def invert(
    model: nn.Module,
    input_shape: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    base: Literal["noise"] | Tensor = "noise",
    count: int = 100,
    steps: int = 100,
    method: Literal["tabor", "nc"] = "tabor",
    attack_loss: AttackLoss = "ce",
    keep: Literal["last", "min"] = "last",
    chunk: int = 0,
    seed: int = 0,
) -> Inversion:
    """Search the trigger of every label.

    The model is frozen and in eval mode meanwhile; its mode, flags, gradients and buffers come back as they were. Every
    label has its own random numbers, so that the others and `chunk` change nothing but rounding.

    Args:
        model: inputs (n, channels, height, width) to logits (n, classes).
        input_shape: (channels, height, width).
        labels: to scan; all if None.
        base: images that the trigger is put on: fresh N(0, 1) noise at every step, or these (n, *input_shape).
        count: noise images a step.
        steps: of Adam (nc: at most).
        method: TABOR's variant, or Neural Cleanse.
        attack_loss, keep: of `tabor`.
        chunk: labels at a time; 0: one on the CPU, where activations then stay in cache, all on a GPU.
        seed: of starts and noise.

    Raises:
        ValueError: shapes, counts, labels or names that cannot be, logits that are not (n, classes) or not finite.
    """
    for name, given, allowed in (
        ("method", method, ("tabor", "nc")),
        ("attack_loss", attack_loss, ("ce", "cw")),
        ("keep", keep, ("last", "min")),
    ):
        if given not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {given!r}")
    shape = tuple(input_shape)
    if len(shape) != 3:
        raise ValueError(f"input_shape must be (channels, height, width), got {shape}")
    if isinstance(base, str) and base != "noise":
        raise ValueError(f"base must be noise or images, got {base!r}")
    if isinstance(base, Tensor) and (base.shape[1:] != shape or not len(base)):
        raise ValueError(f"base must be (n, {', '.join(map(str, shape))}) with n at least 1, got {tuple(base.shape)}")
    for name, value, least in (("count", count, 1), ("steps", steps, 1), ("chunk", chunk, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    like = anchor(model)
    base = base if isinstance(base, str) else base.to(like)
    with frozen(model), torch.enable_grad():
        classes = classes_of(model, like.new_zeros(1, *shape))
        wanted = list(range(classes)) if labels is None else [int(label) for label in labels]
        if not wanted or not all(0 <= label < classes for label in wanted):
            raise ValueError(f"labels must be at least one, in [0, {classes}), got {wanted}")
        size = 1 if method == "nc" else chunk or (1 if like.device.type == "cpu" else len(wanted))
        found, nulls = [], []
        for start in range(0, len(wanted), size):
            draws = _Draws(wanted[start : start + size], shape, count, base, seed, like)
            some = torch.tensor(draws.labels, device=like.device)
            first = draws.images(0)
            answers = model(first.expand(len(some), *first.shape[-4:]).flatten(0, 1)).argmax(1).view(len(some), -1)
            nulls.append((answers == some[:, None]).to(like.dtype).mean(1))
            if method == "nc":
                found.append(neural_cleanse(model, some, draws.mark, draws.mask, draws.images, steps))
            else:
                options = {"attack_loss": attack_loss, "keep": keep}
                found.append(tabor(model, some, draws.mark, draws.mask, draws.images, steps, **options))  # type: ignore[arg-type]
    return Inversion(
        wanted,
        torch.cat([each.trigger.mark for each in found]),
        torch.cat([each.trigger.mask for each in found]),
        torch.cat([_padded(each, steps) for each in found]),
        torch.cat(nulls),
    )


class _Draws:
    """The random numbers of some labels: starts (mark first, then mask), then the noise of one step after another."""

    def __init__(
        self, labels: list[int], shape: tuple[int, ...], count: int, base: Tensor | str, seed: int, like: Tensor
    ) -> None:
        self.labels, self.shape, self.count, self.base, self.like = labels, shape, count, base, like
        self.generators = [generator(seed, INVERSION, label) for label in labels]
        self.mark = self._normal(*shape)
        self.mask = self._normal(*shape[1:])
        self.now = -1

    def _normal(self, *size: int) -> Tensor:
        parts = [torch.randn(size, generator=each, dtype=self.like.dtype) for each in self.generators]
        return torch.stack(parts).to(self.like.device)

    def images(self, step: int) -> Tensor:
        """Images of a step: (N, ...) given ones, or (K, N, ...) noise; to be asked for in order, twice if need be."""
        if isinstance(self.base, Tensor):
            return self.base
        if step != self.now:
            self.noise, self.now = self._normal(self.count, *self.shape), step
        return self.noise


def classes_of(model: nn.Module, x: Tensor) -> int:
    """How many classes the model answers, tried on inputs x. Raises ValueError for other logits than (n, classes)."""
    with torch.no_grad():
        logits = model(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits of the model must be (n, classes), got {shape} for one image")
    if not logits.isfinite().all():
        raise ValueError("logits of the model must be finite, got NaN or Inf on a zero image")
    return logits.shape[1]


def _padded(search: Search, steps: int) -> Tensor:
    """Successes of all steps; after an early stop the last one stands."""
    last = search.success[:, -1:].expand(-1, steps - search.success.shape[1])
    return torch.cat([search.success, last], 1)
