"""Facts about SymbolicOptimizer: what it equals, what it keeps, what it refuses."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.tests import children
from symbolic_l2o import SymbolicOptimizer, SymbolicRule, presets
from symbolic_l2o.baselines import LearnerOptimizer
from symbolic_l2o.features import GradFeatures
from symbolic_l2o.kernel import divide, rational_tanh
from symbolic_l2o.presets import PRESETS, lambda_rule
from symbolic_l2o.rule import fir_rule, pole_rule, silent_at_rest
from symbolic_l2o.teachers import LSTMTeacher
from symbolic_l2o.tests import two_ranks

SHAPES = ((4, 3), (5,), (2, 3, 3, 3))


def parameters() -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=rng)) for shape in SHAPES]


def drive(optimizer: torch.optim.Optimizer, steps: range, scale: float = 1.0) -> list[Tensor]:
    """Steps with gradients that depend on the step and the parameter's number only; returns the parameters."""
    found = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for number, p in enumerate(found):
            rng = torch.Generator().manual_seed(1000 * step + number)
            p.grad = (scale * torch.randn(p.shape, generator=rng) + 0.1 * p.detach().float()).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in found]


def close(one: list[Tensor], other: list[Tensor], tolerance: float = 1e-6) -> bool:
    return all(torch.allclose(a, b, atol=tolerance, rtol=1e-6) for a, b in zip(one, other, strict=True))


def rules() -> dict[str, SymbolicRule]:
    found = {name: presets(name) for name in PRESETS}
    found["fir"] = fir_rule(("mt", "gt"), torch.randn(5, 2, generator=torch.Generator().manual_seed(1)), [0.3, 2.0])
    wild = ("aq", ("asinh", ("z", "nt", 2)), ("exp", ("greater", ("z", "t", 0), ("erfc", ("relu", ("z", "g", 1))))))
    found["wild"] = SymbolicRule(("g", "t", "nt"), wild)
    odd = ("sub", 0.5, ("div", 1.0, ("add", 2.0, ("square", ("sinh", ("log", ("z", "magic2.5", 0)))))))
    found["odd"] = SymbolicRule(("magic2.5", "log", "sgn"), ("mul", ("sign", ("z", "sgn", 0)), ("cube", odd)))
    found["powers"] = SymbolicRule(("mt", "g"), ("mul", ("z", "g", 0), ("pow", 2.0, ("pow", ("z", "mt", 1), 2.0))))
    return found


# What it equals


def test_plain_sgd() -> None:  # acceptance 12
    rule = fir_rule(["g"], torch.ones(1, 1), [1e6])
    ours = drive(SymbolicOptimizer(parameters(), rule, lr=0.1), range(20))
    assert close(ours, drive(torch.optim.SGD(parameters(), lr=0.1), range(20)))
    assert close(drive(SymbolicOptimizer(parameters(), presets("sgd"), lr=0.1), range(20)), ours)


def test_adam_with_decays_of_095() -> None:  # acceptance 12
    rule = fir_rule(["mt"], torch.ones(1, 1), [1e6])
    theirs = drive(torch.optim.Adam(parameters(), lr=0.01, betas=(0.95, 0.95), eps=1e-8), range(50))
    assert close(drive(SymbolicOptimizer(parameters(), rule, lr=0.01), range(50)), theirs)
    assert close(drive(SymbolicOptimizer(parameters(), presets("adam"), lr=0.01), range(50)), theirs)


def test_sgd_with_momentum() -> None:  # acceptance 12
    theirs = drive(torch.optim.SGD(parameters(), lr=0.01, momentum=0.9), range(50))
    assert close(drive(SymbolicOptimizer(parameters(), presets("momentum"), lr=0.01), range(50)), theirs, 1e-5)


@pytest.mark.parametrize(("value", "denominator"), [(0.0, False), (1.0, True)])
def test_the_lambda_rule_goes_from_averaged_gradients_to_adam(value: float, denominator: bool) -> None:  # acceptance 22
    p = nn.Parameter(torch.zeros(6))
    optimizer = SymbolicOptimizer([p], lambda_rule(value), lr=0.1)
    features = GradFeatures("AdamUp_unNorm+AdamDn_Norm")
    moments = features.init(p.detach())
    for step in range(10):
        before = p.detach().clone()
        p.grad = torch.randn(6, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        m, d = features(p.grad, moments).T
        assert torch.allclose(p.detach() - before, -0.1 * (m / d if denominator else m), atol=1e-6)


def test_decoupled_weight_decay_is_adamws() -> None:
    theirs = drive(torch.optim.AdamW(parameters(), lr=0.01, betas=(0.95, 0.95), weight_decay=0.3), range(30))
    assert close(drive(SymbolicOptimizer(parameters(), presets("adam"), 0.01, weight_decay=0.3), range(30)), theirs)


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"compiled": True}])
def test_a_small_decay_of_double_precision_is_not_lost_in_rounding(options: dict[str, bool]) -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SymbolicOptimizer([p], presets("sgd"), lr=1e-4, weight_decay=1e-4, **options)
    for _ in range(100):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert (1 - p.detach()).tolist() == pytest.approx([1 - (1 - 1e-8) ** 100] * 3, rel=1e-6)


def test_sharded_weights_move_as_whole_ones(tmp_path: Path) -> None:
    done = children.run(*children.TORCHRUN, two_ranks.__file__, tmp_path)
    assert done.returncode == 0, done.stderr
    for name, rule in two_ranks.rules().items():
        for form, options in two_ranks.FORMS.items():
            found, whole = (
                torch.load(tmp_path / f"{name}-{form}.pt", weights_only=True),
                two_ranks.trained(rule, False, **options),
            )
            assert close(list(found.values()), list(whole.values()), 1e-5), (name, form)
            torch.manual_seed(0)
            assert not torch.allclose(whole["0.weight"], nn.Linear(4, 5).weight, atol=1e-3)


def test_maximising_is_minimising_the_negative() -> None:
    ours, theirs = parameters(), parameters()
    up = SymbolicOptimizer(ours, presets("rp_pole_mnist5k"), maximize=True)
    down = SymbolicOptimizer(theirs, presets("rp_pole_mnist5k"))
    for step in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = -p.grad
        up.step()
        down.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", rules())
def test_one_kernel_for_all_gives_what_a_loop_gives(name: str) -> None:  # acceptance 21
    rule = rules()[name]
    loop = drive(SymbolicOptimizer(parameters(), rule, foreach=False), range(12))
    together = drive(SymbolicOptimizer(parameters(), rule, foreach=True), range(12))
    size = max(float(p.abs().max()) for p in loop)
    assert close(loop, together, 1e-6 * size) and not close(loop, [p.detach() for p in parameters()], 1e-4)


def test_the_compiled_kernel_gives_what_a_loop_gives() -> None:  # acceptance 21
    rule = rules()["rp_pole_mnist5k"]
    optimizer = SymbolicOptimizer(parameters(), rule, compiled=True, weight_decay=0.1)
    compiled = drive(optimizer, range(8))
    assert close(compiled, drive(SymbolicOptimizer(parameters(), rule, weight_decay=0.1), range(8)))


def test_nine_compiled_optimisers_live_side_by_side() -> None:
    rule, kept = presets("momentum"), []
    for number in range(9):
        scaled = rule.with_coefficients({"rho_g": 0.1 * number})
        kept.append(SymbolicOptimizer(parameters(), scaled, compiled=True))
        assert close(drive(kept[-1], range(2)), drive(SymbolicOptimizer(parameters(), scaled), range(2)))


def test_a_compiled_rule_of_double_precision_is_exact() -> None:
    rule, found = rules()["rp_pole_mnist5k"], []
    for compiled in (True, False):
        p = nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64))
        found.append(drive(SymbolicOptimizer([p], rule, compiled=compiled), range(4)))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-9)


@pytest.mark.parametrize("name", ["rp_pole_mnist5k", "fir", "wild"])
def test_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drive(SymbolicOptimizer(parameters(), rules()[name], weight_decay=0.1), range(12))
    monkeypatch.setattr("symbolic_l2o.optimizer.BLOCK", 5)
    parts = drive(SymbolicOptimizer(parameters(), rules()[name], weight_decay=0.1), range(12))
    assert close(parts, whole, 1e-6 * max(float(p.abs().max()) for p in whole))


def test_weights_that_are_not_contiguous_and_empty_ones_work() -> None:
    p, q = nn.Parameter(torch.ones(3, 4).T), nn.Parameter(torch.ones(4, 3))
    empty = nn.Parameter(torch.zeros(0, 2))
    for step in range(3):
        p.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(step)).T
        q.grad, empty.grad = p.grad.contiguous(), torch.zeros(0, 2)
        for optimizer in (SymbolicOptimizer([p, empty], rules()["fir"]), SymbolicOptimizer([q], rules()["fir"])):
            optimizer.step()
    assert torch.allclose(p, q, atol=1e-7) and not torch.allclose(p, torch.ones(4, 3), atol=1e-3)


def test_the_rational_tanh_is_accurate_from_zero_to_infinity() -> None:
    x = torch.cat([torch.logspace(-30, 30, 20001), torch.linspace(0, 12, 20001)[1:]])
    wanted = torch.tanh(x.double())
    assert float((rational_tanh(x).double() / wanted - 1).abs().max()) < 5e-7
    assert torch.equal(rational_tanh(-x), -rational_tanh(x)) and rational_tanh(torch.zeros(1)) == 0
    assert rational_tanh(torch.tensor(float("nan"))).isnan()
    assert torch.equal(rational_tanh(x.double()), wanted)


def test_dividing_by_a_number_is_dividing_also_by_nothing() -> None:
    x = torch.tensor([3.0, -1.0])
    assert divide(x, 4.0).tolist() == [0.75, -0.25] and divide(x, x).tolist() == [1, 1]
    assert divide(x, 0.0).tolist() == [float("inf"), float("-inf")]


@pytest.mark.parametrize("name", rules())
def test_the_optimiser_moves_weights_by_what_the_rule_says(name: str) -> None:
    rule = rules()[name]
    p = nn.Parameter(torch.zeros(7))
    optimizer = SymbolicOptimizer([p], rule, lr=0.5)
    features, z = rule.gradient_features(), torch.zeros(7)
    moments, state = features.init(z), rule.init_state(z)
    for step in range(8):
        before = p.detach().clone()
        p.grad = torch.randn(7, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        out, state = rule.step(features(p.grad, moments), state)
        assert torch.allclose(p.detach() - before, 0.5 * out, atol=1e-4, rtol=1e-4)


# State


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", ["rp_pole_mnist5k", "fir", "wild"])
def test_a_saved_and_loaded_optimiser_goes_on_bit_for_bit(name: str, foreach: bool) -> None:  # acceptance 21
    rule, dtype = rules()[name], torch.bfloat16 if name == "rp_pole_mnist5k" else None
    options = {"foreach": foreach, "state_dtype": dtype}
    whole = drive(SymbolicOptimizer(parameters(), rule, **options), range(14))
    first = SymbolicOptimizer(parameters(), rule, **options)
    half = drive(first, range(7))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = SymbolicOptimizer([nn.Parameter(p) for p in half], rule, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(drive(second, range(7, 14)), whole, strict=True))
    third = copy.deepcopy(second)
    assert all(torch.equal(a, b) for a, b in zip(drive(third, range(3)), drive(second, range(3)), strict=True))


def test_the_state_of_another_rule_is_refused() -> None:
    first = SymbolicOptimizer(parameters(), presets("momentum"))
    drive(first, range(1))
    with pytest.raises(ValueError, match="state of parameter 0 must have"):
        SymbolicOptimizer(parameters(), presets("adam")).load_state_dict(first.state_dict())


def test_a_pole_rule_keeps_four_floats_a_weight() -> None:  # acceptance 21
    optimizer = SymbolicOptimizer(parameters(), presets("rp_pole_mnist5k"))
    drive(optimizer, range(2))
    size = sum(p.numel() for p in parameters())
    tensors = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert sum(t.numel() * t.element_size() for t in tensors) == 4 * 4 * size
    small = SymbolicOptimizer(parameters(), presets("rp_pole_mnist5k"), state_dtype=torch.bfloat16)
    drive(small, range(2))
    kinds = {name: t.dtype for name, t in next(iter(small.state.values())).items()}
    assert kinds["trace_0"] == torch.bfloat16 and kinds["m"] == kinds["v"] == torch.float32


def test_groups_have_their_own_learning_rate_and_frozen_parameters_stay() -> None:  # acceptance 21
    fast, slow, frozen = parameters()
    optimizer = SymbolicOptimizer(
        [{"params": [fast], "lr": 0.1}, {"params": [slow], "lr": 0.01}, {"params": [frozen]}], presets("adam")
    )
    starts = [p.detach().clone() for p in (fast, slow, frozen)]
    for p in (fast, slow):
        p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    for p, start, moved in zip((fast, slow, frozen), starts, (-0.1, -0.01, 0.0), strict=True):
        assert torch.allclose(p.detach() - start, torch.full_like(p, moved), atol=1e-6)
    assert not optimizer.state[frozen]


def test_a_parameter_without_gradient_does_not_age() -> None:
    one, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    for foreach in (False, True):
        optimizer = SymbolicOptimizer([one, other], presets("adam"), foreach=foreach)
        for step in range(3):
            one.grad, other.grad = torch.ones(3), torch.ones(3) if step == 2 else None
            optimizer.step()
        assert (optimizer.state[one]["step"], optimizer.state[other]["step"]) == (3, 1)
        assert torch.allclose(optimizer.state[other]["m"], torch.full((3,), 0.05))


@pytest.mark.parametrize("name", ["rp_pole_mnist5k", "fir", "adam", "power_series"])
def test_a_weight_that_never_saw_a_gradient_does_not_move(name: str) -> None:  # acceptance 21
    p = nn.Parameter(torch.ones(4))
    optimizer = SymbolicOptimizer([p], rules()[name], lr=1.0)
    for step in range(5):
        p.grad = torch.tensor([0.0, 1.0, -1.0, 0.0]) * (step + 1)
        optimizer.step()
    assert p[0] == p[3] == 1 and p[1] != 1 and p[2] != 1


def resting_rules() -> dict[str, SymbolicRule]:
    """Rules that are not 0 for features at rest, deployed."""
    weights = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    shifted = ("tanh", ("sub", ("z", "gt", 2), 1.0))
    found = {
        "DM fir": fir_rule(("log", "sgn"), weights, [0.3, 2.0]),
        "DM tanh": fir_rule(("log", "sgn"), weights, [0.3, 2.0], outer_tanh=True),
        "DM pole": pole_rule(("log", "sgn"), (2.0, -1.0), (0.5, 1.5), (0.8, 0.4), (0.5, 0.8)),
        "DM equation": SymbolicRule(("log", "sgn"), ("add", ("mul", ("z", "sgn", 3), ("exp", ("z", "log", 1))), 0.3)),
        "RP equation": SymbolicRule(("mt", "gt"), shifted),
        "gt alone": SymbolicRule(("gt",), shifted),
    }
    return {name: silent_at_rest(rule) for name, rule in found.items()}


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", resting_rules())
def test_no_deployed_rule_moves_a_weight_that_never_saw_a_gradient(name: str, foreach: bool) -> None:  # acceptance 21
    p = nn.Parameter(torch.ones(3))
    optimizer = SymbolicOptimizer([p], resting_rules()[name], lr=1.0, foreach=foreach)
    for step in range(30):
        p.grad = torch.tensor([0.0, 1.0, 0.0 if step < 20 else -1.0])
        optimizer.step()
        assert p[0] == 1 and (step >= 20) == bool(p[2] != 1)
    assert p[1] != 1


@pytest.mark.parametrize("name", ["DM fir", "DM tanh", "DM pole", "DM equation", "RP equation"])
def test_a_deployed_rule_says_what_its_equation_says_once_there_was_a_gradient(name: str) -> None:
    rule = resting_rules()[name]
    assert rule.expr[0] == "mul" and rule.expr[1][0] == "greater"  # type: ignore[index]
    equation = SymbolicRule(rule.features, rule.expr[2], rule.coefficients)  # type: ignore[index]
    X = torch.randn(6, 9, 2, generator=torch.Generator().manual_seed(2))
    X[0, :, 1] = 0  # no gradient in the present step alone
    still = torch.tensor([-1.0 if "DM" in name else 0.0, 0.0]).expand(1, 9, 2)
    assert torch.equal(rule(X), equation(X))
    assert torch.equal(rule(still), torch.zeros(9)) and (equation(still).abs() > 0.1).all()


def test_what_lies_before_the_first_step_is_at_rest() -> None:
    rule = SymbolicRule(("log", "sgn"), ("z", "log", 2))
    p = nn.Parameter(torch.zeros(1))
    optimizer, seen = SymbolicOptimizer([p], rule, lr=1.0), []
    state = rule.init_state(p.detach())
    for g in (1.0, 1.0, 0.0, 0.0):
        before, p.grad = p.item(), torch.tensor([g])
        optimizer.step()
        out, state = rule.step(GradFeatures("DM")(p.grad, {"step": torch.zeros(())}), state)
        seen.append((p.item() - before, float(out)))
    assert [found for pair in seen for found in pair] == pytest.approx([-1, -1, -1, -1, 0, 0, 0, 0], abs=1e-6)
    assert rule(torch.zeros(2, 3, 2)).tolist() == [-1] * 3


def test_low_precision_weights_have_moments_of_single_precision() -> None:
    p = nn.Parameter(torch.randn(50).bfloat16())
    optimizer = SymbolicOptimizer([p], presets("rp_pole_mnist5k"))
    drive(optimizer, range(3))
    assert p.dtype == torch.bfloat16 and optimizer.state[p]["m"].dtype == torch.float32


def test_a_scheduler_and_a_closure_work() -> None:
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = SymbolicOptimizer([p], presets("sgd"), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9 and p.item() == pytest.approx(3 - 0.1 * 6)
    scheduler.step()
    assert optimizer.step(closure).item() == pytest.approx(5.76) and p.item() == pytest.approx(2.4 - 0.05 * 4.8)


def test_a_gradient_that_is_not_finite_goes_through() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = SymbolicOptimizer([p], presets("adam"))
    p.grad = torch.tensor([float("nan"), 1.0])
    optimizer.step()
    assert p[0].isnan() and p[1] < 1


def test_a_teacher_works_as_an_optimiser() -> None:
    torch.manual_seed(0)
    teacher, p = LSTMTeacher("rp_s"), nn.Parameter(torch.zeros(2, 3))
    optimizer = LearnerOptimizer([p], teacher, lr=0.01)
    moments, state = teacher.features.init(torch.zeros(6)), teacher.init_state(torch.zeros(6))
    total = torch.zeros(6)
    for step in range(4):
        p.grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        out, state = teacher.step(teacher.features(p.grad.flatten(), moments), state)
        total += 0.01 * out.detach()
    assert torch.allclose(p.detach().flatten(), total, atol=1e-7)


# What it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0 and finite, got -1.0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"foreach": True, "compiled": True}, "foreach must not be True beside compiled"),
        ({"state_dtype": torch.int8}, "state_dtype must be a floating-point type"),
        ({"rule": "rp_pole_mnist5k"}, "rule must be a SymbolicRule, got str"),
        ({"params": []}, "empty parameter list"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, object], message: str) -> None:  # acceptance 28
    with pytest.raises(ValueError, match=message):
        SymbolicOptimizer(**{"params": parameters(), "rule": presets("adam"), **options})  # type: ignore[arg-type]


def test_sparse_and_complex_gradients_are_refused() -> None:  # acceptance 28
    for p, grad in (
        (nn.Parameter(torch.zeros(3)), torch.zeros(3).to_sparse()),
        (nn.Parameter(torch.zeros(3, dtype=torch.cfloat)), torch.zeros(3, dtype=torch.cfloat)),
    ):
        p.grad = grad
        with pytest.raises(RuntimeError, match="dense real gradients"):
            SymbolicOptimizer([p], presets("adam")).step()


def test_the_example_of_the_readme_runs() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    found: dict[str, object] = {}
    torch.manual_seed(0)
    exec(compile(example, "README.md", "exec"), found)
    assert found["loss"].item() < 1  # type: ignore[attr-defined]
