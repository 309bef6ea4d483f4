"""Facts about DC and HC, cosines, the low-pass theorem and the bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vit_antioversmooth.bounds import (
    GELU_LIPSCHITZ,
    bound_bd,
    bound_colsum,
    ffn_bound,
    logit_spread,
    mhsa_bound,
    rho,
)
from vit_antioversmooth.frequency import dc, hc, hc_ratio, lowpass_curve, mean_cosine
from vit_antioversmooth.tests import nets

THEORY, _ = nets.reference("theory_derived")
norm = torch.linalg.matrix_norm
seeds = st.integers(0, 2**31)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(ours: Tensor | float, name: str) -> bool:
    return torch.allclose(torch.as_tensor(ours, dtype=torch.float64), THEORY[name], rtol=0, atol=1e-10)


# DC and HC


def test_dc_and_hc_are_the_reference_numbers() -> None:
    assert exact(norm(hc(THEORY["X"])), "HC_norm") and exact(norm(hc(THEORY["X"])), "HC_norm_fft")
    assert exact(norm(dc(THEORY["X"])), "DC_norm")
    assert exact(norm(hc(THEORY["A"] @ THEORY["X"] @ THEORY["Wv"])), "hc_out")


@given(seeds, st.integers(1, 9), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_dc_keeps_bin_0_of_the_fourier_transform_along_tokens_and_hc_the_rest(seed: int, n: int, dim: int) -> None:
    x = drawn(seed, n, dim)
    spectrum = torch.fft.fft(x, dim=0)
    low = torch.zeros_like(spectrum)
    low[0] = spectrum[0]
    assert torch.allclose(torch.fft.ifft(low, dim=0).real, dc(x), atol=1e-12)
    assert torch.allclose(dc(x) + hc(x), x, atol=1e-12)
    rest = torch.fft.fft(x, dim=0, norm="ortho")[1:]
    assert torch.allclose(norm(hc(x)).square(), rest.abs().square().sum(), atol=1e-12)
    share = norm(hc(x)) / norm(x)
    assert torch.allclose(share, hc_ratio(x) / (1 + hc_ratio(x).square()).sqrt(), atol=1e-12)


def test_equal_tokens_have_ratio_0_and_tokens_that_cancel_infinity() -> None:
    assert hc_ratio(torch.full((3, 2), 0.5)) == 0 and hc_ratio(torch.zeros(3, 2)) == 0
    assert hc_ratio(torch.tensor([[1.0], [-1.0]])) == math.inf


def test_hc_does_not_cancel_beside_a_large_mean() -> None:
    x = 1e4 + drawn(0, 50, 8)
    ours, exactly = norm(hc(x.float())).square().item(), norm(hc(x)).square().item()
    assert abs(ours / exactly - 1) < 1e-3


# Cosines


@given(seeds, st.integers(2, 9), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_the_mean_cosine_is_that_of_all_pairs(seed: int, n: int, dim: int) -> None:
    x = drawn(seed, 2, n, dim)
    unit = x / x.norm(dim=-1, keepdim=True)
    pairs = (unit @ unit.mT).sum((-2, -1)) - n
    assert torch.allclose(mean_cosine(x), pairs / (n * (n - 1)), atol=1e-12)


def test_cosines_of_one_token_are_refused_and_of_zero_tokens_finite() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        mean_cosine(torch.ones(3, 1, 4))
    assert mean_cosine(torch.zeros(4, 3)) == 0
    assert mean_cosine(torch.tensor([[1.0, 0], [0, 0], [1, 0]])) == pytest.approx(1 / 3)


# Low-pass


def test_the_low_pass_curve_is_the_reference_one() -> None:
    assert exact(lowpass_curve(THEORY["A"], THEORY["z"], len(THEORY["hc_over_dc"])), "hc_over_dc")


def test_a_two_by_two_map_halves_the_ratio_each_time_and_never_where_the_mean_is_zero() -> None:
    a = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    assert torch.equal(lowpass_curve(a, torch.tensor([[3.0], [1]]), 3), torch.tensor([0.25, 0.125, 0.0625]))
    assert torch.equal(lowpass_curve(a, torch.tensor([[1.0], [-1]]), 3), torch.full((3,), math.inf))


def test_the_curve_falls_below_machine_precision() -> None:
    curve = lowpass_curve(THEORY["A"], THEORY["z"], 200)
    decay = (
        curve[199] / curve[99]
    ).item() ** 0.01  # a mean over many steps: lambda_2 is complex, so single ones differ
    assert curve[-1] < 1e-100 and decay == pytest.approx(THEORY["lambda2"].item(), rel=1e-3)


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_steps_than_one_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        lowpass_curve(THEORY["A"], THEORY["z"], steps)
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        rho(THEORY["A"], steps)


# Bounds


def test_factor_and_bounds_of_one_map_are_the_reference_numbers() -> None:
    a, n = THEORY["A"], len(THEORY["A"])
    assert exact(rho(a, 2000), "rho_exact") and exact(logit_spread(a), "alpha_row")
    assert exact(bound_colsum(THEORY["alpha_row"], n), "bound_colsum")
    assert exact(bound_bd(THEORY["alpha_row"], n), "bound_bd")
    assert exact(bound_colsum(THEORY["alpha_max"], n), "bound_colsum_alpha_max")
    assert THEORY["hc_out"] <= rho(a, 2000) * THEORY["w_times_hc_in"]


def test_a_two_by_two_map_has_the_bounds_worked_out_by_hand() -> None:
    a = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    alpha = logit_spread(a)
    assert rho(a).item() == pytest.approx(0.5) and alpha.item() == pytest.approx(math.log(3) / 2)
    assert bound_colsum(alpha, 2).item() == pytest.approx(1.5**0.5)
    assert bound_bd(alpha, 2).item() == pytest.approx(0.5)


@given(seeds, st.integers(2, 9), st.floats(0.1, 3))
@settings(max_examples=60, deadline=None)
def test_rho_is_the_largest_singular_value_and_within_both_bounds(seed: int, n: int, spread: float) -> None:
    a = (spread * drawn(seed, 3, n, n)).softmax(-1)
    exactly = torch.linalg.svdvals(hc(a))[..., 0]
    assert torch.allclose(rho(a, 500), exactly, rtol=1e-2, atol=1e-9) and (rho(a) <= exactly * (1 + 1e-9)).all()
    alpha = logit_spread(a)
    assert (exactly <= torch.minimum(bound_colsum(alpha, n), bound_bd(alpha, n)) * (1 + 1e-9)).all()


def test_bounds_of_equal_logits_and_of_huge_ones_stay_finite() -> None:
    assert bound_bd(0.0, 7) == 0 and bound_colsum(0.0, 7) == pytest.approx(1)
    assert bound_colsum(1e4, 7).item() == pytest.approx(7**0.5) and bound_bd(1e4, 7).isfinite()
    assert rho(torch.full((2, 5, 5), 0.2)).tolist() == pytest.approx([0, 0], abs=1e-6)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_heads_together_stay_within_the_sum_of_their_factors(seed: int) -> None:
    a, x = drawn(seed, 3, 6, 6).softmax(-1), drawn(seed + 1, 6, 8)
    value, value_bias, out, bias = drawn(1, 12, 8), drawn(2, 12), drawn(3, 8, 12), drawn(4, 8)
    heads = (x @ value.T + value_bias).unflatten(-1, (3, 4)).transpose(0, 1)
    y = (a @ heads).transpose(0, 1).flatten(1) @ out.T + bias
    factor = mhsa_bound(torch.linalg.svdvals(hc(a))[:, 0], value, out)
    assert norm(hc(y)) <= factor * norm(hc(x)) * (1 + 1e-9)
    assert norm(hc(x + y)) <= (1 + factor) * norm(hc(x)) * (1 + 1e-9)


def test_the_feed_forward_bound_holds_in_1000_trials_with_biases() -> None:
    draws = torch.Generator().manual_seed(0)
    tightest, grew = 0.0, False
    for _ in range(1000):
        first, second = (torch.randn(*s, generator=draws, dtype=torch.float64) for s in ((16, 4), (4, 16)))
        b1, b2 = 3 * torch.randn(16, generator=draws).double(), torch.randn(4, generator=draws).double()
        x = torch.randn(6, 4, generator=draws, dtype=torch.float64)
        y = torch.nn.functional.gelu(x @ first.T + b1) @ second.T + b2
        part = (norm(hc(y)) / (ffn_bound(first, second) * norm(hc(x)))).item()
        tightest, grew = max(tightest, part), grew or bool(norm(hc(x + y)) > norm(hc(x)))
    assert tightest <= 1 and tightest > 0.3 and grew


def test_the_slope_of_the_exact_gelu_is_largest_at_the_square_root_of_2() -> None:
    x = torch.linspace(-6, 6, 200001, dtype=torch.float64).requires_grad_()
    torch.nn.functional.gelu(x).sum().backward()
    assert (
        x.grad.max().item() == pytest.approx(GELU_LIPSCHITZ, abs=1e-9)
        and pytest.approx(1.129, abs=1e-3) == GELU_LIPSCHITZ
    )
