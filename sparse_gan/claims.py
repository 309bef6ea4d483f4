"""The paper's claims over the rows of the study (arXiv 2203.02770; spec b and i).

A row is one GAN: cell {arm, density_g, density_d}, seed, metrics. Arms of one seed share initial weights, images and
noise, so that differences are paired. Distances (`fd`, of fd_classifier) are compared by their logarithms.
"""

import math
from typing import Any

from common.claims import Arm, Claim, Measure, Metrics, Rows, by_seed, each

DENSITY_D = 0.3
LADDER = (0.05, 0.1, 0.2)  # densities of the generator


def arm(name: str, density_g: float, density_d: float = DENSITY_D) -> dict[str, Any]:
    """What the cells of an arm hold."""
    return {"arm": name, "density_g": density_g, "density_d": density_d}


def gains(rows: Rows, arm: Arm, reference: Arm) -> dict[int, float]:
    """By seed that has both: ln fd(reference) - ln fd(arm), above 0 where `arm` is better."""
    ours, theirs = by_seed(rows, arm), by_seed(rows, reference)
    return {seed: math.log(theirs[seed]["fd"] / ours[seed]["fd"]) for seed in ours if seed in theirs}


def gain(arm: Arm, reference: Arm) -> Measure:
    """`gains` as a measure."""
    return lambda rows: list(gains(rows, arm, reference).values())


def best_gain(arm: Arm, references: list[dict[str, Any]]) -> Measure:
    """Per seed that has them all: `gains` over the best of those references that have rows."""

    def measure(rows: Rows) -> list[float]:
        there = [r for r in references if any(r.items() <= row["cell"].items() for row in rows)]
        if not there:
            raise KeyError("no rows of a reference")
        found = [gains(rows, arm, reference) for reference in there]
        return [min(one[seed] for one in found) for seed in found[0] if all(seed in one for one in found)]

    return measure


def wider_gain(rows: Rows) -> list[float]:
    """Per seed that has all four: STU-GAN's gain over static training at density 0.05 minus that at 0.1."""
    sparser, denser = (gains(rows, stu(density), arm("static", density)) for density in (0.05, 0.1))
    return [sparser[seed] - denser[seed] for seed in sparser if seed in denser]


def stu(density: float) -> dict[str, Any]:
    """STU-GAN at a density of the generator."""
    return arm("stu", density)


def average_gain(metrics: Metrics) -> float:
    """ln fd of the plain masked average minus ln fd of the sparse one, of the same run."""
    return math.log(metrics["masked_average_fd"] / metrics["fd"])


def excess_flops(metrics: Metrics) -> float:
    """Training FLOPs over the dense ones, minus the mean density of the two networks' convolutions."""
    share = metrics["training_flops"] / metrics["training_flops_dense"]
    return share - (metrics["density_g"] + metrics["density_d"]) / 2


DENSE = arm("dense", 1.0, 1.0)
POST_HOC = [
    *(arm(f"oneshot-{scope}-g", 0.2) for scope in ("global", "uniform")),
    *(arm(f"oneshot-{scope}-both", 0.2) for scope in ("global", "uniform")),
    arm("gmp", 0.2),
    arm("snip", 0.2),
    arm("imp", 0.2),
]

CLAIMS = [
    *[
        Claim(
            id=f"SG1{letter}",
            statement=f"STU-GAN beats static sparse training at generator density {density} (ln fd ratio)",
            source="abstract",
            paper="better FID, the more so the sparser: largest at 90-95 % sparsity, BigGAN, CIFAR-10 (recalled)",
            measure=gain(stu(density), arm("static", density)),
            unit="ln fd",
        )
        for letter, density in zip("abc", LADDER, strict=True)
    ],
    Claim(
        id="SG1d",
        statement="The gain over static training is larger at generator density 0.05 than at 0.1 (ln fd ratio)",
        source="Sec. 5",
        paper="the gap widens as the generator gets sparser, BigGAN, CIFAR-10 (recalled)",
        measure=wider_gain,
        unit="ln fd",
    ),
    Claim(
        id="SG2a",
        statement="STU-GAN with 80 % sparse G and 70 % sparse D matches the dense GAN (ln fd ratio, within 5 %)",
        source="abstract",
        paper="beats the dense BigGAN's FID, CIFAR-10",
        measure=gain(stu(0.2), DENSE),
        threshold=-math.log(1.05),
        unit="ln fd",
    ),
    Claim(
        id="SG2b",
        statement="STU-GAN with 80 % sparse G and 70 % sparse D beats the dense GAN (ln fd ratio)",
        source="abstract",
        paper="beats the dense BigGAN's FID, CIFAR-10",
        measure=gain(stu(0.2), DENSE),
        unit="ln fd",
    ),
    Claim(
        id="SG3",
        statement="A dense D outruns a sparse G: static training at d_G 0.05 is worse with d_D 1 than with 0.3",
        source="Sec. 3",
        paper="unbalanced GANs degrade or collapse, BigGAN, CIFAR-10 (no number at hand)",
        measure=gain(arm("static", 0.05), arm("static", 0.05, 1.0)),
        unit="ln fd",
    ),
    Claim(
        id="SG4",
        statement="STU-GAN in one run matches the best measured of one-shot, gradual, iterative pruning and SNIP "
        "(ln fd ratio, within 5 %)",
        source="abstract",
        paper="better FID than one-shot, gradual and iterative pruning, CIFAR-10 (no number at hand)",
        measure=best_gain(stu(0.2), POST_HOC),
        threshold=-math.log(1.05),
        unit="ln fd",
    ),
    Claim(
        id="SG5a",
        statement="Inference FLOPs of the generator at density 0.05, as a share of the dense ones",
        source="Sec. 5",
        paper="almost in proportion to the density (recalled; no number at hand)",
        measure=each(stu(0.05), lambda m: m["inference_flops"] / m["inference_flops_dense"]),
        threshold=0.2,
        direction="below",
        interval="worst",
        unit="of dense",
    ),
    Claim(
        id="SG5b",
        statement="Training FLOPs fall with density: share of the dense ones minus the networks' mean density",
        source="Sec. 5",
        paper="a few tens of % of the dense cost (recalled)",
        measure=each(stu(0.05), excess_flops),
        threshold=0.2,
        direction="below",
        interval="worst",
        unit="of dense",
    ),
    Claim(
        id="SG6",
        statement="The sparse moving average beats the plain masked one in the same runs at d_G 0.05 (ln fd ratio)",
        source="ablation",
        paper="better FID (recalled; no number at hand)",
        measure=each(stu(0.05), average_gain),
        unit="ln fd",
    ),
    Claim(
        id="SG7a",
        statement="Exploring D too, with random growth, is no worse than a static D (ln fd ratio, within 5 %)",
        source="ablation",
        paper="at least as good (no number at hand)",
        measure=gain(arm("both", 0.05), stu(0.05)),
        threshold=-math.log(1.05),
        unit="ln fd",
    ),
    Claim(
        id="SG7b",
        statement="Exploring only D does not help a sparse G: STU-GAN beats it at d_G 0.05 (ln fd ratio)",
        source="ablation",
        paper="no help (no number at hand)",
        measure=gain(stu(0.05), arm("only-d", 0.05)),
        unit="ln fd",
    ),
    Claim(
        id="SG8",
        statement="Few weights explore many: share of G's weights ever active, over its density 0.05",
        source="Sec. 4",
        paper="no number at hand",
        measure=each(stu(0.05), lambda m: m["explored_g"] / m["density_g"]),
        threshold=2.0,
        interval="worst",
        unit="times",
    ),
    Claim(
        id="SG9",
        statement="Growing where the gradient is largest beats growing at random (SET) at d_G 0.05 (ln fd ratio)",
        source="ablation",
        paper="no number at hand",
        measure=gain(stu(0.05), arm("set", 0.05)),
        unit="ln fd",
    ),
]
