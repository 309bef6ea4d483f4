"""Facts about rules: their values, their text, their measures, and what a wrong one is told."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from symbolic_l2o.expr import OPERATORS, evaluate, fold, node_count, read_expr
from symbolic_l2o.presets import PRESETS, power_rule, presets
from symbolic_l2o.rule import (
    SymbolicRule,
    drop_small_taps,
    fir_rule,
    pole_rule,
    pole_weights,
    r2_score,
    tap_importance,
    temporal_perception,
)
from symbolic_l2o.tests.vectors import reference

OTHER_NAMES = {"plus": "add", "mult": "mul", "div": "div", "pow": "pow", "greater": "greater", "sqrtm": "sqrt"}
OTHER_NAMES |= {"logm": "log", "Abs": "abs"}


def stepped(rule: SymbolicRule, features: torch.Tensor) -> torch.Tensor:
    """Outputs (T, P) for features (T, P, F), step by step."""
    state, found = rule.init_state(features[0, :, 0]), []
    for z in features:
        out, state = rule.step(z, state)
        found.append(out)
    return torch.stack(found)


# Values


@pytest.mark.parametrize("name", [key for key in reference("operators") if key not in "xy"])
def test_operators_are_the_released_ones(name: str) -> None:  # acceptance 19
    arrays = reference("operators")
    operator = OPERATORS[OTHER_NAMES.get(name, name)]
    operands = [arrays["x"], arrays["y"]][: operator.arity]
    assert torch.allclose(operator.apply(*operands), arrays[name], rtol=1e-12, atol=1e-12, equal_nan=True)


def test_protected_operators_at_zero_and_below() -> None:  # acceptance 19
    def value(*expr: object) -> float:
        return float(fold(expr, {}))  # type: ignore[arg-type]

    assert value("pow", -2.0, 0.5) == pytest.approx(-1.41421, abs=1e-5)
    assert value("sqrt", -4.0) == 2 and value("log", 0.0) == pytest.approx(-18.42068, abs=1e-5)
    assert value("aq", 3.0, 0.0) == 3 and value("aq", 4.0, 3.0) == pytest.approx(4 / 10**0.5)


def test_the_template_gives_the_derived_updates() -> None:
    arrays = reference("template")
    rule = fir_rule(("mt", "gt"), arrays["W"], arrays["gamma"].tolist())
    found = float(arrays["scale"]) * stepped(rule, arrays["features"])
    assert torch.allclose(found, arrays["updates"], atol=1e-12)


def test_the_power_series_is_the_released_one() -> None:
    arrays = reference("power_rule")
    values = {}
    for v, name in enumerate(("mt", "gt", "g", "mom5")):
        for tap in range(3):
            for order in range(3):
                for column, key in enumerate(("k1", "k2", "alpha")):
                    values[f"{key}_{name}_{tap}_{order + 1}"] = float(arrays["coeff"][v, tap, order, column])
    history = arrays["inp"].transpose(0, 1).double()  # (taps, samples, features)
    found = power_rule(values)(history)
    assert torch.allclose(found.float(), arrays["out"], rtol=1e-5)


def test_a_window_and_single_steps_give_the_same_output() -> None:
    features = torch.randn(12, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rules = [presets("rp_pole_mnist5k"), fir_rule(("mt", "gt"), torch.randn(4, 2), [0.3, 1.0], outer_tanh=True)]
    nested = ("trace", 0.5, ("tanh", ("trace", 0.9, ("mul", ("z", "mt", 1), ("z", "gt", 0)))))
    rules.append(SymbolicRule(("mt", "gt"), nested))
    for rule in rules:
        outputs = stepped(rule, features)
        for step in range(12):
            assert torch.allclose(rule(features[: step + 1].flip(0)), outputs[step], rtol=1e-10)


@given(
    a=st.floats(-5, 5), w=st.floats(-5, 5), rho=st.floats(0, 0.98), gamma=st.floats(0.01, 10), seed=st.integers(0, 99)
)
@settings(max_examples=25, deadline=None)
def test_a_pole_is_an_endless_window(a: float, w: float, rho: float, gamma: float, seed: int) -> None:  # 13, 14
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(15, 4, 1, generator=rng, dtype=torch.float64)
    pole = stepped(pole_rule(["mt"], [w], [a], [rho], [gamma]), features)
    whole = stepped(fir_rule(["mt"], pole_weights(a, w, rho, 15)[:, None], [gamma]), features)
    assert torch.allclose(pole, whole, atol=1e-9)
    short = stepped(fir_rule(["mt"], pole_weights(a, w, rho, 5)[:, None], [gamma]), features)
    assert float((pole - short).abs().max()) <= abs(a) * gamma * rho**5 / (1 - rho) + 1e-9
    assert float(whole.abs().max()) <= float(pole_weights(a, w, rho, 15).abs().sum()) * gamma + 1e-9


# Measures


def test_the_memory_of_geometric_taps_is_their_mean_step() -> None:  # acceptance 15
    steps = torch.arange(20, dtype=torch.float64)[:, None]
    assert temporal_perception(0.5**steps)[0] == pytest.approx(0.99998, abs=1e-5)
    many = torch.arange(400, dtype=torch.float64)[:, None]
    assert temporal_perception(0.9**many)[0] == pytest.approx(9, abs=1e-6)
    assert temporal_perception((steps == 0).double()) == [0.0]


def test_the_importance_of_a_linear_tap_is_its_weight_times_the_features_spread() -> None:
    X = torch.randn(500, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X[..., 1] *= 3
    weights = torch.zeros(6, 2, dtype=torch.float64)
    weights[:, 0], weights[2, 1] = 0.5 ** torch.arange(6), -2.0
    found = tap_importance(fir_rule(("mt", "gt"), weights, [1e6, 1e6]), X)
    spread = X.reshape(-1, 2).std(0)
    assert torch.allclose(found, weights.abs() * spread, rtol=1e-6)


def test_complexity_counts_operators_variables_and_constants() -> None:  # acceptance 16
    x, y = ("z", "mt", 0), ("z", "gt", 3)
    rule = SymbolicRule(("mt", "gt"), ("tanh", ("add", ("mul", "a", x), ("mul", "b", y))), {"a": 2.0, "b": -1.5})
    assert rule.complexity() == 8 and rule.taps() == [("gt", 3), ("mt", 0)] and rule.memory == 3
    assert fir_rule(["mt"], torch.ones(3, 1), [0.3]).complexity() == 3 * 6 + 2
    assert presets("adam").complexity() == 3


def test_taps_that_do_not_matter_are_dropped() -> None:
    X = torch.randn(300, 4, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule = fir_rule(["mt"], torch.tensor([[1.0], [1e-4], [0.5], [0.0]]), [0.5])
    small = drop_small_taps(rule, X)
    assert small.taps() == [("mt", 0), ("mt", 2)] and small.complexity() == 2 * 6 + 1
    assert torch.allclose(small(X.transpose(0, 1)), rule(X.transpose(0, 1)), atol=1e-3)


def test_r2_is_one_at_best_zero_at_the_mean_and_needs_spread() -> None:  # acceptance 20
    y = torch.tensor([1.0, 2.0, 4.0])
    assert r2_score(y, y) == 1 and r2_score(y, y.mean().expand(3)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="R2 must have targets that vary"):
        r2_score(torch.ones(3), torch.ones(3))


def test_folding_changes_no_value() -> None:
    rule = presets("rp_pole_mnist5k")
    history = torch.randn(9, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    folded = SymbolicRule(rule.features, fold(rule.expr, rule.coefficients))
    assert torch.allclose(folded(history), rule(history), rtol=1e-12)
    assert node_count(folded.expr) < node_count(rule.expr)


# Text


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back_from_json_and_has_a_formula(name: str) -> None:  # acceptance 29
    rule = presets(name)
    again = SymbolicRule.from_json(rule.to_json())
    assert again == rule
    history = torch.rand(6, 5, len(rule.features), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(again(history), rule(history), rtol=1e-6) and rule.provenance
    assert rule.latex().count("{") == rule.latex().count("}")


def test_a_formula_reads_as_in_the_paper() -> None:
    rule = fir_rule(("mt",), torch.tensor([[2.0], [-0.5]]), [1.0])
    assert rule.latex() == r"\left(-2\right)\,\tanh\left(\tilde m_{t}\right)+0.5\,\tanh\left(\tilde m_{t-1}\right)"
    assert presets("momentum").latex() == r"\left(-1\right)\,\sum_{j\geq 0}0.9^{j}\,\mathrm{g}_{t-j}"


def test_sums_over_the_past_bind_as_they_are_meant() -> None:
    x, y = ("z", "mt", 0), ("z", "gt", 1)

    def text(expr: object) -> str:
        return SymbolicRule(("mt", "gt"), expr).latex()  # type: ignore[arg-type]

    past = r"\sum_{j\geq 0}0.5^{j}\,\tilde m_{t-j}"
    assert text(("trace", 0.5, x)) == past
    both = r"\sum_{j\geq 0}0.5^{j}\,\left(\tilde m_{t-j}+\tilde g_{t-1-j}\right)"
    assert text(("trace", 0.5, ("add", x, y))) == both
    nested = r"\sum_{j\geq 0}0.5^{j}\,\tanh\left(\sum_{k\geq 0}0.9^{k}\,\tilde m_{t-j-k}\right)"
    assert text(("trace", 0.5, ("tanh", ("trace", 0.9, x)))) == nested
    assert text(("add", ("trace", 0.5, x), ("trace", 0.5, x))) == past + "+" + past  # side by side, both have j
    assert text(("mul", ("trace", 0.5, x), y)) == r"\left(" + past + r"\right)\,\tilde g_{t-1}"
    assert text(("mul", y, ("trace", 0.5, x))) == r"\tilde g_{t-1}\," + past
    assert text(("trace", 1e-5, x)) == r"\sum_{j\geq 0}\left(1\cdot10^{-5}\right)^{j}\,\tilde m_{t-j}"
    minus = ("sub", x, ("add", x, y))
    assert text(minus) == r"\tilde m_{t}-\left(\tilde m_{t}+\tilde g_{t-1}\right)"


def test_whole_numbers_serve_as_coefficients() -> None:
    rule = SymbolicRule(("mt",), ("mul", ("tanh", "a"), ("z", "mt", 0)), {"a": 1})
    assert rule.coefficients == {"a": 1.0} and isinstance(rule.coefficients["a"], float)
    z = torch.ones(1, 2, 1)
    assert rule(z).tolist() == pytest.approx([0.761594] * 2) and rule.complexity() == 3
    assert SymbolicRule.from_json(rule.to_json()) == rule


def test_a_name_that_is_no_preset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of rp_pole_mnist5k, .*got 'lion'"):
        presets("lion")


# Hostile rules: nothing but ValueError


GOOD = json.loads(presets("rp_pole_mnist5k").to_json())
Z = ["z", "mt", 0]


@pytest.mark.parametrize(
    ("expr", "message"),
    [
        (["__import__", "os"], "operator must be one of"),
        (["eval", Z], "operator must be one of"),
        ("__import__('os').system('true')", "coefficient must be one of"),
        (["add", Z], "operator add must have 2 operands, got 1"),
        (["tanh", Z, Z], "operator tanh must have 1 operands, got 2"),
        (["z", "mt", -1], r"tap must be an integer in \[0, 1000\], got -1"),
        (["z", "mt", 0.5], "tap must be an integer"),
        (["z", "mt", True], "tap must be an integer"),
        (["z", "__class__", 0], "features must be of"),
        (["z", "g", 0], "feature must be one of the rule's mt, gt, got 'g'"),
        (["trace", 1.0, Z], r"the decay of a trace must be a coefficient or number in \[0, 1\)"),
        (["trace", Z, Z], "the decay of a trace"),
        (["mul", 1e400, Z], "constants must be finite"),
        ([], "equation must be made of"),
        ({"op": "add"}, "must not be"),
        (None, "must not be"),
        ([[Z]], "equation must be made of"),
        (["mul", True, Z], "equation must be made of"),
    ],
)
def test_a_malicious_equation_does_nothing_but_raise(expr: object, message: str) -> None:  # acceptance 28
    with pytest.raises(ValueError, match=message):
        SymbolicRule.from_json(json.dumps({**GOOD, "expr": expr}))


def test_an_equation_too_deep_or_too_long_is_refused() -> None:
    deep: object = Z
    for _ in range(300):
        deep = ["tanh", deep]
    with pytest.raises(ValueError, match="at most 5000 nodes, 200 deep"):
        read_expr(deep, ("mt",), {})
    with pytest.raises(ValueError):
        SymbolicRule.from_json("[" * 100_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "pickle"}, "format must be"),
        ({"features": "mt"}, "features must not be"),
        ({"features": [["mt"]]}, "features must be names"),
        ({"features": ["mt", "gt", "volume"]}, "got 'volume'"),
        ({"coefficients": {**GOOD["coefficients"], "gamma_mt": 0}}, "gamma_mt must be positive, got 0"),
        ({"coefficients": {**GOOD["coefficients"], "w_mt": float("nan")}}, "coefficients must be finite"),
        ({"coefficients": {**GOOD["coefficients"], "w_mt": 10**400}}, "coefficients must be finite"),
        ({"eps": 10**400}, "eps must be at least 0, got 1000"),
        ({"expr": 10**400}, "constants must be finite"),
        ({"coefficients": {**GOOD["coefficients"], "w_mt": "1"}}, "coefficients must be finite"),
        ({"coefficients": {**GOOD["coefficients"], "rho_mt": 1.5}}, "the decay of a trace"),
        ({"beta1": 1.0}, "beta1 must be in"),
        ({"eps": "0"}, "eps must not be"),
        ({"more": 1}, "a rule must have"),
    ],
)
def test_a_damaged_rule_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SymbolicRule.from_json(json.dumps({**GOOD, **change}))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "cos\nsystem\n", "\x80\x04"])
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a rule"):
        SymbolicRule.from_json(text)


def test_values_of_a_pole_outside_their_range_are_refused() -> None:
    for numbers, message in (((1, 1, 1, 1), "rho_mt must be in"), ((1, 1, 0.5, 0), "gamma_mt must be positive")):
        with pytest.raises(ValueError, match=message):
            pole_rule(["mt"], *([number] for number in numbers))
    with pytest.raises(ValueError, match="a sum must have at least one term"):
        fir_rule(["mt"], torch.zeros(0, 1), [1.0])


def test_evaluation_takes_numbers_beside_tensors_on_either_side() -> None:
    x = torch.tensor([1.0, -2.0])
    for name, operator in OPERATORS.items():
        if operator.arity == 2:
            for operands in (("x", 0.5), (0.5, "x")):
                found = evaluate((name, *operands), dict.get, dict.get, {"x": x})  # type: ignore[arg-type]
                tensors = [x if o == "x" else torch.full_like(x, 0.5) for o in operands]
                assert torch.allclose(found, operator.apply(*tensors), equal_nan=True), name
