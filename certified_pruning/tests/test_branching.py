"""Branching decisions: exactly those of the released code, and their fall-backs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from certified_pruning.branching import Reduce, babsr, kfsb, kfsb_candidates, scores
from certified_pruning.rows import Relaxation
from certified_pruning.tests.nets import reference

torch.set_num_threads(1)
OFFSETS = [0, 48, 60]


def domains() -> tuple[dict[str, Tensor], Tensor, Relaxation, Tensor]:
    d = reference("branching")
    lower, upper, coef = (torch.cat([d[f"{n}0"].flatten(1), d[f"{n}1"]], 1) for n in ("lower", "upper", "lA"))
    bias = torch.cat([d["bias0"].repeat_interleave(16), d["bias1"]])
    return d, coef, Relaxation.of(lower, upper), bias


def located(neuron: Tensor) -> Tensor:
    """(layer, index within it) as the reference counts."""
    second = neuron >= 48
    return torch.stack([second.long(), neuron - 48 * second], 1)


def test_upper_lines_equal_the_reference() -> None:
    d, _, relaxation, _ = domains()
    for name, ours in (("slope", relaxation.upper), ("intercept", relaxation.intercept)):
        theirs = torch.cat([d[f"{name}0"].flatten(1), d[f"{name}1"]], 1)
        unstable = relaxation.unstable
        assert torch.allclose(ours[unstable], theirs[unstable], atol=1e-6)


@pytest.mark.parametrize("reduce", ["min", "max"])
def test_babsr_chooses_as_the_reference(reduce: Reduce) -> None:
    d, coef, relaxation, bias = domains()
    assert torch.equal(located(babsr(coef, relaxation, bias, OFFSETS, reduce)), d[f"babsr_{reduce}"])


@pytest.mark.parametrize("reduce", ["min", "max"])
@pytest.mark.parametrize("k", [1, 3])
def test_kfsb_chooses_as_the_reference(reduce: Reduce, k: int) -> None:
    d, coef, relaxation, bias = domains()
    candidates = kfsb_candidates(coef, relaxation, bias, k, reduce)
    chosen = kfsb(candidates, lambda rows, neurons: (d["tpos"][rows, neurons], d["tneg"][rows, neurons]), reduce)
    assert torch.equal(located(chosen), d[f"kfsb_{reduce}_k{k}"])


def test_stable_neurons_have_no_score_and_are_no_candidates() -> None:
    _, coef, relaxation, bias = domains()
    score, intercept = scores(coef, relaxation, bias)
    assert bool((score[~relaxation.unstable] == 0).all()) and bool((intercept[~relaxation.unstable] == 0).all())
    candidates = kfsb_candidates(100 * coef, relaxation, bias, k=60)
    for row, unstable in zip(candidates, relaxation.unstable, strict=True):
        assert bool(unstable[row[row >= 0]].all())


def test_babsr_falls_back_on_the_latest_intercept_then_on_the_first_unstable_neuron() -> None:
    lower, upper = torch.tensor([[1.0, -1.0, -1.0, -2.0, -1.0]]), torch.tensor([[2.0, 1.0, 1.0, 1.0, 1.0]])
    relaxation, bias = Relaxation.of(lower, upper), torch.zeros(5)
    # Intercepts of -5e-4 in the first and the second of two layers; no score above 1e-3.
    coef = torch.tensor([[0.0, -1e-3, 0.0, 0.0, -1e-3]])
    assert babsr(coef, relaxation, bias, [0, 3, 5]).item() == 4
    assert babsr(torch.zeros(1, 5), relaxation, bias, [0, 3, 5]).item() == 1


def test_kfsb_without_a_valid_candidate_takes_the_largest_triangle() -> None:
    lower, upper = torch.tensor([[-1.0, -2.0, -1.0]]), torch.tensor([[1.0, 3.0, 4.0]])
    candidates = kfsb_candidates(torch.zeros(1, 3), Relaxation.of(lower, upper), torch.zeros(3))
    assert candidates.tolist() == [[-1, -1, -1, -1, -1, -1, 1]]
    assert kfsb(candidates, lambda rows, neurons: pytest.fail("nothing to try")).item() == 1


def test_kfsb_prefers_the_intercept_candidate_at_equality() -> None:
    candidates = torch.tensor([[0, 1, 2, 3, 9]])
    flat = torch.tensor([1.0, 5.0, 5.0, 1.0])
    assert kfsb(candidates, lambda rows, neurons: (flat[neurons], flat[neurons])).item() == 2


def test_all_stable_rows_are_marked() -> None:
    relaxation = Relaxation.of(torch.tensor([[1.0, -2.0]]), torch.tensor([[2.0, -1.0]]))
    coef, bias = torch.ones(1, 2), torch.ones(2)
    assert babsr(coef, relaxation, bias, [0, 2]).item() == -1
    assert kfsb(kfsb_candidates(coef, relaxation, bias), lambda rows, neurons: pytest.fail("stable")).item() == -1


def test_an_unknown_reduction_is_refused() -> None:
    _, coef, relaxation, bias = domains()
    with pytest.raises(ValueError, match="reduce must be 'min' or 'max', got 'mean'"):
        babsr(coef, relaxation, bias, OFFSETS, "mean")  # type: ignore[arg-type]
