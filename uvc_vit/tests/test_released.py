"""The released step retraces the authors' code. Numbers in brackets are acceptance checks of the specification."""

from __future__ import annotations

import pytest
import torch

from uvc_vit.adapter import ViTAdapter
from uvc_vit.controller import UVCController
from uvc_vit.gate_values import gumbel
from uvc_vit.group_norms import group_norms
from uvc_vit.prox import divide_columns
from uvc_vit.released import GateMemory, ReleasedSettings, divisors, released_step
from uvc_vit.resource import mac_costs
from uvc_vit.tests import nets
from uvc_vit.tests.plain import Loops
from uvc_vit.uvc_config import UVCConfig
from uvc_vit.variables import Variables


@pytest.mark.parametrize("name", ["trace_released", "trace_fast", "trace_saturate"])
def test_a_whole_trace_is_the_authors(name: str) -> None:
    given = nets.vectors(name)  # [8]
    cfg, args = given["cfg"], given["args"]
    adapter = nets.with_weights(given["proj_w0"], given["fc2_w0"], heads=cfg["H"])
    costs = mac_costs(adapter.dims, cfg["N"], int(given["embed_macs"]), "released")
    names = ("slr", "rlr", "ylr", "plr", "zlr", "glr", "gating_weight", "gating_interval", "tau")
    settings = ReleasedSettings(z_clip=args["z_grad_clip"], **{key: args[key] for key in names})
    now = Variables.start(costs)
    memory = GateMemory(torch.zeros_like(now.gates), torch.zeros_like(now.gates))
    for step, w_lr in enumerate(given["w_lr"].tolist()):
        divide_columns(adapter, *divisors(group_norms(adapter), now, w_lr))
        task, noise = given["task_gate_grad"][step], given["gumbel_noise"][step]
        share = released_step(now, memory, group_norms(adapter), costs, task, noise, args["budget"], settings)
        assert share == pytest.approx(given["R"][step].item(), abs=1e-5)
        for key, expected in (("s", "s"), ("r", "r"), ("y", "y"), ("p", "p"), ("z", "z"), ("gates", "gate")):
            torch.testing.assert_close(getattr(now, key), given[expected][step], rtol=2e-4, atol=2e-5)
    for index, block in enumerate(adapter.blocks):
        torch.testing.assert_close(block.attn.proj.weight.data, given["proj_wT"][index], rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(block.mlp.fc2.weight.data, given["fc2_wT"][index], rtol=2e-4, atol=2e-5)


def test_the_loop_form_takes_the_same_steps_through_the_whole_controller() -> None:
    model, looped = nets.vit(mlp_ratio=4.0), nets.vit(mlp_ratio=4.0)
    method = UVCController(ViTAdapter(model), UVCConfig(mode="released", accounting="released"), (16, 16))
    method.attach()
    loops = Loops(ViTAdapter(looped), method.costs, 0.5)
    for step in range(60):
        task = torch.randn(3, 2, generator=torch.Generator().manual_seed(step)) * 0.01
        method.gates.logits.grad = task.clone()
        info = method.step(1e-2, torch.Generator().manual_seed(step))
        noise = gumbel((2, 3, 2), torch.Generator().manual_seed(step))
        assert pytest.approx(loops.step(1e-2, task, noise), abs=1e-5) == info.R
    for name in ("s", "r", "y", "p", "z", "gates"):
        torch.testing.assert_close(getattr(method.variables, name), getattr(loops.now, name), rtol=1e-4, atol=1e-5)
    for one, other in zip(model.parameters(), looped.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert method.variables.s.ceil().max() >= 1 and method.variables.r.ceil().max() >= 1
