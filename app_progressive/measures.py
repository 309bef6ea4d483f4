"""What the claims measure over the rows of the study (spec b and i).

A row is one run: cell {part, arms, arm}, seed, the metrics of eval.py. Parts: F few-shot, N the same with noisy labels,
L long stream, T sparsity and replay. Arms of one seed share initial weights, stream, order and augmentation, so
differences are paired.
"""

from statistics import mean
from typing import Any

import numpy as np

from app_progressive.schedules import density_schedule
from app_progressive.settings import Config
from app_progressive.threshold import pruned_count
from common.claims import Measure, Metrics, Number, Rows, by_seed, difference, each

WINDOW = 5  # states over which a gap is averaged


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
