"""Facts about mode solve and the final plan. Numbers in brackets are acceptance checks of the specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm import create_model

from uvc_vit.adapter import BlockDims, ViTAdapter
from uvc_vit.controller import UVCController
from uvc_vit.finalise import finalise
from uvc_vit.group_norms import GroupNorms, group_norms
from uvc_vit.plan import Plan
from uvc_vit.prox import divide_columns, shrinkage
from uvc_vit.resource import mac_costs
from uvc_vit.solve import Outcome, Relative, solve_step
from uvc_vit.tests import nets
from uvc_vit.uvc_config import UVCConfig
from uvc_vit.variables import Variables

STEPS = 60
BUDGET = 0.5


class Trial:
    """Mode solve on a network that does not train, with task gradients that close a gate or open it."""

    def __init__(self, budget: float = BUDGET, **settings: Any) -> None:
        self.adapter = ViTAdapter(nets.vit(depth=4, dim=32, heads=4))
        tokens, embed = self.adapter.tokens((16, 16)), self.adapter.embed_macs((16, 16))
        self.costs = mac_costs(self.adapter.dims, tokens, embed)
        self.settings, self.budget = UVCConfig(stage1_steps=STEPS, budget=budget, **settings), budget
        self.now = Variables.start(self.costs)
        self.relative = Relative.of(group_norms(self.adapter))
        self.free = torch.ones(4, dtype=torch.bool)
        self.step = 0

    @property
    def target(self) -> float:
        return 1 - (1 - self.budget) * min(1, (self.step + 1) / (STEPS / 2))

    def norms(self) -> GroupNorms:
        return self.relative(group_norms(self.adapter))

    def run(self, steps: int) -> list[tuple[float, Outcome]]:
        found = []
        for _ in range(steps):
            now = self.now
            divide_columns(self.adapter, *shrinkage(self.norms(), now.s, now.r, now.y, now.p, 0.03))
            noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(self.step))
            arguments = (self.now, self.norms(), self.costs, noise, self.target, self.settings, self.free)
            found.append((self.target, solve_step(*arguments)))
            self.step += 1
        return found

    def plan(self, budget: float | None = None) -> Plan:
        flags = {"prune": self.settings.prune, "skip": self.settings.skip, "free": self.free}
        budget = self.budget if budget is None else budget
        return finalise(self.now, self.norms(), self.costs, self.adapter.dims, budget, **flags)

    def share(self, plan: Plan) -> float:
        return plan.share(self.adapter.tokens((16, 16)), self.adapter.embed_macs((16, 16)))


# Steps


@pytest.mark.parametrize("arms", [{}, {"skip": False}, {"prune": False}])
def test_r_follows_its_target_or_z_is_at_a_bound(arms: dict[str, bool]) -> None:
    trial = Trial(**arms)  # [10]
    before = 1.0
    for target, outcome in trial.run(STEPS):
        assert 0 <= outcome.z <= trial.settings.z_max
        assert abs(outcome.share - target) <= 1e-3 or outcome.z in (0, trial.settings.z_max)
        assert outcome.share <= max(before, target) + 1e-3
        before = outcome.share
    assert abs(before - BUDGET) <= 1e-2


def test_what_an_arm_does_not_use_stays_as_it_starts() -> None:
    start = Variables.start(Trial().costs)
    for arms, fixed in (({"skip": False}, ("gates",)), ({"prune": False}, ("s", "r", "y", "p"))):
        trial = Trial(**arms)
        trial.run(10)
        assert all(torch.equal(getattr(trial.now, name), getattr(start, name)) for name in fixed)
        assert any(not torch.equal(getattr(trial.now, name), getattr(start, name)) for name in ("s", "gates"))


def test_amounts_and_multipliers_stay_within_their_bounds() -> None:
    trial = Trial(budget=0.1)
    trial.run(STEPS)
    now = trial.now
    assert (now.s >= 0).all() and (now.s <= torch.tensor([3.0, 63.0])).all() and (now.r <= 7).all()
    assert min(now.y.min(), now.p.min(), now.z) >= 0 and now.s[:, 0].max() > 1 and now.r.max() > 1


def test_a_block_that_is_protected_keeps_everything() -> None:
    trial = Trial()
    trial.free[2] = False
    trial.run(STEPS)
    assert (trial.now.s[2] == 0).all() and (trial.now.r[2] == 0).all() and trial.now.gates[2].tolist() == [-1, 1]
    plan = trial.plan()
    assert plan.left()[sum(plan.keep_block[:2])] == trial.adapter.dims[2]


def test_the_same_steps_give_the_same_plan_and_so_do_interrupted_ones() -> None:
    whole, halves = Trial(), Trial()  # [10]
    whole.run(STEPS)
    halves.run(25)
    again = Trial()
    again.adapter.model.load_state_dict(halves.adapter.model.state_dict())
    again.now.load_state_dict(halves.now.state_dict())
    again.step = 25
    again.run(STEPS - 25)
    assert whole.plan().sha256() == again.plan().sha256() != Trial().plan().sha256()
    assert all(torch.equal(value, again.now.state_dict()[key]) for key, value in whole.now.state_dict().items())


def test_mode_fixed_comes_near_the_budget_too() -> None:
    trial = Trial(mode="fixed")
    last = trial.run(STEPS)[-1][1]
    assert last.share == pytest.approx(BUDGET, abs=0.1)


def test_variables_of_another_model_are_refused_by_name() -> None:
    state = Trial().now.state_dict()
    with pytest.raises(ValueError, match=r"r must be of shape \(4, 4\), got \(4, 5\)"):
        Trial().now.load_state_dict({**state, "r": torch.zeros(4, 5)})
    with pytest.raises(ValueError, match=r"z must be of shape \(\), got nothing"):
        Trial().now.load_state_dict({key: value for key, value in state.items() if key != "z"})


def test_weights_that_are_all_zero_do_not_disturb() -> None:
    trial = Trial()  # [29]
    with torch.no_grad():
        for block in trial.adapter.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.fc2.weight.zero_()
    trial.relative = Relative.of(group_norms(trial.adapter))
    trial.run(STEPS)
    assert trial.share(trial.plan()) <= BUDGET and all(
        value.isfinite().all() for value in trial.now.state_dict().values()
    )


# The final plan


@pytest.mark.parametrize("budget", [0.8, 0.5, 0.25, 0.12])
@pytest.mark.parametrize("arms", [{}, {"skip": False}])
def test_the_plan_meets_the_budget_within_one_neuron(budget: float, arms: dict[str, bool]) -> None:
    trial = Trial(budget, **arms)
    trial.run(STEPS)
    plan = trial.plan()
    neuron = (trial.costs.neuron / trial.costs.dense).max().item()
    assert budget - neuron < trial.share(plan) <= budget
    assert all(sizes.heads >= 1 and sizes.hidden >= 1 for sizes in plan.left())


@pytest.mark.parametrize("budget", [0.5, 0.2])
def test_even_without_any_step_the_plan_meets_the_budget(budget: float) -> None:
    trial = Trial(budget, skip=False)
    share = trial.share(trial.plan())
    assert budget - 0.01 < share <= budget


def test_a_plan_of_skips_drops_the_blocks_with_the_least_open_gates() -> None:
    trial = Trial(0.6, prune=False)
    trial.now.gates[:, 1] += torch.tensor([0.3, 0.1, 0.2, 0.4])
    plan = trial.plan()
    assert plan.keep_block == (True, False, False, True) and len(plan.keep_mlp[0]) == 64
    assert trial.share(plan) <= 0.6


def test_a_skipped_block_that_fits_returns() -> None:
    trial = Trial(0.6, prune=False)
    trial.now.gates[:, 1] = torch.tensor([-2.0, -3, -1.5, -4])  # all closed
    assert trial.plan().keep_block == (True, False, True, False)


@pytest.mark.parametrize("closed", [2, 3])
def test_where_gates_close_too_much_a_block_returns_and_is_pruned_to_fit(closed: int) -> None:
    trial = Trial(0.7)
    trial.now.gates[:closed, 1] = torch.tensor([-1.5, -1.4, -1.6])[:closed]
    plan = trial.plan()
    neuron = (trial.costs.neuron / trial.costs.dense).max().item()
    assert 0.7 - neuron < trial.share(plan) <= 0.7
    assert plan.keep_block == ((False, True, True, True) if closed == 2 else (True, True, False, True))


def test_a_budget_of_one_changes_nothing() -> None:
    trial = Trial(1.0)  # [25]
    assert trial.plan() == Plan.full(trial.adapter.dims)


def test_a_budget_that_cannot_be_met_is_refused_with_what_can() -> None:
    with pytest.raises(ValueError, match=r"budget must be at least 0\.\d+ here, got 0.01"):
        Trial(0.01).plan()


def test_deit_tiny_with_random_weights_meets_half() -> None:
    torch.manual_seed(0)  # [11]
    method = UVCController(ViTAdapter(create_model("deit_tiny_patch16_224")), UVCConfig(stage1_steps=30), (224, 224))
    method.attach()
    for _ in range(30):
        method.step()
    plan = method.finalise()
    assert 0.4985 < method.resource(plan) <= 0.5025
    for sizes in plan.left():
        (width,) = set(sizes.v_dims)
        assert width % 8 == 0 and sizes.hidden >= 1


@pytest.mark.parametrize("budget", [0.9, 0.6, 0.3])
def test_aligned_heads_of_a_block_keep_equally_many_dimensions_within_one_neuron_of_the_budget(budget: float) -> None:
    adapter = ViTAdapter(nets.vit(depth=4, dim=128, heads=4))  # heads of 32
    tokens, embed = adapter.tokens((16, 16)), adapter.embed_macs((16, 16))
    costs, norms = mac_costs(adapter.dims, tokens, embed), group_norms(adapter)
    now = Variables.start(costs)
    now.r.copy_(torch.tensor([[0.0, 3, 6, 9], [14, 18, 19, 19], [31, 31, 31, 31], [9, 3, 1, 0]]))
    now.s[1, 0] = 1
    plan = finalise(now, Relative.of(norms)(norms), costs, adapter.dims, budget, align=8)
    neuron = (costs.neuron / costs.dense).max().item()
    whole = all(len(neurons) == 256 for neurons in plan.keep_mlp)  # then only steps of 8 dimensions are left to return
    step = (costs.dim / costs.dense).max().item() * 4 * 8 if whole else neuron
    assert budget - step < plan.share(tokens, embed) <= budget
    widths = [{len(plan.keep_dim[block][head]) for head in plan.heads(block)} for block in range(4)]
    assert all(len(found) == 1 and max(found) % 8 == 0 for found in widths)
    if budget == 0.6:
        assert widths == [{24}, {16}, {8}, {32}]  # means 27.5, about 14.5, 1, 28.75
        for block, kept in enumerate(plan.keep_dim):
            largest = norms.column[block].argsort(descending=True)
            for head in plan.heads(block):
                width = len(kept[head])
                assert set(kept[head]) == set(largest[head, :width].tolist())


def test_a_protected_block_keeps_heads_whose_width_is_no_multiple_of_the_alignment() -> None:
    sizes = (BlockDims(32, 12, (12, 12), 64),) * 2
    costs = mac_costs(sizes, 17, 5000)
    norms = GroupNorms(torch.rand(2, 2, 12), torch.rand(2, 2), torch.rand(2, 64))
    free = torch.tensor([False, True])
    plan = finalise(Variables.start(costs), norms, costs, sizes, 0.8, skip=False, free=free, align=8)
    assert plan.left()[0] == sizes[0] and plan.left()[1].hidden < 64


def test_heads_no_wider_than_the_alignment_keep_their_own_numbers() -> None:
    trial = Trial()
    trial.now.r.copy_(torch.tensor([[0.0, 1, 2, 3]] * 4))
    arguments = (trial.now, trial.norms(), trial.costs, trial.adapter.dims, 0.6)
    plan = finalise(*arguments, align=8)
    assert plan == finalise(*arguments) and len({len(dims) for dims in plan.keep_dim[0]}) == 4


@pytest.mark.parametrize("align", [0, 8])
@pytest.mark.parametrize("seed", range(8))
def test_nothing_that_is_removed_would_still_fit(seed: int, align: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sizes = (BlockDims(32, 16, (16, 16, 16), 8),) * 3
    costs = mac_costs(sizes, 17, 5000)
    columns, neurons = torch.rand(3, 3, 16, generator=draw), torch.rand(3, 8, generator=draw)
    now = Variables.start(costs)
    now.s.copy_(torch.rand(3, 2, generator=draw) * torch.tensor([2.0, 3]))  # few neurons: heads and dimensions return
    now.r.copy_(torch.rand(3, 3, generator=draw) * 15)
    budget = 0.3 + 0.6 * torch.rand((), generator=draw).item()
    plan = finalise(now, GroupNorms(columns, columns.sum(-1), neurons), costs, sizes, budget, skip=False, align=align)
    left = costs.dense.item() * budget - plan.macs(17, 5000)
    assert left >= 0
    for block in range(3):
        head, dim, neuron = (part[block].item() for part in (costs.head, costs.dim, costs.neuron))
        heads = plan.heads(block)
        widths = [len(plan.keep_dim[block][place]) for place in heads]
        assert len(plan.keep_mlp[block]) == 8 or neuron > left
        assert min(widths) == 16 or dim * (len(heads) * 8 if align else 1) > left
        gone = [len(plan.keep_dim[block][place]) for place in range(3) if place not in heads]
        assert all(head + dim * width > left for width in gone)
