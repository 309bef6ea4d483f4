"""The paper's claims over the rows of the study (arXiv 2203.06345; spec b and i).

A row is one network: cell {arm, its objective}, seed, metrics. Arms of one seed share initial weights, order and
augmentation, so differences are paired.
"""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from scipy import stats

from common.claims import Claim, Metrics, Rows, by_seed, difference, each, judge

UNDECIDED = ("D2c", "D4a", "D4b", "D4c", "D4d")  # at demo scale: reported with intervals, without a verdict (spec i)
SINGLE = {"embedding": "the embedding level", "attention": "the attention level", "weight": "the weight level"}


def judge_at(scale: str, claims: Sequence[Claim], rows: Rows) -> list[dict[str, Any]]:
    """`judge`, without a verdict on what so short a run as the demo's cannot decide."""
    judged = judge(claims, rows)
    for found in judged:
        if scale in ("smoke", "demo") and found["id"] in UNDECIDED:
            found |= {"verdict": "inconclusive", "rule": f"{found['rule']}; not judged at demo scale"}
    return judged


def over_the_best_single(rows: Rows) -> list[float]:
    """Per seed: accuracy of all levels together minus that of the best level alone. KeyError if one is missing."""
    singles = [by_seed(rows, arm) for arm in SINGLE]
    return [
        accuracy(metrics) - max(accuracy(single[seed]) for single in singles)
        for seed, metrics in by_seed(rows, "all").items()
        if all(seed in single for single in singles)
    ]


def accuracy(metrics: Metrics) -> float:
    """Test accuracy in percent."""
    return metrics["test_accuracy"]


def growth(metrics: Metrics) -> float:
    """Spearman correlation of depth with the cosine between patches. KeyError if that is constant."""
    curve = metrics["embedding_cosine"]
    if len(set(curve)) < 2:
        raise KeyError("no correlation of a constant")
    return float(stats.spearmanr(range(len(curve)), curve).statistic)


def last_cosine(metrics: Metrics) -> float:
    """Cosine between patches after the last block."""
    return metrics["embedding_cosine"][-1]


def head_cosine(metrics: Metrics) -> float:
    """Cosine between the heads of the first block."""
    return metrics["head_cosine"][0]


def mean_head_cosine(metrics: Metrics) -> float:
    """Cosine between heads, the mean over blocks."""
    return mean(metrics["head_cosine"])


def rre(metrics: Metrics) -> float:
    """Relative reconstruction error of q, k, v at 25 % of the rank, the mean over matrices and blocks."""
    return mean(mean(metrics["weights"][name]["rre_25"]) for name in "qkv")


def left_behind(rows: Rows) -> list[float]:
    """Per seed of `all`: parameters more or less than plain, state-dict keys that came or went, hooks still there."""
    ours, plain = by_seed(rows, "all"), by_seed(rows, "plain")
    return [
        abs(metrics["parameters"] - plain[seed]["parameters"]) + metrics["keys_changed"] + metrics["hooks_left"]
        for seed, metrics in ours.items()
        if seed in plain
    ]


def gains() -> Sequence[Claim]:
    """D4: accuracy of each level alone."""
    return [
        Claim(
            id=f"D4{letter}",
            statement=f"Diversity at {words} alone raises test accuracy ({arm} minus plain)",
            source="ablation table",
            paper="each level helps, DeiT-S, ImageNet (recalled, unverified, no number)",
            measure=difference(arm, "plain", accuracy),
        )
        for letter, (arm, words) in zip("abc", SINGLE.items(), strict=True)
    ]


CLAIMS = [
    Claim(
        id="D1",
        statement="The regularizers of all three levels together raise test accuracy (all minus plain)",
        source="abstract",
        paper="+0.70 to +1.76 points top-1 over DeiT backbones, ImageNet, 300 epochs",
        measure=difference("all", "plain", accuracy),
    ),
    # D2a and D2b have no control and hold for untrained networks of the demo as well: see README.md.
    Claim(
        id="D2a",
        statement="Plain: the cosine between patches grows with depth (Spearman correlation with the layer)",
        source="Fig. 1",
        paper="grows with depth, DeiT-S, ImageNet (figure, no number)",
        measure=each("plain", growth),
        threshold=0.8,
        interval="worst",
        unit="rho",
    ),
    Claim(
        id="D2b",
        statement="Plain: the heads of a block attend alike (cosine between different heads, mean over blocks)",
        source="Fig. 1",
        paper="alike, DeiT-S, ImageNet (figure, no number)",
        measure=each("plain", mean_head_cosine),
        threshold=0.3,
        interval="worst",
        unit="cosine",
    ),
    Claim(
        id="D2c",
        statement="Plain: q, k, v are nearer to low rank than Gaussian weights (RRE at 25 %, Gaussian minus plain)",
        source="Fig. 1",
        paper="fast decaying spectra, DeiT-S, ImageNet (figure, no number)",
        measure=each("plain", lambda metrics: metrics["gaussian_rre_25"] - rre(metrics)),
        unit="RRE",
    ),
    Claim(
        id="D3a",
        statement="The embedding terms drive patches of the last layer apart (cosine, all minus plain)",
        source="Fig. 4",
        paper="redundancy largely eliminated, DeiT-S, ImageNet (figure, no number)",
        measure=difference("all", "plain", last_cosine),
        threshold=-0.2,
        direction="below",
        interval="worst",
        unit="cosine",
    ),
    Claim(
        id="D3b",
        statement="The attention term drives the heads of the first block apart (cosine, attention minus plain)",
        source="Fig. 4",
        paper="redundancy largely eliminated, DeiT-S, ImageNet (figure, no number)",
        measure=difference("attention", "plain", head_cosine),
        direction="below",
        unit="cosine",
    ),
    Claim(
        id="D3c",
        statement="The weight term spreads the spectra of q, k, v (RRE at 25 %, weight minus plain)",
        source="Fig. 4",
        paper="redundancy largely eliminated, DeiT-S, ImageNet (figure, no number)",
        measure=difference("weight", "plain", rre),
        interval="worst",
        unit="RRE",
    ),
    *gains(),
    Claim(
        id="D4d",
        statement="All three levels together beat the best single one in test accuracy",
        source="ablation table",
        paper="combining is best, DeiT-S, ImageNet (recalled, unverified, no number)",
        measure=over_the_best_single,
    ),
    Claim(
        id="D5a",
        statement="A trained network has the plain one's parameters and state-dict keys, and no hook (differences)",
        source="by construction",
        paper="training-only (by construction)",
        measure=left_behind,
        threshold=0.5,
        direction="below",
        interval="worst",
        unit="differences",
    ),
    Claim(
        id="D5b",
        statement="A trained network is as fast at inference as the plain one (time ratio minus 1)",
        source="by construction",
        paper="no inference cost (by construction)",
        measure=each("all", lambda metrics: metrics["inference_ratio"] - 1),
        threshold=0.05,
        direction="equivalent",
        unit="of the time",
    ),
]
