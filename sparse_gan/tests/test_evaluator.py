"""Facts about the scores: closed forms of the Fréchet distance, KID by its definition, manifolds by hand, bad input."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from common.config import UserError
from sparse_gan.fidelity import fidelity_scores
from sparse_gan.generative_evaluator import (
    GenerativeEvaluator,
    frechet_distance,
    gaussian,
    kernel_distance,
    precision_recall,
)
from sparse_gan.hinge import discriminator_loss, generator_loss
from sparse_gan.images import as_bytes, blurred, from_bytes, prepare


def test_shifted_gaussians_are_apart_by_the_square_of_the_shift() -> None:
    mean, eye = torch.arange(6.0), torch.eye(6)
    assert frechet_distance(torch.zeros(6), eye, mean, eye) == pytest.approx(55, rel=1e-12)


def test_scaled_gaussians_are_apart_by_the_difference_of_scales_in_each_dimension() -> None:
    zero, eye = torch.zeros(5), torch.eye(5)
    assert frechet_distance(zero, 9 * eye, zero, 4 * eye) == pytest.approx(5 * (3 - 2) ** 2, rel=1e-12)


def covariance(rank: int, size: int, seed: int) -> Tensor:
    root = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T


@pytest.mark.parametrize("rank", [12, 3])
def test_equal_gaussians_are_not_apart_even_where_they_are_flat(rank: int) -> None:
    mean, cov = torch.randn(12), covariance(rank, 12, 0)
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-6 * 12


def test_the_distance_is_that_of_the_matrix_square_root_and_symmetric() -> None:
    one, two, zero = covariance(9, 8, 1), covariance(9, 8, 2), torch.zeros(8)
    root = scipy.linalg.sqrtm((one @ two).numpy())
    wanted = float(one.trace() + two.trace()) - 2 * float(np.trace(root).real)
    assert frechet_distance(zero, one, zero, two) == pytest.approx(wanted, rel=1e-8)
    assert frechet_distance(zero, two, zero, one) == pytest.approx(wanted, rel=1e-8)


def test_statistics_are_numpys_and_too_few_or_infinite_features_are_refused() -> None:
    x = torch.randn(20, 4)
    mean, cov = gaussian(x)
    assert np.allclose(mean, x.double().mean(0)) and np.allclose(cov, np.cov(x.double().numpy(), rowvar=False))
    with pytest.raises(ValueError, match=r"features must be \(n, d\) with n > d, got \(4, 4\)"):
        gaussian(x[:4])
    x[3, 2] = torch.inf
    with pytest.raises(ValueError, match="features must be finite, got 1 values that are not"):
        gaussian(x)
    with pytest.raises(ValueError, match="means and covariances must be finite"):
        frechet_distance(mean, cov * torch.nan, mean, cov)
    with pytest.raises(ValueError, match=r"must be \(d,\) and \(d, d\), got"):
        frechet_distance(mean, cov, mean[:2], cov)


def test_kid_is_the_mean_kernel_within_less_the_mean_kernel_between() -> None:
    x, y = torch.randn(5, 3), torch.randn(4, 3) + 1

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a.double() @ b.double()) / 3 + 1) ** 3

    within = sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 20
    within += sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 12
    between = sum(kernel(a, b) for a in x for b in y) / 20
    assert kernel_distance(x, y) == pytest.approx(within - 2 * between)


class Largest(TorchDispatchMode):
    """Remembers the entries of the largest tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(t.numel() for t in pytree.tree_leaves(made) if isinstance(t, Tensor))])
        return made


def test_all_pairs_are_never_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(60, 3), torch.randn(50, 3) + 0.5
    whole = kernel_distance(x, y), *precision_recall(x, y)
    monkeypatch.setattr("sparse_gan.generative_evaluator.ROWS", 7)
    with Largest() as largest:
        blocks = kernel_distance(x, y), *precision_recall(x, y)
    assert largest.entries <= 7 * 60 and blocks == pytest.approx(whole, rel=1e-12)


def test_precision_and_recall_of_points_on_a_line() -> None:
    real = torch.tensor([[0.0], [1], [2], [3], [10]])
    fake = torch.tensor([[0.5], [1.5], [2.5], [100], [101]])
    precision, recall = precision_recall(real, fake, neighbours=1)
    # balls of reals: radius 1 (7 around 10); of fakes: radius 1: 10 is in no fake's ball
    assert (precision, recall) == (0.6, 0.8)


def test_equal_sets_have_full_precision_and_recall_and_far_ones_none() -> None:
    x = torch.randn(50, 4)
    assert precision_recall(x, x) == (1.0, 1.0) and precision_recall(x, x + 100) == (0.0, 0.0)


def test_the_evaluator_scores_features_of_batches() -> None:
    evaluator = GenerativeEvaluator(lambda images: images.flatten(1)[:, :3], batch_size=7)
    draws = torch.Generator().manual_seed(0)
    real, fake = (torch.rand(40, 1, 2, 2, generator=draws) * 2 - 1 for _ in range(2))
    scores = evaluator.score(real, fake)
    assert set(scores) == {"fd", "kid", "precision", "recall"}
    assert scores["fd"] == pytest.approx(evaluator.distance(real, fake)) and scores["fd"] > 0
    same = evaluator.score(real, real)
    assert abs(same["fd"]) < 1e-9 and (same["precision"], same["recall"]) == (1, 1) and same["kid"] < 0
    assert torch.equal(evaluator.features(real), real.flatten(1)[:, :3])


@pytest.mark.parametrize("wrong", [1.5, -2.0, float("nan")])
def test_images_out_of_range_are_refused(wrong: float) -> None:
    images = torch.zeros(4, 1, 2, 2)
    images[1, 0, 0, 1] = wrong
    for reads in (GenerativeEvaluator(lambda x: x).features, as_bytes):
        with pytest.raises(ValueError, match=r"images must be in \[-1, 1\], got values in"):
            reads(images)


def test_fid_proper_is_asked_of_torch_fidelity_with_colour_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def calculate_metrics(input1: Any, input2: Any, **options: Any) -> dict[str, float]:
        assert (len(input1), len(input2), options["kid_subset_size"]) == (3, 5, 3)
        assert input1[0].shape == (3, 4, 4) and input1[0].dtype == torch.uint8
        names = ("frechet_inception_distance", "inception_score_mean", "kernel_inception_distance_mean")
        return dict(zip(names, (1.0, 2.0, 3.0), strict=True))

    fake, real = torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.zeros(5, 1, 4, 4, dtype=torch.uint8)
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(calculate_metrics=calculate_metrics))
    assert fidelity_scores(fake, real) == {"fid": 1.0, "inception_score": 2.0, "inception_kid": 3.0}
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match=r"eval\.fidelity needs torch-fidelity: pip install torch-fidelity"):
        fidelity_scores(fake, real)


# Losses and images


def test_the_hinge_losses_by_hand() -> None:
    two, zero = torch.full((3,), 2.0), torch.zeros(3)
    assert discriminator_loss(two, -two) == 0 and discriminator_loss(zero, zero) == 2
    assert discriminator_loss(torch.tensor([0.5]), torch.tensor([-0.25])) == 1.25
    assert generator_loss(torch.tensor([0.3])) == pytest.approx(-0.3)


def test_digits_are_padded_to_32_and_pooled_and_padded_to_16() -> None:
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    large, small = prepare(images, 32), prepare(images, 16)
    assert torch.allclose(large[:, :, 2:30, 2:30], images.float() / 127.5 - 1, atol=1e-6)
    assert large[:, :, :2].max() == -1 == large[:, :, :, 30:].min() == small[:, :, 15].max()
    assert small[0, 0, 1, 1] == pytest.approx(images[0, 0, :2, :2].float().mean().item() / 127.5 - 1, abs=1e-6)


def test_bytes_survive_the_way_through_floats() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(as_bytes(from_bytes(levels)), levels) and torch.equal(prepare(levels, 16), from_bytes(levels))


def test_a_blur_keeps_the_mean_of_an_inner_point_and_spreads_it() -> None:
    image = torch.zeros(1, 2, 15, 15)
    image[:, :, 7, 7] = 1
    soft = blurred(image, 1.0)
    assert soft.sum((2, 3)).flatten().tolist() == pytest.approx([1, 1])
    assert (
        soft[0, 0, 7, 7] == pytest.approx(0.16, abs=0.002) and soft[0, 0, 7, 8] == soft[0, 0, 6, 7] > soft[0, 0, 6, 8]
    )
    assert torch.allclose(blurred(torch.full((1, 1, 9, 9), 0.3), 2.0), torch.full((1, 1, 9, 9), 0.3))
