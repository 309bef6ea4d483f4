"""Rules that come with the package: by hand, and those that `export.py` wrote to presets/."""

from pathlib import Path

from symbolic_l2o.expr import Expr
from symbolic_l2o.rule import SymbolicRule, pole_rule, sum_of

FOLDER = Path(__file__).parent / "presets"
BUILT_IN = ("rp_pole_mnist5k", "lambda_adam", "power_series", "sgd", "momentum", "adam")
PRESETS = (*BUILT_IN, *sorted(path.stem for path in FOLDER.glob("*.json")))
SCALES = {"mt": 0.2, "gt": 1.0, "g": 5e-4, "mom5": 5e-4}  # n of the power series
ALPHA = 0.05


def presets(name: str) -> SymbolicRule:
    """A rule by name.

    rp_pole_mnist5k: distilled from an RP_s teacher, see its `provenance`. lambda_adam: between SGD with momentum
    (lambda 0) and Adam (1). power_series: the released re-parameterisation with its start coefficients, to be tuned.
    sgd, momentum (0.9), adam (both decays 0.95): hand-made rules in this form. Others: the files in presets/, whose
    `provenance` says where they come from.

    Raises:
        ValueError: for another name, listing these.
    """
    if name == "rp_pole_mnist5k":
        return pole_rule(
            ("mt", "gt"),
            w=(12.472, 7.658),
            a=(-8.087, 9.303),
            rho=(0.183, 0.957),
            gamma=(0.304, 0.003),
            provenance="pole form fitted to an RP_s teacher (seed 0) trained on a 196-20-10 sigmoid network on mnist5k "
            "in a trial before this code; not a run of it",
        )
    if name == "lambda_adam":
        return lambda_rule(0.8)
    if name == "power_series":
        return power_rule()
    if name == "sgd":
        return SymbolicRule(("g",), ("neg", ("z", "g", 0)), provenance="by hand")
    if name == "momentum":
        coefficients = {"rho_g": 0.9}
        return SymbolicRule(("g",), ("neg", ("trace", "rho_g", ("z", "g", 0))), coefficients, provenance="by hand")
    if name == "adam":
        return SymbolicRule(("mt",), ("neg", ("z", "mt", 0)), provenance="by hand")
    if name in PRESETS:
        return SymbolicRule.from_json((FOLDER / f"{name}.json").read_text())
    raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")


def lambda_rule(value: float, sign: int = -1) -> SymbolicRule:
    """sign * m / (1 - lambda + lambda d): lambda 0 is the moving average of gradients, 1 is m / d.

    The released script climbs: sign +1.
    """
    m, d = ("z", "AdamUp_unNorm", 0), ("z", "AdamDn_Norm", 0)
    ratio: Expr = ("div", m, ("add", ("sub", 1.0, "lambda"), ("mul", "lambda", d)))
    expr: Expr = ratio if sign > 0 else ("neg", ratio)
    return SymbolicRule(("AdamUp_unNorm", "AdamDn_Norm"), expr, {"lambda": value}, provenance="by hand")


def power_rule(coefficients: dict[str, float] | None = None) -> SymbolicRule:
    """sum over features v, taps tau < 3, orders o = 1..3 of k1 spow(v / n_v, o + alpha) + k2 spow(v / n_v, o - alpha).

    Coefficients k1_v_tau_o, k2_v_tau_o and alpha_v_tau_o; at the start k1 = k2 = -.001^o, alpha = .05.
    """
    values: dict[str, float] = {}
    terms: list[Expr] = []
    for name, scale in SCALES.items():
        for tap in range(3):
            ratio: Expr = ("div", ("z", name, tap), scale)
            for order in (1, 2, 3):
                key = f"{name}_{tap}_{order}"
                values |= {f"k1_{key}": -(0.001**order), f"k2_{key}": -(0.001**order), f"alpha_{key}": ALPHA}
                terms.append(("mul", f"k1_{key}", ("pow", ratio, ("add", float(order), f"alpha_{key}"))))
                terms.append(("mul", f"k2_{key}", ("pow", ratio, ("sub", float(order), f"alpha_{key}"))))
    values |= coefficients or {}
    return SymbolicRule(tuple(SCALES), sum_of(terms), values, provenance="released start values")
