"""Facts about the networks: sizes the paper's configuration implies, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from certified_pruning.models import BUILDERS, build_model


def conv_weights(model: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Conv2d))


def relus(model: nn.Module, *image_shape: int) -> int:
    """Number of ReLUs that one image passes."""
    counts: list[int] = []
    for layer in model.modules():
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(lambda _, inputs, output: counts.append(output.numel()))
    model.eval()(torch.zeros(1, *image_shape))
    return sum(counts)


def layer_types(model: nn.Sequential) -> str:
    short = {nn.Conv2d: "C", nn.BatchNorm2d: "B", nn.ReLU: "R", nn.Flatten: "F", nn.Linear: "L"}
    return "".join(short[type(layer)] for layer in model)


def test_the_papers_network_has_463712_conv_weights_and_75876_relus_on_cifar() -> None:
    model = build_model("cifar_model_deep", 3, 32, 10)
    assert conv_weights(model) == 463_712
    assert relus(model, 3, 32, 32) == 75_876


def test_the_papers_network_flattens_3_by_3_maps_on_28_pixel_grey_images() -> None:
    linear = build_model("cifar_model_deep", 1, 28, 10)[16]
    assert isinstance(linear, nn.Linear)
    assert linear.in_features == 128 * 3 * 3


def test_the_demo_network_has_2402_relus_on_mnist() -> None:
    model = build_model("cnn_s", 1, 28, 10)
    assert relus(model, 1, 28, 28) == 2_402
    assert conv_weights(model) == 8 * 16 + 16 * 8 * 16


# kernel, stride, padding and width of each convolution, and the hidden width: spec section d
GEOMETRY = {
    "cnn_s": ([(4, 2, 1, 8), (4, 2, 1, 16)], 50),
    "cifar_model": ([(4, 2, 1, 8), (4, 2, 1, 16)], 100),
    "cifar_model_deep": ([(3, 1, 1, 32), (4, 2, 1, 64), (3, 1, 1, 64), (4, 2, 1, 128), (4, 2, 1, 128)], 100),
    "cnn_b_adv": ([(5, 2, 2, 32), (4, 2, 1, 128)], 250),
    "cnn_7layer_bn": ([(3, 1, 1, 64), (3, 1, 1, 64), (3, 2, 1, 128), (3, 1, 1, 128), (3, 1, 1, 128)], 512),
    "cnn_a": ([(4, 2, 1, 16), (4, 2, 1, 32)], 100),
    "cnn_b": ([(5, 2, 2, 32), (4, 2, 1, 128)], 250),
}


@pytest.mark.parametrize("name", sorted(GEOMETRY))
def test_every_network_has_the_geometry_of_the_spec(name: str) -> None:
    convolutions, hidden = GEOMETRY[name]
    model = build_model(name, 3, 32, 10)
    built = [
        (layer.kernel_size[0], layer.stride[0], layer.padding[0], layer.out_channels)
        for layer in model
        if isinstance(layer, nn.Conv2d)
    ]
    block = "CR" if name in ("cnn_a", "cnn_b") else "CBR"
    assert built == convolutions
    assert layer_types(model) == block * len(convolutions) + "FLRL"
    assert model[-3].out_features == hidden
    assert all(layer.bias is not None for layer in model if isinstance(layer, nn.Conv2d))


def test_the_table_of_geometries_covers_every_builder() -> None:
    assert set(GEOMETRY) == set(BUILDERS)


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("size", [28, 32, 33])
def test_every_network_maps_images_of_any_size_to_one_logit_per_class(name: str, size: int) -> None:
    model = build_model(name, 1, size, 7).eval()
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)


def test_channels_set_the_widths_of_the_convolutions() -> None:
    model = build_model("cifar_model_deep", 3, 32, 10, channels=[8, 16, 16, 32, 31])
    assert [layer.out_channels for layer in model if isinstance(layer, nn.Conv2d)] == [8, 16, 16, 32, 31]
    assert model[16].in_features == 31 * 4 * 4


def test_an_unknown_name_is_refused_with_the_list_of_names() -> None:
    with pytest.raises(ValueError, match=r"cifar_model_deep, cnn_7layer_bn.*got 'resnet'"):
        build_model("resnet", 3, 32, 10)


@pytest.mark.parametrize("channels", [[8], [8, 0], [8, -1], []])
def test_channels_of_the_wrong_number_or_sign_are_refused(channels: list[int]) -> None:
    with pytest.raises(ValueError, match="channels must be 2 positive integers"):
        build_model("cnn_s", 1, 28, 10, channels=channels)


@pytest.mark.parametrize(
    ("argument", "values"),
    [("in_channels", (0, 28, 10)), ("size", (1, 0, 10)), ("size", (1, 3, 10)), ("classes", (1, 28, 0))],
)
def test_impossible_shapes_are_refused_by_name(argument: str, values: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be"):
        build_model("cnn_s", *values)
