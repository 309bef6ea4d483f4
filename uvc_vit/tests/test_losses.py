"""Facts about losses, teacher, schedules and baselines. Numbers in brackets: acceptance checks of the specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ConfigError
from common.masks import prunable_weights
from uvc_vit.adapter import ViTAdapter
from uvc_vit.controller import UVCController
from uvc_vit.distill import KDConfig, Teacher, distilled_loss
from uvc_vit.group_norms import GroupNorms, group_norms
from uvc_vit.masked import apply_plan
from uvc_vit.one_shot import first_blocks, gradient_scores, head_scores, neuron_scores, random_scores, uniform_plan
from uvc_vit.schedule import warmup_cosine
from uvc_vit.tests import nets
from uvc_vit.unstructured import gradual_sparsity, magnitude_mask, taylor_scores, top_share
from uvc_vit.uvc_config import UVCConfig


def no_teacher() -> Tensor:
    pytest.fail("teacher called")


# Distillation


@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.1, 1.0), (0.5, 3.0)])
def test_the_loss_and_its_gradients_are_the_authors(kind: Any, alpha: float, temperature: float) -> None:
    given = nets.vectors("kd_loss")  # [8]
    key = f"{kind}_{alpha}_{temperature}"
    own, distilled = (given[name].clone().requires_grad_() for name in ("cls_logits", "kd_logits"))
    config = KDConfig(kind, alpha, temperature, "numel")
    loss = distilled_loss((own, distilled), given["soft_target"], lambda: given["teacher_logits"], config)
    loss.backward()
    torch.testing.assert_close(loss.double(), given[f"loss_{key}"], rtol=1e-5, atol=0)
    torch.testing.assert_close(own.grad, given[f"g0_{key}"], rtol=1e-5, atol=1e-8)
    if kind != "none":
        torch.testing.assert_close(distilled.grad, given[f"g1_{key}"], rtol=1e-5, atol=1e-8)


def test_a_student_equal_to_its_teacher_loses_nothing_by_soft_distillation() -> None:
    logits, targets = torch.randn(4, 7), torch.full((4, 7), 1 / 7)  # [18]
    loss = distilled_loss(logits, targets, lambda: logits, KDConfig("soft", 1.0, 2.0))
    assert loss.abs() < 1e-6


def test_the_released_reduction_is_smaller_by_the_number_of_classes() -> None:
    own, theirs, targets = torch.randn(4, 7), torch.randn(4, 7), torch.full((4, 7), 1 / 7)  # [18]
    mean = distilled_loss(own, targets, lambda: theirs, KDConfig("soft", 1.0))
    released = distilled_loss(own, targets, lambda: theirs, KDConfig("soft", 1.0, reduction="numel"))
    assert mean.item() == pytest.approx(7 * released.item(), rel=1e-6)


@pytest.mark.parametrize("config", [KDConfig("soft", 0.0), KDConfig("none", 0.7)])
def test_without_distillation_the_teacher_is_not_asked(config: KDConfig) -> None:
    own, targets = torch.randn(4, 7), torch.full((4, 7), 1 / 7)  # [18]
    assert torch.equal(distilled_loss(own, targets, no_teacher, config), F.cross_entropy(own, targets))


def test_hard_distillation_is_cross_entropy_to_the_teachers_choice() -> None:
    own, theirs, targets = torch.randn(4, 7), torch.randn(4, 7), torch.full((4, 7), 1 / 7)  # [18]
    found = distilled_loss(own, targets, lambda: theirs, KDConfig("hard", 1.0))
    assert torch.equal(found, F.cross_entropy(own, theirs.argmax(1)))


def test_each_head_of_a_distilled_model_learns_from_its_own_term() -> None:
    targets, theirs = torch.full((4, 7), 1 / 7), torch.randn(4, 7)  # [18]
    for alpha, zero in ((1.0, 0), (0.0, 1)):
        outputs = (torch.randn(4, 7, requires_grad=True), torch.randn(4, 7, requires_grad=True))
        loss = distilled_loss(outputs, targets, lambda: theirs, KDConfig("soft", alpha))
        loss.backward()
        assert outputs[zero].grad is None or (outputs[zero].grad == 0).all()
        assert (outputs[1 - zero].grad != 0).any()


def test_the_teacher_never_changes_nor_leaves_eval_mode() -> None:
    model = nets.vit(proj_drop_rate=0.5).train()  # [22]
    teacher = Teacher(model, 5)
    before = [value.clone() for value in teacher.model.state_dict().values()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.train()
    first, second = teacher(nets.images()), teacher(nets.images())
    assert torch.equal(first, second) and not first.requires_grad and not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert all(map(torch.equal, before, teacher.model.state_dict().values()))


def test_a_teacher_of_other_classes_and_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="the teacher must have the student's 7 classes, got 5"):  # [25]
        Teacher(nets.vit(), 7)
    with pytest.raises(ConfigError, match=r"kd.alpha must be in \[0, 1\], got 1.5"):
        KDConfig(alpha=1.5)
    with pytest.raises(ConfigError, match=r"kd.temperature must be positive, got 0"):
        KDConfig(temperature=0)


# Schedules


def test_the_schedule_is_the_authors_past_its_end_too() -> None:
    given = nets.vectors("lr_schedule")  # [8], [20]
    found = [warmup_cosine(step, int(given["warmup"]), int(given["total"])) for step in range(110)]
    assert found == pytest.approx(given["cosine"].tolist(), abs=1e-7)


def test_gradual_sparsity_is_the_authors() -> None:
    given = nets.vectors("baselines")  # [8], [21]
    found = [gradual_sparsity(step, 0.5, 62500, 6250, 20) for step in given["gmp_t"].tolist()]
    assert found == pytest.approx(given["gmp_sparsity"].tolist(), abs=1e-12) and found[0] == pytest.approx(0.0713125)
    assert gradual_sparsity(0, 0.5, 10, 1, 4) == 0 and gradual_sparsity(99, 0.5, 10, 1, 4) == found[-1] == 0.5


# Unstructured


def small_net() -> tuple[nn.Module, dict[str, Any]]:
    given = nets.vectors("baselines")
    net = nn.Sequential(nn.Linear(10, 14), nn.GELU(), nn.Linear(14, 6, bias=False))
    net.load_state_dict({"0.weight": given["w0"], "0.bias": given["b0"], "2.weight": given["w1"]})
    return net, given


@pytest.mark.parametrize("density", [0.5, 0.2, 0.9])
def test_unstructured_masks_are_the_authors(density: float) -> None:
    net, given = small_net()  # [8]
    weights = prunable_weights(net, (nn.Linear,))
    batches = [(given["x"][:12], given["y"][:12]), (given["x"][12:], given["y"][12:])]
    taylor = top_share(taylor_scores(net, weights, batches, F.cross_entropy), density)
    for name, masks in (("mag", magnitude_mask(weights, density)), ("taylor", taylor)):
        for index, mask in enumerate(masks.values()):
            assert torch.equal(mask.float(), given[f"{name}_{density}_m{index}"])


# One shot


def test_scores_of_heads_and_neurons_are_the_authors() -> None:
    given = nets.vectors("baselines")  # [8]
    torch.testing.assert_close(
        head_scores(given["sp_grad"], given["sp_act"]), given["sp_head_score"], rtol=1e-5, atol=0
    )
    found = neuron_scores(given["sp_gfc1"], given["sp_gfc2"])
    torch.testing.assert_close(found, given["sp_mlp_score"], rtol=1e-5, atol=0)


def test_collected_scores_are_those_of_the_gradients() -> None:
    model = nets.vit()
    adapter = ViTAdapter(model)
    targets = torch.arange(4) % 5
    found = gradient_scores(adapter, [(nets.images(4), targets)], F.cross_entropy, group_norms(adapter))
    assert all(parameter.grad is None for parameter in model.parameters())
    gains = [nn.Parameter(torch.ones(2)) for _ in model.blocks]  # one on each head's output: its slope is the sum
    for block, gain in zip(model.blocks, gains, strict=True):
        scale = lambda module, inputs, gain=gain: (inputs[0] * gain.repeat_interleave(8),)  # noqa: E731
        block.attn.proj.register_forward_pre_hook(scale)
    total = torch.zeros(3, 2)
    for image, target in zip(nets.images(4), targets, strict=True):
        slopes = torch.autograd.grad(F.cross_entropy(model(image[None]), target[None]), gains)
        total += torch.stack(slopes).abs() / 4
    torch.testing.assert_close(found.head, total / 4, rtol=1e-3, atol=1e-7)  # mean of 4 images in the batch's loss


def method() -> UVCController:
    return UVCController(ViTAdapter(nets.vit(depth=4, dim=32, heads=4)), UVCConfig(), (16, 16))


@pytest.mark.parametrize("budget", [0.7, 0.4])
def test_one_shot_plans_meet_the_budget_with_one_ratio(budget: float) -> None:
    there = method()
    norms = group_norms(there.adapter)
    draw = torch.Generator().manual_seed(0)
    for scores in (norms, random_scores(norms, draw)):
        plan = uniform_plan(scores, there.final_costs, there.adapter.dims, budget, "dims")
        assert budget - 0.01 < there.resource(plan) <= budget
        widths = {len(dims) for heads in plan.keep_dim for dims in heads}
        assert len(widths) == 1 and all(map(all, plan.keep_head)) and widths < {8} | widths
    plan = uniform_plan(norms, there.final_costs, there.adapter.dims, budget, "heads")
    assert budget - 0.01 < there.resource(plan) <= budget
    assert len({sum(heads) for heads in plan.keep_head}) == 1 and len(plan.keep_dim[0][0]) == 8


def test_one_shot_plans_keep_whole_steps_of_dimensions_where_one_ratio_can() -> None:
    adapter = ViTAdapter(nets.vit(depth=3, dim=64, heads=2))  # heads of 32
    there = UVCController(adapter, UVCConfig(), (16, 16))
    norms, arguments = group_norms(adapter), (there.final_costs, adapter.dims)
    for budget, width in ((0.8, 24), (0.6, 16)):
        plan = uniform_plan(norms, *arguments, budget, "dims", align=8)
        assert {len(dims) for heads in plan.keep_dim for dims in heads} == {width}
        assert budget - 0.01 < there.resource(plan) <= budget
    least = uniform_plan(norms, *arguments, 0.36, "dims", align=8)  # leaves 4 dimensions
    assert least == uniform_plan(norms, *arguments, 0.36, "dims") and all(map(all, least.keep_head))
    assert {len(dims) for heads in least.keep_dim for dims in heads} == {4}


def test_a_one_shot_plan_keeps_the_highest_scores() -> None:
    there = method()
    norms = group_norms(there.adapter)
    ramp = GroupNorms(norms.column, norms.head, torch.arange(64.0).repeat(4, 1) + 1)
    plan = uniform_plan(ramp, there.final_costs, there.adapter.dims, 0.6, "dims")
    assert all(neurons[-1] == 63 and len(neurons) == 64 - neurons[0] for neurons in plan.keep_mlp)


def test_dropping_the_last_blocks_keeps_the_first() -> None:
    there = method()
    plan = first_blocks(there.final_costs, there.adapter.dims, 0.6)
    assert plan.keep_block == (True, True, False, False) and there.resource(plan) <= 0.6
    with pytest.raises(ValueError, match=r"budget must be at least 0\.2\d+ for one block, got 0.1"):
        first_blocks(there.final_costs, there.adapter.dims, 0.1)
    model = nets.vit(depth=4, dim=32, heads=4)
    apply_plan(model, plan)
    assert model(nets.images()).isfinite().all()
