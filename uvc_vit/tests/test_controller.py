"""Facts about gates and the controller. Numbers in brackets are acceptance checks of the specification."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from common.config import ConfigError
from uvc_vit.adapter import ViTAdapter
from uvc_vit.controller import UVCController
from uvc_vit.gate_values import gumbel, l0_keep
from uvc_vit.gates import Attachment, Gates
from uvc_vit.group_norms import group_norms
from uvc_vit.masked import apply_plan
from uvc_vit.plan import Plan
from uvc_vit.prox import divide_columns, shrinkage
from uvc_vit.slim import slim
from uvc_vit.solve import solve_step
from uvc_vit.tests import nets
from uvc_vit.uvc_config import UVCConfig
from uvc_vit.verify import verify

STEPS = 12


def controller(model: nn.Module, **settings: Any) -> UVCController:
    return UVCController(ViTAdapter(model), UVCConfig(stage1_steps=STEPS, **settings), (16, 16))


def train(method: UVCController, steps: int, first: int = 0, autocast: bool = False) -> list[Any]:
    """Steps of SGD, whose state is the weights alone."""
    model = method.adapter.model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    found = []
    for step in range(first, first + steps):
        method.gates.generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        method.gates.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(nets.images(8, seed=step))
        nn.functional.cross_entropy(logits.float(), torch.arange(8) % 5).backward()
        optimizer.step()
        found.append(method.step(0.01, torch.Generator().manual_seed(1000 + step)))
    return found


# Gates


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


# The controller


@pytest.mark.parametrize("mode", ["solve", "fixed", "released"])
def test_a_killed_run_goes_on_bit_for_bit(mode: Any) -> None:
    settings: dict[str, Any] = {"mode": mode, "warmup_steps": 2}  # [10]
    settings |= {"accounting": "released"} if mode == "released" else {}
    whole, first, second = (controller(nets.vit(), **settings) for _ in range(3))
    for method in (whole, first, second):
        method.attach()
    train(whole, STEPS)
    train(first, 5)
    second.adapter.model.load_state_dict(copy.deepcopy(first.adapter.model.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, STEPS - 5, first=5)
    assert second.as_is().sha256() == whole.as_is().sha256()
    for key, value in whole.variables.state_dict().items():
        assert torch.equal(value, second.variables.state_dict()[key]), key
    assert all(map(torch.equal, whole.adapter.model.parameters(), second.adapter.model.parameters()))


def test_a_trained_controller_gives_a_plan_within_the_budget_whose_slim_model_equals_the_masked_one() -> None:
    method = controller(nets.vit(), budget=0.5)  # S1 in small
    method.attach()
    infos = train(method, STEPS)
    method.detach()
    assert infos[-1].target == 0.5 and infos[0].target == 1 - 0.5 / (STEPS / 2)
    plan = method.finalise()
    assert 0.48 < method.resource(plan) <= 0.5
    model = method.adapter.model.eval()
    smaller = slim(model, plan)
    apply_plan(model, plan)
    verify(model, smaller, nets.images(7))


def test_amounts_and_multipliers_see_the_norms_after_the_proximal_step() -> None:
    method = controller(nets.vit(), skip=False)
    method.variables.y.fill_(20)
    method.variables.p.fill_(10)
    method.variables.s.copy_(torch.tensor([[0.7, 9.0]]).repeat(3, 1))
    method.variables.r.fill_(3)
    now, model = copy.deepcopy(method.variables), copy.deepcopy(method.adapter.model)
    adapter, target = ViTAdapter(model), method.target
    method.step()
    before = method.relative(group_norms(adapter))
    divide_columns(adapter, *shrinkage(before, now.s, now.r, now.y, now.p, method.config.eta_p))
    after = method.relative(group_norms(adapter))
    solve_step(now, after, method.costs, torch.zeros(3, 2), target, method.config, method.free)
    for key, value in now.state_dict().items():
        torch.testing.assert_close(method.variables.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, model.parameters(), method.adapter.model.parameters()))


def test_in_warm_up_nothing_but_weights_moves() -> None:
    method = controller(nets.vit(), mode="released", accounting="released", warmup_steps=3)
    method.attach()
    before = method.variables.state_dict()
    train(method, 3)
    assert all(torch.equal(before[key], value) for key, value in method.variables.state_dict().items())
    assert not method.gates.warm_up
    train(method, 1, first=3)
    assert not torch.equal(before["z"], method.variables.z)


def test_under_autocast_the_method_stays_in_float32() -> None:
    method = controller(nets.vit())  # [24]
    method.attach()
    train(method, 3, autocast=True)
    assert {value.dtype for value in method.variables.state_dict().values()} == {torch.float32}
    assert method.finalise()


def test_stochastic_depth_and_dropout_do_not_touch_the_plan() -> None:
    plain = controller(nets.vit())  # [30]
    noisy = controller(nets.vit(drop_path_rate=0.3, attn_drop_rate=0.2, proj_drop_rate=0.1))
    for method in (plain, noisy):
        for _ in range(STEPS):
            method.adapter.model.train()(nets.images())
            method.step()
    assert plain.finalise() == noisy.finalise()
    plan = noisy.finalise()
    smaller = slim(noisy.adapter.model, plan)
    assert smaller.blocks[0].attn.attn_drop.p == 0.2 and smaller.blocks[-1].attn.proj_drop.p == 0.1


# Refusals


@pytest.mark.parametrize("budget", [0.0, -1, 1.5, float("nan")])
def test_an_impossible_budget_is_refused(budget: float) -> None:
    with pytest.raises(ConfigError, match=r"method.budget must be in \(0, 1\], got"):  # [25]
        UVCConfig(budget=budget)


@pytest.mark.parametrize("arms", [{}, {"prune": False}, {"skip": False}, {"protect_blocks": [1]}])
def test_a_budget_below_the_floor_is_refused_with_the_floor_which_itself_can_be_met(arms: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"budget must be at least 0\.\d{4} for this model, got 0.01") as error:  # [25]
        controller(nets.vit(), budget=0.01, **arms)
    floor = float(str(error.value).split()[5]) + 1e-4
    method = controller(nets.vit(), budget=floor, **arms)
    assert method.resource(method.finalise()) <= floor


def test_weights_that_are_not_numbers_stop_the_method_with_the_step() -> None:
    method = controller(nets.vit())  # [25]
    train(method, 2)
    for value in (torch.nan, torch.inf):
        weight = method.adapter.blocks[1].mlp.fc2.weight
        before = weight.detach().clone()
        weight.data[0, 0] = value
        with pytest.raises(FloatingPointError, match="weights are not finite at step 2"):
            method.step()
        weight.data.copy_(before)
    method.gates.logits.grad = torch.full((3, 2), torch.nan)
    with pytest.raises(FloatingPointError, match="gates' gradient is not finite at step 2"):
        method.step()


def test_a_protected_block_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="protect_blocks must be below 3, got 3"):
        controller(nets.vit(), protect_blocks=[3])


def test_a_budget_of_one_keeps_everything() -> None:
    method = controller(nets.vit(), budget=1.0)  # [25]
    method.attach()
    assert method.finalise() == Plan.full(method.adapter.dims)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_layer": "SwiGLU"}, "SwiGLU"),
        ({"block_fn": "ParallelScalingBlock"}, "ParallelScalingBlock"),
        ({"block_fn": "ResPostBlock"}, "ResPostBlock"),
        ({"scale_attn_norm": True}, "Attention with a gate or a norm"),
        ({"global_pool": "map", "class_token": False}, "AttentionPoolLatent"),
    ],
)
def test_transformers_of_other_kinds_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    import timm.layers
    from timm.models import vision_transformer

    for module in (timm.layers, vision_transformer):
        options = {key: getattr(module, str(value), value) for key, value in options.items()}
    with pytest.raises(NotImplementedError, match=message):
        ViTAdapter(nets.vit(**options))


def test_a_network_that_is_no_vision_transformer_is_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="Linear: only timm's VisionTransformer"):
        ViTAdapter(nn.Linear(2, 2))
