"""The configuration of one run, finding tickets or transferring them, and of the study; every YAML fills this."""

import os
from dataclasses import dataclass, field
from typing import Literal

from common.config import require
from common.data import DataConfig
from common.experiment import InputConfig
from common.runs import RunConfig
from common.study import StudyConfig
from double_win_lth.models import NAMES
from double_win_lth.recipes import SgdConfig
from double_win_lth.regimes import Regime

RegimeName = Literal["std", "fast", "adv"]
REGIMES: tuple[RegimeName, ...] = ("std", "fast", "adv")
KINDS = ("imp", "omp", "random", "reinit", "shuffled")


def ticket_kind(ticket: str) -> tuple[str, int]:
    """("imp", 5) of "imp:5"; ("imp", 0) of "dense". Raises `ConfigError`."""
    kind, _, level = "imp:0".partition(":") if ticket == "dense" else ticket.partition(":")
    allowed = f"dense or KIND:LEVEL with KIND one of {', '.join(KINDS)} and LEVEL at least 1"
    fits = kind in KINDS and level.isdecimal() and (int(level) >= 1 or ticket == "dense")
    require(fits, "ticket", ticket, allowed)
    return kind, int(level)


@dataclass(frozen=True)
class AttackConfig:
    """PGD in the L-inf ball; in pixel units of [0, 1]."""

    steps: int = 0
    """0: clean images"""
    eps: float = 0.1
    step_size: float = 0.0
    random_start: bool = True

    def check(self, name: str) -> None:
        """Raise `ConfigError` naming the key that cannot be."""
        require(self.steps >= 0, f"{name}.steps", self.steps, "at least 0")
        require(0 <= self.eps <= 1, f"{name}.eps", self.eps, "in [0, 1]")
        allowed = "positive where there are steps"
        require(not self.steps or 0 < self.step_size < 1, f"{name}.step_size", self.step_size, allowed)

    def regime(self, name: str) -> Regime:
        """As what perturbs a batch."""
        return Regime(name, self.eps, self.step_size, self.steps, self.random_start)


@dataclass(frozen=True)
class ModelConfig(InputConfig):
    """The network."""

    name: str = "resnet8"
    """resnet8 (28x28), resnet20 (32x32), torchvision's resnet18 or resnet50"""
    width: int = 16
    """of resnet8 and resnet20: channels of the first stage"""
    size: int = 0
    """train on random crops resized to this side, test on the centre; 0: images as they are"""
    amp: bool = False
    """train under bfloat16 autocast; perturbations and all measuring stay float32"""
    channels_last: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.name in NAMES, "model.name", self.name, f"one of {', '.join(NAMES)}")
        require(self.width >= 1, "model.width", self.width, "at least 1")
        require(self.size >= 0, "model.size", self.size, "at least 0")


@dataclass(frozen=True)
class PruneConfig:
    """Iterative magnitude pruning on the pre-training task."""

    rate: float = 0.2
    """share of the surviving weights that a round removes"""
    rounds: int = 11

    def __post_init__(self) -> None:
        require(0 < self.rate < 1, "prune.rate", self.rate, "in (0, 1)")
        require(1 <= self.rounds <= 255, "prune.rounds", self.rounds, "in [1, 255]")


@dataclass(frozen=True)
class TransferConfig:
    """Which tickets go to the target images, and how."""

    run: str = ""
    """folder of the finished run that found the tickets"""
    weights: str = ""
    """take the pre-trained weights of this run under the masks of the other (swap ablation); empty: of the same"""
    tickets: list[str] = field(default_factory=lambda: ["dense"])
    """dense, or KIND:LEVEL such as imp:10, omp:10, random:10, reinit:10, shuffled:10; several train as one network"""
    kind: Literal["std", "adv"] = "adv"
    """standard or adversarial transfer"""
    attack_bn: Literal["train", "eval"] = "train"
    """mode of batch norm during the training attack; train in the released code"""
    fraction: float = 1.0
    """part of the target's training images: int(fraction * their number)"""
    subset: Literal["stratified", "first"] = "stratified"
    """which of them: nested stratified draws, or the first ones as in the released code"""
    draw: int = 0
    """number of the stratified draw"""
    val: int = 0
    """target images held out of training"""
    select: Literal["last", "val", "val_full"] = "last"
    """last weights; or the best on validation images, their number scaled by fraction, or all of them"""
    select_from: int = 0
    """first epoch (from 0) that can be selected"""

    def __post_init__(self) -> None:
        require(len(self.tickets) > 0, "transfer.tickets", self.tickets, "at least one")
        require(len(set(self.tickets)) == len(self.tickets), "transfer.tickets", self.tickets, "without repetition")
        for ticket in self.tickets:
            ticket_kind(ticket)
        require(0 < self.fraction <= 1, "transfer.fraction", self.fraction, "in (0, 1]")
        require(self.draw >= 0, "transfer.draw", self.draw, "at least 0")
        require(self.val >= 0, "transfer.val", self.val, "at least 0")
        chooses = self.select != "last"
        require(not chooses or self.val > 0, "transfer.val", self.val, f"above 0 with transfer.select {self.select}")
        one = not chooses or len(self.tickets) == 1
        require(one, "transfer.tickets", self.tickets, f"one with transfer.select {self.select}")
        require(self.select_from >= 0, "transfer.select_from", self.select_from, "at least 0")


@dataclass(frozen=True)
class EvalConfig:
    """How accuracy (SA) and accuracy under attack (RA) are measured."""

    attack: AttackConfig = field(default_factory=lambda: AttackConfig(10, 0.1, 0.025))
    images: int = 0
    """attacked images, the first ones; 0: all"""
    batch_size: int = 250
    split: Literal["test", "val"] = "test"
    """val: the held-out target images of transfer.val, to choose settings by"""

    def __post_init__(self) -> None:
        self.attack.check("eval.attack")
        require(self.images >= 0, "eval.images", self.images, "at least 0")
        require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True)
class SchemeConfig:
    """One data-limited scheme of the study: which tickets of each regime are transferred on how much data."""

    fraction: float
    draws: int = 1
    """stratified draws of the images at every seed"""
    grouped: bool = False
    """train all tickets of a draw as one network"""
    steps: int = 0
    """of transfer; 0: those of finetune"""
    epochs: int = 0
    """of transfer; 0: those of finetune"""
    batch_size: int = 0
    """of transfer; 0: that of finetune"""
    std: list[str] = field(default_factory=list)
    """tickets of standard pre-training; none: the regime is left out of this scheme"""
    fast: list[str] = field(default_factory=list)
    adv: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, "study.schemes.fraction", self.fraction, "in (0, 1]")
        require(self.draws >= 1, "study.schemes.draws", self.draws, "at least 1")
        least = min(self.steps, self.epochs, self.batch_size)
        require(least >= 0, "study.schemes.steps, epochs and batch_size", least, "at least 0")
        for tickets in (self.std, self.fast, self.adv):
            for ticket in tickets:
                ticket_kind(ticket)


@dataclass(frozen=True)
class TicketStudy(StudyConfig):
    """The study: every regime at every seed; regimes of one seed share initial weights, batches and subsets."""

    schemes: list[SchemeConfig] = field(
        default_factory=lambda: [SchemeConfig(1.0, std=["dense"], fast=["dense"], adv=["dense"])]
    )
    middle: int = 3
    """level at which tickets should match"""
    high: int = 5
    """level at which regimes and baselines are compared"""
    std_images: int = 100
    """attacked images after standard transfer, whose robust accuracy no claim uses"""
    margin: float = 3.0
    """points that a matching ticket may lose against its own dense network"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.schemes) > 0, "study.schemes", self.schemes, "at least one scheme")
        require(1 <= self.middle <= self.high, "study.middle", self.middle, f"in [1, study.high = {self.high}]")
        require(self.std_images >= 1, "study.std_images", self.std_images, "at least 1")
        require(0 <= self.margin <= 100, "study.margin", self.margin, "in [0, 100]")


@dataclass(frozen=True)
class Config:
    """One run."""

    task: Literal["tickets", "transfer"] = "tickets"
    """tickets: pre-train and find tickets on the source images; transfer: train tickets on the target images"""
    seed: int = 0
    """of the initial weights, the order of the images, the attacks and the random masks"""
    source: DataConfig = field(default_factory=lambda: DataConfig(val=0.0))
    """images of pre-training"""
    target: DataConfig = field(default_factory=lambda: DataConfig(val=0.0))
    """images of the task that tickets are transferred to"""
    allow_overlap: bool = False
    """source and target may share classes of one data set"""
    model: ModelConfig = field(default_factory=ModelConfig)
    init: str = ""
    """pre-trained weights (.safetensors, .pt, .pth) to find tickets in; empty: pre-train here"""
    regime: RegimeName = "adv"
    """of pre-training and of the rounds of pruning"""
    fast: AttackConfig = field(default_factory=lambda: AttackConfig(1, 0.1, 0.125))
    """perturbation of regime fast"""
    adv: AttackConfig = field(default_factory=lambda: AttackConfig(3, 0.1, 0.0666666667))
    """perturbation of regime adv"""
    pretrain: SgdConfig = field(default_factory=SgdConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    round: SgdConfig = field(default_factory=SgdConfig)
    """training between two prunings"""
    transfer: TransferConfig = field(default_factory=TransferConfig)
    finetune: SgdConfig = field(default_factory=SgdConfig)
    """training on the target images"""
    attack: AttackConfig = field(default_factory=lambda: AttackConfig(3, 0.1, 0.025))
    """perturbation in adversarial transfer"""
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    study: TicketStudy = field(default_factory=TicketStudy)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        for name in ("fast", "adv", "attack"):
            getattr(self, name).check(name)
        for name in ("pretrain", "round", "finetune"):
            getattr(self, name).check(name)
        held_out = self.eval.split == "test" or self.transfer.val > 0
        require(held_out, "transfer.val", self.transfer.val, "above 0 with eval.split val")
        # Held-out target images are transfer.val, so that every draw of a fraction leaves the same ones alone.
        whole = self.target.val == 0 and self.target.fraction == 1
        require(whole, "target", self.target, "with val 0 and fraction 1: see transfer.val and transfer.fraction")

    def steps(self, name: Literal["pretrain", "round", "finetune"], per_epoch: int) -> int:
        """Length of a stage. Raises `ConfigError` where it is 0."""
        total: int = getattr(self, name).total(per_epoch)
        require(total > 0, f"{name}.steps", total, f"above 0, or {name}.epochs")
        return total

    def require_apart(self, source: DataConfig | None = None, run: str = "") -> None:
        """Raise `ConfigError` where source and target share classes of one data set without allow_overlap.

        Args:
            source: that of the run whose tickets or weights are taken; None: this one's.
            run: its folder, for the message.
        """
        source = source or self.source
        shared = set(source.classes) & set(self.target.classes)
        apart = bool(source.classes and self.target.classes and not shared)
        allowed = f"disjoint from source.classes {source.classes}{run and f' of {run}'} (or set allow_overlap)"
        one_set = _data_set(source) == _data_set(self.target)
        require(apart or self.allow_overlap or not one_set, "target.classes", self.target.classes, allowed)

    @property
    def perturbation(self) -> Regime:
        """What pre-training and pruning rounds do to a batch."""
        return {"std": AttackConfig(), "fast": self.fast, "adv": self.adv}[self.regime].regime(self.regime)


def _data_set(data: DataConfig) -> tuple[str, str]:
    """What two configurations of one data set have in common; mnist5k is a part of mnist."""
    return {"mnist5k": "mnist"}.get(data.name, data.name), os.path.abspath(data.path)
