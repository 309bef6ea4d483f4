"""Facts about hyperspherical separation, the Gram determinant and gradient diversity."""

from __future__ import annotations

import pytest
import torch

from diverse_vit.gradient_diversity import gradient_diversity
from diverse_vit.hyperspherical import mgd, mhs
from diverse_vit.tests.vectors import check_reference, reference

WEIGHTS = reference("weight_losses")
MAPS = reference("attention_losses")
EMBEDDINGS = reference("embedding_losses")


@pytest.mark.parametrize("name", ["mhs", "mgd"])
@pytest.mark.parametrize("tag", ["square", "wide", "tall"])
def test_losses_of_weight_rows_are_the_authors(name: str, tag: str) -> None:
    w = WEIGHTS[f"{tag}.W"].clone().requires_grad_()
    loss = {"mhs": mhs, "mgd": mgd}[name](w)
    assert loss.item() == pytest.approx(WEIGHTS[f"{tag}.{name}"].item(), rel=1e-8)
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0], WEIGHTS[f"{tag}.{name}.grad"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "loss"), [("mhs", mhs), ("mgd", mgd)])
def test_losses_of_features_are_the_authors(name: str, loss: object) -> None:
    check_reference(EMBEDDINGS, f"{name}_feature_with_prefix", loss, {"h_last": EMBEDDINGS["h_last"]})
    check_reference(MAPS, f"{name}_feature", lambda a: loss(a.flatten(2)), {"attn": MAPS["attn"]})


def test_gradient_diversity_is_the_authors() -> None:
    ours = gradient_diversity(EMBEDDINGS["grad_tensor"]).item()
    assert ours == pytest.approx(EMBEDDINGS["gradient_diversity"].item(), rel=1e-10)


def test_worked_values_of_orthonormal_rows() -> None:
    assert mhs(torch.eye(2)).item() == pytest.approx(-2)
    assert mhs(torch.eye(3)).item() == pytest.approx(-2)
    assert mhs(torch.eye(3).double(), legacy_ties=True).item() == pytest.approx(-6)
    assert mgd(torch.eye(2)).item() == pytest.approx(0.018483, abs=2e-5)


def test_only_the_first_of_tied_pairs_gets_a_gradient() -> None:
    z = torch.eye(3).requires_grad_()
    mhs(z).backward()
    assert z.grad is not None and z.grad[:2].abs().sum() > 0 and (z.grad[2] == 0).all()


def test_equal_rows_are_seen_unlike_in_the_released_form() -> None:
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert mhs(z).item() == 0 and mhs(z, legacy_ties=True).item() == pytest.approx(-4, rel=1e-4)


def test_equal_gradients_have_diversity_one_over_n_and_none_at_all_almost_zero() -> None:
    assert gradient_diversity(torch.ones(2, 5, 3)).item() == pytest.approx(-0.2)
    nothing = torch.zeros(1, 5, 3, requires_grad=True)
    value = gradient_diversity(nothing)
    value.backward()
    assert value.item() == pytest.approx(-1e-8) and nothing.grad is not None and nothing.grad.isfinite().all()


@pytest.mark.parametrize("loss", [mhs, mgd])
def test_a_single_row_is_refused(loss: object) -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        loss(torch.ones(1, 4))
