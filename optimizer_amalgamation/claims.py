"""The paper's claims as data (arXiv 2203.06474; spec b and i); what they measure is in `rows.py`."""

from common.claims import Claim
from optimizer_amalgamation.rows import (
    COLLAPSED,
    SIMILAR,
    best_over_oracle,
    diverged,
    evaluation_spread,
    lead_of_one_teacher,
    least_rise,
    log_spread,
    memory_growth,
    over,
    over_all,
    over_oracle,
    unsteadiness,
)

FEW_POINTS = "no number, a figure: Train CNN on MNIST, 8 replicates x 10 evaluations of 25 epochs"
PLACES = ("the problem of meta-training", "the next problem")
SHIPPED = {"tiny14": "", "small14": ", the problem of its own meta-training"}
STABLER = "spread falls until about 1e-3; min-max, small pool, 8 replicates"


def _against_the_oracle() -> list[Claim]:
    words = {
        "choice-large": "The choice policy",
        "minmax": "Min-max amalgamation",
        "shipped-choice-large": "The shipped student of the choice policy",
    }
    found = []
    arms: list[tuple[str, int | str, str]] = [
        (by, at, PLACES[at]) for by in ("choice-large", "minmax") for at in (0, 1)
    ]
    arms += [("shipped-choice-large", name, f"{name}{which}") for name, which in SHIPPED.items()]
    for letter, (by, place, problem) in zip("abcdef", arms, strict=True):
        found.append(
            Claim(
                id=f"B3{letter}",
                statement=f"{words[by]} is no worse than the pool's best member on {problem}",
                source="Fig. 4",
                paper=f"similar or better; {FEW_POINTS}",
                measure=over_oracle(by, place),
                threshold=SIMILAR,
                direction="below",
                unit="log loss",
            )
        )
    return found


CLAIMS: list[Claim] = [
    *(
        Claim(
            id=f"B1{letter}",
            statement=f"Optimal choice beats {name} on {PLACES[0]}",
            source="Fig. 1",
            paper=f"better; {FEW_POINTS}",
            measure=over("choice-large-student", reference, 0),
            direction="below",
            unit="log loss (not judged at demo scale)",
        )
        for letter, name, reference in (("a", "the mean", "mean"), ("b", "min-max", "minmax"))
    ),
    *(
        Claim(
            id=f"B2{letter}",
            statement=f"Min-max amalgamation beats RNNProp, which has no teachers, on {PLACES[place]}",
            source="Fig. 2",
            paper=f"better, significantly; {FEW_POINTS}",
            measure=over("minmax", "rnnprop", place),
            direction="below",
            unit="log loss",
        )
        for letter, place in (("a", 0), ("b", 1))
    ),
    *(
        Claim(
            id=f"B2{letter}",
            statement=f"The student of the large choice beats {reference}, mean over all problems",
            source="Fig. 2",
            paper=f"better on all problems; {FEW_POINTS}",
            measure=over_all("choice-large-student", reference),
            direction="below",
            unit="log loss (not judged at demo scale)",
        )
        for letter, reference in zip("cdef", ("original", "rnnprop", "scale", "stronger"), strict=True)
    ),
    *_against_the_oracle(),
    *(
        Claim(
            id=f"B3{letter}",
            statement=f"The best {words} is no worse than the pool's best member on two thirds of the problems",
            source="Fig. 4",
            paper=f"similar or better on all; {FEW_POINTS}",
            measure=best_over_oracle(by),
            threshold=SIMILAR,
            direction="below",
            interval="worst",
            unit=f"log loss, upper bounds on the best two thirds, lower ones where not held{where}",
        )
        for letter, words, by, where in (
            ("g", "shipped student of the choice policy", "shipped-choice-large", ""),
            ("h", "student of the choice policy in validation", "choice-large-student", " (not judged at demo scale)"),
        )
    ),
    Claim(
        id="B4",
        statement="The amalgamated optimizer is as steady as the pool's median: instability over it, minus 1",
        source="Fig. 3, 5",
        paper="meets or exceeds the best analytical ones",
        measure=unsteadiness("choice-large-student"),
        direction="below",
        unit="by problem (not judged at demo scale)",
    ),
    Claim(
        id="B5a",
        statement="More noise on the weights, a worse meta loss under it: least rise over 0, .1, .3, 1",
        source="Fig. 6",
        paper="no number",
        measure=least_rise,
        unit="log loss",
    ),
    Claim(
        id="B5b",
        statement="Relative noise of 1 makes every replicate diverge: mean meta loss, under it, of the last 20 steps",
        source="Fig. 6",
        paper="all diverge at .1, after the whole curriculum",
        measure=diverged(1.0),
        threshold=COLLAPSED,
        interval="worst",
        unit="log loss",
    ),
    Claim(
        id="B5c",
        statement="Relative noise of .1 already does",
        source="Fig. 6",
        paper="all diverge at .1, after the whole curriculum",
        measure=diverged(0.1),
        threshold=COLLAPSED,
        interval="worst",
        unit="log loss",
    ),
    *(
        Claim(
            id=f"{name}",
            statement=f"{words} of 1e-3 makes meta-training steadier: log ratio of the spread over replicates",
            source="Fig. 6",
            paper=STABLER,
            measure=log_spread(kind, 1e-3),
            direction="below",
            unit="(not judged at demo scale)",
        )
        for name, kind, words in (("B5d", "relative", "Relative noise"), ("B6", "cgd", "Adversarial noise"))
    ),
    Claim(
        id="B8",
        statement="Repeated evaluations spread alike for all learnt optimizers: p of Levene's test, by problem",
        source="App. E.1",
        paper="about the same",
        measure=evaluation_spread,
        threshold=0.05,
        interval="worst",
        unit="p (not judged at demo scale)",
    ),
    Claim(
        id="B9a",
        statement="The mean sticks to one teacher more than the maximum: largest share of steps with one nearest",
        source="Sec. 3.3",
        paper="an argument, no number",
        measure=lead_of_one_teacher,
        unit="share of steps",
    ),
    Claim(
        id="B9b",
        statement="Teachers that leave no graph (spec h3) cost no memory: peak with two and six over one",
        source="Sec. 3.3",
        paper="in proportion to their number, which is what speaks for optimal choice",
        measure=memory_growth,
        threshold=1.05,
        direction="below",
        interval="worst",
        unit="times",
    ),
]
