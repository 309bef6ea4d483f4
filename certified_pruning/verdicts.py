"""What a verification is asked and what it answers: configuration, per-image verdicts, report."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Literal

from torch import Tensor

from certified_pruning.branching import BRANCHINGS, Reduce

Status = Literal["verified", "falsified", "unknown", "misclassified"]
STATUSES = ("verified", "falsified", "unknown", "misclassified")


@dataclass(frozen=True)
class VerifyConfig:
    """Budgets and step counts of `CompleteVerifier`; numbers of the paper's configuration in `VerifyConfig.paper()`.

    Raises:
        ValueError: a negative budget or count, an unknown branching, reduce or bias name.
    """

    pgd_steps: int = 20
    """attack steps, each start and target"""
    pgd_restarts: int = 3
    """starts of each target; 0: no attack"""
    pgd_step: float = 0.25
    """nominal step in units of eps"""
    refine_iters: int = 0
    """alpha steps on the intermediate bounds"""
    root_steps: int = 20
    """alpha steps on the final bound, before branch and bound"""
    root_lr: float = 0.1
    """step size of Adam there"""
    bab_steps: int = 20
    """alpha and beta steps of each child"""
    lr_alpha: float = 0.01
    """of the alphas of a child"""
    lr_beta: float = 0.05
    """of the betas of a child"""
    decay: float = 0.98
    """factor of the step size after each step"""
    branching: str = "kfsb"
    """kfsb or babsr: how the neuron to split is scored"""
    kfsb_k: int = 3
    """of kfsb: candidates that are tried"""
    reduce: Reduce = "min"
    """of the scores of a neuron's two children"""
    branching_bias: str = "folded"
    """of the scores; folded, or bn_beta as released"""
    max_rows: int = 128
    """domains split at once, over all images"""
    max_images: int = 256
    """images whose bounds are held at once"""
    max_nodes: int | None = 1000
    """child bounds an image, all targets; 0: no branch and bound; None: no limit"""
    timeout_s: float | None = None
    """seconds an image, all targets and stages; not reproducible, unlike max_nodes"""
    hopeless_below: float | None = None
    """images with a root bound this low are not branched on"""
    leaf_lp: bool = True
    """exact LP, if scipy is there, where every ReLU is decided"""
    seed: int = 0
    """of the attack's starts"""

    def __post_init__(self) -> None:
        for name in ("pgd_steps", "pgd_restarts", "refine_iters", "root_steps", "bab_steps", "max_nodes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        for name in ("max_rows", "max_images", "kfsb_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("pgd_step", "root_lr", "lr_alpha", "lr_beta", "decay", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        names = {"branching": BRANCHINGS, "reduce": ("min", "max"), "branching_bias": ("folded", "bn_beta")}
        for name, allowed in names.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @staticmethod
    def paper() -> VerifyConfig:
        """The paper's verifier: budgets of the released configuration files (spec e)."""
        return VerifyConfig(
            pgd_steps=100,
            pgd_restarts=100,
            refine_iters=20,
            root_steps=100,
            max_nodes=200_000,
            timeout_s=300.0,
            hopeless_below=-100.0,
        )


@dataclass
class ImageVerdict:
    """Verdict on one image.

    Attributes:
        status: verified (no point of the box changes the class), falsified (`witness` does), unknown (budget spent),
            misclassified (wrong without any perturbation).
        lb: lower bound on the worst margin z_y - z_t over the box; nan if none was computed.
        nodes: child bounds evaluated by branch and bound.
        seconds: wall time, shared among the images of a batch by their rows.
        stage: where it was decided: ibp, crown, alpha, bab, lp, pgd; clean for misclassified.
        witness: raw image in the box that changes the class in float64, or None.
    """

    status: Status = "unknown"
    lb: float = nan
    nodes: int = 0
    seconds: float = 0.0
    stage: str = "clean"
    witness: Tensor | None = None


@dataclass
class VerifyReport:
    """Verdicts in the order of the images. Accuracies are in percent of *all* images, misclassified included."""

    images: list[ImageVerdict] = field(default_factory=list)

    @property
    def verified_accuracy(self) -> float:
        """Percent of all images verified; nan for no images."""
        return self._percent("verified")

    @property
    def clean_accuracy(self) -> float:
        """Percent of all images classified correctly; nan for no images."""
        return 100.0 - self._percent("misclassified")

    @property
    def counts(self) -> dict[str, int]:
        """Images by status; every status is a key."""
        return {s: sum(v.status == s for v in self.images) for s in STATUSES}

    @property
    def stages(self) -> dict[str, int]:
        """Images by "status/stage"."""
        return dict(Counter(f"{v.status}/{v.stage}" for v in self.images))

    @property
    def nodes(self) -> int:
        return sum(v.nodes for v in self.images)

    def _percent(self, status: str) -> float:
        return 100.0 * self.counts[status] / len(self.images) if self.images else nan

    def to_json(self, witnesses: bool = False) -> str:
        """The table as JSON; numbers that are not finite become null. Witness pixels only if asked for."""
        rows = []
        for v in self.images:
            row: dict[str, object] = {"status": v.status, "stage": v.stage, "nodes": v.nodes}
            row |= {"lb": _number(v.lb), "seconds": round(v.seconds, 6)}
            if witnesses:
                row["witness"] = None if v.witness is None else v.witness.tolist()
            rows.append(row)
        summary = {
            "n_images": len(self.images),
            "verified_accuracy": _number(self.verified_accuracy),
            "clean_accuracy": _number(self.clean_accuracy),
            "counts": self.counts,
            "stages": self.stages,
            "nodes": self.nodes,
            "seconds": round(sum(v.seconds for v in self.images), 6),
        }
        return json.dumps({"summary": summary, "images": rows})


def _number(value: float) -> float | None:
    return value if isfinite(value) else None
