"""The paper's claims over the rows of the study (arXiv 2204.01640; spec b and i).

A row is one run: cell {part, arms, arm}, seed, the metrics of eval.py. Parts: F few-shot, N the same with noisy labels,
L long stream, T sparsity and replay. Arms of one seed share initial weights, stream, order and augmentation, so
differences are paired.
"""

from statistics import mean
from typing import Any

import numpy as np
from scipy import stats

from app_progressive.schedules import density_schedule
from app_progressive.settings import Config
from app_progressive.threshold import pruned_count
from common.claims import Claim, Measure, Metrics, Number, Rows, by_seed, difference, each

PRIMARY = ("C1", "C2a", "C2b", "C3a", "C3b", "C3c", "C4a", "C4b")  # judged together by Holm's procedure
WINDOW = 5  # states over which a gap is averaged
FEW_SHOT = "ResNet-50, few-shot Restricted ImageNet (540 shots)"
PLOTS = "plots only, ResNet/VGG on CIFAR-10/100; no numbers available"


def of(part: str, arm: str) -> dict[str, str]:
    """What the cells of an arm in a part of the study hold."""
    return {"part": part, "arm": arm}


def paired(part: str, one: str, other: str, number: Number) -> Measure:
    """Per seed of both arms: a number of `one` minus that of `other`."""
    return difference(of(part, one), of(part, other), number)


def final_acc(metrics: Metrics) -> float:
    """Test accuracy after the last state, percent."""
    return float(metrics["final_acc"])


def cer(metrics: Metrics) -> float:
    """Cumulative error, test errors added up over the states, as a count."""
    return float(metrics["cer"])


def clean_gap(metrics: Metrics) -> float:
    """Training minus test accuracy of the last weights in eval mode, points."""
    return float(metrics["clean_gap"])


def late(name: str) -> Number:
    """Mean of a metric over the states t > S/2."""
    return lambda metrics: mean(metrics[name][len(metrics[name]) // 2 :])


def smooth(curve: list[float]) -> np.ndarray[Any, Any]:
    """Means over WINDOW states, or over half of them where there are few."""
    window = max(min(WINDOW, len(curve) // 2), 1)
    return np.convolve(curve, np.ones(window) / window, "valid")


def peak(curve: np.ndarray[Any, Any]) -> tuple[int, int, int]:
    """Indices i < j < k of the highest rise and fall around one place: the lesser of the two is the largest."""
    places = range(1, len(curve) - 1)
    j = max(places, key=lambda j: min(curve[j] - curve[:j].min(), curve[j] - curve[j + 1 :].min()))
    return int(curve[:j].argmin()), j, j + 1 + int(curve[j + 1 :].argmin())


def transition(arm: str, side: int) -> Measure:
    """C4, per seed: rise (side 0) to or fall (side 2) from the peak of the gap, at places named by the other seeds.

    A curve's own largest rise is positive even in noise; at places found on other seeds it need not be.
    """

    def measure(rows: Rows) -> list[float]:
        curves = {s: smooth(metrics["test_gap_last"]) for s, metrics in by_seed(rows, of("L", arm)).items()}
        if len(curves) < 2 or len(next(iter(curves.values()))) < 3:
            raise KeyError("too few seeds or states")
        found = []
        for seed in sorted(curves):
            places = peak(np.mean([curve for s, curve in curves.items() if s != seed], axis=0))
            found.append(float(curves[seed][places[1]] - curves[seed][places[side]]))
        return found

    return measure


def exact(config: Config, arm: str) -> Measure:
    """C5, per seed: 1 where the non-zero weights are N - int((1 - base^tau) N) to the last one."""

    def right(metrics: Metrics) -> float:
        total = metrics["weights"]
        wanted = total - pruned_count(density_schedule(1, config.prune.tau, config.prune.base)[0], total)
        return float(metrics["nonzero"] == wanted)

    return each(of("F", arm), right)


def layers_apart(rows: Rows) -> list[float]:
    """C6, per seed: L1 distance of layer densities, SNIP to magnitude, minus SNIP's mean distance among seeds."""
    snip, mag = by_seed(rows, of("F", "app")), by_seed(rows, of("F", "app-mag"))
    vectors = {seed: np.array(list(metrics["per_layer"].values())) for seed, metrics in snip.items()}
    if len(vectors) < 2:
        raise KeyError("too few seeds")
    found = []
    for seed in sorted(snip.keys() & mag.keys()):
        across = [np.abs(vectors[seed] - other).sum() for s, other in vectors.items() if s != seed]
        other = np.array(list(mag[seed]["per_layer"].values()))
        found.append(float(np.abs(vectors[seed] - other).sum() - np.mean(across)))
    return found


def replay_cost(config: Config) -> Measure:
    """C8b, per seed: compute of full over that of no replay, over (S + 1) / 2, minus 1."""

    def measure(rows: Rows) -> list[float]:
        full, none = (
            by_seed(rows, of("T", f"app@{config.prune.tau:g}")),
            by_seed(rows, of("T", f"app@{config.prune.tau:g}/none")),
        )
        states = len(next(iter(full.values()))["errors"])
        ratio = [full[seed]["macs_dense"] / none[seed]["macs_dense"] for seed in sorted(full.keys() & none.keys())]
        return [abs(value / ((states + 1) / 2) - 1) for value in ratio]

    return measure


def collapse(metrics: Metrics) -> float:
    """R1: the largest effective over nominal density from state 4 on."""
    pairs = zip(metrics["density"][3:], metrics["density_target"][3:], strict=True)
    ratios = [effective / nominal for effective, nominal in pairs]
    if not ratios:
        raise KeyError("fewer than four states")
    return max(ratios)


def holm(rows: Rows, claims: list[Claim]) -> dict[str, float]:
    """One-sided p of each primary claim that could be measured, adjusted by Holm's procedure over them."""
    found = {}
    for claim in claims:
        if claim.id in PRIMARY:
            try:
                values = claim.measure(rows)
            except KeyError:
                continue
            if len(values) > 1 and np.ptp(values) > 0:
                found[claim.id] = float(stats.ttest_1samp(values, claim.threshold, alternative="greater").pvalue)
    adjusted, least = {}, 0.0
    for rank, (name, p) in enumerate(sorted(found.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, p * (len(found) - rank)))
        adjusted[name] = least
    return {name: adjusted[name] for name in found}


def claims(config: Config) -> list[Claim]:
    """C1 to C8, R1 and R2, at the margin and exponent of the study."""
    tau = config.prune.tau
    share = f"{100 * config.prune.base**tau:.1f} %"
    noise = "mechanism check with 30 % noisy labels, not the paper's setting"
    return [
        Claim(
            id="C1",
            statement=f"APP at {share} of the weights beats dense training: final accuracy, few-shot",
            source="abstract",
            paper=f"about +7 points, {FEW_SHOT}",
            measure=paired("F", "app", "dense", final_acc),
        ),
        Claim(
            id="C1w",
            statement=f"The weaker form: APP at {share} of the weights equals dense training in final accuracy",
            source="abstract",
            paper=f"about +7 points, {FEW_SHOT}",
            measure=paired("F", "app", "dense", final_acc),
            threshold=config.study.margin,
            direction="equivalent",
        ),
        Claim(
            id="C1s",
            statement="APP beats shrink-and-perturb, which prunes nothing: final accuracy, few-shot",
            source="no claim of the paper",
            paper="no such experiment",
            measure=paired("F", "app", "shrink", final_acc),
        ),
        Claim(
            id="C2a",
            statement="APP reduces the generalisation gap: dense minus APP, last epochs, later half of the states",
            source="abstract",
            paper=f"about 22 % (relative or points not said), {FEW_SHOT}",
            measure=paired("F", "dense", "app", late("gap_last")),
        ),
        Claim(
            id="C2b",
            statement="The same for the final clean gap: training minus test accuracy in eval mode",
            source="abstract",
            paper=f"about 22 % (relative or points not said), {FEW_SHOT}",
            measure=paired("F", "dense", "app", clean_gap),
        ),
        *[
            Claim(
                id=f"C2{letter}",
                statement=f"Dense minus APP (tau {exponent:g}), generalisation gap; {noise}",
                source="abstract",
                paper=f"about 22 %, {FEW_SHOT}, clean labels",
                measure=paired("N", "dense", arm, late("gap_last")),
            )
            for letter, exponent, arm in (("n1", tau, "app"), ("n2", 9.5, "app@9.5"))
        ],
        Claim(
            id="C3a",
            statement="APP has a lower cumulative error than dense training: CER of dense minus APP",
            source="Sec. 4",
            paper=PLOTS,
            measure=paired("F", "dense", "app", cer),
            unit="errors",
        ),
        Claim(
            id="C3b",
            statement="APP beats anytime one-shot pruning: final accuracy",
            source="Sec. 4",
            paper=PLOTS,
            measure=paired("F", "app", "osp", final_acc),
        ),
        Claim(
            id="C3c",
            statement="APP beats anytime one-shot pruning: CER of one-shot minus APP",
            source="Sec. 4",
            paper=PLOTS,
            measure=paired("F", "osp", "app", cer),
            unit="errors",
        ),
        Claim(
            id="C4a",
            statement="Along a long stream the gap of APP first rises (to the peak, at places found on other seeds)",
            source="Sec. 4",
            paper="qualitative plot, S = 100",
            measure=transition("app", 0),
        ),
        Claim(
            id="C4b",
            statement="... and then falls",
            source="Sec. 4",
            paper="qualitative plot, S = 100",
            measure=transition("app", 2),
        ),
        Claim(
            id="C4c",
            statement="The peak of APP's gap is lower than that of dense training",
            source="no claim of the paper",
            paper="the transition is shown for APP",
            measure=paired("L", "dense", "app", lambda metrics: float(smooth(metrics["test_gap_last"]).max())),
        ),
        *[
            Claim(
                id=f"C5{letter}",
                statement=f"{title} ends at {share} of the weights, exact to one weight",
                source="Sec. 4",
                paper="about 1/3 of the dense size",
                measure=exact(config, arm),
                threshold=0.5,
                interval="worst",
                unit="of runs",
            )
            for letter, title, arm in (("a", "APP", "app"), ("b", "One-shot pruning", "osp"))
        ],
        Claim(
            id="C6",
            statement="SNIP and magnitude differ in layer densities by more than SNIP does among seeds (L1 distance)",
            source="figure",
            paper="plot, ResNet-50, CIFAR-10, S = 8, tau = 4.5",
            measure=layers_apart,
            unit="density",
        ),
        Claim(
            id="C7a",
            statement="APP suffers without replay: final accuracy with full minus without replay",
            source="authors' follow-up page",
            paper="qualitative",
            measure=paired("T", f"app@{tau:g}", f"app@{tau:g}/none", final_acc),
        ),
        Claim(
            id="C7b",
            statement=f"APP suffers at high sparsity: final accuracy at tau {tau:g} minus at tau 14 (4.4 %)",
            source="authors' follow-up page",
            paper="qualitative",
            measure=paired("T", f"app@{tau:g}", "app@14", final_acc),
        ),
        Claim(
            id="C8a",
            statement="Replay lowers the error: CER without minus with full replay",
            source="ALMA, abstract",
            paper="lower (no number)",
            measure=paired("T", f"app@{tau:g}/none", f"app@{tau:g}", cer),
            unit="errors",
        ),
        Claim(
            id="C8b",
            statement="Replay costs (S + 1) / 2 times the compute (4.5 at S = 8): deviation from it",
            source="ALMA, abstract",
            paper="5 to 10 times",
            measure=replay_cost(config),
            threshold=0.02,
            direction="below",
            interval="worst",
            unit="relative",
        ),
        Claim(
            id="R1",
            statement="The released code trains far sparser than it says: effective over nominal density, state 4 on",
            source="no claim of the paper; the released code",
            paper="36.6 % nominal, 2.4 % effective (ResNet-20s, S = 8; computed from the released functions)",
            measure=each(of("L", "released"), collapse),
            threshold=0.5,
            direction="below",
            interval="worst",
            unit="of nominal",
        ),
        Claim(
            id="R2a",
            statement="That collapse makes the smaller gap: exact minus released APP, later half of the states",
            source="no claim of the paper",
            paper="no such experiment",
            measure=paired("L", "app", "released", late("test_gap_last")),
        ),
        Claim(
            id="R2b",
            statement="... whatever the scores: released APP equals random masks of its density in that gap",
            source="no claim of the paper",
            paper="no such experiment",
            measure=paired("L", "released", "random", late("test_gap_last")),
            threshold=2.0,
            direction="equivalent",
        ),
    ]
