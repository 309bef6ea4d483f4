"""Facts about the LSTM teachers."""

from __future__ import annotations

import pytest
import torch

from symbolic_l2o.teachers import KINDS, LSTMTeacher
from symbolic_l2o.tests.vectors import load_teacher, reference

TAGS = {"rp_s": "rps", "rp": "rp", "rp_5": "rp5", "dm_raw": "dm"}


@pytest.mark.parametrize(("kind", "tag"), TAGS.items())
def test_outputs_and_states_are_those_of_the_released_networks(kind: str, tag: str) -> None:  # acceptance 5
    arrays = reference("teachers")
    teacher = load_teacher(kind, arrays, f"{tag}.param.")
    gradients = arrays[f"{tag}.grads"]
    moments, state = teacher.features.init(gradients[0]), teacher.init_state(gradients[0])
    for g, wanted in zip(gradients, arrays[f"{tag}.out"], strict=True):
        out, state = teacher.step(teacher.features(g, moments), state)
        assert torch.allclose(out, wanted, atol=1e-5)
    for layer in range(len(KINDS[kind].lstm)):
        assert torch.allclose(state[2 * layer], arrays[f"{tag}.h{layer}"], atol=1e-5)
        assert torch.allclose(state[2 * layer + 1], arrays[f"{tag}.c{layer}"], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "weights", "floats"),
    [
        ("dm", 5301, 80),
        ("dm_raw", 5221, 80),
        ("rp", 6801, 82),
        ("rp_s", 446, 16),
        ("rp_si", 452, 17),
        ("rp_5", 1171, 29),
    ],
)
def test_sizes_are_the_papers(kind: str, weights: int, floats: int) -> None:  # acceptance 5
    teacher = LSTMTeacher(kind)
    assert sum(p.numel() for p in teacher.parameters()) == weights
    assert teacher.state_floats == floats


def test_coordinates_do_not_mix() -> None:  # acceptance 6
    torch.manual_seed(0)
    teacher = LSTMTeacher("rp_s").double()
    gradients = torch.randn(8, 12, dtype=torch.float64)
    order = torch.randperm(12)

    def outputs(g: torch.Tensor) -> torch.Tensor:
        moments, state, found = teacher.features.init(g[0]), teacher.init_state(g[0]), []
        for row in g:
            out, state = teacher.step(teacher.features(row, moments), state)
            found.append(out)
        return torch.stack(found)

    assert torch.allclose(outputs(gradients)[:, order], outputs(gradients[:, order]), rtol=1e-12)
    assert torch.allclose(outputs(gradients)[:, :5], outputs(gradients[:, :5]), rtol=1e-12)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of dm, dm_raw, rp, .*got 'gru'"):
        LSTMTeacher("gru")
