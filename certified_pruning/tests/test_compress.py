"""Facts about the physical removal of pruned channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certified_pruning.compress import compress_channels
from certified_pruning.errors import EmptyLayerError, UnsupportedLayerError
from certified_pruning.models import build_model, cifar_model_deep, cnn_s

REFERENCE = Path(__file__).parent / "reference"
BN_NETS = ["cnn_s", "cifar_model", "cifar_model_deep", "cnn_b_adv", "cnn_7layer_bn"]


def load(name: str) -> dict[str, Tensor]:
    with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


def randomise_batch_norms(model: nn.Module) -> None:
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm2d):
            assert bn.running_mean is not None and bn.running_var is not None
            nn.init.normal_(bn.weight)
            nn.init.normal_(bn.bias)
            nn.init.normal_(bn.running_mean)
            nn.init.uniform_(bn.running_var, 0.5, 2)


def prune(model: nn.Module, share: float = 0.4, seed: int = 0) -> dict[str, Tensor]:
    """Zero the scale and shift of random channels, at least one of each batch norm kept; return their masks."""
    draw = torch.Generator().manual_seed(seed)
    masks: dict[str, Tensor] = {}
    for name, bn in model.named_modules():
        if isinstance(bn, nn.BatchNorm2d):
            kept = torch.rand(bn.num_features, generator=draw) >= share
            kept[int(torch.randint(0, bn.num_features, (1,), generator=draw))] = True
            with torch.no_grad():
                bn.weight.mul_(kept)
                bn.bias.mul_(kept)
            masks[f"{name}.weight"], masks[f"{name}.bias"] = kept, kept.clone()
    return masks


def test_the_compressed_network_equals_the_released_one() -> None:
    reference = load("compress")
    widths = [reference[f"sd.{i}.weight"].shape[0] for i in (0, 3, 6, 9, 12)]
    dense = cifar_model_deep(3, 32, 10, widths).eval()
    dense.load_state_dict({k[3:]: v for k, v in reference.items() if k.startswith("sd.")}, strict=False)
    small = compress_channels(dense)
    expected = {k[6:]: v for k, v in reference.items() if k.startswith("small.")}
    state = {k: v for k, v in small.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    torch.testing.assert_close(small(reference["x"]), reference["y_compressed"], rtol=0, atol=1e-5)
    torch.testing.assert_close(small(reference["x"]), reference["y_dense"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BN_NETS)
@pytest.mark.parametrize(("in_channels", "size"), [(1, 28), (3, 32)])
def test_the_compressed_network_computes_what_the_masked_one_does(name: str, in_channels: int, size: int) -> None:
    torch.manual_seed(0)
    model = build_model(name, in_channels, size, 10).eval()
    randomise_batch_norms(model)
    masks = prune(model)
    small = compress_channels(model, masks)
    x = torch.randn(3, in_channels, size, size)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_compressed_network_loads_into_the_builder_with_its_widths() -> None:
    model = cnn_s(1, 28, 10).eval()
    small = compress_channels(model, prune(model))
    widths = [layer.out_channels for layer in small.modules() if isinstance(layer, nn.Conv2d)]
    rebuilt = build_model("cnn_s", 1, 28, 10, channels=widths).eval()
    rebuilt.load_state_dict(small.state_dict())
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(rebuilt(x), small(x))
    assert repr(rebuilt) == repr(small)


def test_masks_and_exact_zeros_give_the_same_network() -> None:
    model = cnn_s(1, 28, 10)
    masks = prune(model)
    by_mask, by_zeros = compress_channels(model, masks), compress_channels(model)
    assert all(torch.equal(value, by_zeros.state_dict()[name]) for name, value in by_mask.state_dict().items())


def test_one_of_the_two_masks_of_a_batch_norm_suffices() -> None:
    model = cnn_s(1, 28, 10)
    masks = prune(model)
    small: Any = compress_channels(model, {name: mask for name, mask in masks.items() if name.endswith("weight")})
    assert small[0].out_channels == int(masks["1.weight"].sum())


def test_a_channel_whose_shift_is_kept_stays() -> None:
    model: Any = cnn_s(1, 28, 10)
    with torch.no_grad():
        model[1].weight[3], model[1].bias[3] = 0, 1
    kept = torch.ones(8, dtype=torch.bool)
    kept[3] = False
    by_mask: Any = compress_channels(model, {"1.weight": kept, "1.bias": torch.ones_like(kept)})
    by_zeros: Any = compress_channels(model)
    assert by_mask[0].out_channels == by_zeros[0].out_channels == 8


def test_convolution_masks_remove_no_channel() -> None:
    model = cnn_s(1, 28, 10)
    small = compress_channels(model, {"0.weight": torch.zeros(8, 1, 4, 4, dtype=torch.bool)})
    assert repr(small) == repr(model)


def test_the_compressed_network_trains_as_the_masked_one_in_train_mode() -> None:
    torch.manual_seed(0)
    model = cnn_s(1, 28, 10).double()
    small: Any = compress_channels(model, prune(model))
    x = torch.randn(4, 1, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)
    small(x).sum().backward()
    assert small[0].weight.grad.abs().sum() > 0


def test_the_model_is_left_alone_and_shares_no_memory_with_the_copy() -> None:
    model = cnn_s(1, 28, 10)
    masks = prune(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = compress_channels(model, masks)
    for value in small.state_dict().values():
        value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_mode_dtype_and_frozen_parameters_are_kept() -> None:
    model: Any = cnn_s(1, 28, 10).double().eval()
    model[0].weight.requires_grad_(False)
    small = compress_channels(model, prune(model))
    assert not any(module.training for module in small.modules())
    assert all(p.dtype == torch.float64 for p in small.parameters())
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]


def test_nested_sequentials_keep_their_names() -> None:
    body = nn.Sequential(nn.Conv2d(2, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2, 1))
    model = nn.Sequential(body, nn.Sequential(nn.Flatten(), nn.Linear(4 * 2 * 5, 3))).eval()
    masks = prune(model)
    small = compress_channels(model, masks)
    assert list(small.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 2, 7, 13)  # maps of 3 by 6, then 2 by 5
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_emptied_layer_is_named() -> None:
    model: Any = cnn_s(1, 28, 10)
    with torch.no_grad():
        model[4].weight.zero_()
        model[4].bias.zero_()
    with pytest.raises(EmptyLayerError, match="layer '4' would keep nothing"):
        compress_channels(model)


def test_masks_that_were_not_applied_are_refused() -> None:
    kept = torch.ones(8, dtype=torch.bool)
    kept[[2, 5]] = False
    with pytest.raises(ValueError, match=r"masks remove channels \[2, 5\] of '1'.*apply the masks first"):
        compress_channels(cnn_s(1, 28, 10), {"1.weight": kept, "1.bias": kept})


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"nothing.weight": torch.ones(8, dtype=torch.bool)}, "masks must name parameters of the model"),
        ({"1.weight": torch.ones(9, dtype=torch.bool)}, r"masks\['1.weight'\] must be bool of shape \(8,\)"),
        ({"1.weight": torch.ones(8)}, r"masks\['1.weight'\] must be bool of shape \(8,\), got torch.float32"),
    ],
)
def test_foreign_masks_are_refused(masks: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress_channels(cnn_s(1, 28, 10), masks)


class Residual(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(Residual()), "layer '0' is a Residual"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)), "groups is 2, must be 1"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), "directly from a convolution"),
    ],
)
def test_a_network_whose_channels_cannot_be_followed_is_refused(model: nn.Module, message: str) -> None:
    prune(model, share=1.0)
    with pytest.raises(UnsupportedLayerError, match=message):
        compress_channels(model)
