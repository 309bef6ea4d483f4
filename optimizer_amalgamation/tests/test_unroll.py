"""Facts about one truncated unroll and its meta-gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer_amalgamation import (
    SMALL_CHOICE,
    ChoiceRule,
    Context,
    OriginalRule,
    Pool,
    ScaleRule,
    StudentRule,
    Teacher,
)
from optimizer_amalgamation.clip import clip_adaptive
from optimizer_amalgamation.episode import Trained, begin, draw_scale
from optimizer_amalgamation.meta_gradient import meta_gradient
from optimizer_amalgamation.problems import Problem, quadratic
from optimizer_amalgamation.tests.plain import doubled, fixture, flat, plain_unroll, tiny
from optimizer_amalgamation.unroll import Path, imitate, unroll

TEACHERS = (Teacher("adam", 0.005), Teacher("rmsprop", 0.005))


def close(a: Tensor, b: Tensor, relative: float) -> bool:
    return float((a - b).norm()) <= relative * float(b.norm())


def policy_of(rule: Any, context: Context | None = None) -> Any:
    return lambda weights, state, grad, number: rule.step(weights, state, grad, context)


class Case:
    """R replicates of an episode on the tiny problem, in float64."""

    def __init__(self, rule: Any, teachers: Sequence[Any] = (), replicates: int = 1, steps: int = 5) -> None:
        self.problem: Problem = doubled(tiny())
        self.rule, self.teachers = rule, teachers
        self.context = Context.of(self.problem.shapes, torch.zeros(1, dtype=torch.float64))
        rng = torch.Generator().manual_seed(3)
        self.weights = doubled(rule.init(rng, replicates))
        start = torch.stack([self.problem.init(rng) for _ in range(replicates)]).double()
        self.scale = torch.stack([draw_scale(self.problem.size, 1.0, rng) for _ in range(replicates)]).double()
        self.rows = torch.stack([self.problem.draw(steps, rng) for _ in range(replicates)], 1)
        self.policy = policy_of(rule, self.context)
        self.path = begin(self.problem, rule, self.context, start, self.scale, teachers, self.rows[:3])

    def one(self, index: int) -> Case:
        """A replicate alone."""
        case = object.__new__(Case)
        case.__dict__.update(self.__dict__)
        pick = slice(index, index + 1)
        case.weights = {name: value[pick] for name, value in self.weights.items()}
        case.scale, case.rows = self.scale[pick], self.rows[:, pick]
        case.path = Path(
            self.path.params[pick],
            {k: v[pick] for k, v in self.path.state.items()},
            tuple(one[pick] for one in self.path.taught),
            tuple({k: v[pick] for k, v in one.items()} for one in self.path.teacher_states),
        )
        return case

    def efficient(self, reduce: str = "max", weight: Any = 0.0) -> tuple[Any, Any]:
        found = unroll(
            self.problem,
            self.policy,
            self.weights,
            self.path,
            self.rows,
            self.scale,
            self.teachers,
            reduce,  # type: ignore[arg-type]
        )
        grads = meta_gradient(self.problem, self.policy, self.weights, found, self.rows, self.scale, weight)
        return found, grads


# Against the released functions


@pytest.mark.parametrize("name", ["unroll_mlp", "unroll_released"])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_two_unrolls_are_the_released_ones(name: str, reduce: Any) -> None:
    case = fixture(name)
    raw, rule = case["raw"], StudentRule()
    weight, policy = float(raw["imitation_weight"]), policy_of(rule)
    path = Path(
        case["param"] / case["scale"],
        rule.zero_state(case["param"]),
        (case["param"],) * 2,
        tuple(one.zero_state(case["param"]) for one in TEACHERS),
    )
    for segment in range(2):
        shared = (case["rows"], case["scale"])
        found = unroll(case["problem"], policy, case["weights"], path, *shared, TEACHERS, reduce)
        key = f"{reduce}_seg{segment}"
        assert abs(float(found.meta) - float(raw[f"{key}_meta_loss"])) < 2e-6
        assert abs(float(found.imitation) - float(raw[f"{key}_imitation_loss"])) < 2e-6
        grads = meta_gradient(case["problem"], policy, case["weights"], found, *shared, weight)
        for tensor, value in grads.items():
            assert close(value[0], raw[f"{key}_grad_{tensor}"], 1e-5), tensor
        path = found.path
        if key == "max_seg0":
            own = {tensor: value[0] for tensor, value in case["weights"].items()}
            clipped = clip_adaptive({tensor: value[0] for tensor, value in grads.items()}, own)
            assert all(close(value, raw[f"{key}_clipped_{tensor}"], 1e-5) for tensor, value in clipped.items())
            assert (path.params - flat(raw, f"{key}_student_param")).abs().max() < 1e-6
            for taught, one in zip(path.taught, ("adam", "rmsprop"), strict=True):
                assert (taught / case["scale"] - flat(raw, f"{key}_{one}_param")).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["unroll_mlp", "unroll_released"])
def test_an_unroll_without_teachers_is_the_released_one(name: str) -> None:
    case = fixture(name)
    rule, raw = StudentRule(), case["raw"]
    path = Path(case["param"] / case["scale"], rule.zero_state(case["param"]))
    shared = (case["rows"], case["scale"])
    found = unroll(case["problem"], policy_of(rule), case["weights"], path, *shared)
    assert abs(float(found.meta) - float(raw["metaonly_loss"])) < 2e-6 and float(found.imitation) == 0
    grads = meta_gradient(case["problem"], policy_of(rule), case["weights"], found, *shared)
    for tensor, value in grads.items():
        assert close(value[0], raw[f"metaonly_grad_{tensor}"], 1e-5), tensor


def test_a_detached_inner_gradient_would_be_noticed() -> None:
    case = fixture("unroll_released")
    rule, raw = StudentRule(), case["raw"]
    path = Path(case["param"] / case["scale"], rule.zero_state(case["param"]))
    args = (case["problem"], policy_of(rule), case["weights"], path, case["rows"], case["scale"])
    right, wrong = plain_unroll(*args)[2], plain_unroll(*args, detach=True)[2]
    for tensor in right:
        assert close(right[tensor][0], raw[f"metaonly_grad_{tensor}"], 1e-5)
        assert not close(wrong[tensor][0], raw[f"metaonly_grad_{tensor}"], 0.05)


@pytest.mark.parametrize("name", ["unroll_mlp", "unroll_released"])
def test_a_warm_up_is_the_released_one(name: str) -> None:
    case = fixture(name)
    raw, rule = case["raw"], StudentRule()
    context = Context.of(case["problem"].shapes)
    path = begin(case["problem"], rule, context, case["param"], case["scale"], TEACHERS, case["rows"], 0.05)
    found = {
        "param": path.params,
        "student_m": path.state["m"],
        "student_v": path.state["v"],
        "adam_m": path.teacher_states[0]["m"],
        "rmsprop_ms": path.teacher_states[1]["r"],
    }
    for key, value in found.items():
        assert close(value, flat(raw, f"warmup_{key}"), 2e-6), key
    assert all(not value.any() for key, value in path.state.items() if key[0] in "hc")
    assert all(torch.equal(one, path.params * case["scale"]) for one in path.taught)


# Against autograd through the whole unroll


@pytest.mark.parametrize("rule", [StudentRule(), OriginalRule(), ScaleRule(), ChoiceRule(SMALL_CHOICE)])
def test_the_meta_gradient_of_every_rule_is_that_of_autograd(rule: Any) -> None:
    case = Case(rule)
    found, grads = case.efficient()
    meta, _, wanted, _ = plain_unroll(*_arguments(case))
    assert abs(float(found.meta) - float(meta)) < 1e-12
    for name in wanted:
        assert close(grads[name], wanted[name], 1e-10), name
    assert sum(float(value.norm()) for value in grads.values()) > 1e-6


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_the_meta_gradient_of_imitation_is_that_of_autograd(reduce: str) -> None:
    case = Case(StudentRule(), TEACHERS)
    found, grads = case.efficient(reduce, 0.3)
    meta, imitation, wanted, end = plain_unroll(*_arguments(case), TEACHERS, reduce, 0.3)
    assert abs(float(found.meta) - float(meta)) < 1e-12 and abs(float(found.imitation) - float(imitation)) < 1e-12
    assert all(close(grads[name], wanted[name], 1e-10) for name in wanted)
    for ours, theirs in zip(found.path.taught, end.taught, strict=True):
        assert close(ours, theirs, 1e-12)


def test_replicates_at_once_equal_replicates_alone() -> None:
    case = Case(StudentRule(), TEACHERS, replicates=3)
    weight = torch.tensor([0.0, 0.2, 0.5], dtype=torch.float64)
    found, grads = case.efficient(weight=weight)
    for index in range(3):
        alone, own = case.one(index).efficient(weight=weight[index : index + 1])
        assert close(alone.meta, found.meta[index : index + 1], 1e-12)
        assert close(alone.imitation, found.imitation[index : index + 1], 1e-12)
        assert all(close(grads[name][index], value[0], 1e-10) for name, value in own.items())
        assert torch.equal(found.nearest[index], alone.nearest[0])


def test_a_trained_policy_can_teach() -> None:
    case = Case(StudentRule())
    choice = ChoiceRule(SMALL_CHOICE)
    teacher = Trained(choice, doubled(choice.init(torch.Generator().manual_seed(1))), case.context)
    path = begin(case.problem, case.rule, case.context, case.path.params, case.scale, [teacher], case.rows[:2])
    assert torch.equal(path.teacher_states[0]["time"], torch.full((1, 1), 2.0, dtype=torch.float64))
    case.path, case.teachers = path, [teacher]
    _, grads = case.efficient("max", 0.5)
    wanted = plain_unroll(*_arguments(case), [teacher], "max", 0.5)[2]
    assert all(close(grads[name], wanted[name], 1e-10) for name in wanted)


def _arguments(case: Case) -> tuple[Any, ...]:
    return case.problem, case.policy, case.weights, case.path, case.rows, case.scale


# Properties


def test_one_step_teaches_nothing() -> None:
    case = Case(StudentRule(), steps=1)
    case.rows = case.rows[:1]
    found, grads = case.efficient()
    assert float(found.meta) == 0 and all(not value.any() for value in grads.values())


def test_two_steps_teach_by_the_second_loss_only() -> None:
    case = Case(StudentRule(), steps=2)
    _, grads = case.efficient()
    lossless = {name: value.clone().requires_grad_() for name, value in case.weights.items()}
    batch = case.problem.batch(case.rows[0])
    _, true = torch.autograd.functional.vjp(
        lambda p: case.problem.losses(p, batch).sum(), case.path.params * case.scale
    )
    update, _ = case.policy(lossless, case.path.state, true * case.scale, 0)
    second = case.problem.losses((case.path.params - update) * case.scale, case.problem.batch(case.rows[1]))
    wanted = torch.autograd.grad((second + 1e-10).log().sum() / 2, list(lossless.values()))
    assert all(close(grads[name], value, 1e-10) for name, value in zip(lossless, wanted, strict=True))


def test_the_distance_of_equal_parameters_is_finite_and_pulls_nowhere() -> None:
    distance, pull, _ = imitate(torch.ones(2, 16), [torch.ones(2, 16)], "max")
    assert distance.tolist() == pytest.approx([math.log(1e-10) - math.log(16)] * 2) and not pull.any()


def test_the_maximum_pulls_to_the_farthest_teacher_and_the_mean_to_all() -> None:
    params, near, far = torch.zeros(1, 4), torch.full((1, 4), 0.5), torch.full((1, 4), -2.0)
    distance, pull, closest = imitate(params, [far, near], "max")
    assert distance.item() == pytest.approx(math.log(0.5 * 16) - math.log(4)) and closest.item() == 1
    assert pull[0].tolist() == pytest.approx([2 / 8] * 4)
    distance, pull, closest = imitate(params, [near, far], "mean")
    assert distance.item() == pytest.approx((math.log(8) + math.log(0.5)) / 2 - math.log(4)) and closest.item() == 0
    assert pull[0].tolist() == pytest.approx([(2 / 8 - 0.5 / 0.5) / 2] * 4)


def test_a_teacher_that_is_the_student_teaches_nothing() -> None:
    case = Case(StudentRule())
    case.scale = torch.ones_like(case.scale)
    twin = Trained(case.rule, case.weights, case.context)
    path = begin(case.problem, case.rule, case.context, case.path.params, case.scale, [twin])
    case.path, case.teachers = path, [twin]
    found, grads = case.efficient("max", 1.0)
    _, alone = Case.efficient(case, "max", 0.0)
    assert float(found.imitation) == pytest.approx(math.log(1e-10) - math.log(case.problem.size))
    assert all(torch.equal(grads[name], alone[name]) for name in grads)


def test_mean_and_max_agree_for_one_teacher_and_a_duplicated_pool() -> None:
    one = Case(StudentRule(), TEACHERS[:1])
    (first, a), (second, b) = one.efficient("max", 0.2), one.efficient("mean", 0.2)
    assert torch.equal(first.imitation, second.imitation)
    assert all(close(a[name], b[name], 1e-12) for name in a)
    for reduce in ("max", "mean"):
        single, a = Case(StudentRule(), TEACHERS).efficient(reduce, 0.2)
        double, b = Case(StudentRule(), TEACHERS * 2).efficient(reduce, 0.2)
        assert close(single.imitation, double.imitation, 1e-12)
        assert all(close(a[name], b[name], 1e-10) for name in a)


def test_the_farthest_teacher_is_at_least_as_far_as_the_mean() -> None:
    largest, mean = (Case(StudentRule(), TEACHERS, 4).efficient(reduce)[0] for reduce in ("max", "mean"))
    assert bool((largest.imitation >= mean.imitation).all())
    assert largest.nearest.sum(1).tolist() == pytest.approx([1.0] * 4)


def test_teachers_do_not_see_the_scales() -> None:
    case = Case(StudentRule(), TEACHERS)
    start, ends = case.path.params * case.scale, []
    for scale in (torch.ones_like(case.scale), case.scale):
        path = begin(case.problem, case.rule, case.context, start, scale, TEACHERS)
        ends.append(unroll(case.problem, case.policy, case.weights, path, case.rows, scale, TEACHERS).path.taught)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_an_optimizee_that_overflows_stops_and_harms_no_other() -> None:
    case = Case(StudentRule(), TEACHERS, replicates=2)
    case.path.params[1] *= 1e200
    found, grads = case.efficient("max", 0.1)
    _, own = case.one(0).efficient("max", 0.1)
    assert all(close(grads[name][0], value[0], 1e-10) for name, value in own.items())
    assert all(not value[1].any() for value in grads.values())
    assert torch.equal(found.path.params[1], case.path.params[1]) and float(found.meta[1]) == 0


def test_an_update_that_is_no_number_stops_its_optimizee_and_no_teacher() -> None:
    case = Case(StudentRule(), TEACHERS, replicates=2)
    plain, grads = case.efficient(weight=0.1)
    policy = case.policy

    def wrong(weights: Any, state: Any, grad: Tensor, number: int) -> Any:
        update, new = policy(weights, state, grad, number)
        return (update.index_fill(0, torch.tensor([1]), math.nan) if number == 2 else update), new

    case.policy = wrong
    found, own = case.efficient(weight=0.1)
    assert found.alive.tolist() == [True, False] and bool(found.meta.isfinite().all())
    assert found.path.params.isfinite().all() and torch.equal(found.path.params[0], plain.path.params[0])
    assert all(torch.equal(own[name][0], value[0]) and own[name].isfinite().all() for name, value in grads.items())
    assert all(torch.equal(a, b) for a, b in zip(found.path.taught, plain.path.taught, strict=True))


def test_a_teachers_update_that_is_no_number_is_left_out() -> None:
    case = Case(StudentRule(), (Teacher("sgd", 1e200), *TEACHERS), replicates=2)
    found, _ = case.efficient("mean")
    assert all(one.isfinite().all() for one in found.path.taught)
    assert all(value.isfinite().all() for state in found.path.teacher_states for value in state.values())
    assert found.meta.isfinite().all() and bool(found.alive.all())


def test_what_is_kept_does_not_grow_with_the_teachers() -> None:
    pool = Pool([Teacher(name, 0.01) for name in ("sgd", "momentum", "rmsprop", "adam", "powersign", "addsign")])
    floats = []
    for teachers in (pool.teachers[:1], pool.teachers):
        found, _ = Case(StudentRule(), teachers).efficient()
        tensors = {
            id(tensor): tensor.numel()
            for step in found.steps
            for tensor in (step.params, step.grad, step.pull, *(step.state or {}).values())
            if tensor is not None
        }
        floats.append(sum(tensors.values()))
    assert floats[1] == floats[0]


def test_only_the_root_of_all_states_is_kept() -> None:
    found, _ = Case(StudentRule(), steps=17).efficient()
    assert [number for number, step in enumerate(found.steps) if step.state is not None] == [0, 5, 10, 15]


def test_functions_without_data_have_meta_gradients_too() -> None:
    problem = quadratic(10, torch.Generator().manual_seed(0))
    rule, context = StudentRule(), Context.of(problem.shapes)
    weights, ones = rule.init(torch.Generator().manual_seed(1), 2), torch.ones(2, 10)
    rows = torch.zeros(4, 2, 1, dtype=torch.int64)
    path = begin(problem, rule, context, torch.zeros(2, 10), ones)
    found = unroll(problem, policy_of(rule), weights, path, rows, ones)
    grads = meta_gradient(problem, policy_of(rule), weights, found, rows, ones)
    assert all(bool(value.isfinite().all()) for value in grads.values()) and bool(grads["out_kernel"].any())


def test_wrong_unrolls_are_refused() -> None:
    case = Case(StudentRule(), TEACHERS)
    with pytest.raises(ValueError, match="unroll must be at least 1, got 0"):
        unroll(case.problem, case.policy, case.weights, case.path, case.rows[:0], case.scale, TEACHERS)
    with pytest.raises(ValueError, match="teachers must be the 2 of the path, got 1"):
        unroll(case.problem, case.policy, case.weights, case.path, case.rows, case.scale, TEACHERS[:1])
