"""The configuration of one run, a poisoned training set and its chain of tickets, and of the study."""

import math
from dataclasses import dataclass, field
from typing import Literal

from backdoor_lth.models import NAMES
from backdoor_lth.triggers import PLACES
from common.config import require
from common.data import DataConfig
from common.experiment import InputConfig
from common.runs import RunConfig
from common.study import StudyConfig

Method = Literal["imp", "omp", "snip", "grasp", "random"]
Kind = Literal["dirty", "clean_label", "relabel", "none"]


@dataclass(frozen=True)
class ModelConfig(InputConfig):
    """The network."""

    name: str = "cnn"
    """cnn (small, for 28x28), resnet20s, resnet18, vgg16, densenet100 (for 32x32), resnet18_224 (torchvision's)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.name in NAMES, "model.name", self.name, f"one of {', '.join(NAMES)}")


@dataclass(frozen=True)
class AttackConfig:
    """How the training set is poisoned."""

    kind: Kind = "dirty"
    """dirty: patch and label; clean_label: patch on attacked images of the target; relabel: label alone; none"""
    ratio: float = 0.01
    """share of the training images, with clean_label of the target class"""
    target: int = 0
    """the label that the trigger calls for"""
    trigger: Literal["rgb", "gray", "warp"] = "rgb"
    """colours of the patch; warp: no patch, the whole image bent (WaNet)"""
    size: int = 5
    """side of the patch, and of the recovered triggers that are judged"""
    field: int = 4
    """warp: it is drawn at this many places along each side"""
    strength: float = 0.5
    """warp: mean displacement in half pixels"""
    place: str = "bottom_right"
    """bottom_right is upper right in the released code, top_left its bottom left"""
    margin: int = 3
    """pixels between the patch and the border"""
    select: Literal["random", "first"] = "random"
    """which training images are poisoned"""
    equalise: bool = False
    """cut every class to the size of the smallest after poisoning, so that the target is no larger than the others"""
    surrogate: str = ""
    """clean_label: folder of a finished run of task surrogate"""

    def __post_init__(self) -> None:
        require(0 <= self.ratio <= 1, "attack.ratio", self.ratio, "in [0, 1]")
        clean_left = self.ratio < 1 or self.kind in ("clean_label", "none")
        require(clean_left, "attack.ratio", self.ratio, f"below 1 with kind {self.kind}, to leave clean images")
        require(self.target >= 0, "attack.target", self.target, "at least 0")
        require(self.size >= 1, "attack.size", self.size, "at least 1")
        require(self.field >= 2, "attack.field", self.field, "at least 2")
        require(0 <= self.strength < math.inf, "attack.strength", self.strength, "at least 0")
        require(self.place in PLACES, "attack.place", self.place, f"one of {', '.join(PLACES)}")
        require(self.margin >= 0, "attack.margin", self.margin, "at least 0")


@dataclass(frozen=True)
class TrainConfig:
    """SGD of one round."""

    epochs: int = 200
    first_epochs: int = 0
    """of round 0; 0: as many"""
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])
    """parts of the epochs after which the learning rate falls to a tenth"""
    warmup_epochs: float = 0.0
    """over which the learning rate rises from 0, step by step"""
    rewind_epoch: int = 3
    """every later round starts from the weights after this epoch of round 0, its schedule as far advanced"""
    amp: bool = False
    """bfloat16 autocast of the network in training; losses, masks and all that is measured are in float32"""
    channels_last: bool = False
    """memory layout in training; rounds otherwise"""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        require(self.first_epochs >= 0, "train.first_epochs", self.first_epochs, "at least 0")
        require(self.lr > 0, "train.lr", self.lr, "positive")
        require(0 <= self.momentum < 1, "train.momentum", self.momentum, "in [0, 1)")
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "at least 0")
        require(0 <= self.warmup_epochs < math.inf, "train.warmup_epochs", self.warmup_epochs, "at least 0")
        fits = all(0 < part <= 1 for part in self.milestones)
        require(fits, "train.milestones", self.milestones, "in (0, 1]")
        most = self.length(0)
        require(0 <= self.rewind_epoch <= most, "train.rewind_epoch", self.rewind_epoch, f"in [0, {most}]")

    def length(self, number: int) -> int:
        """Epochs of a round."""
        return (self.first_epochs or self.epochs) if not number else self.epochs

    def learning_rate(self, number: int, epoch: float) -> float:
        """After so many epochs of a round."""
        reached = epoch + (self.rewind_epoch if number else 0)
        warm = min(reached / self.warmup_epochs, 1) if self.warmup_epochs else 1
        return warm * self.lr * 0.1 ** sum(reached >= round(part * self.length(number)) for part in self.milestones)


@dataclass(frozen=True)
class PruneConfig:
    """The chain."""

    method: Method = "imp"
    """imp: magnitudes after every round; omp: after round 0 alone; snip, grasp: on one batch at the start; random"""
    rate: float = 0.2
    """share of the survivors that a round removes"""
    rounds: int = 50
    """of pruning, after round 0 of the dense network"""
    fast_rounds: int = 0
    """this many first rounds remove `fast_rate` instead: a shortcut of ours"""
    fast_rate: float = 0.6
    """share of the survivors that a fast round removes"""

    def __post_init__(self) -> None:
        require(0 < self.rate < 1, "prune.rate", self.rate, "in (0, 1)")
        require(0 < self.fast_rate < 1, "prune.fast_rate", self.fast_rate, "in (0, 1)")
        require(self.rounds >= 1, "prune.rounds", self.rounds, "at least 1")
        require(0 <= self.fast_rounds <= self.rounds, "prune.fast_rounds", self.fast_rounds, f"in [0, {self.rounds}]")

    def fraction(self, number: int) -> float:
        """Share of the survivors that round `number` removes."""
        return self.fast_rate if number < self.fast_rounds else self.rate


@dataclass(frozen=True)
class BarrierConfig:
    """The Trojan score of one network."""

    steps: int = 10
    """of fine-tuning"""
    lr: float = 1e-3
    """of that fine-tuning"""
    batches: int = 8
    """of training images, on which errors are measured"""
    batch_size: int = 128
    """of fine-tuning and of measuring errors"""
    points: int = 11
    """between the two networks, ends included, at which errors are measured"""

    def __post_init__(self) -> None:
        require(self.steps >= 0, "score.steps", self.steps, "at least 0")
        require(self.lr > 0, "score.lr", self.lr, "positive")
        require(self.batches >= 1, "score.batches", self.batches, "at least 1")
        require(self.batch_size >= 1, "score.batch_size", self.batch_size, "at least 1")
        require(self.points >= 2, "score.points", self.points, "at least 2")


@dataclass(frozen=True)
class ScoreConfig(BarrierConfig):
    """The Trojan score of a chain."""

    extreme: float = 0.01
    """the winner is sought among tickets of at most this density"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.extreme <= 1, "score.extreme", self.extreme, "in (0, 1]")


@dataclass(frozen=True)
class SearchConfig:
    """The search for triggers."""

    method: Literal["tabor", "nc"] = "tabor"
    """tabor: this paper's variant of it; nc: Neural Cleanse"""
    images: int = 100
    """of noise, at every step"""
    steps: int = 100
    """of optimisation, for each label"""
    attack_loss: Literal["ce", "cw"] = "ce"
    """cross-entropy, or Carlini and Wagner's margin"""
    keep: Literal["last", "min"] = "last"
    """last: the last trigger that attacks well enough; min: the smallest such"""
    norm: Literal["mask", "trigger"] = "mask"
    """whose least size detects"""
    chunk: int = 0
    """labels at a time; 0: one on the CPU, all on a GPU"""

    def __post_init__(self) -> None:
        for name in ("images", "steps"):
            require(getattr(self, name) >= 1, f"inversion.{name}", getattr(self, name), "at least 1")
        require(self.chunk >= 0, "inversion.chunk", self.chunk, "at least 0")


@dataclass(frozen=True)
class InversionConfig(SearchConfig):
    """The search for triggers, on the networks of a chain."""

    clean: int = 100
    """training images for the comparison of noise with clean images; 0: leave it out"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.clean >= 0, "inversion.clean", self.clean, "at least 0")


@dataclass(frozen=True)
class ArmConfig:
    """What an arm of the study changes; its cells are the first `seeds` seeds of the study, all if 0."""

    name: str
    seeds: int = 0
    full: int = 0
    """the same of the full study, SEEDS=full; 0: as many"""
    kind: Kind = "dirty"
    equalise: bool = False
    place: str = ""
    """empty: that of attack"""
    method: Method = "imp"
    rate: float = 0.0
    """0: that of prune"""
    rounds: int = 0
    """0: those of prune"""

    def __post_init__(self) -> None:
        require(bool(self.name), "study.arms.name", self.name, "a name")
        for name in ("seeds", "full", "rounds"):
            require(getattr(self, name) >= 0, f"study.arms.{name}", getattr(self, name), "at least 0")
        require(not self.place or self.place in PLACES, "study.arms.place", self.place, f"one of {', '.join(PLACES)}")
        require(0 <= self.rate < 1, "study.arms.rate", self.rate, "in [0, 1)")


@dataclass(frozen=True)
class TrojanStudy(StudyConfig):
    """The study: the attack and its controls."""

    full: list[int] = field(default_factory=list)
    """seeds of SEEDS=full; empty: the same"""
    arms: list[ArmConfig] = field(default_factory=lambda: [ArmConfig("poisoned"), ArmConfig("clean", kind="none")])

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [arm.name for arm in self.arms]
        require(len(set(names)) == len(names) > 0, "study.arms", names, "at least one, of different names")


@dataclass(frozen=True)
class Config:
    """One run."""

    task: Literal["chain", "surrogate"] = "chain"
    """chain: poison, train, prune; surrogate: train the robust network that clean-label poison is made with"""
    seed: int = 7  # the released code's
    """of the poison, the initial weights and the order of the images"""
    data: DataConfig = field(default_factory=lambda: DataConfig(val=0.0))
    restricted: bool = False
    """of images with ImageNet's 1,000 labels keep the nine superclasses of Restricted ImageNet"""
    model: ModelConfig = field(default_factory=ModelConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    inversion: InversionConfig = field(default_factory=InversionConfig)
    run: RunConfig = field(default_factory=RunConfig)
    study: TrojanStudy = field(default_factory=TrojanStudy)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        files = self.data.name == "imagefolder"
        require(not files, "data.name", self.data.name, "a data set held in memory: pixels are poisoned there")
        clean_label = self.task == "chain" and self.attack.kind == "clean_label"
        needs = not clean_label or bool(self.attack.surrogate)
        require(needs, "attack.surrogate", self.attack.surrogate, "a run of task surrogate, with clean_label")
