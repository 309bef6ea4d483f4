"""Facts about FLOPs, sparse storage and the two forms of sparse inference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.masks import Masks
from sparse_gan.flops import sparse_flops, training_flops
from sparse_gan.game import draw_noise
from sparse_gan.models import Generator, build_discriminator, build_generator
from sparse_gan.pruning import sparse_masks
from sparse_gan.sparse_inference import compact, with_csr_kernels
from sparse_gan.sparse_state import pack, packed_bytes, unpack


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# FLOPs


def test_flops_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 25, 3))
    mask = torch.zeros(4, 2, 3, 3)
    mask.view(-1)[:10] = 1
    flops = sparse_flops(net, (torch.zeros(6, 2, 5, 5),), Masks({"0.weight": mask}))
    assert flops == {"dense": 2 * 6 * (72 * 25 + 300), "sparse": 2 * 6 * (10 * 25 + 300)}


def test_a_transposed_convolution_works_at_its_input_positions() -> None:
    net = nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1)
    mask = torch.zeros(3, 2, 4, 4)
    mask.view(-1)[:10] = 1
    flops = sparse_flops(net, (torch.zeros(6, 3, 5, 5),), Masks({"weight": mask}))
    assert flops == {"dense": 2 * 6 * 96 * 25, "sparse": 2 * 6 * 10 * 25}


def test_flops_of_the_sngan_generator_are_those_of_its_shapes() -> None:
    g = build_generator("sngan", 8, 16, 1, z_dim=6)
    blocks = sum(2 * (2 * 64 * 9 * side**2 + 64 * (side // 2) ** 2) for side in (8, 16))
    whole = 2 * 6 * 8 * 16 + blocks + 2 * 8 * 9 * 256
    assert sparse_flops(g, (torch.zeros(1, 6),), Masks())["dense"] == whole
    assert g.training


def test_flops_of_the_discriminator_are_those_before_its_poolings() -> None:
    d = build_discriminator("sngan", 8, channels=1)
    halving = (8 * 9 + 64 * 9) * 256 + 8 * 64 + 2 * 64 * 9 * 64 + 64 * 16
    whole = 2 * (halving + 4 * 64 * 9 * 16 + 8)
    assert sparse_flops(d, (torch.zeros(1, 1, 16, 16),), Masks())["dense"] == whole


def test_a_step_of_training_is_the_sum_of_its_passes() -> None:
    assert training_flops(10, 1, n_dis=2) == 2 * (10 + 6) + 30 + 3


# Sparse storage


def test_a_packed_state_comes_back_equal_and_takes_a_tenth_at_95_percent_sparsity() -> None:
    net = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.BatchNorm2d(64))
    masks = sparse_masks(net, 0.05, "erk", draws())
    masks.apply_(net)
    packed = pack(net.state_dict(), masks)
    state, again = unpack(packed)
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert torch.equal(again["0.weight"], masks["0.weight"])
    assert packed["sparse"]["0.weight"]["index"].dtype == torch.int32
    assert packed_bytes(packed) == 2 * round(0.05 * 36864) * 4 + 4 * 64 * 4 + 8


def test_an_active_weight_that_is_zero_stays_active_and_dense_weights_stay_dense() -> None:
    net = nn.Conv2d(1, 1, 2, bias=False)
    net.weight.data.zero_()
    mask = torch.tensor([1.0, 0, 0, 1]).view(1, 1, 2, 2)
    assert torch.equal(unpack(pack(net.state_dict(), Masks({"weight": mask})))[1]["weight"], mask.bool())
    assert pack(net.state_dict(), Masks({"weight": torch.ones(1, 1, 2, 2)}))["sparse"] == {}


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"dense": {}, "sparse": {"w": {"shape": [2], "index": torch.tensor([5]), "values": torch.ones(1)}}},
        {"dense": {}, "sparse": {"w": {"shape": [2], "index": torch.tensor([0, 0]), "values": torch.ones(2)}}},
        {"dense": {}, "sparse": {"w": {"shape": [2], "index": torch.tensor([0]), "values": torch.ones(2)}}},
        {"dense": {}, "sparse": {"w": {"shape": "x", "index": 3, "values": None}}},
    ],
)
def test_a_packed_state_that_does_not_fit_is_refused(content: dict) -> None:
    with pytest.raises(ValueError, match=r"not a packed state|w must have one value"):
        unpack(content)


# Sparse inference


def trained(name: str) -> tuple[Generator, torch.Tensor, torch.Tensor]:
    """A sparse generator with running statistics, biases, and channels that nothing reads or nothing writes."""
    torch.manual_seed(0)
    g = build_generator(name, 8, 16, 1, 3, 5)  # type: ignore[arg-type]
    sparse_masks(g, 0.2, "uniform", draws()).apply_(g)
    for module in g.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        for block in g.blocks:
            block.conv1.weight[:2] = 0
            block.conv2.weight[:, 4:6] = 0
    z, labels = draw_noise(16, 5, 3, 0)
    for _ in range(20):
        g(z, labels)
    return g.eval(), z, labels


@pytest.mark.parametrize("name", ["sngan", "biggan"])
def test_compacting_cuts_dead_channels_and_keeps_the_function(name: str) -> None:
    g, z, labels = trained(name)
    small = compact(g)
    with torch.no_grad():
        assert torch.allclose(small(z, labels), g(z, labels), atol=1e-5)
    widths = [block.conv1.out_channels for block in small.blocks]
    assert max(widths) <= (4 if name == "sngan" else 6)  # a constant channel of biggan depends on the class
    assert [block.conv1.out_channels for block in g.blocks] == [8, 8]
    if name == "sngan":
        assert any((block.conv2.offset != 0).any() for block in small.blocks)


@pytest.mark.parametrize("name", ["sngan", "biggan"])
def test_a_block_without_a_live_channel_is_compacted_too_and_in_its_own_dtype(name: str) -> None:
    g, z, labels = trained(name)
    g.double()
    with torch.no_grad():
        g.blocks[0].conv1.weight.zero_()
        g.blocks[1].conv2.weight.zero_()
        small, z = compact(g), z.double()
        assert torch.allclose(small(z, labels), g(z, labels), rtol=0, atol=1e-12)
    assert small.blocks[1].conv1.out_channels == 1 and {p.dtype for p in small.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", ["sngan", "biggan"])
def test_sparse_matrices_keep_the_function(name: str) -> None:
    g, z, labels = trained(name)
    with torch.no_grad():
        assert torch.allclose(with_csr_kernels(g)(z, labels), g(z, labels), atol=1e-5)
