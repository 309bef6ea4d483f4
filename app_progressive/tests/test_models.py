"""Facts about the networks: the authors' outputs and sizes (acceptance check 20)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app_progressive.models import OptionABlock, build_model
from app_progressive.prunable import prunable
from app_progressive.tests.nets import facts

KNOWN = facts("models")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def waves(shape: torch.Size, number: int) -> Tensor:
    """sin(0.7 i + 0.3 j) sqrt(2 / fan_in): the weights of the j-th layer in the reference."""
    i = torch.arange(shape.numel(), dtype=torch.float64)
    return ((0.7 * i + 0.3 * number).sin() * (2 / shape[1:].numel()) ** 0.5).view(shape)


@pytest.mark.parametrize("name", list(KNOWN))
def test_networks_are_the_authors(name: str) -> None:  # 2, 20
    known = KNOWN[name]
    with torch.device("cpu" if "logits" in known else "meta"):
        net = build_model(name, 3, 10, MEAN, STD).double().eval()
    assert sum(p.numel() for p in net.parameters()) == known["params"]
    weights = prunable(net)
    assert len(weights) == known["conv_layers"]
    assert sum(w.numel() for w in weights.values()) == known["prunable_conv_weights"]
    if "logits" in known:
        layers = [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        with torch.no_grad():
            for number, layer in enumerate(layers):
                layer.weight.copy_(waves(layer.weight.shape, number))
                if layer.bias is not None:
                    layer.bias.copy_(torch.arange(len(layer.bias), dtype=torch.float64).cos() * 0.01)
            x = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64).mul(0.013).sin().abs().view(2, 3, 32, 32)
            logits = net(x)
        assert torch.allclose(logits, torch.tensor(known["logits"], dtype=torch.float64), rtol=1e-9)


@pytest.mark.parametrize(("ins", "stride"), [(32, 1), (16, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_block_in_place_has_the_values_and_gradients_of_the_plain_one(
    ins: int, stride: int, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    block = OptionABlock(ins, 32, stride).to(memory_format=layout)
    twin = copy.deepcopy(block)

    def plain(x: Tensor) -> Tensor:
        out = twin.bn2(twin.conv2(F.relu(twin.bn1(twin.conv1(x)))))
        return F.relu(out + (F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)) if stride == 2 else x))

    x, pull = torch.randn(4, ins, 8, 8).contiguous(memory_format=layout), torch.randn(4, 32, 8 // stride, 8 // stride)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, wanted = block(one), plain(other)
    (found * pull).sum().backward()
    (wanted * pull).sum().backward()
    assert torch.equal(found, wanted) and torch.equal(one.grad, other.grad) and torch.equal(one, x)
    for mine, its in zip(block.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, its.grad)


def test_the_small_network_of_the_demo_has_its_size() -> None:
    net = build_model("tinycnn", 1, 10)
    assert sum(w.numel() for w in prunable(net).values()) == 23_184
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_constants_are_no_part_of_the_state() -> None:
    assert not {"mean", "std"} & build_model("tinycnn", 1, 10).state_dict().keys()


def test_imagenet_stems_pool() -> None:
    with torch.device("meta"):
        net = build_model("resnet18", 3, 14, imagenet=True)
    assert net.net.conv1.kernel_size == (7, 7) and isinstance(net.net.maxpool, nn.MaxPool2d)


def test_networks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"name must be one of tinycnn, .* got 'resnet9000'"):
        build_model("resnet9000", 3, 10)
    with pytest.raises(ValueError, match="name resnet18 must have images of 3 channels, got 1"):
        build_model("resnet18", 1, 10)


@pytest.mark.parametrize("amp", [False, True])
def test_every_gradient_of_a_resnet_keeps_the_layout_of_its_activation(
    amp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient of another layout makes the ReLU's backward pass 25 times as slow."""
    net, seen = build_model("resnet20s", 3, 10, MEAN, STD).to(memory_format=torch.channels_last), []
    relu = F.relu_

    def watched(x: Tensor) -> Tensor:
        out = relu(x)
        out.register_hook(lambda grad: seen.append(grad.is_contiguous(memory_format=torch.channels_last)))
        return out

    monkeypatch.setattr(F, "relu_", watched)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        logits = net(torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    logits.float().square().sum().backward()
    assert seen == [True] * 19


def test_the_shortcut_takes_every_second_pixel() -> None:
    block = OptionABlock(4, 8, 2).eval()
    block.bn2.weight.data.zero_()
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(x), F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
