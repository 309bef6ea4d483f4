"""Facts about the cosine between heads: equal to that of the whole maps, value and gradients, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diverse_vit.head_cosine import attention_map, head_cosine
from diverse_vit.tests import plain
from diverse_vit.tests.vectors import reference


def inputs(*, bias: tuple[int, int] | None = None) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 3, 7, 4, dtype=torch.float64, generator=draws) for _ in range(2)]
    if bias:
        parts.append(torch.randn(*bias, 7, 7, dtype=torch.float64, generator=draws))
    return [part.requires_grad_() for part in parts]


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
@pytest.mark.parametrize("bias", [None, (1, 3), (2, 1), (2, 3), (1, 1)])
def test_value_and_gradients_are_those_of_the_whole_maps(chunk: int, bias: tuple[int, int] | None) -> None:
    parts = inputs(bias=bias)
    ours, theirs = head_cosine(*parts, chunk=chunk), plain.head_cosine(*parts)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for own, other in zip(torch.autograd.grad(ours, parts), torch.autograd.grad(theirs, parts), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda q, k, b: head_cosine(q, k, b, chunk=3), inputs(bias=(1, 3)))


def test_the_reference_heads_have_the_authors_cosine() -> None:
    vectors = reference("attention_losses")
    logits = vectors["attn"].log()  # softmax(log A) is A: q = log A, k = I
    eye = torch.eye(9, dtype=torch.float64).expand(3, 4, 9, 9)
    assert head_cosine(logits, eye, chunk=4).item() == pytest.approx(vectors["cosine_attn"].item(), rel=1e-10)


def test_equal_heads_have_cosine_one_and_identity_and_swap_one_half() -> None:
    far = 40 * torch.eye(2)[None]
    eye = torch.eye(2).expand(1, 2, 2, 2)
    assert head_cosine(torch.stack([far, far], 1), eye).item() == pytest.approx(1)
    assert head_cosine(torch.stack([far, far.flip(1)], 1), eye).item() == pytest.approx(0.5)


def test_rows_of_a_map_sum_to_one() -> None:
    maps = attention_map(*inputs(bias=(1, 3)))
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))


def test_what_is_kept_for_backward_is_no_map() -> None:
    q, k = torch.randn(2, 1, 4, 128, 8, requires_grad=True)
    sizes = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head_cosine(q, k)
    assert max(sizes) == q.numel() < 4 * 128 * 128


def test_a_single_head_is_refused() -> None:
    with pytest.raises(ValueError, match="attention must have at least 2 heads, got 1"):
        head_cosine(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))


def test_what_is_differentiable_once_says_so() -> None:
    parts = inputs()
    (gradient, _) = torch.autograd.grad(head_cosine(*parts), parts, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
