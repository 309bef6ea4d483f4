"""Facts about patch mixing and the cross-entropy of tokens: the authors' boxes, weights, targets and losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diverse_vit.patch_mixup import Box, MixedBatch, PatchMixup, box_weights, draw_box, paste
from diverse_vit.tests import plain
from diverse_vit.tests.vectors import reference
from diverse_vit.token_loss import fused_token_cross_entropy, image_cross_entropy, token_cross_entropy

VECTORS = reference("mixing")
BOX = Box(30, 119, 100, 187)


def released_batch() -> MixedBatch:
    y = VECTORS["target"].long()
    lam, weight = box_weights(BOX, 224, 224, (16, 16), torch.zeros(1, dtype=torch.float64))
    return MixedBatch(torch.zeros(4, 3, 224, 224), y, y.flip(0), lam, weight)


# Boxes and weights


def test_boxes_drawn_with_the_stored_seeds_are_the_authors() -> None:
    rows = reference("rand_bbox")["rows"].tolist()
    assert len(rows) == 8
    for seed, lam, top, bottom, left, right, out in rows:
        box = draw_box(lam, 224, 224, np.random.RandomState(int(seed)))
        assert box == (top, bottom, left, right)
        assert box_weights(box, 224, 224, (16, 16))[0] == pytest.approx(out, abs=1e-12)


def test_the_weights_of_the_reference_box_are_the_authors() -> None:
    assert tuple(VECTORS["box_yl_yh_xl_xh"].tolist()) == BOX
    mixed = released_batch()
    torch.testing.assert_close(mixed.patch_weight, VECTORS["patch_lam"].double(), rtol=0, atol=1e-6)
    assert mixed.lam == pytest.approx(VECTORS["lam"].item(), abs=1e-12)
    assert mixed.patch_weight.mean().item() == pytest.approx(mixed.lam, abs=1e-12)


@pytest.mark.parametrize(
    ("box", "lam", "weights"),
    [
        (Box(0, 8, 0, 8), 0.0, [0, 0, 0, 0]),
        (Box(3, 3, 2, 5), 1.0, [1, 1, 1, 1]),
        (Box(0, 4, 4, 8), 0.75, [1, 0, 1, 1]),
        (Box(2, 6, 0, 4), 0.75, [0.5, 1, 0.5, 1]),
    ],
)
def test_worked_weights_of_four_patches(box: Box, lam: float, weights: list[float]) -> None:
    assert box_weights(box, 8, 8, (4, 4))[0] == lam
    assert box_weights(box, 8, 8, (4, 4))[1].tolist() == weights


def test_the_box_is_pasted_from_the_reversed_batch() -> None:
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 4, 4).contiguous()
    mixed = paste(x, Box(1, 3, 0, 2))
    for own in range(4):
        assert (mixed[own, 0, 1:3, 0:2] == 3 - own).all()
        assert mixed[own].sum().item() == 4 * (3 - own) + 12 * own


@given(st.integers(0, 10**6), st.sampled_from([(28, 28, 7, 7), (32, 32, 4, 4), (12, 20, 4, 5)]))
@settings(max_examples=40, deadline=None)
def test_a_mixed_batch_has_the_pixels_its_weights_say(seed: int, sizes: tuple[int, int, int, int]) -> None:
    height, width, *patch = sizes
    x = torch.stack([torch.zeros(1, height, width), torch.ones(1, height, width)]).double()
    mixed = PatchMixup(patch_size=tuple(patch), generator=np.random.RandomState(seed))(x, torch.tensor([4, 7]))
    assert mixed.y1.tolist() == [4, 7] and mixed.y2.tolist() == [7, 4]
    means = nn.functional.avg_pool2d(mixed.x, patch).flatten(1)
    torch.testing.assert_close(means[1], mixed.patch_weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(means[0], 1 - mixed.patch_weight, rtol=0, atol=1e-12)
    assert mixed.patch_weight.mean().item() == pytest.approx(mixed.lam, abs=1e-12)
    assert x[0].sum() == 0 and x[1].mean() == 1


def test_mixup_gives_every_patch_the_weight_of_the_image() -> None:
    x = torch.rand(6, 3, 8, 8)
    mixed = PatchMixup(cutmix_alpha=0, patch_size=4, generator=np.random.RandomState(0))(x, torch.arange(6))
    assert 0 < mixed.lam < 1 and mixed.patch_weight.tolist() == pytest.approx([mixed.lam] * 4)
    torch.testing.assert_close(mixed.x, mixed.lam * x + (1 - mixed.lam) * x.flip(0))


def test_probability_and_switch_are_honoured() -> None:
    x, y, random = torch.rand(2, 1, 8, 8), torch.arange(2), np.random.RandomState(0)
    none = PatchMixup(prob=0, patch_size=4, generator=random)(x, y)
    assert none.lam == 1 and torch.equal(none.x, x) and none.patch_weight.tolist() == [1] * 4
    cut = [PatchMixup(switch_prob=share, patch_size=4, generator=random) for share in (0.0, 0.25, 1.0)]
    shares = [sum(_is_cut(mix(x, y).x, x) for _ in range(400)) / 400 for mix in cut]
    assert shares[0] == 0 and shares[2] == 1 and shares[1] == pytest.approx(0.25, abs=0.07)


def _is_cut(mixed: Tensor, x: Tensor) -> bool:
    return bool(((mixed == x) | (mixed == x.flip(0))).all())


def test_without_a_generator_numpys_global_one_draws_as_released() -> None:
    x, y = torch.rand(2, 1, 8, 8), torch.arange(2)
    np.random.seed(5)
    ours = PatchMixup(patch_size=4)(x, y)
    theirs = PatchMixup(patch_size=4, generator=np.random.RandomState(5))(x, y)
    assert torch.equal(ours.x, theirs.x) and ours.lam == theirs.lam


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(3, 1, 8, 8), "batch must be even, got 3 images"),
        (torch.rand(2, 1, 9, 8), r"image size must be a multiple of the patch size \(4, 4\), got \(9, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "images must be floating point, got torch.uint8"),
    ],
)
def test_batches_that_cannot_be_mixed_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchMixup(patch_size=4)(x, torch.zeros(len(x), dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup_alpha": -1}, "alphas must be at least 0 and not both 0, got -1 and 1.0"),
        ({"mixup_alpha": 0, "cutmix_alpha": 0}, "alphas must be at least 0 and not both 0, got 0 and 0"),
        ({"prob": 1.5}, r"prob must be in \[0, 1\], got 1.5"),
        ({"switch_prob": -1}, r"switch_prob must be in \[0, 1\], got -1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchMixup(patch_size=4, **options)


# The loss of tokens


def test_the_loss_of_all_tokens_and_its_gradient_are_the_authors() -> None:
    logits = VECTORS["token_logits"].double().requires_grad_()
    loss = token_cross_entropy(logits, released_batch())
    assert loss.item() == pytest.approx(VECTORS["loss_cls_plus_mixing"].item(), rel=1e-7)
    gradient = torch.autograd.grad(loss, logits)[0][0]
    torch.testing.assert_close(gradient, VECTORS["loss_cls_plus_mixing.grad_first_img"].double(), rtol=1e-4, atol=1e-9)


def test_the_loss_is_the_mean_over_the_class_token_and_every_patch_alike() -> None:
    logits, mixed = VECTORS["token_logits"].double(), released_batch()
    of_image = image_cross_entropy(logits[:, 0], mixed).item()
    assert of_image == pytest.approx(VECTORS["loss_cls_only"].item(), rel=1e-7)
    patches = VECTORS["loss_mixing_sum"].item()
    loss = token_cross_entropy(logits, mixed).item()
    assert loss == pytest.approx((of_image + patches) / 197, rel=1e-6)
    assert abs(loss - (of_image + patches) / 196) > 1e-3 * loss
    assert abs(loss - (of_image + patches / 196) / 2) > 1e-3 * loss


def test_targets_are_the_authors_in_both_branches() -> None:
    mixed = released_batch()
    ours = plain.targets(mixed.y1, mixed.y2, mixed.patch_weight, 5, 0.1)
    torch.testing.assert_close(ours, VECTORS["patch_target"].double(), rtol=0, atol=1e-6)
    image = plain.targets(mixed.y1, mixed.y2, torch.tensor([mixed.lam], dtype=torch.float64), 5, 0.1)[:, 0]
    torch.testing.assert_close(image, VECTORS["image_target"].double(), rtol=0, atol=1e-6)
    weight = torch.full((1,), VECTORS["mixup_lam"].item()).double()
    of_mixup = plain.targets(mixed.y1, mixed.y2, weight, 5, 0.1)[:, 0]
    torch.testing.assert_close(of_mixup, VECTORS["mixup_image_target"].double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(of_mixup, VECTORS["mixup_patch_target0"].double(), rtol=0, atol=1e-6)


def random_batch(tokens: int = 10, classes: int = 6) -> tuple[Tensor, nn.Linear, MixedBatch]:
    draws = torch.Generator().manual_seed(0)
    y1, y2 = torch.randint(classes, (2, 3), generator=draws)
    weight = torch.rand(tokens - 1, generator=draws, dtype=torch.float64)
    head = nn.Linear(4, classes).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws))
    features = torch.randn(3, tokens, 4, generator=draws, dtype=torch.float64).requires_grad_()
    return features, head, MixedBatch(features.detach(), y1, y2, 0.3, weight)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_two_gathers_equal_one_hot_targets(smoothing: float) -> None:
    features, head, mixed = random_batch()
    weights = torch.cat([torch.tensor([mixed.lam], dtype=torch.float64), mixed.patch_weight])
    logits = head(features)
    target = plain.targets(mixed.y1, mixed.y2, weights, 6, smoothing)
    ours, theirs = token_cross_entropy(logits, mixed, smoothing), plain.soft_cross_entropy(logits, target)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
def test_the_fused_loss_equals_the_plain_one(chunk: int) -> None:
    features, head, mixed = random_batch()
    leaves = [features, *head.parameters()]
    ours = 3 * fused_token_cross_entropy(features, head, mixed, chunk=chunk)
    theirs = 3 * token_cross_entropy(head(features), mixed)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    pairs = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True)
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-13)


def test_the_fused_loss_holds_the_logits_of_one_chunk_only() -> None:
    batch, tokens, classes, chunk = 2, 197, 50, 16
    features = torch.randn(batch, tokens, 8, requires_grad=True)
    mixed = MixedBatch(features, *torch.randint(classes, (2, batch)), 0.3, torch.rand(tokens - 1))
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                made.append(out.numel())
            return out

    with Watch():
        fused_token_cross_entropy(features, nn.Linear(8, classes), mixed, chunk=chunk).backward()
    assert max(made) <= max(batch * chunk * classes, features.numel()) < batch * tokens * classes / 5


def test_the_fused_loss_without_gradient_or_bias() -> None:
    features, _, mixed = random_batch()
    head = nn.Linear(4, 6, bias=False).double()
    with torch.no_grad():
        value = fused_token_cross_entropy(features, head, mixed, chunk=4)
    torch.testing.assert_close(value, token_cross_entropy(head(features), mixed).detach())
    fused_token_cross_entropy(features, head, mixed, chunk=4).backward()
    assert head.weight.grad is not None


def test_under_autocast_the_loss_is_float32() -> None:
    features, head, mixed = random_batch()
    features, head = features.detach().float().requires_grad_(), head.float()
    wanted = token_cross_entropy(head(features), mixed).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_token_cross_entropy(features, head, mixed, chunk=4)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted, rel=0.02)
    assert features.grad is not None and features.grad.dtype == torch.float32


def test_gradients_under_float16_autocast_and_a_loss_scale_are_those_of_float32() -> None:
    draws, classes, scale = torch.Generator().manual_seed(0), 1000, 2.0**16
    features = torch.randn(64, 197, 32, generator=draws).requires_grad_()
    head = nn.Linear(32, classes)
    nn.init.normal_(head.weight, std=0.02, generator=draws)
    y1, y2 = torch.randint(classes, (2, 64), generator=draws)
    mixed = MixedBatch(features.detach(), y1, y2, 0.3, torch.rand(196, generator=draws))
    leaves = [features, *head.parameters()]
    wanted = torch.autograd.grad(fused_token_cross_entropy(features, head, mixed), leaves)
    with torch.autocast("cpu", torch.float16):
        loss = fused_token_cross_entropy(features, head, mixed)
    for half, whole in zip(torch.autograd.grad(scale * loss, leaves), wanted, strict=True):
        assert (half / scale - whole).norm() < 5e-3 * whole.norm()


def test_the_weights_gradient_does_not_overflow_under_float16_autocast() -> None:
    features, head = torch.full((64, 40, 4), 100.0, requires_grad=True), nn.Linear(4, 3)
    nn.init.zeros_(head.weight)
    y = torch.zeros(64, dtype=torch.long)
    with torch.autocast("cpu", torch.float16):
        fused_token_cross_entropy(features, head, MixedBatch(features, y, y, 1.0, torch.ones(39))).backward()
    assert head.weight.grad is not None and head.weight.grad.isfinite().all()


def test_uniform_logits_cost_log_k() -> None:
    _, _, mixed = random_batch()
    assert token_cross_entropy(torch.zeros(3, 10, 6), mixed).item() == pytest.approx(math.log(6))


def test_tokens_that_do_not_fit_the_labels_are_refused() -> None:
    features, head, mixed = random_batch()
    for loss in (lambda z: token_cross_entropy(z, mixed), lambda z: fused_token_cross_entropy(z, head, mixed)):
        with pytest.raises(ValueError, match=r"tokens must be 3 images of 10, got \(3, 9\): is patch_size right\?"):
            loss(features[:, 1:])
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        fused_token_cross_entropy(features, head, mixed, chunk=0)
