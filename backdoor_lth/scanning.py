"""Scan one network for a trigger, and say what its detection is worth (Sec. 4; controls K1 to K5)."""

from typing import Any

import torch
from torch import Tensor, nn

from backdoor_lth.compaction import compact
from backdoor_lth.detection import detect
from backdoor_lth.inversion import Inversion, invert
from backdoor_lth.metrics import Normalize, evaluate, recovered_success, trigger_driven
from backdoor_lth.settings import SearchConfig
from common.data import ImageSet

FINITE_INDEX = 1e9
"""stands for an infinite anomaly index, which JSON lacks"""


def inverted(
    model: nn.Module, shape: tuple[int, ...], config: SearchConfig, base: Tensor | None, seed: int
) -> Inversion:
    """Search every label's trigger on `model`, on noise or, if given, on these inputs."""
    return invert(
        model,
        shape,
        base="noise" if base is None else base,
        count=config.images,
        steps=config.steps,
        method=config.method,
        attack_loss=config.attack_loss,
        keep=config.keep,
        chunk=config.chunk,
        seed=seed,
    )


def verdict(found: Inversion, norm: str = "mask") -> dict[str, Any]:
    """What the recovered triggers say, as plain data; no knowledge of the attack."""
    detection = detect(found, norm)  # type: ignore[arg-type]
    return {
        "detected": detection.label,
        "l1": [round(value, 6) for value in (found.l1 if norm == "mask" else found.trigger_l1).tolist()],
        "index": min(detection.index, FINITE_INDEX),
        "flagged": detection.flagged,
        "collapse_label": detection.collapse_label,
        "null_success": found.null_success.tolist(),
        "successes": (found.success >= 0.99).sum(1).tolist(),
    }


def judged(
    model: nn.Module,
    dense: nn.Module,
    found: Inversion,
    clean: ImageSet,
    triggered: ImageSet,
    target: int,
    size: int,
    normalize: Normalize,
    norm: str = "mask",
) -> dict[str, Any]:
    """`verdict` and, knowing the attack, how well network and recovered triggers do.

    own_asr, dense_asr: percent of all test images that the trigger recovered for the true target turns, on the scanned
    and on the dense network (K2); detected_asr: the same of the detected label's own trigger on the scanned network.
    """
    rates = evaluate(model, clean, triggered, target, normalize)
    null = evaluate(dense, clean, triggered, target, normalize)["null"]
    said = verdict(found, norm)

    def success(net: nn.Module, label: int) -> float:
        place = found.labels.index(label)
        return recovered_success(net, clean, found.mark[place], found.mask[place], label, size, normalize)

    dense_asr = success(dense, target)
    numbers = {
        "own_asr": success(model, target),
        "dense_asr": dense_asr,
        "dense_null": null,
        "detected_asr": success(model, said["detected"]),
        "right": said["detected"] == target,
        "collapse_right": said["collapse_label"] == target,
        "trigger_driven": trigger_driven(rates["lift"], dense_asr, null),
    }
    return {**rates, **said, **numbers}


def folded(model: nn.Module, state: dict[str, Tensor], shape: tuple[int, ...]) -> nn.Module:
    """`model`, now with the weights of `state`, compacted where it can be; for measuring only."""
    model.load_state_dict(state)
    with torch.no_grad():
        return compact(model, shape)
