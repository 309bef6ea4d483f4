"""Facts about the features of a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from symbolic_l2o.features import KNOWN, GradFeatures, feature_names
from symbolic_l2o.tests.vectors import reference


def stream(features: GradFeatures, gradients: Tensor) -> Tensor:
    state = features.init(gradients[0])
    return torch.stack([features(g, state) for g in gradients])


def test_all_columns_are_those_of_the_released_code() -> None:
    arrays = reference("features")
    names = KNOWN[:10]
    found = stream(GradFeatures(names, eps=1e-12), arrays["grads"])
    for column, name in enumerate(names):
        difference = (found[..., column] - arrays["features"][..., column]).abs()
        size = arrays["features"][..., column].abs()
        largest = arrays["grads"].abs().amax(0)  # a moment near 0 is a difference of moments of this size
        within = 2e-5 if name in ("mt", "gt") else 1e-5 * size + 1e-6 * largest + 1e-12
        assert (difference <= within).all(), name


@pytest.mark.parametrize(("powers", "key"), [("magic:2,2.5,3", "magic0"), ("magic:2,3,4", "magic1")])
def test_magic_columns_are_those_of_the_released_code(powers: str, key: str) -> None:
    arrays = reference("features")
    assert torch.allclose(stream(GradFeatures(powers), arrays["grads"]), arrays[key], atol=2e-5)


def test_a_short_history_worked_out_by_hand() -> None:  # acceptance 1
    found = stream(GradFeatures("mt+gt"), torch.tensor([[1.0], [-2.0], [3.0], [0.0]]))[:, 0]
    assert torch.allclose(found[:, 0], torch.tensor([1, -0.337963, 0.320302, 0.273750]), atol=1e-5)
    assert torch.allclose(found[:, 1], torch.tensor([1, -1.255292, 1.368782, 0]), atol=1e-5)


def test_the_first_step_gives_signs_and_zero_gradients_give_exact_zeros() -> None:  # acceptance 1, 2
    g = torch.tensor([[3.0, -0.02, 5e-3, 0.0]])
    found = stream(GradFeatures("mt+gt+nt"), g)[0]
    assert torch.allclose(found, g[0].sign()[:, None].expand(-1, 3), atol=1e-5)
    magic = stream(GradFeatures("magic:2,2.5,3"), g)[0]
    assert torch.allclose(magic, 0.05 * g[0].sign()[:, None].expand(-1, 3), atol=1e-5)
    names = [name for name in KNOWN if name not in ("t", "log", "AdamDn_Norm")]
    assert (stream(GradFeatures([*names, "magic2"]), torch.zeros(30, 2)) == 0).all()


@pytest.mark.parametrize("name", ["mt", "gt", "nt"])
def test_normalised_features_do_not_see_the_gradients_scale(name: str) -> None:  # acceptance 3
    g = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = GradFeatures([name], eps=0)
    assert torch.allclose(stream(features, g), stream(features, 1e3 * g), rtol=1e-12)


@pytest.mark.parametrize("name", ["g", "mom5", "mom9", "mom99", "AdamUp_unNorm", "AdamUp_Norm"])
def test_raw_features_scale_with_the_gradient(name: str) -> None:  # acceptance 3
    g = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(stream(GradFeatures([name]), 1e3 * g), 1e3 * stream(GradFeatures([name]), g), rtol=1e-12)


def test_columns_come_in_one_order_whatever_is_asked_for() -> None:  # acceptance 4
    assert feature_names("gt+mt") == feature_names("mt+gt") == feature_names(["gt", "mt"]) == ("mt", "gt")
    assert feature_names("magic:3,2,2.5") == ("magic2", "magic2.5", "magic3")
    assert feature_names("RP_5") == ("mt", "g", "mom5", "mom9", "mom99") and feature_names("DM") == ("log", "sgn")


def test_log_features_are_those_of_l2l() -> None:
    found = stream(GradFeatures("DM"), torch.tensor([[1.0, -1e-3, 1e-5]]))[0]
    assert torch.allclose(found[:, 0], torch.tensor([0.0, -1.3815, -2.3003]).clamp(min=-1), atol=1e-3)
    assert torch.allclose(found[:, 1], torch.tensor([1.0, -0.148413, 0.00148413]), atol=1e-6)


def test_only_the_moments_asked_for_are_kept() -> None:
    assert set(GradFeatures("g").init(torch.zeros(3))) == {"step"}
    assert set(GradFeatures("mt+gt").init(torch.zeros(3))) == {"step", "m", "v"}
    assert set(GradFeatures("nt").init(torch.zeros(3))) == {"step", "v", "mom5"}


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("mt+nonsense", {}, "features must be of mt, gt, .*got 'nonsense'"),
        ([], {}, "got 'none'"),
        ("magic:0", {}, "got 'magic0'"),
        ("magic:-1", {}, "got 'magic-1'"),
        ("mt", {"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        ("mt", {"beta2": -0.1}, "beta2 must be"),
        ("mt", {"eps": float("nan")}, "eps must be at least 0, got nan"),
    ],
)
def test_wrong_features_are_refused(names: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradFeatures(names, **options)
