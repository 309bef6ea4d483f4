"""The reference vectors, and the check of a loss and its gradients against them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "reference"


def reference(name: str) -> dict[str, Tensor]:
    """Arrays of a reference file."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as archive:
        return {key: torch.from_numpy(np.asarray(archive[key])) for key in archive}


def check_reference(
    vectors: dict[str, Tensor], name: str, loss: Callable[..., Tensor], arguments: dict[str, Tensor]
) -> None:
    """Value and gradients of `loss` are those of the authors' function."""
    inputs = [value.clone().requires_grad_() for value in arguments.values()]
    value = loss(*inputs)
    assert value.item() == pytest.approx(vectors[name].item(), rel=1e-10, abs=1e-10)
    gradients = torch.autograd.grad(value, inputs)
    for argument, gradient in zip(arguments, gradients, strict=True):
        torch.testing.assert_close(gradient, vectors[f"{name}.grad_{argument}"], rtol=1e-8, atol=1e-10)
