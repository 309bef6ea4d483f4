"""Facts about the cosine and contrastive losses: reference vectors, worked values, O(n d) against n x n."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diverse_vit.cosines import contrastive, cosine, cosine_across
from diverse_vit.head_cosine import attention_map, head_cosine
from diverse_vit.hyperspherical import mgd, mhs
from diverse_vit.orthogonality import cno, cno_features, so
from diverse_vit.tests import plain
from diverse_vit.tests.vectors import check_reference, reference

VECTORS = reference("embedding_losses")
MAPS = reference("attention_losses")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "absolute"), [("cosine", False), ("cosine_abs", True)])
def test_the_cosine_of_patches_is_the_authors(name: str, absolute: bool, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        check_reference(VECTORS, name, lambda z: cosine(z[:, 1:], absolute=absolute), {"h_last": VECTORS["h_last"]})
    value = cosine(VECTORS["h_last"][:, 1:].to(dtype), absolute=absolute).item()
    assert value == pytest.approx(VECTORS[name].item(), rel=1e-4)


@pytest.mark.parametrize(("name", "absolute"), [("cosine_across", False), ("cosine_across_abs", True)])
def test_the_cosine_across_layers_is_the_authors(name: str, absolute: bool) -> None:
    both = {key: VECTORS[key] for key in ("h_first", "h_last")}
    check_reference(VECTORS, name, lambda a, b: cosine_across(a[:, 1:], b[:, 1:], absolute=absolute), both)


def test_the_contrastive_loss_is_the_authors_in_both_layers() -> None:
    both = {key: VECTORS[key] for key in ("h_first", "h_last")}
    check_reference(VECTORS, "contrastive", lambda a, b: contrastive(a[:, 1:], b[:, 1:]), both)


@pytest.mark.parametrize(("name", "absolute"), [("cosine_attn", False), ("cosine_attn_abs", True)])
def test_the_cosine_of_heads_is_the_authors(name: str, absolute: bool) -> None:
    check_reference(MAPS, name, lambda a: cosine(a.flatten(2), absolute=absolute), {"attn": MAPS["attn"]})


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("contrastive_attn", contrastive),
        ("cosine_across_attn", cosine_across),
        ("cosine_across_attn_abs", lambda a, b: cosine_across(a, b, absolute=True)),
    ],
)
def test_losses_across_the_heads_of_two_layers_are_the_authors(name: str, loss: Callable[..., Tensor]) -> None:
    both = {key: MAPS[key] for key in ("attn", "attn2")}
    check_reference(MAPS, name, lambda a, b: loss(a.flatten(2), b.flatten(2)), both)


# Worked values


def test_worked_cosines_of_two_tokens() -> None:
    orthonormal, equal = torch.eye(2)[None], torch.ones(1, 2, 3)
    opposite = torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])
    assert cosine(orthonormal).item() == 0.5
    assert cosine(equal).item() == pytest.approx(1)
    assert cosine(equal, diagonal=False).item() == pytest.approx(1)
    assert cosine(opposite).item() == pytest.approx(0, abs=1e-7)
    assert cosine(opposite, absolute=True).item() == pytest.approx(1)
    assert cosine(orthonormal, diagonal=False).item() == 0
    assert cosine(orthonormal, absolute=True, margin=0.5).item() == pytest.approx(0.25)


def test_zero_tokens_have_cosine_zero_and_finite_gradients() -> None:
    for absolute in (False, True):
        z = torch.zeros(1, 4, 3, requires_grad=True)
        value = cosine(z, absolute=absolute) + contrastive(z, z)
        value.backward()
        assert value.item() == pytest.approx(math.log(2)) and z.grad is not None and z.grad.isfinite().all()


def test_worked_contrastive_losses() -> None:
    eye, equal = torch.eye(2)[None], torch.ones(1, 5, 3)
    assert contrastive(eye, eye).item() == pytest.approx(0.313262, abs=1e-6)
    assert contrastive(equal, equal).item() == pytest.approx(math.log(2))


def test_worked_cosines_of_two_heads() -> None:
    eye, swap = torch.eye(2), torch.eye(2).flip(0)
    alike, apart = (torch.stack(pair)[None].flatten(2) for pair in ((eye, eye), (eye, swap)))
    assert cosine(alike).item() == pytest.approx(1) and cosine(apart).item() == pytest.approx(0.5)
    assert cosine(apart, absolute=True).item() == pytest.approx(0.5)


@pytest.mark.parametrize("wrong", [torch.ones(2, 1, 3), torch.ones(3)])
def test_fewer_than_two_rows_are_refused(wrong: Tensor) -> None:
    for loss in (cosine, lambda z: cosine_across(z, z), lambda z: contrastive(z, z)):
        with pytest.raises(ValueError, match=r"with at least 2 rows, got shape"):
            loss(wrong)


def test_layers_of_different_shapes_and_odd_margins_are_refused() -> None:
    a, b = torch.ones(1, 3, 4), torch.ones(1, 4, 4)
    for loss in (cosine_across, contrastive):
        with pytest.raises(ValueError, match=r"same shape, got \(1, 3, 4\) and \(1, 4, 4\)"):
            loss(a, b)
    with pytest.raises(ValueError, match=r"margin must be in \[0, 1\), got 1"):
        cosine(a, margin=1)


# Against the n x n map

SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(1, 7), st.integers(0, 2**31))


def equal_with_gradients(loss: Callable[..., Tensor], oracle: Callable[..., Tensor], *inputs: Tensor) -> None:
    found = []
    for function in (loss, oracle):
        own = [value.clone().requires_grad_() for value in inputs]
        value = function(*own)
        found.append((value, *torch.autograd.grad(value, own)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@given(SHAPES, st.booleans(), st.booleans(), st.sampled_from([0.0, 0.3]))
@settings(max_examples=40, deadline=None)
def test_the_cosine_equals_the_mean_over_the_map(
    shape: tuple[int, ...], absolute: bool, diagonal: bool, margin: float
) -> None:
    *sizes, seed = shape
    z = torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    options = {"absolute": absolute, "diagonal": diagonal, "margin": margin}
    equal_with_gradients(lambda z: cosine(z, **options, chunk=4), lambda z: plain.cosine(z, **options), z)


@given(SHAPES, st.booleans())
@settings(max_examples=30, deadline=None)
def test_losses_across_layers_equal_those_over_the_map(shape: tuple[int, ...], absolute: bool) -> None:
    *sizes, seed = shape
    a, b = torch.randn(2, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    options = {"absolute": absolute}
    equal_with_gradients(
        lambda a, b: cosine_across(a, b, **options, chunk=4), lambda a, b: plain.cosine_across(a, b, **options), a, b
    )
    equal_with_gradients(contrastive, plain.contrastive, a, b)


def test_absolute_cosines_never_hold_the_whole_map() -> None:
    z = torch.randn(2, 64, 4, requires_grad=True)
    largest = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cosine(z, absolute=True, chunk=8)
    assert largest <= z.numel() < 2 * 64 * 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert cosine(z).dtype == torch.float32
    assert cosine(z).item() == pytest.approx(cosine(z.double()).item(), abs=1e-6)
    assert contrastive(z, z).item() == pytest.approx(contrastive(z.double(), z.double()).item(), abs=1e-6)


NAMED: dict[Callable[..., Any], tuple[str, ...]] = {  # the tensors of each loss that `exact` decorates
    cosine: ("z",),
    cosine_across: ("a", "b"),
    contrastive: ("h_first", "h_last"),
    attention_map: ("q", "k"),
    head_cosine: ("q", "k"),
    mhs: ("z",),
    mgd: ("z",),
    so: ("z",),
    cno: ("w", "x1", "x2"),
    cno_features: ("z", "x1", "x2"),
}


@pytest.mark.parametrize("loss", NAMED, ids=lambda loss: loss.__name__)
def test_every_loss_can_be_called_by_keywords_in_any_order(loss: Callable[..., Any]) -> None:
    start = torch.Generator().manual_seed(0)
    shape, names = (2, 2, 4, 3) if "q" in NAMED[loss] else (2, 4, 3), NAMED[loss]
    values = [
        torch.randn(2, 4, 1, generator=start) if n[0] == "x" else torch.randn(shape, generator=start) for n in names
    ]
    more = {"normalise": True} if loss is so else {}
    expected = loss(*values, **more)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(**more, **dict(reversed(list(zip(names, values, strict=True)))))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match=f"missing .*'{names[0]}'"):
        loss(**more)
