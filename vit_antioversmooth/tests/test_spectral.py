"""Facts about spectral attention: the polynomial of the explicit map, its gradients, and that no map is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vit_antioversmooth.attnscale import attnscale_reference
from vit_antioversmooth.frequency import dc, hc
from vit_antioversmooth.spectral import (
    Spectrum,
    attnscale_spectrum,
    centred_spectrum,
    graph_filter_spectrum,
    spectral_attention,
)

HEADS, TOKENS, WIDTH = 3, 7, 4
NAMES = ("mean", "identity", "attention", "square")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads() -> list[Tensor]:
    """Query, key and value."""
    return [drawn(2, HEADS, TOKENS, WIDTH, seed=seed).requires_grad_() for seed in range(3)]


def softmax_map(query: Tensor, key: Tensor, scale: float = WIDTH**-0.5) -> Tensor:
    return (scale * query @ key.mT).softmax(-1)


def by_the_map(query: Tensor, key: Tensor, value: Tensor, spectrum: Spectrum, scale: float = WIDTH**-0.5) -> Tensor:
    """f(A) V with all four matrices written out."""
    a = softmax_map(query, key, scale)
    eye = torch.eye(TOKENS, dtype=a.dtype)
    powers = (torch.full_like(eye, 1 / TOKENS), eye, a, a @ a)
    columns = [torch.as_tensor(c, dtype=a.dtype).view(-1, 1, 1) for c in spectrum]
    return sum(column * power for column, power in zip(columns, powers, strict=True)) @ value


def same_with_gradients(spectrum: Spectrum) -> None:
    """Output and gradients of query, key, value and every tensor coefficient are those of the explicit map."""
    found = []
    for form in (spectral_attention, by_the_map):
        inputs = heads()
        own = Spectrum(*(c.clone().requires_grad_() if isinstance(c, Tensor) else c for c in spectrum))
        out = form(*inputs, own)
        learnt = [c for c in own if isinstance(c, Tensor)]
        gradients = torch.autograd.grad((out * drawn(*out.shape, seed=9)).sum(), [*inputs, *learnt], allow_unused=True)
        found.append([out, *(torch.zeros(1) if g is None else g for g in gradients)])
    assert len(found[0]) == 4 + sum(isinstance(c, Tensor) for c in spectrum)
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs.to(ours), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kept", [*NAMES, "all"])
def test_it_is_the_polynomial_of_the_map_with_all_gradients(kept: str) -> None:
    coefficients = {name: drawn(HEADS, seed=number) for number, name in enumerate(NAMES)}
    none = dict.fromkeys(NAMES, 0.0)
    same_with_gradients(Spectrum(**(coefficients if kept == "all" else {**none, kept: coefficients[kept]})))


@pytest.mark.parametrize(
    "spectrum",
    [
        Spectrum(),
        attnscale_spectrum(drawn(HEADS)),
        centred_spectrum(),
        graph_filter_spectrum(0.5, 1.0, drawn(HEADS), 4),
    ],
)
def test_the_named_settings_are_polynomials_of_the_map_too(spectrum: Spectrum) -> None:
    same_with_gradients(spectrum)


def test_as_it_stands_it_is_softmax_attention_bit_for_bit() -> None:
    query, key, value = heads()
    assert torch.equal(
        spectral_attention(query, key, value, Spectrum()),
        torch.nn.functional.scaled_dot_product_attention(query, key, value),
    )


def test_attnscale_is_a_setting() -> None:
    query, key, value = heads()
    omega = drawn(HEADS)
    theirs = attnscale_reference(softmax_map(query, key), omega) @ value
    assert torch.allclose(spectral_attention(query, key, value, attnscale_spectrum(omega)), theirs, atol=1e-12)


def test_centred_attention_has_the_high_frequencies_of_softmax_attention_and_lets_no_common_part_through() -> None:
    query, key, value = heads()
    plain = spectral_attention(query, key, value, Spectrum())
    centred = spectral_attention(query, key, value, centred_spectrum())
    assert torch.allclose(hc(centred), hc(plain), atol=1e-12)
    shifted = spectral_attention(query, key, value + drawn(WIDTH), centred_spectrum())
    assert torch.allclose(centred, shifted, atol=1e-12)


@pytest.mark.parametrize("order", [2, 4])
def test_a_graph_filter_is_the_first_order_expansion_of_the_maps_power(order: int) -> None:
    query, key, value = heads()
    w0, w1, wk = drawn(3, HEADS)
    a, eye = softmax_map(query, key), torch.eye(TOKENS, dtype=torch.float64)
    w0_, w1_, wk_ = (w.view(-1, 1, 1) for w in (w0, w1, wk))
    theirs = (w0_ * eye + w1_ * a + wk_ * (a + (order - 1) * (a @ a - a))) @ value
    ours = spectral_attention(query, key, value, graph_filter_spectrum(w0, w1, wk, order))
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_tokens_that_are_all_alike_come_out_times_the_sum_of_the_coefficients() -> None:
    query, key, _ = heads()
    value = drawn(2, HEADS, 1, WIDTH).expand(-1, -1, TOKENS, -1)
    out = spectral_attention(query, key, value, Spectrum(0.3, -0.2, 1.5, 0.7))
    assert torch.allclose(out, 2.3 * value, atol=1e-12) and torch.allclose(out, dc(out), atol=1e-12)


def test_a_given_scale_takes_the_place_of_the_usual_one() -> None:
    spectrum = Spectrum(0.1, 0.2, 0.3, 0.4)
    assert torch.allclose(
        spectral_attention(*heads(), spectrum, scale=1.3), by_the_map(*heads(), spectrum, scale=1.3), atol=1e-12
    )


def test_dropout_leaves_the_expectation_with_both_factors_of_the_square_dropped_apart() -> None:
    torch.manual_seed(0)
    query, key, value = (tensor[:1].detach().expand(20000, -1, -1, -1) for tensor in heads())
    spectrum = Spectrum(0.1, 0.2, 0.3, 0.4)
    draws = spectral_attention(query, key, value, spectrum, dropout_p=0.3)
    expected = spectral_attention(query[:1], key[:1], value[:1], spectrum)[0]
    assert ((draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)).abs().max() < 5


def test_nothing_of_the_size_of_a_map_is_kept_for_backward_and_half_precision_stays() -> None:
    query, key, value = (torch.randn(1, 2, 64, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    spectrum = Spectrum(*(torch.rand(2, requires_grad=True) for _ in NAMES))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = spectral_attention(query, key, value, spectrum)
    assert out.dtype == torch.bfloat16 and max(sizes) <= 2 * 64 * 8 < 2 * 64 * 64
