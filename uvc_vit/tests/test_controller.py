"""Facts about the controller. Numbers in brackets are acceptance checks of the specification."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.config import ConfigError, parse
from uvc_vit.adapter import ViTAdapter
from uvc_vit.controller import UVCController
from uvc_vit.group_norms import group_norms
from uvc_vit.masked import apply_plan
from uvc_vit.plan import Plan
from uvc_vit.prox import divide_columns, shrinkage
from uvc_vit.released import ReleasedSettings
from uvc_vit.settings import Config
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
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(nets.images(8, seed=step))
        nn.functional.cross_entropy(logits.float(), torch.arange(8) % 5).backward()
        optimizer.step()
        found.append(method.step(0.01, torch.Generator().manual_seed(1000 + step)))
    return found


# The controller


def test_every_step_sees_the_gates_gradient_of_its_own_batch_alone() -> None:
    method = controller(nets.vit())
    method.attach()
    model = method.adapter.model.train()
    for step in range(3):
        method.gates.generator = torch.Generator().manual_seed(step)
        model(nets.images(8, seed=step)).square().mean().backward()
        assert method.gates.logits.grad is not None
        (own,) = torch.autograd.grad(_again(method, step), method.gates.logits)
        torch.testing.assert_close(method.gates.logits.grad, own)
        method.step()
        model.zero_grad()


def _again(method: UVCController, step: int) -> torch.Tensor:
    method.gates.generator = torch.Generator().manual_seed(step)
    return method.adapter.model(nets.images(8, seed=step)).square().mean()


def test_gates_within_gates_are_refused() -> None:
    model = nets.vit()
    first, second = controller(model), controller(model, budget=0.7)
    first.attach()
    with pytest.raises(RuntimeError, match="gates of another controller"):
        second.attach()
    first.detach()
    second.attach()
    second.detach()


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
    noise = {"drop_path_rate": 0.3, "attn_drop_rate": 0.2, "proj_drop_rate": 0.1}  # [30]
    plain, noisy, twin = (controller(nets.vit(**options)) for options in ({}, noise, {}))
    for method in (plain, noisy, twin):
        method.attach()
    train(plain, STEPS - 1)
    train(noisy, STEPS - 1)
    fc2 = [method.adapter.blocks[1].mlp.fc2.weight for method in (plain, noisy)]
    assert not torch.allclose(*fc2, rtol=0, atol=1e-4)  # the noise was there in training

    twin.adapter.model.load_state_dict(noisy.adapter.model.state_dict())
    twin.load_state_dict(noisy.state_dict())
    for method in (noisy, twin):
        method.adapter.model.train()
        method.gates.logits.grad = torch.full((3, 2), 0.1)
        method.step()
    for key, value in twin.variables.state_dict().items():
        assert torch.equal(value, noisy.variables.state_dict()[key]), key
    plan = noisy.finalise()
    assert plan == twin.finalise() and 0.48 < noisy.resource(plan) <= 0.5
    noisy.detach()
    model = noisy.adapter.model
    smaller = slim(model, plan)
    assert not torch.equal(smaller(nets.images()), smaller(nets.images()))
    apply_plan(model, plan)
    verify(model.eval(), smaller.eval(), nets.images(7))


# Refusals


@pytest.mark.parametrize("budget", [0.0, -1, 1.5, float("nan")])
def test_an_impossible_budget_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match=r"method.budget must be in \(0, 1\], got"):  # [25]
        UVCConfig(budget=budget)
    with pytest.raises(ConfigError, match=r"^method.budget must be in \(0, 1\], got [^\n]*$"):  # a command's one line
        parse(Config, ["--method.budget", str(budget).replace("nan", ".nan")], prog="train.py")


def test_a_step_without_gates_in_the_model_is_refused() -> None:
    method = controller(nets.vit())
    with pytest.raises(RuntimeError, match=r"call attach\(\) before the training loop"):
        method.step()
    method.attach()
    method.step()
    method.detach()
    with pytest.raises(RuntimeError, match="needs the gates"):
        method.step()
    controller(nets.vit(), skip=False).step()  # there are none


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((32, 32), r"input_size must be the model's \(16, 16\), got \(32, 32\)"),
        (16, r"input_size must be \(height, width\) in pixels, got 16"),
        ((16.0, 16), r"input_size must be \(height, width\) in pixels, got \(16.0, 16\)"),
    ],
)
def test_images_of_another_size_are_refused(size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UVCController(ViTAdapter(nets.vit()), UVCConfig(), size)


def test_a_model_that_takes_any_size_takes_whole_patches_or_pads() -> None:
    model = nets.vit(dynamic_img_size=True)
    assert ViTAdapter(model).tokens((24, 32)) == 6 * 8 + 1
    with pytest.raises(ValueError, match=r"multiples of the patches' \(4, 4\), got \(18, 16\)"):
        ViTAdapter(model).tokens((18, 16))
    assert ViTAdapter(nets.vit(dynamic_img_size=True, dynamic_img_pad=True)).tokens((18, 16)) == 5 * 4 + 1


@pytest.mark.parametrize("dim", [16, 64])  # heads of 8, and of 32, which keep at least `align` dimensions
@pytest.mark.parametrize("arms", [{}, {"prune": False}, {"skip": False}, {"protect_blocks": [1]}])
def test_a_budget_below_the_floor_is_refused_with_the_floor_which_itself_can_be_met(
    arms: dict[str, Any], dim: int
) -> None:
    with pytest.raises(ValueError, match=r"budget must be at least 0\.\d{4} for this model, got 0.01") as error:  # [25]
        controller(nets.vit(dim=dim), budget=0.01, **arms)
    floor = float(str(error.value).split()[5]) + 1e-4
    method = controller(nets.vit(dim=dim), budget=floor, **arms)
    assert method.resource(method.finalise()) <= floor


def test_a_warm_up_that_takes_all_of_stage_1_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps must be below the 12 steps of stage 1, got 12"):
        controller(nets.vit(), warmup_steps=12)


def test_weights_that_are_not_numbers_stop_the_method_with_the_step() -> None:
    method = controller(nets.vit())  # [25]
    method.attach()
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


def test_settings_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "uvc.yaml"
    path.write_text("{budget: 0.4, skip: false, released: {zlr: 2.0}}")
    found = UVCConfig.from_yaml(path)
    assert found == UVCConfig(budget=0.4, skip=False, released=ReleasedSettings(zlr=2.0))
    for content, message in (("{budget: 2}", "method.budget must be in"), ("{bugdet: 1}", "bugdet"), ("[", "readable")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            UVCConfig.from_yaml(path)
