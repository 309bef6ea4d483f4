"""The paper's claims and the controls beside them (arXiv 2205.11819; spec b and i)."""

import math
from typing import Any

from backdoor_lth.measures import (
    best_lift,
    by_seed,
    controlled,
    correlation,
    difference,
    exists,
    noise_answered,
    number,
    only_one_right,
    outlives,
    peak_over_clean,
    peak_rank,
    smallest,
    weakened,
)
from backdoor_lth.settings import Config
from common.claims import Claim

SETTING = "ResNet-20s, CIFAR-10, RGB trigger, 1 % poison"


def claims(config: Config) -> list[Claim]:
    """B1 to B13 and K1 to K5 at the thresholds of the study; without its arms a claim is inconclusive."""
    extreme, target = config.score.extreme, config.attack.target
    share = {"interval": "binomial", "unit": "of seeds"}
    sign = {"interval": "sign"}
    control = {"source": "control, not in the paper", "paper": "not measured"}
    rows: list[dict[str, Any]] = [
        {
            "id": "B1a",
            "statement": "The Trojan outlives accuracy: kept share of ASR minus kept share of SA, mean of tickets",
            "source": "Fig. 4",
            "paper": f"above 99 % sparsity ASR far above SA ({SETTING})",
            "measure": outlives("asr", extreme, 150),
            "unit": "of the dense value",
            **sign,
        },
        {
            "id": "B1b",
            "statement": "The same by lift, which a network that answers the target to everything lacks",
            **control,
            "measure": outlives("lift", extreme, 150),
            "unit": "of the dense value",
            **sign,
        },
        {
            "id": "B2a",
            "statement": "A winning ticket exists: ASR at least 90 %, SA at most twice chance",
            "source": "Figs. 3, 4",
            "paper": f"0.05 % of the weights, SA 11.38 %, ASR 94.49 % ({SETTING})",
            "measure": exists(extreme, -100),
            "threshold": 0.5,
            **share,
        },
        {
            "id": "B2b",
            "statement": "... and a genuine one: its lift is at least 50 points (K1)",
            **control,
            "measure": exists(extreme, 50),
            "threshold": 0.5,
            **share,
        },
        {
            "id": "B3a",
            "statement": "The peak score marks it: share of extreme tickets with a higher ASR than the peak's",
            "source": "Figs. 3, 4",
            "paper": f"peak score at peak ASR, no number ({SETTING})",
            "measure": peak_rank(extreme),
            "threshold": 1 / 3,
            "direction": "below",
            "unit": "of tickets",
            **sign,
        },
        {
            "id": "B3b",
            "statement": "Rank correlation of score and ASR over the extreme tickets",
            "source": "Figs. 3, 4",
            "paper": f"no number ({SETTING})",
            "measure": correlation(extreme, "asr"),
            "unit": "rank correlation",
            **sign,
        },
        {
            "id": "B3c",
            "statement": "Rank correlation of score and lift over the extreme tickets",
            **control,
            "measure": correlation(extreme, "lift"),
            "unit": "rank correlation",
            **sign,
        },
        {
            "id": "B3d",
            "statement": "The peak score is higher with a Trojan than without, same seed",
            "source": "Fig. A12",
            "paper": "about 0 without a Trojan (2 of 10 clean seeds misfire)",
            "measure": peak_over_clean(extreme),
            "unit": "score",
        },
        {
            "id": "B4",
            "statement": "Fine-tuning weakens the winner's attack: ASR before minus after",
            "source": "Fig. 4",
            "paper": f"no number ({SETTING})",
            "measure": by_seed("poisoned", weakened),
            **sign,
        },
        {
            "id": "B5a",
            "statement": "The least mask on the winner names the target",
            "source": "Tables 1-3",
            "paper": f'("1", 29.8), right ({SETTING})',
            "measure": number("right", "winner"),
            "threshold": 0.5,
            **share,
        },
        {
            "id": "B5b",
            "statement": "... more reliably than on the dense network: share of the seeds where only one is right",
            "source": "Tables 1, 2",
            "paper": 'dense: ("1", 78.7), right; ResNet-18: wrong on dense, right on the ticket',
            "measure": only_one_right(("winner", "right"), ("dense", "right")),
            "threshold": 0.5,
            **share,
        },
        {
            "id": "K5",
            "statement": "The inversion beats the majority answer to noise: share of the seeds where only one is right",
            **control,
            "measure": only_one_right(("winner", "right"), ("winner", "collapse_right")),
            "threshold": 0.5,
            **share,
        },
        {
            "id": "B6a",
            "statement": "The target's trigger recovered on the winner attacks it better than dense's attacks dense",
            "source": "Tables 1, 2",
            "paper": f"48.0 to 99.6 % ({SETTING})",
            "measure": difference("own_asr", "winner", "dense"),
            **sign,
        },
        {
            "id": "B6b",
            "statement": "... and attacks the dense network better than dense's own trigger does (K2)",
            **control,
            "measure": difference("dense_asr", "winner", "dense"),
            **sign,
        },
        {
            "id": "K2",
            "statement": "... and turns at least 20 points more images of the dense network than no trigger",
            **control,
            "measure": by_seed("poisoned", controlled),
            "threshold": 20.0,
            **sign,
        },
        {
            "id": "K1",
            "statement": "The winner gives few clean test images of other classes to the target (CTR)",
            **control,
            "measure": number("ctr", "winner"),
            "threshold": 20.0,
            "direction": "below",
            "unit": "%",
            **sign,
        },
        {
            "id": "K3",
            "statement": "The winner gives few noise images to the target without any trigger",
            **control,
            "measure": noise_answered(target),
            "threshold": 20.0,
            "direction": "below",
            "unit": "%",
            **sign,
        },
        {
            "id": "B7",
            "statement": "Noise serves as well as 100 clean images: ASR of the winner's trigger, noise minus clean",
            "source": "Table 3",
            "paper": f"noise 99.6 %, 100 clean images 99.8 % ({SETTING})",
            "measure": difference("own_asr", "winner", "winner-clean"),
            "threshold": -10.0,
        },
        {
            "id": "B8",
            "statement": "The target's mask is smaller on the winner than on the tickets H and L (seeds with both)",
            "source": "Tables A4-A7",
            "paper": f"29.8 against 124.9 (H) and 276.1 (L) ({SETTING})",
            "measure": smallest(target),
            "threshold": 0.5,
            **share,
        },
        {
            "id": "B13",
            "statement": "Networks without a Trojan are not flagged (anomaly index above 2 on the clean winner)",
            "source": "appendix (norms of clean networks), Fig. A12",
            "paper": "no clean network flagged; indices .80 and 1.01 from its norms",
            "measure": number("flagged", "winner", "clean"),
            "threshold": 0.5,
            "direction": "below",
            **share,
        },
        {
            "id": "K4a",
            "statement": "Labels alone: a 'winning ticket' of ASR at least 90 %, SA at most twice chance exists",
            **control,
            "measure": exists(extreme, -100, "relabelled"),
            "threshold": 0.5,
            "direction": "below",
            **share,
        },
        {
            "id": "K4b",
            "statement": "Labels alone, no trigger: the scan of its winner names the favoured label",
            **control,
            "measure": number("right", "winner", "relabelled"),
            "threshold": 0.5,
            "direction": "below",
            **share,
        },
        {
            "id": "K4c",
            "statement": "With a trigger but equal classes: a genuine winning ticket (lift at least 50) exists",
            **control,
            "measure": exists(extreme, 50, "equalised"),
            "threshold": 0.5,
            **share,
        },
    ]
    rivals = (
        ("B9a", "rate40", "40 % a round does not work", "Fig. A9", "above"),
        ("B9b", "rate10", "10 % a round works as well", "Fig. A9", "equivalent"),
        ("B10a", "random", "random pruning does not work", "Fig. A10", "above"),
        ("B10b", "omp", "one-shot magnitude pruning works too", "Fig. A10", "equivalent"),
        ("B10c", "snip", "SNIP works too", "Fig. A10", "equivalent"),
        ("B10d", "grasp", "GraSP works too", "Fig. A10", "equivalent"),
    )
    rows += [
        {
            "id": name,
            "statement": f"Best lift of a ticket of SA at most twice chance, IMP minus this arm: {words}"
            + (" (seeds where that of IMP is at least 50)" if direction == "equivalent" else ""),
            "source": source,
            "paper": f"curves, no number ({SETTING})",
            "measure": best_lift(extreme, arm, 50 if direction == "equivalent" else -math.inf),
            "threshold": 0.0 if direction == "above" else 20.0,
            "direction": direction,
        }
        for name, arm, words, source, direction in rivals
    ]
    rows.append(
        {
            "id": "B11",
            "statement": "Holds for another place of the trigger: the least mask names the target",
            "source": "Table A4",
            "paper": '("1", 79.3), right, recovered trigger 86.7 % (top left)',
            "measure": number("right", "winner", "top_left"),
            "threshold": 0.5,
            **share,
        }
    )
    return [Claim(**row) for row in rows]
