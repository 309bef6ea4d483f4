"""Facts about records, regression and distilled rules."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from symbolic_l2o import SymbolicOptimizer, SymbolicRule, collect, distill
from symbolic_l2o.distill import fidelity
from symbolic_l2o.records import SRData, draw_starts, extract_windows, window_count
from symbolic_l2o.regression import Candidate, Search, knee, line_fit, predict, symbolic_regression
from symbolic_l2o.rule import fir_rule, pole_rule
from symbolic_l2o.teachers import LSTMTeacher
from symbolic_l2o.template import fit_fir, fit_pole
from symbolic_l2o.tests.vectors import reference, tiny_problem

QUICK = Search(evaluations=4000, generations=15, population=150, length=20)


class RuleLearner:
    """A rule in a teacher's place."""

    def __init__(self, rule: SymbolicRule) -> None:
        self.rule, self.features = rule, rule.gradient_features()
        self.init_state, self.step = rule.init_state, rule.step


def windows(count: int = 400, length: int = 8, features: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, length, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labelled(X: torch.Tensor, y: torch.Tensor) -> SRData:
    return SRData(X, y, torch.arange(len(X)) // 5)


# Records


def test_windows_are_the_released_ones() -> None:  # acceptance 17
    arrays = reference("windows")
    data = extract_windows(arrays["records"], arrays["starts"], int(arrays["memlen"]))
    found = torch.cat([data.X.flatten(1), data.y[:, None]], 1)
    assert torch.equal(found, arrays["Xy"])


def test_starts_leave_room_and_never_overlap() -> None:  # acceptance 17
    assert window_count(100, 20) == 3 and window_count(70, 5) == 12
    starts = draw_starts(100, 20, 50, torch.Generator().manual_seed(0))
    assert starts.shape == (50, 3) and int(starts.min()) >= 0 and int(starts.max()) + 20 <= 100
    assert int(starts.diff(dim=1).min()) >= 20 and len(starts.unique(dim=0)) > 40
    for steps, length in ((59, 20), (12, 3)):
        with pytest.raises(ValueError, match="steps must be at least 3 windows"):
            window_count(steps, length)
    with pytest.raises(ValueError, match="windows must lie within the 10 steps"):
        extract_windows(torch.zeros(1, 10, 1, 3), torch.tensor([[[7]]]), 4)


def test_a_rule_recorded_and_replayed_on_its_windows_is_itself() -> None:  # acceptance 17
    rule = fir_rule(("mt", "gt"), torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), [0.3, 0.9])
    problem = tiny_problem()
    data = collect(RuleLearner(rule), problem, length=8, steps=40, runs=2, per_tensor=4)
    assert len(data) == 2 * 15 * 3 and len(data.group.unique()) == 30  # 4 + 4 + 4 + 3 coordinates a run
    assert fidelity(rule, data) == pytest.approx(1, abs=1e-9)


def test_no_group_is_on_both_sides_of_a_split() -> None:  # acceptance 18
    data = labelled(windows(), torch.zeros(400))
    train, test = data.split(3)
    assert not set(train.group.tolist()) & set(test.group.tolist())
    assert len(train) + len(test) == 400 and len(test.group.unique()) == 12
    assert torch.equal(data.split(3)[1].X, test.X) and not torch.equal(data.split(4)[1].X, test.X)
    with pytest.raises(ValueError, match="at least two groups"):
        SRData(data.X, data.y, torch.zeros(400)).split(0)


def test_the_same_seed_records_the_same() -> None:  # acceptance 27
    torch.manual_seed(5)
    teacher = LSTMTeacher("rp_s")
    one, other, third = (collect(teacher, tiny_problem(), 8, 30, 1, seed, 3) for seed in (0, 0, 1))
    assert torch.equal(one.X, other.X) and torch.equal(one.y, other.y) and not torch.equal(one.X, third.X)


# Forms


def test_a_template_finds_the_template_that_made_the_data() -> None:
    X = windows(800)
    truth = fir_rule(("mt", "gt"), torch.randn(8, 2, generator=torch.Generator().manual_seed(3)), [0.4, 1.5])
    data = labelled(X, truth(X.transpose(0, 1)))
    assert fidelity(fit_fir(data, ("mt", "gt")), data) > 0.9999
    squashed = labelled(X, torch.tanh(data.y))
    assert fidelity(fit_fir(squashed, ("mt", "gt"), outer_tanh=True), squashed) > 0.999
    assert fidelity(fit_fir(squashed, ("mt", "gt")), squashed) < 0.99


def test_a_pole_form_finds_the_poles_that_made_the_data() -> None:
    X = windows(800, length=12)
    truth = pole_rule(("mt", "gt"), (2.0, -1.0), (0.5, 1.5), (0.8, 0.4), (0.5, 0.8))
    found = fit_pole(labelled(X, truth(X.transpose(0, 1))), ("mt", "gt"))
    for name, value in truth.coefficients.items():
        assert found.coefficients[name] == pytest.approx(value, rel=0.02), name


# Regression


def test_operon_finds_an_equation_and_the_same_one_again() -> None:  # acceptance 27
    X = windows(500, 5, 1)[:, :, 0].numpy()
    y = X[:, 0] + 0.6 * X[:, 1] + np.tanh(2 * X[:, 3])
    first, second = (symbolic_regression(X, y, "operon", QUICK, seed=1) for _ in range(2))
    assert first == second and max(candidate.r2 for candidate in first) > 0.98
    best = max(first, key=lambda candidate: candidate.r2)
    assert 1 - ((predict(best.expr, torch.from_numpy(X)).numpy() - y) ** 2).mean() / y.var() == pytest.approx(best.r2)


def test_the_line_through_points_is_that_of_least_squares() -> None:
    draws = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 200, generator=draws, dtype=torch.float64)
    y = 3 * x - 2 + 0.1 * noise
    expected = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y).solution.tolist()
    assert line_fit(x, y) == pytest.approx(expected, rel=1e-12)
    assert line_fit(torch.full_like(x, 0.1), y) == (0.0, pytest.approx(float(y.mean())))
    assert line_fit(torch.zeros_like(x), y) == (0.0, pytest.approx(float(y.mean())))


def test_gplearn_finds_a_rough_equation() -> None:
    X = windows(300, 3, 1)[:, :, 0].numpy()
    found = symbolic_regression(X, X[:, 0] - X[:, 2], "gplearn", Search(generations=6, population=150), seed=0)
    assert max(candidate.r2 for candidate in found) > 0.9


@pytest.mark.parametrize(("backend", "package"), [("operon", "pyoperon"), ("gplearn", "gplearn")])
def test_a_missing_package_is_named_with_how_to_get_it(
    backend: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (package, f"{package}.sklearn", f"{package}.genetic"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"needs the package {package}: pip install"):
        symbolic_regression(np.zeros((9, 1)), np.arange(9.0), backend)  # type: ignore[arg-type]


def test_the_knee_is_the_shortest_equation_close_to_the_best() -> None:
    x = ("z", 0, 0)
    short, middle, long = Candidate(x, 0), Candidate(("tanh", x), 0), Candidate(("tanh", ("tanh", x)), 0)
    assert knee([short, middle, long], [0.5, 0.895, 0.9]) is middle
    assert knee([short, middle, long], [0.5, float("nan"), 0.9]) is long
    with pytest.raises(ValueError, match="at least one finite equation"):
        knee([], [])


def test_data_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="X and y must be finite"):
        symbolic_regression(np.full((4, 1), np.nan), np.zeros(4))
    with pytest.raises(ValueError, match="backend must be operon or gplearn, got 'pysr'"):
        symbolic_regression(np.zeros((4, 1)), np.zeros(4), "pysr")  # type: ignore[arg-type]
    data = labelled(windows(40), torch.arange(40.0))
    with pytest.raises(ValueError, match=r"backend must be one of operon, .*got 'julia'"):
        distill(data, "RP", "julia")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="features must be the 2 of the data, got mt, gt, nt"):
        distill(data, "RP_si", "pole")


# Rules


@pytest.mark.parametrize("backend", ["operon", "template", "template_tanh", "pole"])
def test_a_distilled_rule_is_faithful_and_an_optimiser(backend: str) -> None:  # acceptance 29
    X = windows(600, length=6)
    truth = pole_rule(("mt", "gt"), (1.0, 0.0), (0.0, 0.8), (0.0, 0.5), (1e3, 2.0))
    found = distill(labelled(X, truth(X.transpose(0, 1))), "RP", backend, search=QUICK)  # type: ignore[arg-type]
    assert found.r2 > {"operon": 0.9, "template": 0.99, "template_tanh": 0.7, "pole": 0.99}[backend]
    rule = SymbolicRule.from_json(found.rule.to_json())
    assert torch.equal(rule(X.transpose(0, 1)), found.rule(X.transpose(0, 1))) and "mt" in rule.features
    p = torch.ones(3, requires_grad=True)
    optimizer = SymbolicOptimizer([p], rule, lr=0.01)
    for _ in range(3):
        p.grad = torch.tensor([1.0, -1.0, 0.0])
        optimizer.step()
    assert p[0] < 1 < p[1] and p[2].item() == pytest.approx(1, abs=1e-7)


def test_the_scale_of_raw_gradients_is_folded_back() -> None:
    X = 5e-4 * windows(500, length=4, features=1)
    data = labelled(X, -2000 * X[:, 0, 0] - 800 * X[:, 2, 0])
    assert distill(data, "g", "operon", search=QUICK).r2 > 0.99


@pytest.mark.parametrize("backend", ["operon", "template"])
def test_the_equation_is_judged_with_its_intercept_and_the_rule_rests_without_one(backend: str) -> None:  # 21
    X = windows(800, length=4)
    X[:, :, 0] = X[:, :, 0].abs() + 1  # far from rest, as in records of live coordinates
    data = labelled(X, 0.8 - torch.tanh(X[:, 0, 0]) + 0.1 * X[:, 1, 1])
    found = distill(data, "RP", backend, search=QUICK)  # type: ignore[arg-type]
    _, test = data.split(0)
    assert found.r2 == pytest.approx(fidelity(found.equation, test)) and found.rule.at_rest == 0
    assert fidelity(found.rule, test) == pytest.approx(found.r2, abs=1e-12)  # no bias on live coordinates
    if backend == "operon":
        assert found.r2 > 0.9 and abs(found.equation.at_rest) > 0.05
        assert found.equation.complexity() < found.rule.complexity()
    else:
        assert found.rule == found.equation  # psi has no intercept


def test_the_knee_is_taken_from_the_r2_that_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[float] = []

    def spy(candidates: list[Candidate], scores: list[float]) -> Candidate:
        kept.extend(scores)
        return knee(candidates, scores)

    monkeypatch.setattr(sys.modules["symbolic_l2o.distill"], "knee", spy)
    X = windows(500, length=4)
    found = distill(labelled(X, 3 + torch.tanh(X[:, 0, 0] - 1)), "RP", search=QUICK)
    assert min(abs(found.r2 - score) for score in kept) < 1e-9 and found.r2 >= max(kept) - 0.01
    assert found.front_r2 == pytest.approx(max(kept), abs=1e-9)


def test_the_rules_of_dm_records_leave_dead_coordinates_alone() -> None:  # acceptance 21
    torch.manual_seed(2)
    data = collect(LSTMTeacher("dm"), tiny_problem(), 8, 40, 2, 0, 4)
    for backend in ("template", "template_tanh", "pole", "operon"):
        found = distill(data, "DM", backend, search=QUICK)  # type: ignore[arg-type]
        p = torch.ones(2, requires_grad=True)
        optimizer = SymbolicOptimizer([p], found.rule, lr=1.0)
        for _ in range(100):
            p.grad = torch.tensor([0.0, 1e-3])
            optimizer.step()
        assert p[0] == 1 and p[1] != 1, backend
        assert fidelity(found.rule, data) == pytest.approx(fidelity(found.equation, data), abs=1e-6)
