"""The Trojan score: the error barrier on the line between a ticket and the same ticket fine-tuned (Sec. 4; spec c5)."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_lth.compaction import compact_states
from backdoor_lth.frozen import frozen, stateless
from backdoor_lth.pruning import masked
from common.masks import Masks
from common.runs import NonFiniteError

State = Mapping[str, Tensor]
Batch = tuple[Tensor, Tensor]
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Barrier:
    """Error and mean cross-entropy at each alpha (1: the first state, 0: the second), and how far they rise between."""

    alphas: list[float]
    error: list[float]
    loss: list[float]

    @property
    def score_error(self) -> float:
        """Largest error on the line above the mean error of its ends; 0 to 1."""
        return rise(self.error)

    @property
    def score_loss(self) -> float:
        """The same of the cross-entropy."""
        return rise(self.loss)


def rise(values: Sequence[float]) -> float:
    """Largest value above the mean of the first and the last."""
    return max(values) - (values[0] + values[-1]) / 2


def error_barrier(
    model: nn.Module,
    state_a: State,
    state_b: State,
    batches: Iterable[Batch],
    *,
    points: int = 11,
    aliased: bool = False,
    compacted: bool = False,
) -> Barrier:
    """Evaluate alpha * a + (1 - alpha) * b at evenly spaced alphas, in eval mode, on the same batches.

    Every floating entry is interpolated, batch-norm statistics included; integer buffers are those of `state_a`. The
    model itself is not touched but for its modes, which come back.

    Args:
        model: any module returning (n, classes) logits.
        state_a, state_b: complete state dicts of it.
        batches: (inputs, labels).
        points: at least 2.
        aliased: what the released script computes: the second state is overwritten by each interpolation.
        compacted: fold input-independent channels first; pays below a few percent density, equal up to rounding.

    Raises:
        ValueError: keys or shapes that are not the model's, points below 2, no batches or an empty one.
        NonFiniteError: NaN or Inf in a state on the line or among its logits.
    """
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    expected = model.state_dict()
    for name, state in (("state_a", state_a), ("state_b", state_b)):
        if odd := sorted(state.keys() ^ expected.keys()):
            raise ValueError(f"{name} must have exactly the model's entries, got or lacks {odd[0]}")
        for key, value in state.items():
            if value.shape != expected[key].shape:
                raise ValueError(f"{name} {key} must be {tuple(expected[key].shape)}, got {tuple(value.shape)}")
    batches = list(batches)
    if not batches or not all(len(y) for _, y in batches):
        raise ValueError("batches must hold images, got none or an empty one")
    alphas = [index / (points - 1) for index in range(points)]
    states = _line(state_a, state_b, alphas, aliased)
    networks: Iterable[Network] = (stateless(model, state) for state in states)
    if compacted:
        networks = compact_states(model, batches[0][0].shape[1:], states)
    with frozen(model):
        values = [_errors(network, batches, alpha) for network, alpha in zip(networks, alphas, strict=True)]
    return Barrier(alphas, [error for error, _ in values], [loss for _, loss in values])


def _line(state_a: State, state_b: State, alphas: Iterable[float], aliased: bool) -> Iterator[dict[str, Tensor]]:
    for alpha in alphas:
        state = interpolated(state_a, state_b, alpha)
        _require_finite(state.values(), alpha, "weights")
        state_b = state if aliased else state_b
        yield state


def interpolated(state_a: State, state_b: State, alpha: float) -> dict[str, Tensor]:
    """alpha * a + (1 - alpha) * b, exactly a and b at the ends and wherever they are equal."""
    return {
        name: torch.lerp(state_b[name], value, alpha) if value.is_floating_point() else value
        for name, value in state_a.items()
    }


def _require_finite(values: Iterable[Tensor], alpha: float, what: str) -> None:
    if not all(bool(value.isfinite().all()) for value in values):
        raise NonFiniteError(f"{what} at alpha {alpha:g} must be finite, got NaN or Inf: no barrier can be measured")


@torch.no_grad()
def _errors(network: Network, batches: Sequence[Batch], alpha: float) -> tuple[float, float]:
    """Share of wrong answers and mean cross-entropy over all batches."""
    wrong, loss, count = 0, 0.0, 0
    for x, y in batches:
        logits = network(x)
        _require_finite([logits], alpha, "logits")
        wrong += int((logits.argmax(1) != y).sum())
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
        count += len(y)
    return wrong / count, loss / count


@torch.enable_grad()
def fine_tuned(
    model: nn.Module,
    state: State,
    masks: Masks,
    batches: Iterable[Batch],
    *,
    lr: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> dict[str, Tensor]:
    """The state after one SGD step on each batch, in train mode, masks kept; the model itself is not touched."""
    student = copy.deepcopy(model)
    student.load_state_dict(state)
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    detach = masks.attach(student, optimizer)
    for x, y in batches:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(student(x), y).backward()
        optimizer.step()
    detach()
    return student.state_dict()


def trojan_score(
    model: nn.Module, masks: Masks, training: Iterable[Batch], sample: Sequence[Batch], *, lr: float = 1e-3
) -> Barrier:
    """The barrier between `model` under `masks` (the ticket) and the ticket after one step on each training batch.

    Args:
        model: with the trained weights; not changed.
        masks: of the ticket.
        training: (inputs, labels), ten in the paper; none at all scores 0.
        sample: what the errors are measured on.
        lr: of the fine-tuning.
    """
    ticket = masked(model.state_dict(), masks)
    return error_barrier(model, ticket, fine_tuned(model, ticket, masks, training, lr=lr), sample)
