"""The configuration of one lottery-ticket chain and of its verification; every YAML in configs/ fills this."""

from dataclasses import dataclass, field
from typing import Literal

from certified_pruning.models import BUILDERS
from certified_pruning.verdicts import VerifyConfig
from common.config import require
from common.data import DataConfig
from common.runs import RunConfig
from common.study import StudyConfig


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "cnn_s"
    """see models.py"""
    channels: list[int] = field(default_factory=list)
    """widths of the convolutions; empty: the network's own"""
    mean: list[float] = field(default_factory=lambda: [0.0])
    """the network sees (pixels - mean) / std, by channel"""
    std: list[float] = field(default_factory=lambda: [1.0])

    def __post_init__(self) -> None:
        require(self.name in BUILDERS, "model.name", self.name, f"one of {', '.join(BUILDERS)}")
        require(all(width > 0 for width in self.channels), "model.channels", self.channels, "positive widths")
        require(len(self.mean) == len(self.std) > 0, "model.std", self.std, "as many numbers as model.mean")
        require(all(value > 0 for value in self.std), "model.std", self.std, "positive")


@dataclass(frozen=True)
class TrainConfig:
    """How each lottery round is trained."""

    regime: Literal["standard", "fgsm", "fgsm_gradalign"] = "fgsm"
    """fgsm starts at random in the box; fgsm_gradalign is the paper's"""
    eps: float = 0.1
    """radius of the L-inf box in pixel units"""
    epochs: int = 5
    batch_size: int = 64
    """over all ranks together"""
    lr: float = 0.05
    warmup: float = 0.1
    """share of the steps over which lr rises; then it falls to 0 in a straight line"""
    milestones: list[int] = field(default_factory=list)
    """epochs after which lr is divided by 10; given, they replace warm-up and decay"""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 8.0
    """largest gradient norm"""
    eps_ramp: float = 0.3
    """share of the steps over which eps rises from 0 in a straight line"""
    eps_start: int = 0
    """first epoch of the paper's smoothed eps schedule; 0 uses eps_ramp"""
    eps_length: int = 1
    eps_mid: float = 0.4
    gradalign: float = 0.2
    """weight of gradient alignment in fgsm_gradalign"""
    nrs: float = 0.05
    """weight of the stability regulariser, for pruning methods with +nrs"""

    def __post_init__(self) -> None:
        require(0 <= self.eps <= 1, "train.eps", self.eps, "in [0, 1]")
        require(self.epochs >= 1, "train.epochs", self.epochs, "at least 1")
        require(self.batch_size >= 2, "train.batch_size", self.batch_size, "at least 2")
        require(self.lr > 0, "train.lr", self.lr, "positive")
        require(0 <= self.warmup <= 1, "train.warmup", self.warmup, "in [0, 1]")
        require(0 <= self.momentum < 1, "train.momentum", self.momentum, "in [0, 1)")
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "at least 0")
        require(self.clip > 0, "train.clip", self.clip, "positive")
        require(0 <= self.eps_ramp <= 1, "train.eps_ramp", self.eps_ramp, "in [0, 1]")
        require(self.gradalign >= 0, "train.gradalign", self.gradalign, "at least 0")
        require(self.nrs >= 0, "train.nrs", self.nrs, "at least 0")


@dataclass(frozen=True)
class PruneConfig:
    """The lottery: train, prune, rewind to the initial weights, again."""

    method: Literal["imp", "random", "imp+nrs"] = "imp"
    """imp: global magnitude; +nrs adds the stability regulariser to training"""
    rate: float = 0.5
    """share of the remaining convolution weights that a round prunes"""
    rounds: int = 5
    """trained levels, the dense one included"""

    def __post_init__(self) -> None:
        require(0 < self.rate < 1, "prune.rate", self.rate, "in (0, 1)")
        require(self.rounds >= 1, "prune.rounds", self.rounds, "at least 1")


@dataclass(frozen=True)
class EvalConfig:
    """How many images are verified, and with what budget; a level is chosen on validation and reported on test."""

    images: int = 100
    """verified images of the validation and of the test split, the first ones"""
    val_root_steps: int = 10
    """alpha-CROWN steps on validation images, without branch and bound"""

    def __post_init__(self) -> None:
        require(self.images >= 1, "eval.images", self.images, "at least 1")
        require(self.val_root_steps >= 0, "eval.val_root_steps", self.val_root_steps, "at least 0")


@dataclass(frozen=True)
class PruningStudy(StudyConfig):
    """The study: every method at every seed."""

    methods: list[str] = field(default_factory=lambda: ["imp", "random", "imp+nrs"])
    """pruning methods to compare; imp's first level is the dense reference"""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = set(self.methods) - {"imp", "random", "imp+nrs"}
        require(not unknown and "imp" in self.methods, "study.methods", self.methods, "imp and any of random, imp+nrs")


@dataclass(frozen=True)
class Config:
    """One chain of lottery rounds."""

    seed: int = 0
    """of the initial weights, the order of the images, the attacks and the random masks"""
    data: DataConfig = field(default_factory=lambda: DataConfig(val=0.5, val_from="test"))
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    run: RunConfig = field(default_factory=RunConfig)
    study: PruningStudy = field(default_factory=PruningStudy)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "at least 0")
