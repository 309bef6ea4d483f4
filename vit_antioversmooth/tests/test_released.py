"""Facts about released weights: whole networks of the authors' code come out equal, and nothing is loaded by halves."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vit_antioversmooth.released import load_released
from vit_antioversmooth.tests import nets
from vit_antioversmooth.tests.test_attnscale import close

NAMES = {"lamb": "attn.attnscale.omega", "lamb1": "featscale.s", "lamb2": "featscale.t"}


def counterpart() -> VisionTransformer:
    return VisionTransformer(**nets.IMAGE, **nets.SIZES, norm_layer=partial(nn.LayerNorm, eps=1e-6))


def forward(model: VisionTransformer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the output of each block."""
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _, args, out: seen.append(out)) for block in model.blocks]
    out = model(x)
    for handle in handles:
        handle.remove()
    return out, torch.stack(seen)


@pytest.mark.parametrize(("name", "count"), [("vit_attnscale_small", 1), ("vit_featscale_small", 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_whole_released_network_comes_out_equal(name: str, count: int, dtype: torch.dtype, prefix: str) -> None:
    arrays, state = nets.reference(name)
    model = counterpart().to(dtype).eval()
    load_released(model, {prefix + key: value for key, value in state.items()}, count)
    x = arrays["x"].to(dtype).requires_grad_()
    out, blocks = forward(model, x)
    assert close(out, arrays["out"]) and close(blocks, arrays["block_out"])
    out.backward(arrays["grad_out"].to(dtype))
    assert close(x.grad, arrays["grad_x"])
    for key in (key.removeprefix("grad.") for key in arrays if key.startswith("grad.blocks")):
        owner, _, lamb = key.replace(".attn", "").rpartition(".")
        ours = model.get_parameter(f"{owner}.{NAMES[lamb]}").grad
        assert close(ours if lamb == "lamb" else count * ours, arrays[f"grad.{key}"]), key


def test_a_single_count_is_not_what_the_released_featscale_network_computes() -> None:
    arrays, state = nets.reference("vit_featscale_small")
    model = counterpart().double().eval()
    load_released(model, state, 1)
    assert (model(arrays["x"]) - arrays["out"]).abs().max() > 1e-3


def test_a_plain_checkpoint_leaves_the_scales_and_lacks_nothing_else() -> None:
    arrays, state = nets.reference("vit_attnscale_small")
    plain = {key: value for key, value in state.items() if not key.endswith("lamb")}
    model = counterpart().double().eval()
    load_released(model, plain, 1)
    assert not any("scale" in key for key in model.state_dict())
    load_released(model, state, 1)
    load_released(model, plain, 1)
    assert close(model(arrays["x"]), arrays["out"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.mlp.fc1.bias"), r"lacks 1: blocks\.1\.mlp\.fc1\.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "has 1 others: extra"),
        (lambda state: state.update({"head.bias": torch.zeros(7)}), r"head\.bias must have shape \(5,\), got \(7,\)"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_no_weight(change, message: str) -> None:
    _, state = nets.reference("vit_attnscale_small")
    change(state)
    model = nets.build("plain").double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_released(model, state, 1)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_count_other_than_one_or_two_is_refused() -> None:
    with pytest.raises(ValueError, match="featscale_count must be 1 or 2, got 3"):
        load_released(nets.build("plain"), {}, 3)


@pytest.mark.parametrize("name", ["swin", "cait"])
def test_released_names_of_the_other_networks_load_too(name: str) -> None:
    source = nets.build(name)
    nets_state = dict(source.state_dict())
    wanted = {}
    blocks = [key.rpartition(".attn.qkv")[0] for key in nets_state if key.endswith("attn.qkv.weight")]
    for block in blocks:
        heads, dim = (
            source.get_submodule(f"{block}.attn").num_heads,
            source.get_submodule(f"{block}.attn").qkv.in_features,
        )
        wanted |= {
            f"{block}.attn.lamb": torch.randn(heads),
            f"{block}.lamb1": torch.randn(dim),
            f"{block}.lamb2": torch.randn(dim),
        }
    model = nets.build(name)
    load_released(model, {f"module.{key}": value for key, value in {**nets_state, **wanted}.items()}, 1)
    for key, value in wanted.items():
        owner, _, lamb = key.rpartition(".")
        assert torch.equal(model.get_parameter(f"{owner.removesuffix('.attn')}.{NAMES[lamb]}"), value)
