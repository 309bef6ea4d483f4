"""Facts about costs that were measured in place of multiply-adds."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.config import ConfigError
from common.tests.paper_checks import quiet, said
from uvc_vit import cost as cost_module
from uvc_vit import latency
from uvc_vit.adapter import BlockDims, ViTAdapter
from uvc_vit.controller import UVCController
from uvc_vit.cost import latency_ratio, training_ratio
from uvc_vit.eval import read_plan
from uvc_vit.latency import LatencyTable, fit, measure, variants
from uvc_vit.plan import Plan
from uvc_vit.slim import slim
from uvc_vit.tests import nets
from uvc_vit.tests.test_slim import changed, distilled
from uvc_vit.tests.test_train import config
from uvc_vit.train import train
from uvc_vit.uvc_config import UVCConfig

SIZES = BlockDims(dim=16, qk_dim=8, v_dims=(8, 8), hidden=32)


def table(**parts: Any) -> LatencyTable:
    """Three blocks of 1 + 2 * 2 + .25 * 16 + .125 * 32 = 13 seconds each, 1 for the rest: 40."""
    found: dict[str, Any] = {"block": 1.0, "head": 2.0, "dim": 0.25, "neuron": 0.125}
    return replace(LatencyTable((SIZES,) * 3, 1.0, *((value,) * 3 for value in found.values())), **parts)


def controller(costs: LatencyTable, **settings: Any) -> UVCController:
    adapter = ViTAdapter(nets.vit())
    options = UVCConfig(accounting="latency", stage1_steps=30, **settings)
    return UVCController(adapter, options, (16, 16), costs.costs(adapter))


def cost(plan: Plan) -> float:
    """Of a plan by the table."""
    left = [1 + 2 * sizes.heads + 0.25 * sum(sizes.v_dims) + 0.125 * sizes.hidden for sizes in plan.left()]
    return (1 + sum(left)) / 40


def test_the_plan_meets_the_budget_in_measured_time() -> None:
    method = controller(table(), budget=0.5)
    assert method.costs.dense.item() == 40
    method.attach()
    for _ in range(30):
        info = method.step()
    assert pytest.approx(0.5, abs=2e-2) == info.R
    share = cost(method.finalise())
    assert 0.5 - 0.125 / 40 < share <= 0.5


def test_what_takes_no_time_is_not_removed() -> None:
    method = controller(table(neuron=(0.0,) * 3), budget=0.6, skip=False)
    for _ in range(30):
        method.step()
    assert all(sizes.hidden == 32 for sizes in method.finalise().left())


def test_times_that_are_linear_are_fitted_exactly() -> None:
    left = [plan.left()[0] for plan in variants(SIZES)]
    assert len(left) == 1 + 2 * 3 + 1 and len(set(left)) == len(left)
    times = [3 + 2 * sizes.heads + 0.5 * sum(sizes.v_dims) + 0.25 * sizes.hidden for sizes in left]
    parts, error = fit(left, times)
    assert parts.tolist() == pytest.approx([3, 2, 0.5, 0.25]) and error < 1e-9
    parts, error = fit(left, [5 - 0.01 * sizes.hidden for sizes in left])
    assert parts[3] == 0 and error > 0.01  # less time for more neurons: noise, not a cost


def test_a_network_is_timed_in_its_own_precision() -> None:
    found = measure(nets.vit().to(torch.bfloat16), nets.images(2).to(torch.bfloat16), repeats=1)
    assert len(found.sizes) == 3


def test_a_network_is_timed_block_by_block() -> None:
    model = nets.vit()
    found = measure(model, nets.images(), repeats=3)
    assert found.sizes == ViTAdapter(model).dims and found.embed > 0
    assert len(set(zip(found.block, found.head, found.dim, found.neuron, strict=True))) == 1  # equal blocks
    assert found.block[0] + 2 * found.head[0] + 16 * found.dim[0] + 32 * found.neuron[0] > 0


def test_times_are_ratios_of_the_small_network_to_the_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nets.vit()
    plan = changed(model, keep_mlp=tuple(range(8)))
    spent, forward = [0.0], nn.Linear.forward

    def timed(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        spent[0] += layer.weight.numel()
        return forward(layer, x)

    monkeypatch.setattr(nn.Linear, "forward", timed)
    monkeypatch.setattr(cost_module, "now", lambda: spent[0])
    small, large = (
        sum(layer.weight.numel() for layer in net.modules() if isinstance(layer, nn.Linear))
        for net in (slim(model, plan), model)
    )
    assert small < large
    assert latency_ratio(model, plan, "grouped", nets.images(), 2) == pytest.approx(small / large)
    assert training_ratio(model, plan, "grouped", nets.images(), 2) == pytest.approx(large / small)


def test_stage_2_is_timed_on_a_network_with_two_outputs_too() -> None:
    model = distilled()
    model.set_distilled_training(True)
    plan = changed(model, keep_mlp=(1, 2))
    for measured in (latency_ratio, training_ratio):
        assert measured(model, plan, "grouped", nets.images(), 1) > 0


def test_a_run_uses_the_table_that_the_command_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke = Path(latency.__file__).parent / "configs" / "smoke.yaml"
    path = tmp_path / "table.json"
    arguments = ["--config", smoke, "--out", path, "--batch", 2, "--repeats", 2]
    status, out, _ = said(latency.main, arguments, capsys)
    assert status is None and f"{path}: 3 blocks, fitted within" in out
    entries = json.loads(path.read_text())
    entries |= {"embed": 0, "block": [0] * 3, "head": [0] * 3, "dim": [0] * 3, "neuron": [1, 1, 3]}
    path.write_text(json.dumps(entries))
    options = ("--method.accounting", "latency", "--method.table", path, "--method.skip", "false")
    train(config(*options, "--method.budget", 0.6), tmp_path / "run", quiet)
    hidden = [len(neurons) for neurons in read_plan(tmp_path / "run" / "plan.json").keep_mlp]
    assert hidden[0] + hidden[1] + 3 * hidden[2] in range(int(0.6 * 5 * 64) - 2, int(0.6 * 5 * 64) + 1)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", "[" * 100_000, '{"sizes": [{"dim": 1}]}']
    + [
        json.dumps({**asdict(table()), **wrong})
        for wrong in ({"block": [1]}, {"dim": [-1] * 3}, {"head": ["1"] * 3}, {"embed": None}, {"more": 1})
    ]
    + [json.dumps(asdict(table())).replace("0.125", "NaN"), json.dumps(asdict(table())).replace("0.125", "1e999")],
)
def test_a_damaged_table_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ConfigError, match=r"method.table: .*/t.json: not a table of latencies"):
        LatencyTable.read(tmp_path / "t.json")


def test_tables_that_are_not_there_or_not_the_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such table"):
        LatencyTable.read(tmp_path / "no.json")
    with pytest.raises(ValueError, match="plan block 0 is for hidden 32, the model has 64"):
        table().costs(ViTAdapter(nets.vit(mlp_ratio=4.0)))
    adapter = ViTAdapter(nets.vit())
    for accounting, costs, given in (("latency", None, "none"), ("exact", table().costs(adapter), "some")):
        options = UVCConfig(accounting=accounting)  # type: ignore[arg-type]
        message = f"costs must be those of a LatencyTable for accounting latency, else none, got {given}"
        with pytest.raises(ValueError, match=message):
            UVCController(adapter, options, (16, 16), costs)


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(asdict(table(error=0.02))))
    found = LatencyTable.read(tmp_path / "t.json")
    assert found == table(error=0.02) and torch.equal(found.costs(ViTAdapter(nets.vit())).hidden, torch.full((3,), 32))
