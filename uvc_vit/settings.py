"""The configuration of a run."""

from dataclasses import dataclass, field
from typing import Literal

from common.config import require
from common.data import DataConfig
from common.runs import RunConfig
from common.study import StudyConfig
from common.vit import ViTConfig, ViTTrainConfig
from uvc_vit import models  # noqa: F401  makes its networks known to timm, whose names model.name takes
from uvc_vit.distill import KDConfig
from uvc_vit.uvc_config import UVCConfig

Arm = Literal["dense", "uvc", "magnitude", "random", "gradient", "drop-last", "omp", "taylor", "gmp"]
UNSTRUCTURED = ("omp", "taylor", "gmp")  # single weights go: no multiply-adds are saved


@dataclass(frozen=True)
class ModelConfig(ViTConfig):
    """The network that is compressed."""

    weights: str = ""
    """to start from: model.pt of a finished dense run, or the T2T authors' .pth.tar; empty: random weights, or timm's
    where model.pretrained"""


@dataclass(frozen=True)
class SearchConfig:
    """Stage 1, in which method uvc finds what goes; the other methods choose at once and add its epochs to stage 2."""

    epochs: int = 8
    """of stage 1"""
    lr: float = 5e-4
    """of the weights in stage 1"""
    warmup_steps: int = 0
    """over which lr rises, before it falls as a cosine"""
    accumulate: int = 4
    """of arms gradient and taylor: batches over which gradients are scored"""

    def __post_init__(self) -> None:
        require(self.epochs >= 0, "search.epochs", self.epochs, "at least 0")
        require(self.lr > 0, "search.lr", self.lr, "positive")
        require(self.warmup_steps >= 0, "search.warmup_steps", self.warmup_steps, "at least 0")
        require(self.accumulate >= 1, "search.accumulate", self.accumulate, "at least 1")


@dataclass(frozen=True)
class EvalConfig:
    """How a finished run is measured."""

    batch_size: int = 500

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "at least 1")


STUDY_ARMS = (
    "uvc",
    "prune-only",
    "skip-only",
    "no-kd",
    "kd-numel",
    "magnitude",
    "gradient",
    "random",
    "drop-last",
    "dense",
    "released",
    *UNSTRUCTURED,
)


@dataclass(frozen=True)
class CompressionStudy(StudyConfig):
    """The study: at every seed a dense network, compressed by every arm."""

    arms: list[str] = field(default_factory=lambda: ["uvc", "prune-only", "skip-only", "no-kd", "magnitude", "random"])
    """at `budget`"""
    budget: float = 0.25
    wide_arms: list[str] = field(default_factory=lambda: ["uvc", "dense"])
    """at `wide_budget`"""
    wide_budget: float = 0.5
    dense_epochs: int = 24
    """of training the network that is compressed; 0: it stays as it starts"""
    dense_lr: float = 2e-3
    dense_warmup: float = 2.0
    """epochs"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("arms", "wide_arms"):
            arms = getattr(self, name)
            known = set(arms) <= set(STUDY_ARMS) and len(set(arms)) == len(arms)
            require(known, f"study.{name}", arms, f"some of {', '.join(STUDY_ARMS)}, without repetition")
        for name in ("budget", "wide_budget"):
            require(0 < getattr(self, name) <= 1, f"study.{name}", getattr(self, name), "in (0, 1]")
        require(self.dense_epochs >= 0, "study.dense_epochs", self.dense_epochs, "at least 0")
        require(self.dense_lr > 0, "study.dense_lr", self.dense_lr, "positive")

    def pairs(self) -> list[tuple[str, float]]:
        """Arms with their budgets, in the order they run."""
        return [(arm, self.budget) for arm in self.arms] + [(arm, self.wide_budget) for arm in self.wide_arms]


@dataclass(frozen=True)
class Config:
    """One run: from the starting weights to the compressed network."""

    seed: int = 0
    """of the weights, the order of the images, augmentation and the gates' noise"""
    arm: Arm = "uvc"
    """dense: nothing goes; magnitude, random, gradient: groups go at once by that score; drop-last: the last blocks go;
    omp, taylor: single weights go at once, by magnitude or by the loss's first-order change; gmp: gradually"""
    layout: Literal["padded", "grouped"] = "grouped"
    """see slim.py; with padded all heads of a block keep equally many value dimensions, but not in mode released"""
    data: DataConfig = field(default_factory=lambda: DataConfig(val=0.0))
    model: ModelConfig = field(default_factory=ModelConfig)
    method: UVCConfig = field(default_factory=UVCConfig)
    """its budget counts for every arm; stage1_steps is set to search.epochs"""
    kd: KDConfig = field(default_factory=KDConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    train: ViTTrainConfig = field(default_factory=ViTTrainConfig)
    """stage 2; its epochs, lr and warm-up are of that stage, all else of both"""
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    study: CompressionStudy = field(default_factory=CompressionStudy)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        require(
            self.arm != "uvc" or self.search.epochs > 0, "search.epochs", self.search.epochs, "positive for arm uvc"
        )
        timed = self.method.accounting == "latency"
        require(bool(self.method.table) or not timed, "method.table", self.method.table, "set for accounting latency")
        for name in ("ema", "erasing"):
            require(getattr(self.train, name) == 0, f"train.{name}", getattr(self.train, name), "0 here")
        require(self.train.schedule == "steps", "train.schedule", self.train.schedule, "steps here")
