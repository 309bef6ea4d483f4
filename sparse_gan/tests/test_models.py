"""Facts about the networks and spectral norm: exact sigma, gradients through it, what commutes, conditioning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_gan.game import draw_noise
from sparse_gan.models import (
    BatchNorm,
    DiscriminatorBlock,
    GeneratorBlock,
    build_discriminator,
    build_generator,
)
from sparse_gan.spectral_norm import SNConv2d, SNEmbedding, SNLinear, normalized

# Spectral norm


def settled(weight: Tensor) -> Tensor:
    left = F.normalize(torch.randn(len(weight), dtype=weight.dtype), dim=0)
    for _ in range(500):
        normalized(weight, left, update=True)
    return left


def test_a_normalised_weight_has_spectral_norm_one_and_masked_entries_stay_zero() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 3) * (torch.rand(6, 4, 3, 3) < 0.3)
    ours = normalized(weight, settled(weight), update=False)
    assert torch.linalg.matrix_norm(ours.flatten(1), 2).item() == pytest.approx(1, abs=1e-5)
    assert (ours[weight == 0] == 0).all()


def test_the_gradient_flows_through_sigma() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    left, target = settled(weight.detach()), torch.randn(4, 5, dtype=torch.float64)
    ours = torch.autograd.grad((normalized(weight, left, update=False) * target).sum(), weight)[0]
    exact = weight / torch.linalg.matrix_norm(weight, 2)
    assert torch.allclose(ours, torch.autograd.grad((exact * target).sum(), weight)[0], atol=1e-7)


def test_a_layer_of_zeros_stays_finite_with_its_gradient() -> None:
    layer = SNConv2d(2, 3, 3, padding=1)
    layer.weight.data.zero_()
    layer(torch.ones(1, 2, 4, 4)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("layer", "plain", "x"),
    [
        (SNConv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1), torch.randn(2, 2, 4, 4)),
        (SNLinear(4, 3), nn.Linear(4, 3), torch.randn(2, 4)),
        (SNEmbedding(5, 3), nn.Embedding(5, 3), torch.tensor([4, 0])),
    ],
)
def test_a_normalised_layer_is_the_plain_one_with_weight_over_sigma(
    layer: nn.Module, plain: nn.Module, x: Tensor
) -> None:
    layer(x)
    before = layer.left.clone()
    weight = normalized(layer.weight, layer.left, update=False)
    plain.load_state_dict({"weight": weight, **({"bias": layer.bias} if hasattr(layer, "bias") else {})})
    assert torch.allclose(layer.eval()(x), plain(x), atol=1e-6)
    assert torch.equal(layer.left, before)
    layer.train()(x)
    assert not torch.equal(layer.left, before)


# Networks


@pytest.mark.parametrize("name", ["sngan", "biggan"])
@pytest.mark.parametrize("size", [8, 16, 32])
def test_images_have_the_size_and_range_asked_for_and_each_gets_one_score(name: str, size: int) -> None:
    g = build_generator(name, 6, size, channels=1, classes=3, z_dim=5)  # type: ignore[arg-type]
    d = build_discriminator(name, 7, channels=1, classes=3)  # type: ignore[arg-type]
    z, labels = draw_noise(4, 5, 3, 0)
    images = g(z, labels)
    assert images.shape == (4, 1, size, size) and images.abs().max() <= 1
    assert d(images, labels).shape == (4,)


def test_at_the_papers_widths_the_networks_have_the_known_numbers_of_parameters() -> None:
    def count(net: nn.Module) -> int:
        return sum(p.numel() for p in net.parameters())

    assert count(build_generator("sngan", 256, 32)) == 4_276_739
    conv, shortcut = 128 * 128 * 9 + 128, 128 * 128 + 128
    first = 3 * 128 * 9 + 128 + conv + 3 * 128 + 128
    assert count(build_discriminator("sngan", 128)) == first + 2 * conv + shortcut + 4 * conv + 129
    embeddings = 6 * 2 * 10 * 256 - 6 * 2 * 256  # gains and biases by class instead of one of each
    assert count(build_generator("biggan", 256, 32)) == 4_276_739 + embeddings


def test_the_shortcut_of_a_generator_block_commutes_with_upsampling() -> None:
    torch.manual_seed(0)
    block = GeneratorBlock(3, 4, 0, nn.Conv2d)
    x = torch.randn(2, 3, 4, 4)
    hidden = F.interpolate(F.relu(block.norm1(x)), scale_factor=2)
    hidden = block.conv2(F.relu(block.norm2(block.conv1(hidden))))
    wanted = hidden + block.shortcut(F.interpolate(x, scale_factor=2))
    assert torch.allclose(block(x, None), wanted, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_a_halving_block_pools_the_sum_of_both_its_ways(first: bool) -> None:
    torch.manual_seed(0)
    block = DiscriminatorBlock(3, 4, down=True, first=first).eval()
    torch.nn.init.normal_(block.conv2.bias)
    x = torch.randn(2, 3, 4, 4)
    weight = normalized(block.conv2.weight, block.conv2.left, update=False)
    hidden = F.conv2d(F.relu(block.conv1(x if first else F.relu(x))), weight, block.conv2.bias, padding=1)
    wanted = F.avg_pool2d(hidden + block.shortcut(x), 2)
    assert torch.allclose(block(x), wanted, atol=1e-5)


def test_one_batch_of_real_and_fake_is_judged_as_two_batches() -> None:
    torch.manual_seed(0)
    d = build_discriminator("biggan", 8).eval()
    x, y = torch.rand(2, 5, 3, 32, 32), torch.randint(10, (2, 5))
    together = d(x.flatten(0, 1), y.flatten()).view(2, 5)
    assert torch.allclose(together, torch.stack([d(x[0], y[0]), d(x[1], y[1])]), atol=1e-5)


def test_biggan_depends_on_the_class_and_sngan_does_not() -> None:
    torch.manual_seed(0)
    z, one, two = torch.randn(2, 5), torch.zeros(2).long(), torch.ones(2).long()
    for name, conditional in (("biggan", True), ("sngan", False)):
        g, d = build_generator(name, 6, 8, 1, 3, 5).eval(), build_discriminator(name, 6, 1, 3).eval()  # type: ignore[arg-type]
        images = g(z, one)
        assert torch.equal(images, g(z, two)) != conditional
        assert torch.equal(d(images, one), d(images, two)) != conditional


def test_the_projection_adds_the_inner_product_with_the_class() -> None:
    torch.manual_seed(0)
    d = build_discriminator("biggan", 6, 1, 3).eval()
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 1])
    hidden = F.relu(d.blocks(images)).sum((2, 3))
    rows = normalized(d.embed.weight, d.embed.left, update=False)[labels]
    assert torch.allclose(d(images, labels), d.output(hidden).squeeze(1) + (rows * hidden).sum(1), atol=1e-6)


def test_biggan_normalises_every_convolution_of_both_networks_and_starts_small() -> None:
    g, d = build_generator("biggan", 64, 32), build_discriminator("biggan", 64)
    for net in (g, d):
        layers = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
        assert len(layers) > 8 and all(isinstance(m, SNConv2d) for m in layers)
    assert g.blocks[0].conv1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(isinstance(m, SNConv2d | SNLinear) for m in build_generator("sngan", 8, 32).modules())


def test_conditional_batch_norm_scales_by_one_plus_the_gain_and_adds_the_bias_of_the_class() -> None:
    norm = BatchNorm(2, classes=3)
    x, labels = torch.randn(6, 2, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    plain = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    gain, bias = (table.weight[labels][:, :, None, None] for table in (norm.gain, norm.bias))
    assert torch.allclose(norm(x, labels), plain * (1 + gain) + bias, atol=1e-5)


def test_sizes_and_names_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="size must be 4 times a power of two, at least 8, got 20"):
        build_generator("sngan", 8, 20)
    with pytest.raises(ValueError, match="name must be sngan or biggan, got 'dcgan'"):
        build_discriminator("dcgan", 8)  # type: ignore[arg-type]
