"""Facts about the learnt rules: the released values, coordinates, replicates, gradients, the in-place form."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from optimizer_amalgamation.blocks import in_place, turned
from optimizer_amalgamation.choice import ChoiceRule
from optimizer_amalgamation.lstm import Cell, init_lstm
from optimizer_amalgamation.pool import LARGE_CHOICE, SMALL_CHOICE, Pool, Teacher
from optimizer_amalgamation.rule import Context, Rule
from optimizer_amalgamation.scale import ScaleRule
from optimizer_amalgamation.students import OriginalRule, StudentRule
from optimizer_amalgamation.tests.vectors import reference, stepped, student_weights, weights_of

POOLS = {"choice_small": SMALL_CHOICE, "choice_large": LARGE_CHOICE}
SHAPES = [(4, 3), (5,), (2, 1, 2, 2)]
CONTEXT = Context.of(SHAPES)
N = 25
RULES: dict[str, Rule] = {
    "student": StudentRule(),
    "one layer": StudentRule(layers=1),
    "adam head": StudentRule(head="adam"),
    "rmsprop head": StudentRule(head="rmsprop"),
    "original": OriginalRule(),
    "choice": ChoiceRule(),
    "hard choice": ChoiceRule(SMALL_CHOICE, hardness=10.0),
    "multiplied choice": ChoiceRule(SMALL_CHOICE, multiplier=0.5),
    "scale": ScaleRule(),
}


def grads(steps: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gradients (steps, *shape)."""
    return 0.1 * torch.randn(steps, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fresh(rule: Rule, seed: int, replicates: int | None = None) -> dict[str, Tensor]:
    """Weights whose biases and heads are not zero either."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: w + 0.3 * torch.randn(w.shape, generator=rng)
        for name, w in rule.init(torch.Generator().manual_seed(seed), replicates).items()
    }


# The released values


@pytest.mark.parametrize("name", ["rnnprop_random", "rnnprop_released"])
def test_the_student_is_the_released_one(name: str) -> None:  # acceptance 2
    arrays = reference(name)
    rule, weights = StudentRule(), weights_of(arrays)
    updates, last = stepped(rule, weights, arrays["grads"].flatten(1))
    assert (updates - arrays["updates"].flatten(1)).abs().max() < 2e-7
    assert (updates.abs() < 0.1).all()
    _, first = stepped(rule, weights, arrays["grads"].flatten(1)[:1])
    for number, state in (("t0", first), (f"t{len(updates) - 1}", last)):
        for key in ("m", "v", "h0", "c0", "h1", "c1"):
            assert torch.allclose(state[key].flatten(), arrays[f"{key}_{number}"].flatten(), atol=1e-6)


def test_a_constant_gradient_of_the_released_student() -> None:  # acceptance 3
    constant, _ = stepped(StudentRule(), student_weights(), torch.full((100, 1), 1e-3))
    assert constant[[0, 9, 99], 0].tolist() == pytest.approx([0.0254921, 0.0179520, 0.0098608], abs=2e-7)
    still, _ = stepped(StudentRule(), student_weights(), torch.zeros(100, 1))
    assert still[[0, 99], 0].tolist() == pytest.approx([-8.4256e-4, -1.49e-5], abs=1e-7)


def test_the_student_does_not_see_the_scale_of_gradients() -> None:  # acceptance 4
    g = 0.1 + grads(30, 6).abs()
    one, _ = stepped(StudentRule(), student_weights(), g)
    for factor in (3.0, 1000.0):
        assert torch.allclose(stepped(StudentRule(), student_weights(), factor * g)[0], one, atol=1e-6)
    assert not torch.allclose(stepped(StudentRule(), student_weights(), -g)[0], -one, atol=1e-4)


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_choice_policy_is_the_released_one(name: str, number: int) -> None:  # acceptance 5
    arrays = reference(name)
    weights, rule = weights_of(arrays), ChoiceRule(POOLS[name])
    g, wanted = arrays[f"grads_{number}"], arrays[f"updates_{number}"].flatten(1)
    context = Context.of([g.shape[1:]])
    state = rule.zero_state(g[0].flatten())
    for step, one in enumerate(g.flatten(1)):
        update, choice, state = rule.choose(weights, state, one, context)
        assert (update - wanted[step]).abs().max() < 1e-6 * wanted.abs().max()
        assert torch.allclose(choice.mean(0), arrays[f"mean_choice_{number}"][step], atol=1e-6)
        assert torch.allclose(choice.sum(-1), torch.ones(()), atol=1e-6)
    late = {**rule.zero_state(g[0].flatten()), "time": torch.full((1,), 1500.0)}
    update, _ = rule.step(weights, late, g[0].flatten(), context)
    assert (update - arrays[f"update_time1500_{number}"].flatten()).abs().max() < 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("name", POOLS)
def test_another_epsilon_in_the_choice_pool_is_seen(name: str) -> None:  # acceptance 5
    arrays = reference(name)
    rule = ChoiceRule(Pool([replace(t, epsilon=1e-10) for t in POOLS[name].teachers]))
    errors = []
    for number in (0, 1, 2):
        g, wanted = arrays[f"grads_{number}"], arrays[f"updates_{number}"].flatten(1)
        updates, _ = stepped(rule, weights_of(arrays), g.flatten(1), Context.of([g.shape[1:]]))
        errors.append(float((updates - wanted).abs().max() / wanted.abs().max()))
    assert max(errors) > 2e-6


def test_a_choice_of_one_is_that_one() -> None:  # acceptance 5
    pool = Pool((Teacher("adam", 0.02),))
    rule, g = ChoiceRule(pool), grads(10, N)
    updates, _ = stepped(rule, fresh(rule, 0), g, CONTEXT)
    state = pool.zero_state(g[0])
    for one, update in zip(g, updates, strict=True):
        wanted, state = pool.step(state, one)
        assert torch.allclose(update, wanted[0], rtol=1e-6, atol=0)


def test_original_is_the_released_one() -> None:  # acceptance 6
    arrays = reference("original")
    updates, _ = stepped(OriginalRule(), weights_of(arrays), arrays["grads"].flatten(1))
    assert (updates - arrays["updates"].flatten(1)).abs().max() < 2e-7


def test_scale_is_the_released_one() -> None:  # acceptance 6
    arrays = reference("scale_hierarchical")
    g, wanted = (torch.cat([arrays[f"{name}_{j}"].flatten(1) for j in (0, 1)], 1) for name in ("grads", "updates"))
    context = Context.of([(3, 4), (4,)])
    weights = {**weights_of(arrays), "gamma": arrays["gamma"]}
    updates, state = stepped(ScaleRule(), weights, g, context)
    assert (updates - wanted).abs().max() < 5e-4 * wanted.abs().max()
    assert torch.allclose(state["global_h"], arrays["global_final"], atol=1e-5)


def test_rules_have_the_papers_numbers_of_weights() -> None:
    sizes = {name: sum(w.numel() for w in rule.init().values()) for name, rule in RULES.items()}
    assert (sizes["student"], sizes["original"], sizes["choice"], sizes["scale"]) == (5141, 5061, 5886, 5070)
    assert sum(w.numel() for w in ChoiceRule(SMALL_CHOICE).init().values()) == 5482


def test_fresh_lstm_weights() -> None:
    weights = init_lstm("lstm0", 2, torch.Generator().manual_seed(0))
    limit = (6 / 82) ** 0.5
    assert 0.9 * limit < weights["lstm0_kernel"].abs().max() <= limit
    assert torch.allclose(weights["lstm0_recurrent"] @ weights["lstm0_recurrent"].T, torch.eye(20), atol=1e-5)
    assert weights["lstm0_bias"].tolist() == [0.0] * 20 + [1.0] * 20 + [0.0] * 40


def test_fresh_scale_starts_from_its_decays_and_stands_still() -> None:
    rule = ScaleRule()
    weights = rule.init(torch.Generator().manual_seed(0))
    assert torch.sigmoid(weights["beta_g.bias"]).item() == pytest.approx(0.9, abs=1e-4)
    assert torch.sigmoid(weights["beta_lambda.bias"]).item() == pytest.approx(0.999, abs=1e-5)
    updates, _ = stepped(rule, weights, grads(3, N), CONTEXT)
    assert not updates.any()


# What holds for all


@pytest.mark.parametrize("name", RULES)
def test_weights_have_the_rules_shapes_and_depend_on_the_seed_only(name: str) -> None:
    rule = RULES[name]
    one, two = (rule.init(torch.Generator().manual_seed(3)) for _ in range(2))
    assert {key: tuple(w.shape) for key, w in one.items()} == rule.shapes
    assert all(torch.equal(w, two[key]) for key, w in one.items())
    assert any(not torch.equal(w, rule.init(torch.Generator().manual_seed(4))[key]) for key, w in one.items())


@pytest.mark.parametrize("name", RULES)
def test_replicates_equal_separate_runs(name: str) -> None:
    rule, g = RULES[name], grads(6, 3, N, dtype=torch.float64)
    weights = {key: w.double() for key, w in fresh(rule, 5, replicates=3).items()}
    updates, state = stepped(rule, weights, g, CONTEXT)
    for r in range(3):
        alone, its = stepped(rule, {key: w[r] for key, w in weights.items()}, g[:, r], CONTEXT)
        assert torch.allclose(updates[:, r], alone, rtol=1e-10, atol=1e-12)
        assert all(torch.allclose(state[key][r], tensor, rtol=1e-10, atol=1e-12) for key, tensor in its.items())


@pytest.mark.parametrize("name", RULES)
def test_the_first_replicate_is_what_one_draw_gives(name: str) -> None:
    one, three = (RULES[name].init(torch.Generator().manual_seed(5), count) for count in (None, 3))
    assert all(torch.equal(three[key][0], w) for key, w in one.items())
    assert any(not torch.equal(w[0], w[1]) for w in three.values())


@pytest.mark.parametrize("name", RULES)
def test_no_argument_is_changed(name: str) -> None:
    rule, g = RULES[name], grads(2, N)
    weights = fresh(rule, 1)
    _, state = stepped(rule, weights, g, CONTEXT)
    before = [t.clone() for t in (*weights.values(), *state.values(), g)]
    rule.step(weights, state, g[0], CONTEXT)
    rule.warmup(state, g[0])
    assert all(torch.equal(a, b) for a, b in zip(before, (*weights.values(), *state.values(), g), strict=True))


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("scale",) and "choice" not in name])
def test_coordinates_do_not_see_each_other(name: str) -> None:  # acceptance 2
    rule, g = RULES[name], grads(8, N)
    weights = fresh(rule, 2)
    whole, _ = stepped(rule, weights, g)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(stepped(rule, weights, g[:, order])[0], whole[:, order], atol=1e-7)
    parts = [stepped(rule, weights, part.contiguous())[0] for part in g.split([12, 5, 8], 1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-7)


@pytest.mark.parametrize("name", ["choice", "multiplied choice"])
def test_tensors_of_a_choice_policy_do_not_see_each_other(name: str) -> None:
    rule, g = RULES[name], grads(8, N)
    weights = fresh(rule, 2)
    whole, _ = stepped(rule, weights, g, CONTEXT)
    parts = [
        stepped(rule, weights, part, Context.of([shape]))[0]
        for part, shape in zip(g.split([12, 5, 8], 1), SHAPES, strict=True)
    ]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6)
    assert not torch.allclose(stepped(rule, weights, g, Context.of([(N,)]))[0], whole, atol=1e-6)


def test_the_context_flags_one_two_and_three_axes() -> None:
    context = Context.of([(2, 2), (3,), (1, 1, 2), (1, 1, 1, 2), ()])
    flags = context.ranks.tolist()
    assert flags[:4] == [[0, 1, 0]] * 4 and flags[4:7] == [[1, 0, 0]] * 3 and flags[7:9] == [[0, 0, 1]] * 2
    assert flags[9:] == [[0, 0, 0]] * 3
    assert context.tensors.tolist() == [0] * 4 + [1] * 3 + [2] * 2 + [3] * 2 + [4]


@pytest.mark.parametrize("name", RULES)
def test_warming_up_advances_averages_and_clock_alone(name: str) -> None:  # acceptance 9
    rule, g = RULES[name], grads(4, N)
    warmed = rule.zero_state(g[0], CONTEXT)
    for one in g:
        warmed = rule.warmup(warmed, one)
    _, state = stepped(rule, fresh(rule, 0), g, CONTEXT)
    for key, tensor in warmed.items():
        if key in ("m", "v", "r", "time"):
            assert torch.equal(tensor, state[key])
        else:
            assert torch.equal(tensor, rule.zero_state(g[0], CONTEXT)[key])
    if name == "choice":
        assert set(warmed) >= {"m", "v", "r", "time"} and float(warmed["time"]) == 4


@pytest.mark.parametrize("name", ["student", "adam head", "original", "choice", "multiplied choice", "scale"])
def test_derivatives_are_right(name: str) -> None:
    rule, g = RULES[name], grads(3, N, dtype=torch.float64)
    weights = {key: w.double() for key, w in fresh(rule, 0).items()}
    context = replace(CONTEXT, ranks=CONTEXT.ranks.double())
    _, state = stepped(rule, weights, g, context)
    rng = torch.Generator().manual_seed(0)
    ways = {key: torch.randn(w.shape, generator=rng, dtype=torch.float64) for key, w in weights.items()}
    way_g = 0.1 * torch.randn(N, generator=rng, dtype=torch.float64)

    def value(t: Tensor) -> Tensor:
        moved = {key: w + t * ways[key] for key, w in weights.items()}
        update, new = stepped(rule, moved, g + t * way_g, context, state)
        return update.sin().sum() + sum(tensor.sin().sum() for key, tensor in new.items() if key != "time")

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(value(t), t)
    h = 1e-5
    assert float(found) == pytest.approx(float(((value(t + h) - value(t - h)) / (2 * h)).detach()), rel=1e-6)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_the_pull_back_by_hand_is_the_derivative_of_the_cell(lead: tuple[int, ...]) -> None:  # acceptance 12
    rng = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()

    inputs = [
        leaf(*lead, 3, 4),
        leaf(*lead, 2, 4),
        leaf(*lead, 2, 4),
        leaf(*lead, 3, 8),
        leaf(*lead, 2, 8),
        leaf(*lead, 8),
    ]
    assert torch.autograd.gradcheck(lambda *args: Cell.apply(*args)[:2], inputs)
    x, h, c, kernel, recurrent, bias = inputs
    i, f, s, o = (kernel.mT @ x + recurrent.mT @ h + bias.unsqueeze(-1)).chunk(4, -2)
    wanted_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(s)
    found_h, found_c, *_ = Cell.apply(*inputs)
    assert torch.allclose(found_c, wanted_c, atol=1e-14)
    assert torch.allclose(found_h, torch.sigmoid(o) * torch.tanh(wanted_c), atol=1e-14)


def test_shared_weights_get_the_sum_over_replicates() -> None:
    rule, g = StudentRule(), grads(1, 3, N)[0]
    weights = {key: w.requires_grad_() for key, w in fresh(rule, 0).items()}
    update, _ = rule.step(weights, rule.zero_state(g), g)
    found = torch.autograd.grad(update.sum(), list(weights.values()))
    parts = [
        torch.autograd.grad(rule.step(weights, rule.zero_state(one), one)[0].sum(), list(weights.values())) for one in g
    ]
    for value, *its in zip(found, *parts, strict=True):
        assert torch.allclose(value, sum(its), atol=1e-5)


# In place


@pytest.mark.parametrize("name", [name for name in RULES if name != "scale"])
def test_the_form_in_place_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimizer_amalgamation.blocks.BLOCK", 8)  # so that there are four, the last one short
    rule, g = RULES[name], grads(12, N)
    weights = fresh(rule, 4)
    step = in_place(rule, weights)
    start = rule.zero_state(g[0], CONTEXT)
    there = {key: turned(tensor).clone() for key, tensor in start.items()}
    there["time"] = torch.zeros(N)
    updates, state = stepped(rule, weights, g, CONTEXT)
    with torch.no_grad():
        for one, wanted in zip(g, updates, strict=True):
            update = step(there, one, CONTEXT)
            assert (update - wanted).abs().max() <= 2e-7 * max(1.0, float(wanted.abs().max()))
            there["time"] += 1
    assert all(torch.allclose(turned(there[key]), tensor, atol=2e-6) for key, tensor in state.items() if key != "time")


# Options


def test_a_hard_choice_is_one_member_and_with_noise_a_sample() -> None:
    rule, soft, g = ChoiceRule(hardness=10.0), ChoiceRule(), grads(1, N)[0]
    weights, state = fresh(rule, 3), rule.zero_state(g)
    _, hard, _ = rule.choose(weights, state, g, CONTEXT)
    _, mixed, _ = soft.choose(weights, state, g, CONTEXT)
    assert torch.equal(hard.argmax(-1), mixed.argmax(-1)) and set(hard.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hard.sum(-1), torch.ones(N))
    noise = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
    _, sampled, _ = rule.choose(weights, state, g, replace(CONTEXT, gumbel=noise))
    wanted = torch.softmax(10 * (mixed.log() + noise), -1)
    assert torch.allclose(sampled, wanted, atol=1e-4)


def test_a_choice_policy_does_not_overflow() -> None:
    rule, g = ChoiceRule(SMALL_CHOICE), grads(1, N)[0]
    weights = {**rule.init(torch.Generator().manual_seed(0)), "choice_bias": torch.tensor([300.0, 0.0])}
    update, choice, _ = rule.choose(weights, rule.zero_state(g), g, CONTEXT)
    assert torch.equal(choice, torch.tensor([1.0, 0.0]).expand(N, 2)) and update.isfinite().all()


def test_directions_of_other_heads_are_adams_and_rmsprops() -> None:
    g = grads(1, N)[0]
    for head, direction in (("adam", g / (g.square() + 1e-10).sqrt()), ("rmsprop", g / (g.square() + 1e-10).sqrt())):
        rule = StudentRule(head=head)
        weights = {name: torch.zeros(shape) for name, shape in rule.shapes.items()}
        update, _ = rule.step(weights, rule.zero_state(g), g)
        assert torch.allclose(update, 0.1 * direction, atol=1e-6)
    ones = torch.ones(1)
    rmsprop, adam = StudentRule(head="rmsprop"), StudentRule(head="adam")
    weights = {name: torch.zeros(shape) for name, shape in adam.shapes.items()}
    second = [stepped(rule, weights, torch.stack([ones, ones]))[0][1] for rule in (rmsprop, adam)]
    d = 1 / 1.999**0.5
    assert float(second[0]) == pytest.approx(0.1 * d, rel=1e-5)
    assert float(second[1]) == pytest.approx(0.1 * 1.9 * d, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (-0.1, 0.9)}, "betas must be"),
        ({"eps": 0.0}, "eps must be positive and finite, got 0.0"),
        ({"eps": float("nan")}, "eps must be"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"head": "sgd"}, "head must be one of free, adam, rmsprop, got 'sgd'"),
    ],
)
def test_wrong_students_are_refused(options: dict[str, object], message: str) -> None:  # acceptance 18
    with pytest.raises(ValueError, match=message):
        StudentRule(**options)  # type: ignore[arg-type]


def test_wrong_options_of_other_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="hardness must be at least 0 and finite, got -1"):
        ChoiceRule(hardness=-1.0)
    with pytest.raises(ValueError, match="multiplier must be"):
        ChoiceRule(multiplier=float("inf"))
    with pytest.raises(ValueError, match="alpha must be positive"):
        OriginalRule(-0.1)
    with pytest.raises(ValueError, match="replicates must be at least 1, got 0"):
        StudentRule().init(replicates=0)
    for rule in (ChoiceRule(), ScaleRule()):
        with pytest.raises(ValueError, match="context must be given"):
            rule.step(rule.init(), {}, torch.zeros(3))
    with pytest.raises(ValueError, match="context must be given"):
        ScaleRule().zero_state(torch.zeros(3))
