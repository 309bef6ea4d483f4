"""Facts about the networks: the authors' logits, names and parameter counts (acceptance checks 1 and section d)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from backdoor_lth.models import build_model
from backdoor_lth.tests.nets import REFERENCE, hash_filled, reference, waves
from common.masks import prunable_weights

NETWORKS = {  # reference, parameters, convolutions, their weights
    ("resnet20s", 10): ("resnet20s", 269_722, 19, 267_696),
    ("resnet20s", 100): ("resnet20s_c100", 275_572, 19, 267_696),
    ("vgg16", 10): ("vgg16_bn", 14_728_266, 13, 14_710_464),
    ("resnet18", 10): ("resnet18", 11_173_962, 20, 11_159_232),
    ("densenet100", 10): ("densenet_100_12", 769_162, 99, None),
}


@pytest.mark.parametrize(("name", "classes"), NETWORKS)
def test_networks_have_the_authors_logits_and_counts(name: str, classes: int) -> None:
    there, parameters, convolutions, weights = NETWORKS[name, classes]
    model = build_model(name, 3, classes)
    prunable = prunable_weights(model)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(prunable) == convolutions
    assert weights is None or sum(w.numel() for w in prunable.values()) == weights
    with torch.no_grad():
        logits = hash_filled(model)(waves())
    torch.testing.assert_close(logits, reference("architectures")[there], rtol=1e-8, atol=1e-10)


def test_the_network_of_restricted_imagenet_has_its_counts() -> None:
    model = build_model("resnet18_224", 3, 9)
    assert sum(p.numel() for p in model.parameters()) == 11_181_129 and len(prunable_weights(model)) == 20


def test_names_are_the_authors_where_weights_are_exchanged() -> None:
    with np.load(REFERENCE / "architectures.npz", allow_pickle=False) as archive:
        names = archive["resnet20s_names"].tolist()
    mine = build_model("resnet20s", 3, 10).state_dict()
    assert [name for name in mine if not name.endswith("num_batches_tracked")] == names


def test_the_demo_network_has_32_688_convolution_weights() -> None:
    weights = prunable_weights(build_model("cnn", 3, 10))
    assert [w.numel() for w in weights.values()] == [432, 4608, 9216, 18432] and sum([432, 4608, 9216, 18432]) == 32_688


def test_resnet20s_weights_are_kaiming_normal_by_fan_in() -> None:
    torch.manual_seed(0)
    convolution = build_model("resnet20s", 3, 10).layer3[1].conv1  # type: ignore[index, union-attr]
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_a_batch_of_one_keeps_its_axis_in_every_network() -> None:
    for name in ("cnn", "densenet100"):
        assert build_model(name, 3, 7).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name must be one of cnn, resnet20s.*, got 'resnet99'"):
        build_model("resnet99", 3, 10)
