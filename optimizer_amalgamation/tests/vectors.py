"""The reference vectors."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from optimizer_amalgamation.rule import Context, Rule, State, Weights

REFERENCE = Path(__file__).parent / "reference"


def reference(name: str) -> dict[str, Tensor]:
    """The arrays of a reference file."""
    with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as archive:
        return {key: torch.from_numpy(np.asarray(archive[key])) for key in archive}


def weights_of(arrays: dict[str, Tensor]) -> Weights:
    """Those among them that are weights."""
    return {name.removeprefix("w_"): array for name, array in arrays.items() if name.startswith("w_")}


def stepped(
    rule: Rule, weights: Weights, grads: Tensor, context: Context | None = None, state: State | None = None
) -> tuple[Tensor, State]:
    """Updates (T, ..., n) for gradients (T, ..., n), and the last state."""
    state = rule.zero_state(grads[0], context) if state is None else state
    found = []
    for g in grads:
        update, state = rule.step(weights, state, g, context)
        found.append(update)
    return torch.stack(found), state


def student_weights() -> Weights:
    """Weights that the authors released, for tests only."""
    return weights_of(reference("rnnprop_released"))
