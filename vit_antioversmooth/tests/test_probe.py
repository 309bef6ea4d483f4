"""Facts about FrequencyProbe and the theorems checked on networks."""

from __future__ import annotations

import pytest
import torch
from timm.layers import GluMlp, SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor

from common.data import ImageSet
from common.vit import ViTConfig, build_vit
from vit_antioversmooth.attnscale import apply_attnscale
from vit_antioversmooth.bounds import rho
from vit_antioversmooth.frequency import hc_ratio, mean_cosine
from vit_antioversmooth.models import NoSkipBlock
from vit_antioversmooth.probe import FrequencyProbe
from vit_antioversmooth.tests import nets
from vit_antioversmooth.theory_check import bound_violations, bounds_apply, lowpass_share


def tokens(model, x: Tensor) -> list[Tensor]:
    """Input of the first block and output of every block, by hooks of our own."""
    seen: list[Tensor] = []
    handles = [model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    handles += [block.register_forward_hook(lambda _, args, out: seen.append(out)) for block in model.blocks]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("name", "prefix"), [("plain", 1), ("distilled", 2), ("registers", 5), ("cait", 0)])
def test_patch_tokens_are_measured_before_the_first_and_after_every_block(name: str, prefix: int) -> None:
    model, x = nets.build(name), nets.images(name, 3)
    with FrequencyProbe(model, ("hc", "cos")) as probe, torch.no_grad():
        model(x[:2])
        model(x[2:])
    results, seen = probe.results(), tokens(model, x)
    assert set(results) == {"hc_over_dc", "hc_over_x", "patch_cosine"}
    for layer, whole in enumerate(seen):
        patches = whole[:, prefix:]
        assert results["hc_over_dc"][layer] == pytest.approx(hc_ratio(patches).mean().item(), rel=1e-5)
        assert results["patch_cosine"][layer] == pytest.approx(mean_cosine(patches).mean().item(), abs=1e-5)
        share = torch.linalg.matrix_norm(patches - patches.mean(1, keepdim=True)) / torch.linalg.matrix_norm(patches)
        assert results["hc_over_x"][layer] == pytest.approx(share.mean().item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_maps_are_measured_as_attnscale_leaves_them(mode: str) -> None:
    model, x = nets.build("plain"), nets.images("plain")
    maps: list[Tensor] = []
    apply_attnscale(model, mode="reference")
    nets.randomize(model)
    handles = [b.attn.attn_drop.register_forward_hook(lambda _, args, out: maps.append(out)) for b in model.blocks]
    with torch.no_grad():
        expected = model(x)
    for handle in handles:
        handle.remove()
    other = nets.build("plain")
    apply_attnscale(other, mode=mode)
    nets.randomize(other)
    with FrequencyProbe(other, ("attn", "rho")) as probe, torch.no_grad():
        assert torch.allclose(other(x), expected, atol=1e-4)
    results = probe.results()
    for layer, effective in enumerate(maps):
        assert results["attention_cosine"][layer] == pytest.approx(mean_cosine(effective).mean().item(), abs=1e-5)
        assert results["head_cosine"][layer] == pytest.approx(mean_cosine(effective.flatten(2)).mean().item(), abs=1e-5)
        assert results["rho"][layer] == pytest.approx(rho(effective).mean().item(), rel=1e-4)
        assert results["rho_max"][layer] == pytest.approx(rho(effective).max().item(), rel=1e-4)
    alike = torch.nn.functional.cosine_similarity(maps[0].flatten(2), maps[1].flatten(2), dim=-1).mean().item()
    assert results["layer_cosine"][0] == pytest.approx(alike, abs=1e-5) and len(results["layer_cosine"]) == 2
    assert results["softmax_cosine"] != pytest.approx(results["attention_cosine"], abs=1e-3)


@pytest.mark.parametrize("name", list(nets.NETS))
def test_every_supported_network_can_be_probed_and_is_left_as_it_was(name: str) -> None:
    model, x = nets.build(name), nets.images(name)
    fused = [getattr(module, "fused_attn", None) for module in model.modules()]
    before = model(x)
    with FrequencyProbe(model) as probe, torch.no_grad():
        model(x)
    assert torch.equal(model(x), before)
    assert [getattr(module, "fused_attn", None) for module in model.modules()] == fused
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    results = probe.results()
    assert [len(results[name]) for name in ("patch_cosine", "rho")] == [4, 3]
    assert all(torch.tensor(values).isfinite().all() for values in results.values())


def test_what_a_probe_cannot_say_is_refused() -> None:
    model = nets.build("plain")
    with pytest.raises(ValueError, match="must be among hc, cos, attn, rho, got 'fft'"):
        FrequencyProbe(model, ("hc", "fft"))
    with FrequencyProbe(model) as probe, pytest.raises(ValueError, match="at least one forward"):
        probe.results()


def test_a_failing_forward_leaves_no_hook_behind() -> None:
    model = nets.build("plain")
    with pytest.raises(AssertionError), FrequencyProbe(model):
        model(torch.zeros(1, 3, 7, 7))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(block.attn.fused_attn for block in model.blocks)


def untrained(skip: bool = True, depth: int = 12):
    torch.manual_seed(0)
    data = ImageSet(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), 10)
    return build_vit(ViTConfig(depth=depth), data, Block if skip else NoSkipBlock).eval()


def test_high_frequencies_of_an_untrained_deep_net_fall_with_depth_and_rise_with_omega() -> None:
    x, last = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)), []
    for omega in (0.0, 1.0, 4.0, 20.0):
        model = untrained()
        apply_attnscale(model, init=omega)
        with FrequencyProbe(model, ("hc",)) as probe, torch.no_grad():
            model(x)
        ratios = probe.results()["hc_over_dc"]
        last.append(ratios[-1])
        if omega == 0:
            assert ratios == sorted(ratios, reverse=True)
    assert last == sorted(set(last)) and last[-1] > 1.5 * last[0]


def test_without_attention_skips_tokens_collapse_and_a_large_omega_keeps_them_apart() -> None:
    x, last = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)), {}
    for omega in (0.0, 20.0):
        model = untrained(skip=False)
        apply_attnscale(model, init=omega)
        with FrequencyProbe(model, ("hc",)) as probe, torch.no_grad():
            model(x)
        last[omega] = probe.results()["hc_over_dc"][-1]
    assert last[0.0] < 1e-5 and last[20.0] > 0.5


def test_all_maps_of_a_net_are_low_pass_and_no_bound_is_violated() -> None:
    model, x = nets.build("plain"), nets.images("plain", 4)
    held, judged, curves = lowpass_share(model, x)
    assert held == judged == 3 * 3 * 4 and [len(curve) for curve in curves] == [32] * 3
    numbers = bound_violations(model, x)
    assert numbers["violations"] == 0 and numbers["checked"] == 3 * (3 * 4 + 3 * 4) and 0.1 < numbers["tightest"] <= 1
    apply_attnscale(model, init=3.0)
    assert bound_violations(model, x)["violations"] == 0


def test_where_tokens_have_collapsed_rounding_is_no_violation_and_all_numbers_are_finite() -> None:
    model = nets.build("plain")
    for block in model.blocks:
        block.attn.qkv.weight.data[:24] = 0  # queries: uniform maps, whose factor and bound are 0
        block.attn.qkv.bias.data[:24] = 0
    held, judged, _ = lowpass_share(model, nets.images("plain"))
    assert held == judged == 3 * 3 * 2
    numbers = bound_violations(model, nets.images("plain"))
    assert numbers["bound_bd"] == 0 and numbers["violations"] == 0 and numbers["tightest"] <= 1
    assert all(torch.tensor(value).isfinite() for value in numbers.values())


@pytest.mark.parametrize(
    ("options", "apply"),
    [
        ({}, True),
        ({"qk_norm": True}, True),
        ({"mlp_layer": SwiGLU}, False),
        ({"mlp_layer": GluMlp}, False),
        ({"act_layer": "silu"}, False),
        ({"scale_mlp_norm": True}, False),
        ({"scale_attn_norm": True}, False),
    ],
)
def test_bounds_apply_to_bare_projections_and_mlps_of_two_layers_only(options: dict[str, object], apply: bool) -> None:
    assert bounds_apply(nets.NETS["plain"](**options)) == apply


def test_a_factor_above_its_bound_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    import vit_antioversmooth.theory_check as theory

    monkeypatch.setattr(theory, "ffn_bound", lambda first, second: torch.tensor(1e-9))
    assert bound_violations(nets.build("plain"), nets.images("plain"))["violations"] == 3 * 2
