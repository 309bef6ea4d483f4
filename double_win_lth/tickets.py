"""Tickets: the pre-trained weights under nested masks, found by magnitude (Sec. 3; spec c).

Iterative magnitude pruning (IMP) with full rewinding: round 1 ranks the pre-trained weights themselves; round k trains
the ticket of round k - 1 on the pre-training task and ranks what comes out. Every ticket is the *pre-trained* network,
batch-norm statistics and head included, under its mask.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from common.masks import Masks, prunable_weights, random_scores
from common.runs import CheckpointError, write_atomically
from double_win_lth.selection import keep_largest
from double_win_lth.similarity import iou

FORMAT = "double-win-tickets-1"
MOST_LEVELS = 255
Prunable = Callable[[nn.Module], Mapping[str, nn.Parameter]]
TrainRound = Callable[[nn.Module, Masks, int], None]


def conv_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weight of every Conv2d, the first one and 1x1 shortcuts included; never the head, norms or biases."""
    return prunable_weights(model)


class TicketBook:
    """All tickets of one chain, one byte a weight: masks are nested, so the number of rounds survived says it all.

    Args:
        survived: name -> uint8 tensor of the weight's shape: the number of rounds that each entry survives.

    Raises:
        ValueError: no tensors, or other than uint8.
    """

    def __init__(self, survived: Mapping[str, Tensor]) -> None:
        for name, value in survived.items():
            if value.dtype != torch.uint8:
                raise ValueError(f"survived {name} must be uint8, got {value.dtype}")
        if not sum(value.numel() for value in survived.values()):
            raise ValueError("survived must hold at least one entry, got none")
        self.survived = dict(survived)

    @classmethod
    def dense(cls, weights: Mapping[str, Tensor]) -> "TicketBook":
        """Before the first round: level 0 alone, every entry kept."""
        return cls({name: torch.zeros(weight.shape, dtype=torch.uint8) for name, weight in weights.items()})

    @property
    def levels(self) -> int:
        """The number of tickets beside the dense network (level 0)."""
        return max(int(value.max()) for value in self.survived.values() if value.numel())

    def remaining(self, level: int) -> int:
        """Weights that ticket `level` keeps."""
        return self.mask(level).kept

    def sparsity(self, level: int) -> float:
        """Share of the prunable weights that ticket `level` lacks."""
        return self.mask(level).sparsity

    def mask(self, level: int) -> Masks:
        """Masks of ticket `level`, 0 being dense. Raises IndexError outside [0, levels]."""
        if not 0 <= level <= self.levels:
            raise IndexError(f"level must be in [0, {self.levels}], got {level}")
        return Masks({name: value >= level for name, value in self.survived.items()})

    def followed_by(self, mask: Masks) -> "TicketBook":
        """This book with one more ticket. Raises ValueError unless it is nested in the last and not empty."""
        last, level = self.mask(self.levels), self.levels + 1
        if level > MOST_LEVELS:
            raise ValueError(f"rounds must be at most {MOST_LEVELS}, got {level}")
        if mask.keys() != last.keys() or any((mask[name] & ~last[name]).any() for name in last):
            raise ValueError("mask must lie within the last ticket's")
        if not mask.kept:
            raise ValueError(f"round {level} must leave at least one weight, got 0 of {last.kept}")
        return TicketBook({name: value + mask[name].to(value) for name, value in self.survived.items()})

    def apply_to(self, model: nn.Module, level: int, prunable: Prunable = conv_weights) -> None:
        """Set the weights of `model` that ticket `level` lacks to zero, in place.

        Weights that are zero stay zero: to go from a ticket to one of a lower level load the pre-trained weights first.

        Raises:
            ValueError: where names or shapes are not exactly those of the model's prunable weights.
        """
        mask = self.mask(level)
        require_all_masked(mask, prunable(model))
        mask.apply_(model)

    def iou(self, other: "TicketBook", level: int) -> float:
        """Intersection over union of both books' masks at this level (`similarity.iou`)."""
        return iou(self.mask(level), other.mask(level))

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        tensors = {name: value.contiguous() for name, value in self.survived.items()}
        write_atomically(Path(path), safetensors.torch.save(tensors, {"format": FORMAT}))

    @classmethod
    def load(cls, path: Path) -> "TicketBook":
        """What `save` wrote. Raises `CheckpointError` if it is missing, damaged or something else."""
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such file of tickets")
        try:
            with safetensors.safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise CheckpointError(f"{path}: not a file of tickets (its metadata lack the format {FORMAT})")
                return cls({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (safetensors.SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged, or not a file of tickets ({error})") from error


def require_all_masked(mask: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless `mask` has exactly the names of the prunable `weights`."""
    if odd := sorted(mask.keys() ^ weights.keys()):
        there = "the ticket" if odd[0] in mask else "the model"
        raise ValueError(f"ticket must mask exactly the {len(weights)} prunable weights, only {there} has {odd[0]}")


def survivors(total: int, rate: float, rounds: int) -> list[int]:
    """Weights left after 0, 1, ..., `rounds` rounds: each removes round(rate * survivors), halves to even.

    Raises:
        ValueError: rate not in (0, 1), rounds not in [1, 255], or a round that would leave nothing.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate must be in (0, 1), got {rate}")
    if not 1 <= rounds <= MOST_LEVELS:
        raise ValueError(f"rounds must be in [1, {MOST_LEVELS}], got {rounds}")
    counts = [total]
    for level in range(1, rounds + 1):
        counts.append(counts[-1] - round(rate * counts[-1]))
        if not counts[-1]:
            raise ValueError(f"round {level} must leave at least one weight, removes all {counts[-2]} at rate {rate}")
    return counts


def find_tickets(
    model: nn.Module,
    train_round: TrainRound,
    *,
    rate: float = 0.2,
    rounds: int,
    prunable: Prunable = conv_weights,
    on_ticket: Callable[[TicketBook], None] | None = None,
    found: TicketBook | None = None,
) -> TicketBook:
    """Iterative magnitude pruning with rewinding to the weights and buffers that `model` holds now.

    Round k removes round(rate * survivors) of the smallest surviving magnitudes over all prunable weights together.

    Args:
        model: pre-trained, and again so afterwards: `TicketBook.apply_to` makes a ticket of it.
        train_round: (model, masks, level) trains ticket `level` in place on the pre-training task and keeps masked
            weights at zero meanwhile (`detach` what `Masks.attach` gave); called for levels 1 .. rounds - 1, since
            round 1 needs no training.
        rate: share of the survivors that a round removes, in (0, 1).
        rounds: tickets to find.
        prunable: the weights to prune, by name.
        on_ticket: called after each round, the model being the new ticket.
        found: the book of an interrupted chain of at most `rounds` tickets, to go on from; none is trained again.

    Raises:
        ValueError: rate or rounds out of range, more tickets found than asked for, nothing to prune, a round that would
            leave nothing, or a ranked weight that is NaN or infinite.
    """
    weights = prunable(model)
    if not weights:
        raise ValueError("model must have a weight to prune, got none")
    book = found or TicketBook.dense(weights)
    counts = survivors(sum(weight.numel() for weight in weights.values()), rate, rounds)
    if book.levels > rounds:
        raise ValueError(f"found must hold at most rounds={rounds} tickets, got {book.levels}")
    pretrained = copy.deepcopy(model.state_dict())
    book.apply_to(model, book.levels, prunable)
    for level in range(book.levels, rounds):
        masks = book.mask(level)
        if level:
            train_round(model, masks, level)
        book = book.followed_by(keep_largest(_on_cpu(prunable(model)), counts[level + 1], masks))
        model.load_state_dict(pretrained)
        book.apply_to(model, book.levels, prunable)
        if on_ticket is not None:
            on_ticket(book)
    model.load_state_dict(pretrained)
    return book


def one_shot_tickets(
    model: nn.Module,
    remaining: Sequence[int],
    *,
    score: Literal["magnitude", "random"] = "magnitude",
    prunable: Prunable = conv_weights,
    generator: torch.Generator | None = None,
) -> TicketBook:
    """Nested tickets with these survivor counts from one ranking: OMP by magnitude, RP by uniform scores.

    Args:
        model: pre-trained; not changed.
        remaining: survivors of tickets 1, 2, ...: not rising, each at least 1.
        score: what is ranked.
        prunable: the weights to prune.
        generator: of the random scores.

    Raises:
        ValueError: counts out of range or rising, another score, non-finite weights.
    """
    if score not in ("magnitude", "random"):
        raise ValueError(f"score must be magnitude or random, got {score!r}")
    weights = _on_cpu(prunable(model))
    scores = weights if score == "magnitude" else random_scores(weights, generator or torch.default_generator)
    book = TicketBook.dense(weights)
    for count in remaining:
        last = book.mask(book.levels)
        if not 1 <= count <= last.kept:
            raise ValueError(f"remaining must not rise and be in [1, {last.kept}], got {count}")
        book = book.followed_by(keep_largest(scores, count, last))
    return book


def shuffled(book: TicketBook, generator: torch.Generator) -> TicketBook:
    """A book with the same count in every layer at every level, at random positions."""
    places = {name: torch.randperm(value.numel(), generator=generator) for name, value in book.survived.items()}
    return TicketBook({name: value.flatten()[places[name]].view_as(value) for name, value in book.survived.items()})


def _on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().cpu() for name, weight in weights.items()}
