"""Holm's correction (1979): the t tests of C4, C5 and C7 are decided together, the other claims each alone.

Held and not held are tests of opposite sides. Each side's p-values are corrected over all tests of the family that
could be made; a verdict stands only where its own is below LEVEL, and is inconclusive otherwise. C5 is held only over
both references of a method, the plain network and its control.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from common.claims import Claim, Rows, holm, judge

FAMILY = ("C4", "C5", "C7")
LEVEL = 0.05


def of_family(claim: Claim) -> bool:
    """Whether the claim is one of C4, C5, C7 that a t test decides; C4c and C4d are not."""
    return claim.id[:2] in FAMILY and claim.interval == "t"


def p_values(claim: Claim, values: Sequence[float]) -> dict[str, float]:
    """p of `held` and of `not held`: one-sided t tests of the mean of at least two values.

    1 where all values are equal: accuracies of a thousand images often are, and that says nothing of their spread.
    """
    if np.ptp(values) < 1e-6:
        return {"held": 1.0, "not held": 1.0}
    sides = ("greater", "less") if claim.direction == "above" else ("less", "greater")
    p = [float(stats.ttest_1samp(values, claim.threshold, alternative=side).pvalue) for side in sides]
    return dict(zip(("held", "not held"), p, strict=True))


def judge_together(claims: Sequence[Claim], rows: Rows) -> list[dict[str, Any]]:
    """`judge` with the verdicts of the family corrected: never a new one, but some no longer decided.

    Those of the family that were measured on two seeds or more get `holm`, the corrected p of either side.
    """
    judged = judge(claims, rows)
    family = [(claim, found) for claim, found in zip(claims, judged, strict=True) if of_family(claim)]
    tests = {claim.id: p_values(claim, found["values"]) for claim, found in family if len(found["values"]) > 1}
    corrected = {side: holm({name: p[side] for name, p in tests.items()}) for side in ("held", "not held")}
    for claim, found in family:
        found["rule"] += f", Holm over {', '.join(FAMILY)}"
        if claim.id in tests:
            found["holm"] = {side: p[claim.id] for side, p in corrected.items()}
            if found["holm"].get(found["verdict"], 0.0) >= LEVEL:
                found["verdict"] = "inconclusive"
    for method in ("C5a", "C5b"):
        both = [found for claim, found in family if claim.id.startswith(method)]
        exceeded = all(found["verdict"] == "held" for found in both)
        for found in both:
            found["rule"] += ", over both references"
            if found["verdict"] == "held" and not exceeded:
                found["verdict"] = "inconclusive"
    return judged
