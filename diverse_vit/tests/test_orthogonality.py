"""Facts about soft and conditional orthogonality: reference vectors, worked values, the optimum, Rayleigh's bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diverse_vit.cosines import unit
from diverse_vit.orthogonality import cno, cno_features, cno_starts, so
from diverse_vit.tests import plain
from diverse_vit.tests.vectors import check_reference, reference

WEIGHTS = reference("weight_losses")
MAPS = reference("attention_losses")
EMBEDDINGS = reference("embedding_losses")
TAGS = ["square", "wide", "tall"]


def orthogonal(size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed)))[0]


def weight(tag: str) -> Tensor:
    return WEIGHTS[f"{tag}.W"].clone().requires_grad_()


def starts(tag: str, name: str = "cno") -> tuple[Tensor, Tensor]:
    return WEIGHTS[f"{tag}.{name}.x_largest"], WEIGHTS[f"{tag}.{name}.x_smallest"]


@pytest.mark.parametrize("tag", TAGS)
def test_cno_of_a_weight_and_its_estimates_are_the_authors(tag: str) -> None:
    w = weight(tag)
    loss, largest, smallest = cno(w, *starts(tag))
    assert loss.item() == pytest.approx(WEIGHTS[f"{tag}.cno"].item(), rel=1e-10)
    assert largest.item() == pytest.approx(WEIGHTS[f"{tag}.cno.largest"].item(), rel=1e-10)
    assert smallest.item() == pytest.approx(WEIGHTS[f"{tag}.cno.smallest"].item(), rel=1e-8, abs=1e-10)
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0], WEIGHTS[f"{tag}.cno.grad"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("tag", TAGS)
def test_the_inverse_form_is_that_of_the_transpose(tag: str) -> None:
    w = weight(tag)
    loss = cno(w.mT, *starts(tag, "cno_inverse"))[0]
    assert loss.item() == pytest.approx(WEIGHTS[f"{tag}.cno_inverse"].item(), rel=1e-10)
    wanted = WEIGHTS[f"{tag}.cno_inverse.grad"]
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0], wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("tag", TAGS)
def test_so_of_a_weight_is_the_authors(tag: str) -> None:
    w = weight(tag)
    loss = so(w, normalise=False)
    assert loss.item() == pytest.approx(WEIGHTS[f"{tag}.so"].item(), rel=1e-10)
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0], WEIGHTS[f"{tag}.so.grad"], rtol=1e-10, atol=1e-10)


def test_so_and_cno_of_features_are_the_authors() -> None:
    check_reference(
        EMBEDDINGS, "so_embedding_with_prefix", lambda z: so(z, normalise=True), {"h_last": EMBEDDINGS["h_last"]}
    )
    check_reference(MAPS, "so_attn", lambda a: so(a.flatten(2), normalise=False), {"attn": MAPS["attn"]})
    x = [EMBEDDINGS[f"cno_embedding.x_{name}"] for name in ("largest", "smallest")]
    check_reference(
        EMBEDDINGS,
        "cno_embedding_with_prefix",
        lambda z: cno_features(unit(z), *x),
        {"h_last": EMBEDDINGS["h_last"]},
    )
    x = [MAPS[f"cno_attn.x_{name}"] for name in ("largest", "smallest")]
    check_reference(MAPS, "cno_attn", lambda a: cno_features(a.flatten(2), *x), {"attn": MAPS["attn"]})


# Worked values and the optimum


def test_the_worked_example_of_the_specification() -> None:
    x1, x2 = torch.tensor([[1.0], [1.0]]).double(), torch.tensor([[1.0], [2.0]]).double()
    loss, largest, smallest = cno(torch.diag(torch.tensor([2.0, 1.0]).double()), x1, x2)
    assert largest.item() == pytest.approx(65 / 17)
    assert smallest.item() == pytest.approx(1.0029, abs=1e-4) and loss.item() == pytest.approx(7.9558, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["identity", "zero", "orthogonal", "three times orthogonal"])
def test_at_the_optimum_loss_and_gradient_are_zero(kind: str, dtype: torch.dtype) -> None:
    w = {
        "identity": torch.eye(48, dtype=dtype),
        "zero": torch.zeros(48, 48, dtype=dtype),
        "orthogonal": orthogonal(48, dtype),
        "three times orthogonal": 3 * orthogonal(48, dtype),
    }[kind].requires_grad_()
    loss, largest, smallest = cno(w, *torch.rand(2, 48, 1, generator=torch.Generator().manual_seed(0)).to(dtype))
    loss.backward()
    assert loss.item() == 0 and largest == smallest
    assert w.grad is not None and (w.grad == 0).all()


def test_one_matrix_at_its_optimum_leaves_the_others_alone() -> None:
    x1, x2 = torch.rand(2, 2, 16, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = torch.stack([torch.eye(16, dtype=torch.float64), WEIGHTS["square.W"]]).requires_grad_()
    losses, *_ = cno(w, x1, x2)
    (gradient,) = torch.autograd.grad(losses.sum(), w)
    alone = WEIGHTS["square.W"].clone().requires_grad_()
    expected = torch.autograd.grad(cno(alone, x1[1], x2[1])[0], alone)[0]
    assert (gradient[0] == 0).all()
    torch.testing.assert_close(gradient[1], expected, rtol=1e-12, atol=1e-12)


def test_rotating_weights_and_starts_changes_nothing_and_scaling_scales_to_the_fourth() -> None:
    w, (x1, x2), q = WEIGHTS["tall.W"], starts("tall"), orthogonal(20)
    value = cno(w, x1, x2)[0].item()
    assert cno(q @ w, q @ x1, q @ x2)[0].item() == pytest.approx(value, rel=1e-10)
    assert cno(3 * w, x1, x2)[0].item() == pytest.approx(81 * value, rel=1e-10)


def test_estimates_lie_within_the_true_spectrum_of_a_thousand_matrices() -> None:
    draws = torch.Generator().manual_seed(0)
    w = torch.randn(1000, 6, 9, dtype=torch.float64, generator=draws)
    _, largest, smallest = cno(w, *torch.rand(2, 1000, 6, 1, dtype=torch.float64, generator=draws))
    true = torch.linalg.eigvalsh(w @ w.mT)
    assert (largest <= true[:, -1] * (1 + 1e-12)).all() and (smallest >= true[:, 0] * (1 - 1e-9)).all()


def test_more_power_steps_come_nearer_to_the_true_extremes() -> None:
    w, (x1, x2) = WEIGHTS["wide.W"], starts("wide")
    true = torch.linalg.eigvalsh(w @ w.mT)
    gaps = [(true[-1] - true[0] - cno(w, x1, x2, power_iters=steps)[0].sqrt()).item() for steps in (1, 3, 30)]
    assert gaps[0] > gaps[1] > gaps[2] >= -1e-9


# The closed form against W W^T


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
def test_value_and_gradient_equal_those_through_w_w_transposed(shape: tuple[int, int]) -> None:
    draws = torch.Generator().manual_seed(1)
    w = torch.randn(3, *shape, dtype=torch.float64, generator=draws).requires_grad_()
    x1, x2 = torch.rand(2, 3, shape[0], 1, dtype=torch.float64, generator=draws)
    upstream = torch.randn(3, dtype=torch.float64, generator=draws)
    ours = (cno(w, x1, x2)[0] * upstream).sum()
    theirs = (torch.stack([plain.cno(*parts)[0] for parts in zip(w, x1, x2, strict=True)]) * upstream).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(value, w)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_finite_differences() -> None:
    w = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    x1, x2 = torch.rand(2, 2, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(lambda w: cno(w, x1, x2)[0], w)


def test_only_vectors_are_kept_beside_the_weight() -> None:
    w = torch.randn(1, 64, 64, requires_grad=True)
    sizes = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cno(w, *torch.rand(2, 1, 64, 1))
    assert sorted(sizes)[-1] == 64 * 64 and sorted(sizes)[-2] <= 6 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_weights_stay_finite_in_float32(dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(0)
    w = (10 * torch.randn(96, 96, generator=draws)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        loss = cno(w, *torch.rand(2, 96, 1, generator=draws))[0]
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and w.grad is not None and w.grad.dtype == dtype
    if dtype != torch.float16:  # such gradients are beyond its range
        assert w.grad.isfinite().all()


def test_two_hundred_steps_narrow_the_true_spectrum() -> None:
    draws = torch.Generator().manual_seed(0)
    w = (torch.randn(16, 16, generator=draws) / 4).requires_grad_()

    def spread() -> float:
        values = torch.linalg.eigvalsh(w.detach() @ w.detach().mT)
        return (values[-1] - values[0]).item()

    before, optimizer = spread(), torch.optim.SGD([w], lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        cno(w, *(x[0] for x in cno_starts(16, 1, draws, w)))[0].backward()
        optimizer.step()
    assert spread() < 0.8 * before


def test_soft_orthogonality_of_nothing_is_the_number_of_rows() -> None:
    assert so(torch.zeros(3, 5), normalise=False).item() == 3
    assert so(torch.eye(3), normalise=False).item() == 0


def test_both_sides_of_the_trace_identity_agree() -> None:
    z = torch.randn(2, 7, 3, dtype=torch.float64)
    expected = (z @ z.mT - torch.eye(7, dtype=torch.float64)).square().sum((-2, -1)).mean()
    torch.testing.assert_close(so(z, normalise=False), expected)


def test_starts_are_uniform_as_released_or_normal() -> None:
    like, draws = torch.zeros(1), torch.Generator().manual_seed(0)
    x1, x2 = cno_starts(1000, 2, draws, like)
    assert x1.shape == (2, 1000, 1) and x1.min() >= 0 and x2.max() < 1 and abs(x1.mean() - 0.5) < 0.05
    assert cno_starts(1000, 1, draws, like, start="normal")[0].min() < -1
    with pytest.raises(ValueError, match="start must be uniform or normal, got 'ones'"):
        cno_starts(3, 1, draws, like, start="ones")


def test_starts_and_power_steps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"w, x1, x2 must be .* got \(3, 4\), \(4, 1\), \(4, 1\)"):
        cno(torch.ones(3, 4), torch.ones(4, 1), torch.ones(4, 1))
    with pytest.raises(ValueError, match="power_iters must be at least 1, got 0"):
        cno(torch.ones(3, 4), torch.ones(3, 1), torch.ones(3, 1), power_iters=0)
