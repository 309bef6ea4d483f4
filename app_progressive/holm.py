"""Holm's correction (1979): C1 to C4, in all their forms, are decided together (spec i), the other claims each alone.

Held and not held are tests of opposite sides. Each side's p-values are corrected over all tests of the family that
could be made; a verdict stands only where its own is below LEVEL, and is inconclusive otherwise.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from common.claims import Claim, Rows, holm, judge

FAMILY = ("C1", "C2", "C3", "C4")
LEVEL = 0.05


def of_family(claim: Claim) -> bool:
    """Whether the claim is one of C1 to C4; C1w and C2n1 are."""
    return claim.id[:2] in FAMILY


def p_values(claim: Claim, values: Sequence[float]) -> dict[str, float]:
    """p of `held` and of `not held`: one-sided t tests of the mean of at least two values, as the verdict's bounds.

    An equivalence is held where both of its edges are passed inwards, and not held where one is passed outwards.
    """

    def p(edge: float, side: str) -> float:
        if np.ptp(values) == 0:
            return float(values[0] <= edge if side == "greater" else values[0] >= edge)
        return float(stats.ttest_1samp(values, edge, alternative=side).pvalue)

    edge = claim.threshold
    if claim.direction == "equivalent":
        return {
            "held": max(p(-edge, "greater"), p(edge, "less")),
            "not held": min(p(edge, "greater"), p(-edge, "less")),
        }
    return {"held": p(edge, "greater"), "not held": p(edge, "less")}


def judge_together(claims: Sequence[Claim], rows: Rows) -> list[dict[str, Any]]:
    """`judge` with the verdicts of the family corrected: never a new one, but some no longer decided.

    Those of the family that were measured on two seeds or more get `holm`, the corrected p of either side.
    """
    judged = judge(claims, rows)
    pairs = zip(claims, judged, strict=True)
    tests = {c.id: p_values(c, found["values"]) for c, found in pairs if of_family(c) and len(found["values"]) > 1}
    corrected = {side: holm({name: p[side] for name, p in tests.items()}) for side in ("held", "not held")}
    for claim, found in zip(claims, judged, strict=True):
        if of_family(claim):
            found["rule"] += f", Holm over {FAMILY[0]} to {FAMILY[-1]}"
        if claim.id in tests:
            found["holm"] = {side: p[claim.id] for side, p in corrected.items()}
            if found["holm"].get(found["verdict"], 0.0) >= LEVEL:
                found["verdict"] = "inconclusive"
    return judged
