"""Facts about the gates in a network. Numbers in brackets are acceptance checks of the specification."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from uvc_vit.adapter import ViTAdapter
from uvc_vit.controller import UVCController
from uvc_vit.gate_values import gumbel, l0_keep
from uvc_vit.gates import Attachment, Gates
from uvc_vit.masked import apply_plan
from uvc_vit.slim import slim
from uvc_vit.tests import nets
from uvc_vit.tests.test_controller import controller
from uvc_vit.uvc_config import UVCConfig


def reference(prefix: str) -> tuple[Any, dict[str, Any]]:
    """The authors' small network and what it computes."""
    given = {
        key.removeprefix(prefix): value for key, value in nets.vectors("gated_vit").items() if key.startswith(prefix)
    }
    shape: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 4,
        "num_heads": 3,
        "num_classes": 10,
    }
    kind = VisionTransformerDistilled if prefix else VisionTransformer
    model: Any = kind(mlp_ratio=2.0, norm_layer=partial(nn.LayerNorm, eps=1e-6), **shape)
    model.load_state_dict({key[2:]: value for key, value in given.items() if key[:2] == "w/" and "gating" not in key})
    return model.eval(), given


@pytest.mark.parametrize("prefix", ["", "d_"])
def test_gated_outputs_are_the_authors(prefix: str) -> None:
    model, given = reference(prefix)  # [8], [19]
    gates = Gates(4)
    gates.logits.data.copy_(given["w/block_skip_gating"])
    Attachment(model, gates)
    torch.testing.assert_close(model(given["x"]), given["y_argmax"], rtol=0, atol=2e-5)
    gates.warm_up = True
    torch.testing.assert_close(model(given["x"]), given["y_warmup"], rtol=0, atol=2e-5)
    torch.testing.assert_close(model.train()(given["x"]), given["y_warmup"], rtol=0, atol=2e-5)
    gates.draw = lambda training: setattr(gates, "keep", l0_keep(gates.logits, 0.1))  # type: ignore[method-assign]
    torch.testing.assert_close(model(given["x"]), given["y_softl0"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("prefix", ["", "d_"])
def test_pruned_outputs_are_the_authors_masked_and_slim(prefix: str) -> None:
    model, given = reference(prefix)  # [8]
    method = UVCController(ViTAdapter(model), UVCConfig(), (16, 16))
    method.variables.s.copy_(given["s"])
    method.variables.r.copy_(given["r"])
    method.gates.logits.data.copy_(given["w/block_skip_gating"])
    plan = method.as_is()
    smaller = slim(model, plan)
    apply_plan(model, plan)
    torch.testing.assert_close(model(given["x"]), given["y_pruned_argmax"], rtol=0, atol=2e-5)
    torch.testing.assert_close(smaller(given["x"]), given["y_pruned_argmax"], rtol=0, atol=2e-5)


def test_a_hard_gate_is_open_as_often_as_its_logits_say() -> None:
    gates, opened = Gates(1000, hard=True), 0.0  # [19]
    gates.generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        gates.draw(training=True)
        opened += gates.keep.detach().sum().item()  # type: ignore[union-attr]
    assert opened / 1e5 == pytest.approx(0.8808, abs=0.005)


def test_soft_gates_run_blocks_by_as_much_on_average_as_derived() -> None:
    gates = Gates(100_000)
    gates.generator = torch.Generator().manual_seed(0)
    gates.draw(training=True)
    assert gates.keep.detach().mean().item() == pytest.approx(0.8513, abs=0.003)  # type: ignore[union-attr]
    assert gumbel((100_000,), torch.Generator().manual_seed(1)).mean().item() == pytest.approx(0.5772, abs=0.02)


def test_skipped_blocks_are_not_computed_and_evaluation_draws_nothing() -> None:
    model, gates, calls = nets.vit(), Gates(3), []  # [19]
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    Attachment(model, gates)
    gates.logits.data[1] = torch.tensor([0.5, 0.4])
    state = torch.get_rng_state()
    first, second = model(nets.images()), model(nets.images())
    assert calls == [0, 2, 0, 2] and torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)


def test_the_loss_reaches_gates_and_nothing_else_of_the_method() -> None:
    method = controller(nets.vit())  # [28]
    method.attach()
    method.adapter.model.train()(nets.images()).sum().backward()
    assert (method.gates.logits.grad != 0).any(dim=1).all()
    torch.testing.assert_close(method.gates.logits.grad.sum(1), torch.zeros(3), rtol=0, atol=1e-5)
    for name in ("s", "r", "y", "p", "z"):
        assert not getattr(method.variables, name).requires_grad


def test_hard_gates_have_the_soft_ones_gradient() -> None:
    grads = []
    for hard in (False, True):
        gates = Gates(4, hard=hard)
        gates.generator = torch.Generator().manual_seed(3)
        gates.draw(training=True)
        gates.keep.sum().backward()  # type: ignore[union-attr]
        grads.append(gates.logits.grad)
    assert torch.equal(*grads) and gates.keep.detach().unique().tolist() in ([0, 1], [1], [0])  # type: ignore[union-attr]


def test_gradient_checkpointing_recomputes_with_the_same_gates() -> None:
    grads = []
    for checkpointing in (False, True):
        model = nets.vit().train()
        model.set_grad_checkpointing(checkpointing)
        gates = Gates(3)
        gates.generator = torch.Generator().manual_seed(0)
        Attachment(model, gates)
        model(nets.images()).sum().backward()
        grads.append((gates.logits.grad, model.patch_embed.proj.weight.grad))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_detaching_leaves_the_model_as_it_was() -> None:
    model = nets.vit()
    before, keys = model(nets.images()), list(model.state_dict())
    method = controller(model)
    method.attach()
    method.attach()
    assert list(model.state_dict()) != keys and not [key for key in model.state_dict() if "logits" in key]
    method.detach()
    method.detach()
    assert list(model.state_dict()) == keys and torch.equal(model(nets.images()), before)
