"""The paper's claims over the rows of the study (arXiv 2203.06578; spec b and i).

Rows: cell {arm, what, by, problem}; what is teacher, equation, race, tune, sanity, cost or network. Losses are
cross-entropies on all images of half B after the race, by start; rows of one seed share starts and batches.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from statistics import mean
from typing import Any

import numpy as np
from scipy import stats

from common.claims import Claim, Rows, holm
from symbolic_l2o.sanity import TARGETS
from symbolic_l2o.settings import BASELINES

Measure = Callable[[Rows], list[float]]
RP_TYPE = ("rp", "rp_s", "rp_si")
UNSEEN = ("relu3", "tanh", "conv")
RIVALS = ("sgdm", "adam")
ALPHA = 0.05
LEARNT = 2.0  # evaluation loss below which a teacher has learnt something; chance is ln 10 = 2.303
FIGURES = "figures of the paper's release"


def seeds_of(rows: Rows) -> list[int]:
    """Seeds of rows, in order. Raises KeyError without any."""
    found = sorted({row["seed"] for row in rows})
    if not found:
        raise KeyError("no rows")
    return found


def found(rows: Rows, seed: int, **cell: Any) -> list[Any]:
    """Metrics of the rows of a seed with these settings. Raises KeyError without any."""
    wanted = [
        row["metrics"]
        for row in rows
        if row["seed"] == seed and all(row["cell"].get(key) == value for key, value in cell.items())
    ]
    if not wanted:
        raise KeyError(f"no row of {cell} at seed {seed}")
    return wanted


def searched(rows: Rows, seed: int, arm: str, metric: str) -> list[Any]:
    """A metric of the equations that symbolic regression found for a teacher, one a search."""
    cells = [row for row in rows if row["seed"] == seed and row["cell"].get("arm") == arm]
    values = [
        row["metrics"][metric]
        for row in cells
        if row["cell"].get("by", "").startswith("operon")
        if metric in row["metrics"]
    ]
    if not values:
        raise KeyError(f"no search of {arm} at seed {seed}")
    return values


def best_r2(rows: Rows, seed: int, arm: str) -> float:
    """Largest held-out R2 of a teacher's equations, whatever their form."""
    return max(metrics["r2"] for metrics in found(rows, seed, arm=arm, what="equation"))


def per_seed(function: Callable[[Rows, int], float]) -> Measure:
    """A measure that is one number a seed; a seed for which `function` raises KeyError has none."""

    def measure(rows: Rows) -> list[float]:
        values = []
        for seed in seeds_of(rows):
            with suppress(KeyError):
                values.append(function(rows, seed))
        return values

    return measure


def sanity(target: str) -> Measure:
    """C1: largest R2 on a known rule."""
    return per_seed(lambda rows, seed: found(rows, seed, what="sanity", by=target)[0]["r2"])


def lead_in_r2(rows: Rows, seed: int) -> float:
    """C2: the smaller lead of RP_s and RP_si over DM in R2."""
    return min(best_r2(rows, seed, "rp_s"), best_r2(rows, seed, "rp_si")) - best_r2(rows, seed, "dm")


def complexity_step(above: str, below: str) -> Measure:
    """C3: mean complexity of a teacher's equations minus that of another's."""
    return per_seed(
        lambda rows, seed: (
            mean(searched(rows, seed, above, "complexity")) - mean(searched(rows, seed, below, "complexity"))
        )
    )


def memory(rows: Rows, seed: int, arm: str) -> float:
    """Largest mean step back over a teacher's features, of its template."""
    return max(found(rows, seed, arm=arm, what="equation", by="template")[0]["tpf"])


def memory_step(above: str, below: str) -> Measure:
    """C3: temporal perception of one teacher minus that of another."""
    return per_seed(lambda rows, seed: memory(rows, seed, above) - memory(rows, seed, below))


def final(rows: Rows, seed: int, arm: str, by: str, problem: str) -> list[float]:
    """Final losses of a race, one a start."""
    return found(rows, seed, arm=arm, what="race", by=by, problem=problem)[0]["final"]  # type: ignore[no-any-return]


def taught(rows: Rows, seed: int, arm: str, problem: str) -> float:
    """Mean final loss of a teacher. Raises KeyError where meta-training has taught it nothing."""
    if not found(rows, seed, arm=arm, what="teacher")[0]["loss"] < LEARNT:
        raise KeyError(f"{arm} has not learnt at seed {seed}")
    return mean(final(rows, seed, arm, "teacher", problem))


def excess(arm: str, by: str) -> Measure:
    """C4a: how much worse than its teacher an equation ends, relative, on the teacher's own problem."""
    return per_seed(lambda rows, seed: mean(final(rows, seed, arm, by, "sig")) / taught(rows, seed, arm, "sig") - 1)


def loss_step(worse: str, better: str) -> Measure:
    """C4b: log ratio of two teachers' final losses on the problem that all can solve."""
    return per_seed(
        lambda rows, seed: float(np.log(taught(rows, seed, worse, "relu01") / taught(rows, seed, better, "relu01")))
    )


def form_deficit(rows: Rows, seed: int) -> float:
    """C6: the largest amount, over RP-type teachers, by which a regression's front beats psi in R2."""
    deficits = []
    for arm in RP_TYPE:
        psi = max(
            found(rows, seed, arm=arm, what="equation", by=form)[0]["r2"] for form in ("template", "template_tanh")
        )
        deficits.append(max(searched(rows, seed, arm, "front_r2")) - psi)
    return max(deficits)


def problems_won(rows: Rows, seed: int) -> float:
    """C8: unseen problems on which the pole rule ends below both tuned rivals: Wilcoxon over starts, Holm."""
    tests = {}
    for problem in UNSEEN:
        ours = np.asarray(final(rows, seed, "rp_s", "pole", problem))
        for rival in RIVALS:
            theirs = np.asarray(final(rows, seed, "baselines", rival, problem))
            p = stats.wilcoxon(ours, theirs, alternative="less").pvalue if (ours != theirs).any() else 1.0
            tests[f"{problem} {rival}"] = float(p)
    corrected = holm(tests)
    return float(sum(all(corrected[f"{problem} {rival}"] <= ALPHA for rival in RIVALS) for problem in UNSEEN))


def tuning_gain(rows: Rows, seed: int) -> float:
    """C8: evaluation loss after tuning the rule that was made too small, over that before."""
    cells = [m for m in found(rows, seed, what="tune", arm="tune")]
    return cells[0]["loss"] / cells[0]["start_loss"]  # type: ignore[no-any-return]


def never_worse(rows: Rows, seed: int) -> float:
    """C8: largest excess of the loss after tuning over that before, both starts."""
    return max(m["loss"] - m["start_loss"] for m in found(rows, seed, what="tune", arm="tune"))


def cost(metric: str) -> Measure:
    """C7: a number of the cost cell."""
    return per_seed(lambda rows, seed: found(rows, seed, what="cost")[0][metric])


def network_lead(*rivals: str) -> Measure:
    """C8, larger scales: test accuracy of the meta-tuned rule minus that of rivals, each the best in validation.

    Of several rivals SGD with momentum and Adam must be there.
    """

    def best(rows: Rows, seed: int, names: Sequence[str]) -> float:
        networks = [row for row in rows if row["seed"] == seed and row["cell"].get("what") == "network"]
        entries = [row["metrics"] for row in networks if row["cell"]["by"] in names]
        there = {row["cell"]["by"] for row in networks}
        if not entries or (len(names) > 1 and not there.issuperset(RIVALS)):
            raise KeyError(f"no network of {names} at seed {seed}")
        return max(entries, key=lambda metrics: metrics["val_accuracy"])["test_accuracy"]  # type: ignore[no-any-return]

    return per_seed(lambda rows, seed: best(rows, seed, ("tuned",)) - best(rows, seed, rivals))


def _sanity_claims() -> Sequence[Claim]:
    words = {
        "sgd": "-0.01 g_t",
        "window": "sum over 11 gradients with falling weights",
        "mixed": "g_t^2 + g_t-1 + 2 g_t-2 + exp g_t-4",
        "momentum": "momentum 0.6",
        "adam": "Adam 0.9",
    }
    thresholds = {"adam": 0.80}
    return [
        Claim(
            id=f"C1{letter}",
            statement=f"Symbolic regression recovers {words[name]} from 10 gradients",
            source="sanity table",
            paper=f"R2 {r2} in {seconds} s, 5 gradients, PySR",
            measure=sanity(name),
            threshold=thresholds.get(name, r2 - 0.03),
            interval="worst",
            unit="R2",
        )
        for letter, (name, (r2, seconds)) in zip("abcde", TARGETS.items(), strict=True)
    ]


MC = "MC: DM 182.9 (with CL and IL 220.6), RP 104.7, RP_s 80.3, RP_si 67.0"
TPF = "TPF: DM 25.2 (with CL and IL 27.4), RP (5.3, 2.4), RP_s (5.5, 2.2), RP_si (4.6, 2.0, 4.1)"
LOSSES = (
    "final loss teacher / equation: DM .23 / .33, RP .12 / .14, RP_s .09 / .10, RP_si .08 / .09 (~620 steps, MNIST MLP)"
)
R2S = "R2 at P1 / P2: DM .46 / .54, RP .93 / .94, RP_si .94 / .94"
NETS = "ResNet-50, CIFAR-10: 95.40 against SGD+cos 94.93; ResNet-152, CIFAR-100: 78.07 against 80.26 (lost)"

CLAIMS: list[Claim] = [
    *_sanity_claims(),
    Claim(
        id="C2a",
        statement="Equations explain RP_s and RP_si better than DM: the smaller lead",
        source="Table 7",
        paper=R2S,
        measure=per_seed(lead_in_r2),
        threshold=0.2,
        interval="worst",
        unit="R2",
    ),
    Claim(
        id="C2b",
        statement="An equation explains RP_s: held-out groups of one run and one coordinate",
        source="Table 7",
        paper=R2S,
        measure=per_seed(lambda rows, seed: best_r2(rows, seed, "rp_s")),
        threshold=0.75,
        interval="worst",
        unit="R2",
    ),
    *(
        Claim(
            id=f"C3{letter}",
            statement=f"Better features make simpler equations: complexity of {above} minus {below}",
            source=FIGURES,
            paper=MC,
            measure=complexity_step(above, below),
            unit="nodes",
        )
        for letter, above, below in (("a", "dm", "rp"), ("b", "rp", "rp_s"), ("c", "rp_s", "rp_si"))
    ),
    *(
        Claim(
            id=f"C3{letter}",
            statement=f"and shorter memories: temporal perception of {above} minus {below}, largest feature",
            source=FIGURES,
            paper=TPF,
            measure=memory_step(above, below),
            unit="steps",
        )
        for letter, above, below in (("d", "dm", "rp"), ("e", "rp_s", "rp_si"))
    ),
    *(
        Claim(
            id=f"C4{letter}",
            statement=f"The {by} equation of {arm} ends hardly above its teacher: relative excess of the loss",
            source=FIGURES,
            paper=LOSSES,
            measure=excess(arm, by),
            threshold=0.25,
            direction="below",
            unit="of the teacher's loss",
        )
        for letter, arm, by in (
            ("a", "rp_s", "template"),
            ("b", "rp_s", "pole"),
            ("c", "rp_si", "template"),
            ("d", "rp", "template"),
        )
    ),
    *(
        Claim(
            id=f"C4{letter}",
            statement=f"Teachers with better features end lower: log loss of {worse} minus {better}, on relu01",
            source=FIGURES,
            paper=LOSSES,
            measure=loss_step(worse, better),
            unit="nats",
        )
        for letter, worse, better in (("e", "dm", "rp"), ("f", "rp", "rp_s"), ("g", "rp_s", "rp_si"))
    ),
    Claim(
        id="C6",
        statement="One form captures every RP-type equation: largest lead in R2 of symbolic regression over psi",
        source="the form psi",
        paper="a formula, no number",
        measure=per_seed(form_deficit),
        threshold=0.02,
        direction="below",
        interval="worst",
        unit="R2",
    ),
    Claim(
        id="C7a",
        statement="A rule keeps less than its teacher: floats a weight of the pole rule",
        source="abstract",
        paper="meta-tuning of ResNet-50 in 30 GB; the smallest teacher keeps 16 floats a weight",
        measure=cost("pole_floats"),
        threshold=16,
        direction="below",
        interval="worst",
        unit="floats",
    ),
    Claim(
        id="C7b",
        statement="and steps faster: time of the smallest teacher's step over the rule's",
        source="abstract",
        paper="no number",
        measure=cost("rp_s_step_ratio"),
        threshold=5.0,
        interval="worst",
        unit="times",
    ),
    Claim(
        id="C7c",
        statement="and is meta-tuned in little more memory than training takes: peak on ResNet-20 over that of Adam",
        source="abstract",
        paper="meta-training on ResNet-50 in 30 GB",
        measure=cost("tuning_peak_ratio"),
        threshold=1.5,
        direction="below",
        interval="worst",
        unit="times",
    ),
    Claim(
        id="C8a",
        statement="The untuned rule beats SGD with momentum and Adam, each at its best, on unseen problems",
        source="ResNet figures",
        paper=NETS,
        measure=per_seed(problems_won),
        threshold=1.5,
        interval="worst",
        unit="of 3 problems",
    ),
    Claim(
        id="C8b",
        statement="Meta-tuning mends a rule ten times too small: evaluation loss after over before",
        source="Sec. on tuning",
        paper="no number",
        measure=per_seed(tuning_gain),
        threshold=0.7,
        direction="below",
        interval="worst",
        unit="times",
    ),
    Claim(
        id="C8c",
        statement="and never returns a rule that is worse than its start",
        source="by construction: the start is a candidate",
        paper="no number",
        measure=per_seed(never_worse),
        threshold=1e-9,
        direction="below",
        interval="worst",
        unit="loss",
    ),
    Claim(
        id="C5",
        statement="Curriculum and imitation improve teachers but raise memory and complexity (not measured here)",
        source=FIGURES,
        paper="DM: TPF 25.2 to 27.4, MC 182.9 to 220.6, loss .23 to .19",
        measure=lambda rows: [],
        unit="(one teacher needs ten times the demo's time)",
    ),
    Claim(
        id="C8d",
        statement="The meta-tuned rule is not worse than the best hand-made optimiser on a deep network",
        source="ResNet figures",
        paper=NETS,
        measure=network_lead(*BASELINES),
        threshold=-0.3,
        unit="points (not judged at demo scale)",
    ),
    Claim(
        id="C8e",
        statement="and is better than Adam there",
        source="ResNet figures",
        paper=NETS,
        measure=network_lead("adam"),
        unit="points (not judged at demo scale)",
    ),
]
