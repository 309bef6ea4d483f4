"""ChainNet computes what the module computes, and refuses what it cannot represent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from certified_pruning.chain import ChainNet
from certified_pruning.errors import UnsupportedLayerError
from certified_pruning.tests.nets import mlp, odd_net, small_conv
from certified_pruning.verifier import CompleteVerifier

torch.set_num_threads(1)
ODD = (2, 9, 7)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chain_reproduces_the_module_with_negative_and_zero_batch_norm_scales(seed: int) -> None:
    model = odd_net(seed)
    x = torch.rand(5, *ODD)
    with torch.no_grad():
        expected = model(x)
        exact = odd_net(seed).double()(x.double())
    assert torch.allclose(ChainNet.from_module(model, ODD).forward(x), expected, atol=1e-5)
    net64 = ChainNet.from_module(model, ODD, torch.float64)
    assert torch.allclose(net64.forward(x.double()), exact, atol=1e-12)


def test_affine_maps_match_their_dense_matrices() -> None:
    net = ChainNet.from_module(odd_net(), ODD, torch.float64)
    g = torch.Generator().manual_seed(0)
    for affine in net.affines:
        n = torch.Size(affine.in_shape).numel()
        matrix = affine.forward(torch.eye(n, dtype=torch.float64)) - affine.bias  # (in, out)
        rows = torch.randn(3, matrix.shape[1], generator=g, dtype=torch.float64)
        assert torch.allclose(affine.transposed(rows), rows @ matrix.T, atol=1e-12)
        r = torch.rand(3, n, generator=g, dtype=torch.float64)
        radius = affine.radius(r)
        assert bool((radius >= r @ matrix.abs() - 1e-12).all())
        if len(affine.ops) == 1:
            assert torch.allclose(radius, r @ matrix.abs(), atol=1e-12)


def test_transposed_convolution_is_the_same_for_few_and_for_many_input_channels() -> None:
    torch.manual_seed(0)
    for channels in (1, 3, 4, 5, 8):
        conv = nn.Conv2d(channels, 6, (3, 4), (2, 3), (1, 2)).double()
        net = ChainNet.from_module(nn.Sequential(conv, nn.Flatten()).eval(), (channels, 8, 9), torch.float64)
        rows = torch.randn(4, net.n_out, dtype=torch.float64)
        grads = torch.nn.grad.conv2d_input((4, channels, 8, 9), conv.weight, rows.view(4, 6, 4, 4), (2, 3), (1, 2))
        assert torch.allclose(net.affines[0].transposed(rows), grads.flatten(1), atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3, 8, 20])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(4, 2, 1), (3, 2, 1), (3, 3, 0), ((2, 4), (1, 2), (0, 1)), (3, 1, 1)]
)
def test_every_form_of_the_transposed_convolution_is_the_adjoint(kernel, stride, padding, channels: int) -> None:
    """<y, conv(x)> = <conv^T(y), x>, with rows and columns that the stride never reaches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 5, kernel, stride, padding, bias=False)).eval()
    op = ChainNet.from_module(model, (channels, 12, 11), torch.float64).affines[0].ops[0]
    x = torch.randn(6, channels * 12 * 11, dtype=torch.float64)
    y = torch.randn_like(op.linear(x))
    assert torch.allclose((y * op.linear(x)).sum(1), (op.transposed(y) * x).sum(1), atol=1e-12)


def test_pixels_that_the_stride_never_reaches_get_zero_in_single_precision() -> None:
    torch.manual_seed(0)
    for channels in (1, 8):
        conv = nn.Conv2d(channels, 6, 4, 2, bias=False)
        op = ChainNet.from_module(nn.Sequential(conv).eval(), (channels, 11, 13)).affines[0].ops[0]
        rows = torch.randn(3, 6 * 4 * 5)
        maps = op.transposed(rows).view(3, channels, 11, 13)
        grads = torch.nn.grad.conv2d_input((3, channels, 11, 13), conv.weight, rows.view(3, 6, 4, 5), 2)
        assert torch.allclose(maps, grads, atol=1e-5)
        assert bool((maps[:, :, 10] == 0).all()) and bool((maps[..., 12] == 0).all())


def test_a_bias_that_differs_within_a_channel_is_kept() -> None:
    """Pooling with padding scales the bias of the convolution before it down at the border."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2, 2, padding=1), nn.Flatten()).eval()
    net, x = ChainNet.from_module(model, (1, 6, 6)), torch.rand(3, 1, 6, 6)
    bias = net.affines[0].bias.view(2, 9)
    assert bool((bias[:, :1] != bias).any())
    with torch.no_grad():
        assert torch.allclose(net.forward(x), model(x), atol=1e-6)


def test_scaled_output_scales_the_logits_only() -> None:
    net, x = ChainNet.from_module(small_conv(), (1, 6, 5)), torch.rand(2, 1, 6, 5)
    assert torch.equal(net.scale_output(0.25).forward(x), net.forward(x) / 4)
    assert torch.equal(net.scale_output(0.25).head(2).forward(x), net.head(2).forward(x))


def test_head_ends_at_the_input_of_a_relu() -> None:
    model = small_conv()
    net, x = ChainNet.from_module(model, (1, 6, 5)), torch.rand(2, 1, 6, 5)
    with torch.no_grad():
        assert torch.allclose(net.head(1).forward(x), model[:5](x).flatten(1), atol=1e-5)
    assert net.sizes == [27, 64, 8]
    assert net.offsets == [0, 27, 91, 99]


def test_relus_in_a_row_at_the_start_and_at_the_end_keep_their_meaning() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.ReLU(), nn.Linear(4, 2), nn.ReLU()).eval()
    x = torch.randn(6, 3)
    with torch.no_grad():
        assert torch.allclose(ChainNet.from_module(model, (3,)).forward(x), model(x), atol=1e-6)


def test_bn_beta_is_the_shift_of_the_batch_norm_folded_last() -> None:
    model = small_conv()
    net = ChainNet.from_module(model, (1, 6, 5))
    assert torch.equal(net.affines[0].bn_beta, model[1].bias.detach().repeat_interleave(9))
    assert torch.equal(net.affines[2].bn_beta, net.affines[2].bias)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Sigmoid(), r"'2' .*Sigmoid"),
        (nn.MaxPool2d(2), r"'2' .*MaxPool2d"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "'2' .*reflect"),
        (nn.AvgPool2d(2, ceil_mode=True), "'2' .*ceil_mode"),
        (nn.Flatten(2), "'2' .*start_dim"),
        (nn.Linear(5, 5), "'2' .*Flatten"),
    ],
)
def test_other_layers_are_refused_by_name_and_type(layer: nn.Module, text: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), layer).eval()
    with pytest.raises(UnsupportedLayerError, match=text):
        ChainNet.from_module(model, (1, 5, 5))


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def test_a_residual_block_is_refused_though_it_is_a_sequential() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Residual(nn.Linear(3, 3), nn.ReLU())).eval()
    with pytest.raises(UnsupportedLayerError, match=r"'1' .*Residual"):
        ChainNet.from_module(model, (3,))


def test_a_module_changed_by_a_hook_is_refused() -> None:
    model = mlp([3, 4, 2])
    model[0].register_forward_hook(lambda m, i, out: 2 * out)
    with pytest.raises(ValueError, match="does not compute what its layers say"):
        ChainNet.from_module(model, (3,))


def test_train_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="model must be in eval mode"):
        ChainNet.from_module(small_conv().train(), (1, 6, 5))


def test_batch_norm_without_running_statistics_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.ReLU()).eval()
    with pytest.raises(ValueError, match="'1' must have running statistics"):
        ChainNet.from_module(model, (1, 5, 5))


@pytest.mark.parametrize("shape", [(2, 6, 5), (1, 6, 9), (30,), (1, 1, 1)])
def test_an_input_shape_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="input_shape does not fit"):
        ChainNet.from_module(small_conv(), shape)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = small_conv()
    model[7].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite weights"):
        ChainNet.from_module(model, (1, 6, 5))


def test_batch_norm_without_scale_and_shift_is_folded() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False), nn.ReLU(), nn.Flatten()).eval()
    model[1].running_mean.fill_(0.3)
    model[1].running_var.fill_(2.0)
    x = torch.rand(2, 1, 5, 5)
    with torch.no_grad():
        assert torch.allclose(ChainNet.from_module(model, (1, 5, 5)).forward(x), model(x), atol=1e-6)


def test_a_relu_that_is_used_twice_acts_twice() -> None:
    """x - .3 stays below 0 here: without the second ReLU the net would prefer class 0."""
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(1, 1), relu, nn.Linear(1, 1), relu, nn.Linear(1, 2)).eval()
    numbers = [[[1.0]], [0.0], [[1.0]], [-0.3], [[-1.0], [0.0]], [-0.1, 0.0]]
    for parameter, values in zip(model.parameters(), numbers, strict=True):
        parameter.data.copy_(torch.tensor(values))
    x = torch.tensor([[0.1]])
    assert ChainNet.from_module(model, (1,)).forward(x).tolist() == [[pytest.approx(-0.1), 0.0]]
    report = CompleteVerifier(model, (1,), 0.05, 2).verify(x, torch.tensor([0]))
    assert report.images[0].status == "misclassified"


def test_a_block_that_is_nested_twice_acts_twice() -> None:
    block = mlp([3, 3, 3])
    model = nn.Sequential(block, nn.ReLU(), block, nn.Linear(3, 2)).eval()
    net, x = ChainNet.from_module(model, (3,)), torch.randn(5, 3)
    assert net.sizes == [3, 3, 3]
    with torch.no_grad():
        assert torch.allclose(net.forward(x), model(x), atol=1e-6)
