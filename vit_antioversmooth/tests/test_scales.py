"""Facts about parameters: how many there are in the paper's networks, and how the optimiser sees them."""

from __future__ import annotations

import pytest
import timm
import torch

from vit_antioversmooth.attnscale import apply_attnscale
from vit_antioversmooth.cost import PAPER_COUNTS, added_parameters, step_time_ratios
from vit_antioversmooth.featscale import apply_featscale
from vit_antioversmooth.scales import param_groups, scale_parameters
from vit_antioversmooth.tests import nets


@pytest.mark.parametrize("name", list(PAPER_COUNTS))
def test_the_papers_networks_get_the_papers_number_of_parameters(name: str) -> None:
    timm_name, depth, attn, feat = PAPER_COUNTS[name]
    *added, own = added_parameters(timm_name, depth)
    assert added == [attn, feat] and max(added) / own < 9e-4 and 21e6 < own < 51e6


def test_scales_are_in_one_undecayed_group_of_their_own_exactly_once() -> None:
    model = nets.build("registers")
    apply_attnscale(model, share="layers")
    apply_featscale(model, tied=True)
    groups = {group["name"]: group for group in param_groups(model, 1e-3, 0.05, scale_lr_mult=30)}
    assert {id(p) for p in groups["scales"]["params"]} == {id(p) for p in scale_parameters(model)}
    assert len(groups["scales"]["params"]) == 1 + 3
    assert (groups["scales"]["lr"], groups["scales"]["weight_decay"]) == (30 * 1e-3, 0.0)
    assert groups["scales"]["initial_lr"] == groups["scales"]["lr"] and groups["decayed"]["initial_lr"] == 1e-3
    everything = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(everything) == sorted({id(p) for p in model.parameters()})


def test_matrices_decay_and_vectors_position_and_tokens_do_not() -> None:
    model = nets.build("registers")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["name"]: [names[id(p)] for p in group["params"]] for group in param_groups(model, 1e-3, 0.05)}
    assert set(groups) == {"decayed", "undecayed"}
    assert {"cls_token", "reg_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.bias"} <= set(groups["undecayed"])
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight"} <= set(groups["decayed"])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_a_learning_rate_multiple_that_cannot_be_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=f"scale_lr_mult must be finite and at least 0, got {wrong}"):
        param_groups(nets.build("plain"), 1e-3, 0.05, scale_lr_mult=wrong)


def test_frozen_scales_are_left_out() -> None:
    model = nets.build("plain")
    apply_attnscale(model, init=1.0)
    for parameter in scale_parameters(model):
        parameter.requires_grad_(False)
    assert [group["name"] for group in param_groups(model, 1e-3, 0.05)] == ["decayed", "undecayed"]


def test_a_models_own_undecayed_parameters_are_honoured() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=2, embed_dim=24, depths=(1, 1, 1, 1))
    names = {id(p): name for name, p in model.named_parameters()}
    (decayed,) = (group["params"] for group in param_groups(model, 1e-3, 0.05) if group["name"] == "decayed")
    assert not any("relative_position_bias_table" in names[id(p)] for p in decayed)


def test_step_times_are_ratios_to_the_first_model() -> None:
    models = {"one": nets.build("plain"), "same": nets.build("plain")}
    ratios = step_time_ratios(models, torch.randn(8, 3, 16, 16), 5, repeats=5)
    assert ratios["one"] == 1 and 0.5 < ratios["same"] < 2
