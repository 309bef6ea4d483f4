"""Facts about the optimisers: their steps, their state, what they skip and what they refuse."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.runs import generator
from common.tests import children
from optimizer_amalgamation import (
    LARGE_CHOICE,
    SMALL_CHOICE,
    AddSign,
    AmalgamatedOptimizer,
    ChoiceOptimizer,
    ChoiceRule,
    Context,
    LearnedGD,
    OriginalRule,
    Pool,
    PoolAdam,
    PoolMomentum,
    PoolRMSProp,
    PoolSGD,
    PowerSign,
    ScaleOptimizer,
    Teacher,
    blocks,
)
from optimizer_amalgamation.rule_optimizer import RuleOptimizer
from optimizer_amalgamation.tests import two_ranks
from optimizer_amalgamation.tests.vectors import reference, stepped, student_weights, weights_of

SHAPES = [(4, 3), (5,), (2, 1, 2, 2)]
SCALE = {**weights_of(reference("scale_hierarchical")), "gamma": reference("scale_hierarchical")["gamma"]}
Make = Callable[..., RuleOptimizer]


def amalgamated(params: Any, **options: Any) -> AmalgamatedOptimizer:
    return AmalgamatedOptimizer(params, student_weights(), **{"warmup": 2, **options})


def choice(params: Any, **options: Any) -> ChoiceOptimizer:
    return ChoiceOptimizer(params, weights_of(reference("choice_large")), **{"warmup": 2, **options})


def original(params: Any, **options: Any) -> LearnedGD:
    return LearnedGD(params, weights_of(reference("original")), **{"warmup": 2, **options})


def scale(params: Any, **options: Any) -> ScaleOptimizer:
    return ScaleOptimizer(params, SCALE, **{"warmup": 2, **options})


LEARNT: dict[str, Make] = {"amalgamated": amalgamated, "choice": choice, "original": original, "scale": scale}
POOL: dict[str, Make] = {
    "sgd": PoolSGD,
    "momentum": PoolMomentum,
    "rmsprop": PoolRMSProp,
    "adam": PoolAdam,
    "powersign": PowerSign,
    "addsign": AddSign,
}
ALL = {**LEARNT, **POOL}
BOTH = [("blocks", name) for name in LEARNT if name != "scale"] + [("flat", name) for name in LEARNT]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for shape in SHAPES]


def gradient(p: Tensor, *keys: int) -> Tensor:
    seed = 1000 * (keys[0] + 1) + sum(keys[1:]) + p.numel()
    return (0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))).to(p.dtype)


def drive(optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[Tensor]:
    """Its parameters after steps with fixed gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for number, p in enumerate(params):
            p.grad = gradient(p, step, number)
        optimizer.step()
    return [p.detach().clone() for p in params]


def same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def close(one: Iterable[Tensor], other: Iterable[Tensor], atol: float = 1e-6) -> bool:
    return all(torch.allclose(a, b, atol=atol) for a, b in zip(one, other, strict=True))


def state_types(optimizer: torch.optim.Optimizer) -> set[torch.dtype]:
    """Types of its state tensors."""
    return {tensor.dtype for state in optimizer.state.values() for key, tensor in state.items() if key != "step"}


# Steps


@pytest.mark.parametrize("impl", ["blocks", "flat"])
@pytest.mark.parametrize(("warmup", "name"), [(3, "x_warm"), (0, "x_nowarm")])
def test_the_released_trajectories_on_a_quadratic(impl: str, warmup: int, name: str) -> None:  # acceptance 16
    arrays = reference("optimizer_quadratic")
    assert int(arrays["warmup"]) == 3 and float(arrays["warmup_rate"]) == pytest.approx(0.05)
    p = nn.Parameter(arrays["x0"].clone())
    optimizer = AmalgamatedOptimizer([p], weights_of(arrays), warmup=warmup, impl=impl)
    for wanted in arrays[name]:
        optimizer.zero_grad()
        (0.5 * (arrays["A"] @ p - arrays["b"]).square().sum()).backward()
        optimizer.step()
        assert torch.allclose(p.detach(), wanted, atol=1e-5)


@pytest.mark.parametrize(("impl", "name"), BOTH)
def test_the_optimiser_moves_weights_by_what_the_rule_says(impl: str, name: str) -> None:
    params = parameters()
    optimizer = LEARNT[name](params, warmup=2, warmup_lr=0.3, impl=impl)
    rule, weights, alpha = optimizer.rule, optimizer.weights, optimizer.param_groups[0]["alpha"]
    context = Context.of(SHAPES)
    state = rule.zero_state(torch.zeros(25), context)
    wanted = torch.cat([p.detach().flatten() for p in params])
    for step in range(6):
        found = torch.cat([p.flatten() for p in drive(optimizer, [step])])
        g = torch.cat([p.grad.flatten() for p in params])  # type: ignore[union-attr]
        if step < 2:
            update, state = 0.3 * g, rule.warmup(state, g)
        else:
            update, state = rule.step(weights, state, g, context)
            update = alpha * update
        wanted = wanted - update
        assert torch.allclose(found, wanted, atol=1e-5 if name == "scale" else 1e-6)


@pytest.mark.parametrize("name", [name for name in LEARNT if name != "scale"])
def test_both_forms_give_the_same(name: str) -> None:
    blocks, flat = (drive(LEARNT[name](parameters(), impl=impl), range(10)) for impl in ("blocks", "flat"))
    assert close(blocks, flat, 2e-6)
    assert not close(blocks, [p.detach() for p in parameters()], 1e-3)


@pytest.mark.parametrize(("name", "kind"), [*((name, name) for name in POOL), ("powersign", "ada"), ("addsign", "ada")])
def test_members_of_the_pool_are_its_teachers_without_a_warm_up(name: str, kind: str) -> None:
    options = {"adaptive": True} if kind == "ada" else {}
    p = nn.Parameter(torch.zeros(6))
    optimizer = POOL[name]([p], lr=0.03, **options)
    teacher = Teacher(f"ada{name}" if options else name, 0.03)
    state, wanted = teacher.zero_state(p.detach()), torch.zeros(6)
    for step in range(5):
        (found,) = drive(optimizer, [step])
        update, state = teacher.step(state, p.grad)  # type: ignore[arg-type]
        wanted = wanted - update
        assert torch.allclose(found, wanted, atol=1e-7)


def test_the_pools_rates_are_the_default_ones() -> None:
    rates = {name: make([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] for name, make in POOL.items()}
    assert rates == {"sgd": 0.2, "momentum": 0.5, "rmsprop": 0.005, "adam": 0.005, "powersign": 0.1, "addsign": 0.1}


@pytest.mark.parametrize(("impl", "name"), BOTH)
def test_lr_scales_every_update_and_decay_is_decoupled(impl: str, name: str) -> None:  # acceptance 16
    for step in (1, 4):  # warming up, and after
        moves = []
        for lr, decay in ((1.0, 0.0), (0.5, 0.0), (0.5, 0.2)):
            optimizer = LEARNT[name](parameters(), lr=0.0, impl=impl)
            drive(optimizer, range(step))
            start = [p.detach().clone() for p in parameters()]
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = lr, decay
            moves.append([a - b for a, b in zip(drive(optimizer, [step]), start, strict=True)])
        whole, half, decayed = moves
        alpha = optimizer.param_groups[0]["alpha"]
        assert close(half, [0.5 * move for move in whole])
        assert close(decayed, [move - 0.5 * 0.2 * alpha * p for move, p in zip(half, start, strict=True)])


def test_a_scheduler_halves_the_update() -> None:  # acceptance 16
    params, others = parameters(), parameters()
    one, other = amalgamated(params), amalgamated(others)
    scheduler = torch.optim.lr_scheduler.LambdaLR(one, lambda step: 0.5 if step >= 4 else 1.0)
    for step in range(4):
        drive(one, [step])
        scheduler.step()
        drive(other, [step])
    before = [p.detach().clone() for p in params]
    assert same(before, others)
    half, whole = drive(one, [4]), drive(other, [4])
    assert close(half, [0.5 * (b + w) for b, w in zip(before, whole, strict=True)])


@pytest.mark.parametrize(("impl", "name"), BOTH)
def test_maximising_is_minimising_the_negative(impl: str, name: str) -> None:
    ups, downs = parameters(), parameters()
    up, down = LEARNT[name](ups, maximize=True, impl=impl), LEARNT[name](downs, impl=impl)
    for step in range(5):
        for p, q in zip(ups, downs, strict=True):
            p.grad = gradient(p, step)
            q.grad = -p.grad
        up.step()
        down.step()
    assert same(ups, downs)


@pytest.mark.parametrize("impl", ["blocks", "flat"])
def test_groups_have_their_own_values(impl: str) -> None:
    fast, slow, frozen = parameters()
    optimizer = amalgamated(
        [
            {"params": [fast], "lr": 1.0, "warmup": 0, "alpha": 0.2},
            {"params": [slow], "lr": 0.5, "warmup": 9, "warmup_lr": 0.3},
            {"params": [frozen]},
        ],
        impl=impl,
    )
    starts = [p.detach().clone() for p in (fast, slow, frozen)]
    for p in (fast, slow):
        p.grad = gradient(p, 0)
    optimizer.step()
    update, _ = stepped(optimizer.rule, optimizer.weights, fast.grad.flatten()[None])  # type: ignore[union-attr]
    assert torch.allclose(fast.detach(), starts[0] - 0.2 * update.view(fast.shape), atol=1e-6)
    assert torch.allclose(slow.detach(), starts[1] - 0.5 * 0.3 * slow.grad, atol=1e-6)  # type: ignore[operator]
    assert torch.equal(frozen, starts[2]) and not optimizer.state[frozen]


@pytest.mark.parametrize(("impl", "name"), BOTH)
def test_a_parameter_without_gradient_does_not_age(impl: str, name: str) -> None:  # acceptance 16
    params = parameters()
    optimizer = LEARNT[name](params, impl=impl)
    drive(optimizer, range(3))
    before, saved = params[1].detach().clone(), copy.deepcopy(optimizer.state[params[1]])
    params[0].grad, params[1].grad = gradient(params[0], 9), None
    optimizer.step()
    assert torch.equal(params[1], before)
    assert optimizer.state[params[0]]["step"] == 4 and optimizer.state[params[1]]["step"] == 3
    assert all(torch.equal(optimizer.state[params[1]][k], tensor) for k, tensor in saved.items() if k != "global_h")


def test_tensors_of_scale_share_one_global_state() -> None:
    params = parameters()
    optimizer = scale(params, warmup=0)
    drive(optimizer, range(2))
    before = optimizer.state[params[0]]["global_h"].clone()
    params[1].grad = None
    optimizer.step()
    optimizer.add_param_group({"params": [late := nn.Parameter(torch.ones(3))]})
    late.grad = torch.ones(3)
    for turn in range(2):
        shared = [optimizer.state[p]["global_h"] for p in params]
        assert all(torch.equal(shared[0], other) for other in shared) and not torch.equal(shared[0], before)
        before = shared[0].clone()
        optimizer.step()
        assert turn == 0 or torch.equal(optimizer.state[late]["global_h"], optimizer.state[params[0]]["global_h"])


def test_a_first_tensor_that_joins_late_joins_the_global_state_of_scale() -> None:
    params = parameters()
    optimizer = scale(params, warmup=0)
    for p in params[1:]:
        p.grad = gradient(p, 0)
    for _ in range(3):
        optimizer.step()
    shared = optimizer.state[params[1]]["global_h"].clone()
    optimizer.param_groups[0]["warmup"] = 10**6  # the global state rests while all tensors warm up
    params[0].grad = gradient(params[0], 0)
    optimizer.step()
    assert shared.any() and torch.equal(optimizer.state[params[0]]["global_h"], shared)


@pytest.mark.parametrize(("impl", "name"), [*BOTH, ("auto", "adam")])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e19])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_gradient_that_is_not_finite_leaves_its_tensor_alone(
    impl: str, name: str, wrong: float, steps: int
) -> None:  # acceptance 16
    params = parameters()
    optimizer = LEARNT[name](params, impl=impl) if name in LEARNT else POOL[name](params)
    drive(optimizer, range(steps))
    starts, saved = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state[params[1]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for turn in range(2):
            for number, p in enumerate(params):
                p.grad = gradient(p, 20 + turn, number)
            params[1].grad[2] = wrong  # type: ignore[index]
            optimizer.step()
    assert torch.equal(params[1], starts[1])
    assert all(torch.equal(optimizer.state[params[1]][k], tensor) for k, tensor in saved.items() if k != "global_h")
    for number in (0, 2):
        assert params[number].isfinite().all() and not torch.equal(params[number], starts[number])
        assert all(tensor.isfinite().all() for tensor in optimizer.state[params[number]].values())
    assert optimizer.skipped == 2
    assert [str(w.message).split(":")[1].strip()[:27] for w in caught] == ["a gradient or update was no"]


@pytest.mark.parametrize(("impl", "name"), BOTH)
def test_every_skipped_tensor_counts(impl: str, name: str) -> None:
    params = parameters()
    optimizer = LEARNT[name](params, impl=impl)
    for number, p in enumerate(params):
        p.grad = torch.full_like(p, float("nan")) if number else gradient(p, 0)
    with pytest.warns(UserWarning, match="was not finite"):
        optimizer.step()
    assert optimizer.skipped == 2 and copy.deepcopy(optimizer).skipped == 2


class Exploding(OriginalRule):
    """Its third update is infinite for the second tensor."""

    def step(self, weights: Any, state: Any, grad: torch.Tensor, context: Any = None) -> Any:
        update, new = super().step(weights, state, grad, context)
        return torch.where(grad == 7, math.inf, update), new


@pytest.mark.parametrize("impl", ["flat", "blocks"])
def test_an_update_that_is_no_number_is_left_out_and_counted(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "OriginalRule", ())  # any rule
    params = parameters()
    optimizer = RuleOptimizer(params, Exploding(1.0), OriginalRule().init(generator(0)), warmup=0, impl=impl)
    drive(optimizer, range(2))
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad[2] = 7  # type: ignore[index]
    starts, saved = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state[params[1]])
    with pytest.warns(UserWarning, match="gradient or update was not finite"):
        optimizer.step()
    assert optimizer.skipped == 1 and torch.equal(params[1], starts[1])
    assert all(torch.equal(optimizer.state[params[1]][key], tensor) for key, tensor in saved.items())
    assert not torch.equal(params[0], starts[0]) and not torch.equal(params[2], starts[2])


def failing(name: str, params: Any, **options: Any) -> RuleOptimizer:
    """Its update is not finite where all gradients were 0 (0 / 0), or for large ones."""
    if name == "amalgamated":
        return AmalgamatedOptimizer(params, student_weights(), eps=1e-46, warmup=0, **options)
    rule = ChoiceRule(Pool((Teacher("sgd", 1e30), Teacher("rmsprop", 0.005))))
    return ChoiceOptimizer(params, rule.init(generator(0)), rule.pool, warmup=0, **options)


@pytest.mark.parametrize("impl", ["flat", "blocks"])
@pytest.mark.parametrize(("name", "bad_turn", "bad"), [("amalgamated", 0, 0.0), ("choice", 1, 9e17)])
@pytest.mark.parametrize("sizes", [(4,), (4, 3), (9000,), (4, 9000, 3)])
def test_a_skipped_step_was_never_there(
    impl: str, name: str, bad_turn: int, bad: float, sizes: tuple[int, ...]
) -> None:
    found = []
    for disturbed in (True, False):
        params = [nn.Parameter(torch.zeros(size)) for size in sizes]
        optimizer = failing(name, params, impl=impl)
        for turn in range(3):
            for p in params:
                p.grad = torch.full_like(p, 1e-30 if name == "choice" else 1.0)
            if turn == bad_turn and not disturbed:
                params[0].grad = None
            elif turn == bad_turn:
                params[0].grad[-1] = bad  # type: ignore[index]
            with pytest.warns(UserWarning) if turn == bad_turn and disturbed else contextlib.nullcontext():
                optimizer.step()
        assert optimizer.skipped == disturbed
        found.append([*params, *(tensor for p in params for tensor in optimizer.state[p].values())])
        assert all(bool(tensor.isfinite().all()) for tensor in found[-1])
    assert same(*found) if len(sizes) == 1 else close(*found)


@pytest.mark.parametrize("impl", ["flat", "blocks", "auto"])
@pytest.mark.parametrize(
    ("dtype", "name", "options", "size"),
    [
        (torch.float16, "amalgamated", {"warmup": 1, "warmup_lr": 2.0}, 6e4),
        (torch.float16, "original", {"warmup": 0, "lr": 1e30}, 6e4),
        (torch.float32, "amalgamated", {"warmup": 0, "lr": 1e39}, 1.0),
        (torch.bfloat16, "amalgamated", {"warmup": 1, "warmup_lr": 1e22}, 9e17),
        (torch.float16, "amalgamated", {"warmup": 0, "lr": 1e4, "weight_decay": 1e3}, 1.0),
        (torch.float16, "sgd", {"lr": 2.0}, 6e4),
    ],
)
def test_what_a_parameter_cannot_hold_is_not_added(
    impl: str, dtype: torch.dtype, name: str, options: dict[str, Any], size: float
) -> None:
    p, other = nn.Parameter(torch.full((3,), 2.0).to(dtype)), nn.Parameter(torch.ones(2))
    groups = [{"params": [p], **options}, {"params": [other], "lr": 1.0}]
    optimizer = LEARNT[name](groups, impl=impl) if name in LEARNT else POOL[name](groups)
    p.grad, other.grad = torch.full_like(p, size), torch.ones(2)
    with pytest.warns(UserWarning, match="was not finite"):
        optimizer.step()
    assert optimizer.skipped == 1 and p.tolist() == [2.0] * 3 and not torch.equal(other, torch.ones(2))
    assert not any(bool(tensor.any()) for tensor in optimizer.state[p].values())


@pytest.mark.parametrize("impl", ["flat", "blocks"])
def test_what_a_parameter_just_holds_is_added(impl: str) -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    optimizer = amalgamated([p], warmup_lr=2.0, impl=impl)
    p.grad = torch.full_like(p, 32752.0)
    optimizer.step()
    assert p.tolist() == [-65504.0] * 2 and optimizer.skipped == 0


def test_a_state_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    optimizer = amalgamated(parameters())
    drive(optimizer, range(3))
    before, saved = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
    saved["state"][1]["h0"][0] = math.nan
    with pytest.raises(RuntimeError, match="state of parameter 1 must be finite, got NaN or Inf in h0"):
        optimizer.load_state_dict(saved)
    assert same(*([*each["state"][1].values()] for each in (before, optimizer.state_dict())))


def test_without_a_word_the_weights_are_shipped_ones() -> None:
    optimizer, named = (AmalgamatedOptimizer(parameters(), *words) for words in ((), ("choice-large",)))
    assert all(torch.equal(weight, named.weights[name]) for name, weight in optimizer.weights.items())


def test_contexts_of_changing_sets_of_parameters_do_not_pile_up() -> None:
    params = [nn.Parameter(torch.zeros(1 + number % 3)) for number in range(9)]
    optimizer = LEARNT["original"](params, impl="flat")
    for step in range(100):
        for number, p in enumerate(params):
            p.grad = torch.ones_like(p) if step >> number & 1 else None
        optimizer.step()
    assert len(optimizer._contexts) <= 64


def test_large_gradients_that_can_be_squared_are_taken() -> None:
    for impl, name in BOTH:
        params = parameters()
        optimizer = LEARNT[name](params, impl=impl, warmup=0)
        for p in params:
            p.grad = torch.full_like(p, 9e17)
        optimizer.step()
        assert optimizer.skipped == 0 and all(p.isfinite().all() for p in params)
        assert all(tensor.isfinite().all() for p in params for tensor in optimizer.state[p].values())


def test_a_layout_of_another_memory_order_gives_the_same() -> None:
    p = nn.Parameter(torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)))
    q = nn.Parameter(p.detach().clone().to(memory_format=torch.channels_last))
    assert not q.is_contiguous()
    one, other = amalgamated([p]), amalgamated([q])
    for step in range(5):
        p.grad = gradient(p, step)
        q.grad = p.grad.clone().to(memory_format=torch.channels_last)
        one.step()
        other.step()
    assert torch.equal(p, q)


def test_small_tensors_are_stepped_together_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (torch.float32, torch.float64)
    for name in ("amalgamated", "choice", "original"):
        found = []
        for block in (4096, 32, 4):  # all together; two and one; each alone
            monkeypatch.setattr("optimizer_amalgamation.stepping.BLOCK", block)
            params = [nn.Parameter(p.detach().to(kind)) for kind in kinds for p in parameters()]
            optimizer = LEARNT[name]([{"params": params[::2], "lr": 0.5, "alpha": 0.3}, {"params": params[1::2]}])
            drive(optimizer, range(3))
            params[0].grad = None
            optimizer.step()  # clocks differ from here
            found.append(drive(optimizer, range(4, 8)))
        assert close(found[0], found[1], 2e-6) and close(found[0], found[2], 2e-6)


def test_empty_parameters_and_single_numbers_are_parameters_too() -> None:
    for impl in ("blocks", "flat"):
        empty, single = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(()))
        optimizer = amalgamated([empty, single], impl=impl)
        empty.grad, single.grad = torch.zeros(0, 3), torch.ones(())
        optimizer.step()
        assert single.item() == pytest.approx(-0.05)


def test_the_choices_are_the_mean_of_the_last_steps() -> None:
    params = parameters()
    optimizer = choice(params, warmup=1)
    assert optimizer.choices() == {}
    drive(optimizer, range(4))
    rule, weights = ChoiceRule(LARGE_CHOICE), optimizer.weights
    for number, p in enumerate(params):
        context, state = Context.of([p.shape]), rule.zero_state(torch.zeros(p.numel()))
        state = rule.warmup(state, gradient(p, 0, number).flatten())
        for step in (1, 2, 3):
            _, mixed, state = rule.choose(weights, state, gradient(p, step, number).flatten(), context)
        assert torch.allclose(optimizer.choices()[number], mixed.mean(0), atol=1e-6)


def test_a_choice_of_one_member_is_that_optimiser() -> None:
    rule = ChoiceRule(Pool((Teacher("adam", 0.02),)))
    p, q = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
    one = ChoiceOptimizer([p], rule.init(torch.Generator().manual_seed(0)), rule.pool, warmup=0)
    assert close(drive(one, range(6)), drive(PoolAdam([q], lr=0.02), range(6)))


# State


@pytest.mark.parametrize(("impl", "name"), [*BOTH, *(("auto", name) for name in POOL)])
def test_a_saved_and_loaded_optimiser_goes_on_bit_for_bit(impl: str, name: str) -> None:  # acceptance 16
    def make(params: Any) -> RuleOptimizer:
        return LEARNT[name](params, impl=impl) if name in LEARNT else POOL[name](params)

    whole = drive(make(parameters()), range(10))
    first = make(parameters())
    half = drive(first, range(5))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make([nn.Parameter(p) for p in half])
    second.load_state_dict(torch.load(file, weights_only=True))
    third, fourth = copy.deepcopy(second), pickle.loads(pickle.dumps(second))
    for optimizer in (second, third, fourth):
        assert same(drive(optimizer, range(5, 10)), whole)


@pytest.mark.parametrize("impl", ["blocks", "flat"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_other_types(impl: str, dtype: torch.dtype) -> None:
    found = drive(optimizer := amalgamated(parameters(dtype), impl=impl), range(5))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert state_types(optimizer) == {wide}
    assert all(p.dtype == dtype for p in found)
    params = [nn.Parameter(p.to(torch.float64)) for p in parameters(dtype)]
    exact = amalgamated(params)
    for step in range(5):
        for number, p in enumerate(params):
            p.grad = gradient(p.detach().to(dtype), step, number).double()
        exact.step()
    allowed = {torch.bfloat16: 0.1, torch.float16: 0.01, torch.float64: 1e-12}[dtype]
    assert close([p.double() for p in found], params, allowed)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert state_types(optimizer) == {wide}


@pytest.mark.parametrize("impl", ["blocks", "flat"])
def test_types_can_be_mixed(impl: str) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    mixed = [nn.Parameter(p.detach().to(kind)) for p, kind in zip(parameters(), kinds, strict=True)]
    found = drive(amalgamated(mixed, impl=impl), range(4))
    for number, (p, kind) in enumerate(zip(parameters(), kinds, strict=True)):
        alone = nn.Parameter(p.detach().to(kind))
        optimizer = amalgamated([alone], impl=impl)
        for step in range(4):
            alone.grad = gradient(alone, step, number)
            optimizer.step()
        assert torch.allclose(found[number], alone, atol=1e-6)


@pytest.mark.parametrize("impl", ["blocks", "flat"])
def test_recurrent_states_can_be_narrow_and_averages_stay_wide(impl: str) -> None:
    optimizer = amalgamated(parameters(), state_dtype=torch.bfloat16, impl=impl)
    found = drive(optimizer, range(8))
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert {key for key, tensor in state.items() if tensor.dtype == torch.bfloat16} == {"h0", "c0", "h1", "c1"}
    whole = drive(amalgamated(parameters(), impl=impl), range(8))
    assert close(found, whole, 0.01) and not close(found, whole, 1e-6)


def test_the_state_is_82_floats_a_coordinate_and_3_of_a_pool() -> None:
    optimizer = amalgamated(parameters())
    drive(optimizer, range(1))
    size = sum(t.numel() for s in optimizer.state.values() for key, t in s.items() if key != "step")
    assert size == 82 * 25
    optimizer = choice(parameters())
    drive(optimizer, range(1))
    assert sum(t.numel() for s in optimizer.state.values() for key, t in s.items() if key != "step") == 83 * 25


def test_a_step_leaves_no_graph_and_no_trace_in_the_random_state() -> None:  # acceptance 20
    for name, make in ALL.items():
        params = parameters()
        optimizer = make(params)
        before = torch.get_rng_state()
        drive(optimizer, range(4))
        assert torch.equal(torch.get_rng_state(), before), name
        tensors = [t for state in optimizer.state.values() for t in state.values()] + [p.grad for p in params]
        assert all(t.grad_fn is None and not t.requires_grad for t in tensors), name
        assert all(p.grad_fn is None and p.requires_grad for p in params)


def test_policy_weights_are_a_copy_and_not_trained() -> None:
    weights = student_weights()
    one = AmalgamatedOptimizer(parameters(), weights, warmup=0)
    wanted = drive(amalgamated(parameters(), warmup=0), range(3))
    for w in weights.values():
        w.zero_()
    assert same(drive(one, range(3)), wanted)


def test_training_moves_a_network_and_a_closure_works() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(64, 4)
    optimizer = amalgamated(net.parameters(), warmup=10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (net(x) - x[:, :1] * x[:, 1:2]).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(250)]
    assert losses[-1] < 0.2 * losses[0]


def test_a_group_added_later_joins() -> None:
    params = parameters()
    for impl, name in BOTH:
        optimizer = LEARNT[name](params[:2], impl=impl)
        drive(optimizer, range(4))
        optimizer.add_param_group({"params": [params[2]], "lr": 0.5})
        drive(optimizer, range(4, 7))
        assert [int(optimizer.state[p]["step"]) for p in params] == [7, 7, 3]


def test_a_gradient_scaler_unscales_skips_and_goes_on() -> None:
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    scaled, plain = amalgamated([p]), amalgamated([q])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(6):
        p.grad = q.grad = None
        g = gradient(q, step)
        scaler.scale((p * g).sum()).backward()
        if step == 3:
            p.grad.fill_(float("inf"))  # type: ignore[union-attr]
        else:
            q.grad = g
            plain.step()
        scaler.step(scaled)
        scaler.update()
    assert torch.allclose(p, q, atol=1e-6) and scaler.get_scale() == 2.0**9
    assert scaled.skipped == 0 and int(scaled.state[p]["step"]) == 5


def test_it_trains_under_ddp_as_alone(tmp_path: Path) -> None:
    two_ranks.main(tmp_path / "one.pt")
    done = children.run(*children.TORCHRUN, two_ranks.__file__, tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert close(one.values(), two.values(), 1e-5)


# What it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0 and finite, got -1"),
        ({"lr": float("nan")}, "lr must be"),
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers in"),
        ({"eps": 0.0}, "eps must be positive and finite, got 0"),
        ({"warmup": -1}, "warmup must be an integer of at least 0, got -1"),
        ({"warmup": 1.5}, "warmup must be an integer of at least 0, got 1"),
        ({"warmup": True}, "warmup must be an integer"),
        ({"warmup_lr": -0.1}, "warmup_lr must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"state_dtype": torch.int8}, "state_dtype must be a floating-point type, got torch.int8"),
        ({"impl": "fused"}, "impl must be one of auto, blocks, flat, got 'fused'"),
        ({"params": []}, "empty parameter list"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:  # acceptance 18
    with pytest.raises(ValueError, match=message):
        amalgamated(**{"params": parameters(), **options})


def test_wrong_arguments_of_others_are_refused() -> None:  # acceptance 18
    with pytest.raises(ValueError, match="impl must be 'flat', got 'blocks'"):
        scale(parameters(), impl="blocks")
    with pytest.raises(ValueError, match="on one device and of one precision"):
        scale([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.float64))])
    with pytest.raises(ValueError, match="at least one teacher, got none"):
        ChoiceOptimizer(parameters(), {}, Pool(()))
    with pytest.raises(ValueError, match="lstm0_kernel must have shape"):
        ChoiceOptimizer(parameters(), weights_of(reference("choice_small")), LARGE_CHOICE)
    ChoiceOptimizer(parameters(), weights_of(reference("choice_small")), SMALL_CHOICE)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_complex_and_integer_parameters_are_refused(dtype: torch.dtype) -> None:  # acceptance 18
    p = torch.zeros(3, dtype=dtype)
    with pytest.raises(TypeError, match="parameters must be real floating-point tensors, got torch"):
        amalgamated([p])
    optimizer = amalgamated(parameters())
    with pytest.raises(TypeError, match="parameters must be real"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("impl", "name"), BOTH)
def test_sparse_gradients_are_refused_before_anything_moves(impl: str, name: str) -> None:  # acceptance 18
    params = parameters()
    optimizer = LEARNT[name](params, impl=impl)
    starts = drive(optimizer, range(3))
    for p in params:
        p.grad = gradient(p, 0)
    params[2].grad = params[2].grad.to_sparse()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="must have dense gradients, got torch"):
        optimizer.step()
    assert same(params, starts) and all(int(optimizer.state[p]["step"]) == 3 for p in params)


def test_what_are_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"weights must be a file of weights, got '{tmp_path}'"):
        AmalgamatedOptimizer(parameters(), str(tmp_path))
    with pytest.raises(TypeError, match="weights must be a name, a path or tensors by name, got None"):
        AmalgamatedOptimizer(parameters(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["adam", "powersign", "addsign"])
@pytest.mark.parametrize("betas", [(0.5,), (0.5, 0.9, 0.9)])
def test_betas_are_two(name: str, betas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"betas must be two numbers in \[0, 1\), got \(0.5,"):
        POOL[name](parameters(), betas=betas)


def test_what_is_no_pool_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pool must be a Pool, got \['rmsprop', 'adam'\]"):
        ChoiceOptimizer(parameters(), {}, ["rmsprop", "adam"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a pool must have teachers such as Teacher\('adam', 0.005\), got 'adam'"):
        Pool(["adam"])  # type: ignore[list-item]


def test_a_group_with_a_wrong_rate_does_not_join() -> None:
    optimizer = amalgamated(parameters())
    with pytest.raises(ValueError, match="lr must be at least 0 and finite, got -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


def test_a_loaded_state_has_the_types_of_the_optimiser_that_loads_it() -> None:
    narrow, wide = amalgamated(parameters(), state_dtype=torch.bfloat16), amalgamated(parameters())
    drive(narrow, range(4))
    wide.load_state_dict(narrow.state_dict())
    assert state_types(wide) == {torch.float32}
    narrow.load_state_dict(wide.state_dict())
    assert state_types(narrow) == {torch.float32, torch.bfloat16}


def test_what_was_skipped_is_saved_with_the_state() -> None:
    params = parameters()
    optimizer, other = amalgamated(params), amalgamated(parameters())
    params[0].grad = torch.full_like(params[0], math.nan)
    with pytest.warns(UserWarning, match="was not finite"):
        optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped == 1
    saved = {name: value for name, value in other.state_dict().items() if name != "skipped"}  # as torch's
    optimizer.load_state_dict(saved)
    assert optimizer.skipped == 1


def test_a_state_of_another_layout_is_refused_and_changes_nothing() -> None:  # acceptance 18
    optimizer = amalgamated(parameters())
    drive(optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    other = choice(parameters())
    drive(other, range(3))
    with pytest.raises(RuntimeError, match="state of parameter 0 must have"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"groups must have \[3\] parameters, got \[2\]"):
        optimizer.load_state_dict(amalgamated(parameters()[:2]).state_dict())
    wrong = copy.deepcopy(saved)
    wrong["state"][1]["h0"] = wrong["state"][1]["h0"].T
    with pytest.raises(RuntimeError, match="state of parameter 1 must have"):
        optimizer.load_state_dict(wrong)
    wrong["state"][1]["h0"] = 1.0
    with pytest.raises(RuntimeError, match="state of parameter 1 must have"):
        optimizer.load_state_dict(wrong)
    with pytest.raises(RuntimeError, match="groups must have alpha, warmup, warmup_lr, got "):
        optimizer.load_state_dict(torch.optim.Adam(parameters()).state_dict())
    now = optimizer.state_dict()
    assert all(torch.equal(now["state"][n][k], t) for n, its in saved["state"].items() for k, t in its.items())
