"""Facts about scaled models in other hands: copies, pickles, exports, checkpointing, compiling, low precision."""

from __future__ import annotations

import copy
import io
import pickle
import shutil

import pytest
import torch
from timm.layers import Attention
from torch import nn

from vit_antioversmooth.attnscale import apply_attnscale
from vit_antioversmooth.featscale import apply_featscale
from vit_antioversmooth.scales import remove_scales, scale_parameters
from vit_antioversmooth.tests import nets

both_forms = pytest.mark.parametrize("mode", ["auto", "folded"])


def scaled(name: str = "plain", mode: str = "auto") -> nn.Module:
    model = nets.build(name)
    apply_attnscale(model, mode=mode)
    apply_featscale(model)
    nets.randomize(model)
    return model


@pytest.mark.parametrize(("name", "mode"), [*((name, "auto") for name in nets.NETS), ("plain", "folded")])
def test_the_hooks_of_a_deep_copy_use_its_own_scales(name: str, mode: str) -> None:
    """With closures as hooks a copy (EMA!) would go on with the original's omega."""
    model, x = scaled(name, mode), nets.images(name)
    other, before = copy.deepcopy(model), model(x)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        for parameter in scale_parameters(other):
            parameter.zero_()
    assert torch.equal(model(x), before)
    assert torch.equal(other(x), nets.build(name)(x))
    remove_scales(other)
    assert torch.equal(model(x), before)


def test_a_model_whose_last_forward_failed_can_be_copied() -> None:
    model, x = scaled(), nets.images("plain")
    before, attention = model(x), model.blocks[1].attn
    fails = attention.qkv.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    fails.remove()
    assert torch.equal(copy.deepcopy(model)(x), before)


@both_forms
def test_a_pickled_model_comes_back_whole_and_can_be_unscaled(mode: str) -> None:
    model, x = scaled(mode=mode), nets.images("plain")
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other(x), model(x))
    remove_scales(other)
    assert torch.equal(other(x), nets.build("plain")(x))


@both_forms
def test_activation_checkpointing_gives_the_same_gradients(mode: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = scaled(mode=mode).train()
        model.set_grad_checkpointing(checkpointing)
        model(nets.images("plain")).square().sum().backward()
        found.append([parameter.grad for parameter in scale_parameters(model)])
    assert all(torch.allclose(one, two, rtol=1e-6) for one, two in zip(*found, strict=True))


@both_forms
def test_an_exported_model_computes_the_same_and_survives_saving(mode: str) -> None:
    model, x = scaled(mode=mode), nets.images("plain")
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    assert torch.allclose(torch.export.load(file).module()(x), model(x), atol=1e-6)


@pytest.mark.parametrize(("name", "mode"), [("plain", "auto"), ("plain", "folded"), ("swin", "auto"), ("cait", "auto")])
@torch.no_grad()
def test_a_model_compiled_after_applying_equals_the_eager_one_in_one_graph(name: str, mode: str) -> None:
    model, x = scaled(name, mode), nets.images(name)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    for parameter in scale_parameters(model):
        parameter.zero_()
    assert torch.allclose(compiled(x), nets.build(name)(x), atol=1e-5)


@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_a_block_compiled_by_inductor_equals_the_eager_one_in_one_graph() -> None:
    model, x = scaled(), torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(model.blocks[0], fullgraph=True)
    assert torch.allclose(compiled(x), model.blocks[0](x), atol=1e-5)
    for parameter in scale_parameters(model):
        parameter.zero_()
    assert torch.allclose(compiled(x), nets.build("plain").blocks[0](x), atol=1e-5)


@pytest.mark.parametrize("apply", [apply_attnscale, apply_featscale])
def test_a_model_that_is_compiled_already_is_refused(apply) -> None:
    with pytest.raises(RuntimeError, match="must not be compiled yet"):
        apply(torch.compile(nets.build("plain")))
    model = nets.build("plain")
    model.compile()
    with pytest.raises(RuntimeError, match="must not be compiled yet"):
        apply(model)


@pytest.mark.parametrize("name", list(nets.NETS))
def test_under_bfloat16_autocast_blocks_stay_in_bfloat16_and_near_single_precision(name: str) -> None:
    model, x = nets.build(name), nets.images(name)
    apply_attnscale(model, init=0.3)
    apply_featscale(model, init=(0.2, 0.1))
    attention = next(module for module in model.modules() if hasattr(module, "attnscale"))
    seen = []
    attention.register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        model(x)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    exactly, half = seen
    assert half.dtype == torch.bfloat16
    assert (half.float() - exactly).abs().max() < 2e-2 * exactly.abs().max()


def test_a_bfloat16_model_keeps_its_type_and_its_scales_with_it() -> None:
    model = scaled().to(torch.bfloat16)
    assert model(nets.images("plain").to(torch.bfloat16)).dtype == torch.bfloat16
    late = nets.build("plain").to(torch.bfloat16)
    apply_attnscale(late)
    assert {parameter.dtype for parameter in scale_parameters(late)} == {torch.bfloat16}


def test_the_efficient_forms_save_less_than_half_of_what_the_map_form_saves_for_backward() -> None:
    saved = {}
    for mode in ("auto", "folded", "reference"):
        torch.manual_seed(0)
        block = nn.Module()
        block.attn = Attention(384, num_heads=6, qkv_bias=True)
        apply_attnscale(block, mode=mode)
        x = torch.randn(8, 197, 384, requires_grad=True)
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = block.attn(x)
        saved[mode] = sum(storages.values()) - sum(
            storages.get(p.untyped_storage().data_ptr(), 0) for p in block.parameters()
        )
        del out
    assert saved["auto"] <= 0.45 * saved["reference"]
    assert saved["folded"] <= 0.9 * saved["auto"]
