"""Facts about the LSTM step: torch's, with its derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symbolic_l2o.lstm import elu, lstm_step
from symbolic_l2o.teachers import KINDS, LSTMTeacher


def torchs(teacher: LSTMTeacher, z: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The step in torch's own layers."""
    x, kept = z if teacher.before is None else F.elu(teacher.before(z)), []
    for number, cell in enumerate(teacher.cells):
        x, memory = cell(x, (state[2 * number], state[2 * number + 1]))
        kept += [x, memory]
    out = teacher.output(x).squeeze(-1)
    return torch.tanh(out) if teacher.saturates else out, kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_and_its_weight_gradients_are_those_of_torchs_layers(kind: str) -> None:
    torch.manual_seed(0)
    teacher = LSTMTeacher(kind).double()
    z = 3 * torch.randn(6, 11, len(teacher.features.names), dtype=torch.float64)
    weights, found = torch.randn(6, 11, dtype=torch.float64), []
    for step in (teacher.step, lambda z, state: torchs(teacher, z, state)):
        state, total, outputs = teacher.init_state(z[0, :, 0]), torch.zeros((), dtype=torch.float64), []
        for now, weight in zip(z, weights, strict=True):
            out, state = step(now, state)
            total = total + (weight * out).sum()
            outputs.append(out)
        gradients = torch.autograd.grad(total + state[-1].square().sum(), list(teacher.parameters()))
        found.append([*outputs, *state, *gradients])
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-10, atol=1e-13)


def test_the_steps_derivatives_are_right_in_every_argument() -> None:
    torch.manual_seed(0)
    cell = nn.LSTMCell(3, 2).double()
    x, h, c = (torch.randn(rows, 4, dtype=torch.float64, requires_grad=True) for rows in (3, 2, 2))
    assert torch.autograd.gradcheck(lambda *inputs: lstm_step(cell, *inputs), (x, h, c))
    y = torch.tensor([-40.0, -1.5, -1e-3, 2e-3, 1.0, 40.0], dtype=torch.float64, requires_grad=True)
    assert torch.allclose(elu(y), F.elu(y), atol=1e-15) and torch.autograd.gradcheck(elu, y)


def test_single_precision_loses_no_more_than_torchs_layers_do() -> None:
    torch.manual_seed(0)
    teacher = LSTMTeacher("rp_s")
    z, weights = torch.randn(20, 500, 2), 0.3 + torch.randn(20, 500)

    def gradient(step: object, z: Tensor, weights: Tensor) -> Tensor:
        state, total = teacher.init_state(z[0, :, 0]), torch.zeros((), dtype=z.dtype)
        for now, weight in zip(z, weights, strict=True):
            out, state = step(now, state)  # type: ignore[operator]
            total = total + (weight * out).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(teacher.parameters()))]).double()

    ours = gradient(teacher.step, z, weights)
    exact = gradient(teacher.double().step, z.double(), weights.double())
    assert float((ours - exact).norm() / exact.norm()) < 1e-6


def test_nothing_given_is_changed() -> None:
    torch.manual_seed(0)
    cell = nn.LSTMCell(3, 2)
    given = [torch.randn(rows, 4) for rows in (3, 2, 2)]
    before = [tensor.clone() for tensor in given]
    lstm_step(cell, *given)
    x = torch.randn(9)
    copy = x.clone()
    elu(x)
    assert all(torch.equal(a, b) for a, b in zip([*given, x], [*before, copy], strict=True))
