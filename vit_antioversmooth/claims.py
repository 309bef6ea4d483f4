"""The paper's claims (arXiv 2203.05962) over the rows of the study.

A row is one network: cell {arm}, seed, metrics. Arms of one seed share initial weights, order and augmentation, so
differences are paired. The -control arms have equally fast parameters (AttnScale's as many, FeatScale's half as many)
but scale all frequencies alike: only what a method does beyond its control is an effect of frequency.
"""

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean

import numpy as np
from scipy import stats

from common.claims import Claim, Measure, Metrics, Number, Rows, difference, each
from vit_antioversmooth.cost import PAPER_COUNTS
from vit_antioversmooth.settings import ScaleStudy


def smaller(*measures: Measure) -> Measure:
    """Per seed the smallest of several numbers: above a threshold only where all are. KeyError if one lacks a seed."""

    def measure(rows: Rows) -> list[float]:
        numbers = [one(rows) for one in measures]
        if len(set(map(len, numbers))) > 1:
            raise KeyError("not every arm has every seed")
        return [min(values) for values in zip(*numbers, strict=True)]

    return measure


def last_third(name: str) -> Number:
    """Mean over the last third of the layers of a list by layer."""
    return lambda metrics: mean(metrics[name][-max(len(metrics[name]) // 3, 1) :])


def last(name: str) -> Number:
    """The last layer's value of a list by layer."""
    return lambda metrics: metrics[name][-1]


def accuracy(metrics: Metrics) -> float:
    """Test accuracy in percent."""
    return metrics["test_accuracy"]


def mean_scale(name: str) -> Number:
    """Mean over layers and heads of a learnt scale: omega, s or t."""
    return lambda metrics: float(np.mean(np.concatenate([np.ravel(layer) for layer in metrics[name]])))


def oversmoothing(metrics: Metrics) -> float:
    """The smaller Spearman correlation of depth with patch cosine and with -HC/DC. KeyError if one is constant."""
    curves = [metrics["patch_cosine"], [-ratio for ratio in metrics["hc_over_dc"]]]
    if any(len(set(curve)) < 2 for curve in curves):
        raise KeyError("no correlation of a constant")
    return min(float(stats.spearmanr(range(len(curve)), curve).statistic) for curve in curves)


def smallest_step(metrics: Metrics) -> float:
    """The smallest rise of last-block HC/DC between successive omegas of the dose response."""
    dose = metrics["dose_hc_over_dc"]
    return min(after - before for before, after in pairwise(dose))


def counts_agree(metrics: Metrics) -> float:
    """1 where every counted number of added parameters is the paper's, else 0."""
    added = metrics["added_parameters"]
    return float(all(added[name][:2] == list(counts) for name, (_, _, *counts) in PAPER_COUNTS.items()))


def gains(arm: str, letters: Sequence[str], title: str, paper: str) -> list[Claim]:
    """C5 for one method: accuracy against the plain network and against the method's control."""
    pairs = ((f"{arm}", "plain", "the plain network"), (f"{arm}", f"{arm}-control", "its frequency-blind control"))
    return [
        Claim(
            id=f"C5{letter}",
            statement=f"{title} raises accuracy at equal depth and recipe over {words}",
            source="abstract",
            paper=paper if reference == "plain" else "no such control in the paper",
            measure=difference(method, reference, accuracy),
        )
        for letter, (method, reference, words) in zip(letters, pairs, strict=True)
    ]


def cosines(arm: str, name: str, letters: Sequence[str], statement: str, paper: str) -> list[Claim]:
    """C4 for one method: cosine over the last third of the layers, against plain and against the method's control."""
    return [
        Claim(
            id=f"C4{letter}",
            statement=f"{statement} (last third of layers, {arm} minus {reference})",
            source="teaser figure",
            paper=paper if reference == "plain" else "no such control in the paper",
            measure=difference(arm, reference, last_third(name)),
            direction="below",
            unit="cosine",
        )
        for letter, reference in zip(letters, ("plain", f"{arm}-control"), strict=True)
    ]


def dose_response(omegas: Sequence[float]) -> Claim:
    """C4c, for the omegas of a study."""
    doses = ", ".join(f"{omega:g}" for omega in omegas)
    return Claim(
        id="C4c",
        statement=f"Causal: last-block HC/DC rises with omega in {{{doses}}} before any training (smallest rise)",
        source="the method",
        paper="no such experiment",
        measure=each("init", smallest_step),
        interval="worst",
        unit="HC/DC",
    )


def claims_of(study: ScaleStudy) -> list[Claim]:
    """`CLAIMS` with the omegas of `study` in their words."""
    return [dose_response(study.omegas) if claim.id == "C4c" else claim for claim in CLAIMS]


CLAIMS = [
    Claim(
        id="C1",
        statement="Softmax attention is a low-pass filter: HC/DC of A^t z vanishes (trained maps that fail)",
        source="theory",
        paper="every map (theorem; as stated it needs pi^T z != 0)",
        measure=each("plain", lambda metrics: metrics["judged_maps"] - metrics["lowpass_maps"]),
        threshold=0.5,
        direction="below",
        interval="worst",
        unit="maps",
    ),
    Claim(
        id="C2",
        statement="HC after attention, heads, skip and feed-forward stays within the explicit bounds (violations)",
        source="theory",
        paper="none (theorem)",
        measure=each("plain", lambda metrics: metrics["violations"]),
        threshold=0.5,
        direction="below",
        interval="worst",
        unit="violations",
    ),
    Claim(
        id="C3",
        statement="Plain ViTs oversmooth with depth: patch cosine rises, HC/DC falls (Spearman, the smaller)",
        source="teaser figure",
        paper="feature cosine .24 (layer 0) to .57 (24), DeiT-S-24, ImageNet (read from the figure)",
        measure=each("plain", oversmoothing),
        threshold=0.8,
        interval="worst",
        unit="rho",
    ),
    *cosines(
        "attnscale",
        "attention_cosine",
        ("a1", "a2"),
        "AttnScale keeps attention maps diverse: their rows' cosine falls",
        "last layer .94 to .54, DeiT-S-24, ImageNet (read from the figure)",
    ),
    *cosines(
        "featscale",
        "patch_cosine",
        ("b1", "b2"),
        "FeatScale keeps features diverse: patch cosine falls",
        "last layer .57 to .34, DeiT-S-24, ImageNet (read from the figure)",
    ),
    dose_response(ScaleStudy().omegas),
    Claim(
        id="C4d",
        statement="Causal: without attention skips AttnScale (omega from 20) keeps tokens apart (last patch cosine)",
        source="the method",
        paper="no such experiment",
        measure=difference("noskip-plain", "noskip-attnscale", last("patch_cosine")),
        threshold=0.3,
        interval="worst",
        unit="cosine",
    ),
    *gains(
        "attnscale",
        ("a1", "a2"),
        "AttnScale",
        "79.8 to 80.7 (DeiT-S-12), 80.5 to 81.1 (24 layers) top-1, ImageNet, 500 epochs (recalled, unverified)",
    ),
    *gains(
        "featscale",
        ("b1", "b2"),
        "FeatScale",
        "up to +1.1: 79.8 to 80.9 (DeiT-S-12) top-1, ImageNet, 500 epochs (recalled, unverified)",
    ),
    Claim(
        id="C6a",
        statement="Practically free: added parameters of DeiT-S-12/24, CaiT-S-24, Swin-S are the paper's, exactly",
        source="abstract",
        paper="AttnScale 72, 144, 192, 282; FeatScale 9,216, 18,432, 18,432, 18,048 (of 22 to 50 million)",
        measure=each("init", counts_agree),
        threshold=0.5,
        interval="worst",
        unit="of networks",
    ),
    Claim(
        id="C6b",
        statement="Practically free: time of a training step over that of the plain network (the slower method)",
        source="abstract",
        paper="negligible (no number)",
        measure=each("init", lambda metrics: max(metrics["attnscale_step_ratio"], metrics["featscale_step_ratio"])),
        threshold=1.10,
        direction="below",
        unit="times",
    ),
    *[
        Claim(
            id=f"C7{letter}",
            statement=f"Fine-tuning a trained plain network with fresh {title} beats the same without (test accuracy)",
            source="experiments, CaiT",
            paper="82.6 to 83.2, CaiT-S-24, 60 epochs, ImageNet (recalled, unverified)",
            measure=difference(f"tuned-{arm}", "tuned-plain", accuracy),
        )
        for letter, arm, title in (("a", "attnscale", "AttnScale"), ("b", "featscale", "FeatScale"))
    ],
    Claim(
        id="C8a",
        statement="High frequencies are amplified: mean omega above 0 and above its frequency-blind control's",
        source="experiments, learnt scales",
        paper="positive (no number)",
        measure=smaller(
            each("attnscale", mean_scale("omega")), difference("attnscale", "attnscale-control", mean_scale("omega"))
        ),
        interval="worst",
        unit="omega",
    ),
    Claim(
        id="C8b",
        statement="High frequencies are amplified: mean t above 0 above mean s (the smaller of t and -s)",
        source="experiments, learnt scales",
        paper="positive t (no number)",
        measure=each("featscale", lambda metrics: min(mean_scale("t")(metrics), -mean_scale("s")(metrics))),
        interval="worst",
        unit="scale",
    ),
]
