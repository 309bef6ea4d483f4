"""The configuration of a run and of the study."""

import re
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from app_progressive.models import NAMES
from common.config import ConfigError, require
from common.data import DataConfig
from common.experiment import InputConfig
from common.runs import RunConfig
from common.study import StudyConfig

ARMS = ("dense", "osp", "app", "released", "random", "shrink", "scratch", "imp", "cubic", "open")
CRITERION_ARMS = ("osp", "app")


@dataclass(frozen=True)
class StreamConfig:
    """The megabatches."""

    states: int = 8
    """S, how many"""
    size: int = 50
    """|M|, examples of one, its validation part included"""
    val_fraction: float = 0.1
    """part of each megabatch held out for validation"""
    replay: Literal["full", "none", "one", "buffer"] = "full"
    """what a state trains on beside the newest megabatch: all, nothing, the one before, a growing buffer"""
    buffer: list[int] = field(default_factory=lambda: [182, 182])
    """examples added to the training and the validation buffer after each state"""
    shuffle: bool = True
    """read the pool in an order drawn from the seed; false: in file order, which must then be random"""
    shots: int = 0
    """examples a class in the pool, drawn from the seed; 0: all"""
    noise: float = 0.0
    """part of the pool's labels replaced by another class: not the paper's setting, a check of the mechanism"""
    groups: list[list[int]] = field(default_factory=list)
    """classes that count as one, with those in no group left out; empty: as they are"""

    def __post_init__(self) -> None:
        require(self.states >= 1, "stream.states", self.states, "at least 1")
        require(self.size >= 2, "stream.size", self.size, "at least 2")
        require(0 < self.val_fraction < 1, "stream.val_fraction", self.val_fraction, "in (0, 1)")
        require(len(self.buffer) == 2 and min(self.buffer) >= 0, "stream.buffer", self.buffer, "two numbers from 0 on")
        require(self.shots >= 0, "stream.shots", self.shots, "at least 0")
        require(self.shuffle or not self.shots, "stream.shots", self.shots, "0 unless stream.shuffle")
        require(0 <= self.noise < 1, "stream.noise", self.noise, "in [0, 1)")
        members = [label for group in self.groups for label in group]
        require(len(set(members)) == len(members), "stream.groups", self.groups, "without repetition")
        require(all(self.groups), "stream.groups", self.groups, "groups of at least one class")


@dataclass(frozen=True)
class ModelConfig(InputConfig):
    """The network; it normalises inside."""

    name: str = "tinycnn"
    """tinycnn, resnet20s to resnet110s, resnet18 to resnet101, wide_resnet50_2, wide_resnet101_2, vgg16_bn"""
    width: int = 16
    """channels of tinycnn's first convolution"""
    imagenet: bool = False
    """7x7 stem with pooling for torchvision's networks"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.name in NAMES, "model.name", self.name, f"one of {', '.join(NAMES)}")
        require(self.width >= 1, "model.width", self.width, "at least 1")


@dataclass(frozen=True)
class PruneConfig:
    """Whether and how the network is pruned along the stream."""

    method: Literal["dense", "osp", "app"] = "app"
    """dense: never; osp: once, before the first megabatch; app: before every megabatch"""
    criterion: Literal["snip", "taylor", "mag", "random", "grasp", "synflow"] = "snip"
    tau: float = 4.5
    """last exponent: the last density is base^tau"""
    base: float = 0.8
    """density of the first state"""
    schedule: Literal["exponential", "cubic"] = "exponential"
    densities: list[float] = field(default_factory=list)
    """the densities themselves, one a state, instead of a schedule"""
    growth: float = 0.0
    """of the exponent a state where the stream's length shall not be used; 0: it is used"""
    scope: Literal["global", "local"] = "global"
    """local: each layer has the same density"""
    ties: Literal["rank", "threshold"] = "rank"
    """rank: exact counts; threshold: all equal to the threshold go (released)"""
    update: Literal["nested", "intersect", "replace"] = "nested"
    """intersect: new masks are multiplied with old ones (released); replace: weights may come back"""
    score_weights: Literal["current", "fresh"] = "current"
    """fresh: random weights are scored from the second state on (released)"""
    keep_stored: bool = False
    """keep values behind the masks; for replace, and for intersect of current weights"""
    subset: Literal["union", "newest", "first"] = "union"
    """which of the state's examples the scores are taken on; first: the same for ever (released)"""
    q: float = 0.2
    """how many: int(q |M|)"""
    score_batch: int = 100
    """examples a batch of scoring"""

    def __post_init__(self) -> None:
        require(1 <= self.tau < float("inf"), "prune.tau", self.tau, "a finite number, at least 1")
        require(0 < self.base < 1, "prune.base", self.base, "in (0, 1)")
        require(all(0 < d <= 1 for d in self.densities), "prune.densities", self.densities, "in (0, 1]")
        require(self.growth >= 0, "prune.growth", self.growth, "at least 0")
        ways = {"method osp": self.method == "osp", "schedule": self.schedule != "exponential"}
        ways |= {"densities": bool(self.densities), "growth": self.growth > 0}
        first, *others = [name for name, given in ways.items() if given] or [""]
        for name in others:  # one way to set the densities
            require(False, f"prune.{name}", getattr(self, name), f"left out with prune.{first}")
        require(0 < self.q < 1, "prune.q", self.q, "in (0, 1)")
        require(self.score_batch >= 1, "prune.score_batch", self.score_batch, "at least 1")
        stored = self.update == "replace" or (self.update == "intersect" and self.score_weights == "current")
        require(self.keep_stored or not stored, "prune.keep_stored", False, f"true with prune.update {self.update}")


@dataclass(frozen=True)
class TrainConfig:
    """SGD on each state; the learning rate starts anew in every state."""

    epochs: int = 8
    """in each state"""
    milestones: list[int] = field(default_factory=lambda: [3, 6])
    """epochs of the state after which the learning rate is a tenth of before"""
    batch_size: int = 16
    """over all ranks together; the last batch of an epoch is as short as it must be"""
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1.0e-4
    start: Literal["continue", "scratch", "shrink", "rewind"] = "continue"
    """of a later state: the last best weights; new ones; 0.6 of the last plus 0.1 of new ones; the first ones"""
    reset_momentum: bool = False
    """forget the momentum between states"""
    val_augment: bool = False
    """augment validation images too (released)"""
    amp: bool = False
    """bfloat16 autocast in training and validation; scores and test are in float32"""
    channels_last: bool = False

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "train.epochs", self.epochs, "at least 1")
        rising = list(self.milestones) == sorted(set(self.milestones)) and min(self.milestones, default=1) >= 1
        require(rising, "train.milestones", self.milestones, "rising epochs, at least 1")
        require(self.batch_size >= 1, "train.batch_size", self.batch_size, "at least 1")
        require(self.lr > 0, "train.lr", self.lr, "positive")
        require(0 <= self.momentum < 1, "train.momentum", self.momentum, "in [0, 1)")
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "at least 0")


@dataclass(frozen=True)
class EvalConfig:
    """How the network is measured."""

    batch_size: int = 500

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True)
class PartConfig:
    """One part of the study: arms on one stream, at the first `seeds` of study.seeds (all where there are fewer)."""

    name: Literal["F", "N", "L", "T"]
    """F few-shot; N the same with noisy labels; L long; T sparsity and replay"""
    arms: list[str]
    """dense, osp, app, released, random (masks at the density of `released`, which must come before), shrink, scratch,
    imp, cubic, open; osp and app also with a criterion, app-mag; any with an exponent and a replay, app@9.5/none"""
    seeds: int
    states: int
    size: int
    epochs: int
    milestones: list[int]
    q: float = 0.2
    noise: float = 0.0
    shots: int = 0

    def __post_init__(self) -> None:
        require(len(self.arms) > 0, "study.parts.arms", self.arms, "at least one arm")
        require(len(set(self.arms)) == len(self.arms), "study.parts.arms", self.arms, "without repetition")
        require(self.seeds >= 1, "study.parts.seeds", self.seeds, "at least 1")
        for arm in self.arms:
            split_arm(arm)
        needs = "random" in self.arms
        order = [arm for arm in self.arms if arm in ("released", "random")]
        require(not needs or order == ["released", "random"], "study.parts.arms", self.arms, "released before random")


def split_arm(arm: str) -> tuple[str, str, float, str]:
    """Name, criterion, exponent (0: the default) and replay (empty: the default) of an arm. Raises `ConfigError`."""
    found = re.fullmatch(r"([a-z]+)(?:-([a-z]+))?(?:@(\d+(?:\.\d+)?))?(?:/(full|none|one|buffer))?", arm)
    if found is None or found[1] not in ARMS or (found[2] and found[1] not in CRITERION_ARMS):
        raise ConfigError(f"study.parts.arms must be of {', '.join(ARMS)}, such as app-mag@9.5/none, got {arm!r}")
    criteria = get_args(PruneConfig.__annotations__["criterion"])
    require(not found[2] or found[2] in criteria, "study.parts.arms", arm, f"with a criterion of {', '.join(criteria)}")
    tau = float(found[3] or 0)
    require(not found[3] or tau >= 1, "study.parts.arms", arm, "with an exponent of at least 1")
    return found[1], found[2] or "", tau, found[4] or ""


@dataclass(frozen=True)
class AnytimeStudy(StudyConfig):
    """The study: arms of one seed share initial weights, stream, order and augmentation."""

    parts: list[PartConfig] = field(default_factory=list)
    """which streams and arms"""
    margin: float = 1.5
    """points within which accuracies count as equal"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.margin > 0, "study.margin", self.margin, "positive")
        first: dict[str, PartConfig] = {}
        for part in self.parts:  # the claims know a row by its part's name and its arm
            other = first.setdefault(part.name, part)
            same = replace(part, arms=other.arms, seeds=other.seeds) == other
            require(same, "study.parts", part.name, "of one stream and length of training wherever it is named")
        arms = [(part.name, arm) for part in self.parts for arm in part.arms]
        require(len(set(arms)) == len(arms), "study.parts", arms, "without an arm twice in parts of one name")


@dataclass(frozen=True)
class Config:
    """One training run along a stream."""

    seed: int = 0
    """of initial weights, stream, order, augmentation and random scores"""
    data: DataConfig = field(default_factory=lambda: DataConfig(val=0.0))
    stream: StreamConfig = field(default_factory=StreamConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    study: AnytimeStudy = field(default_factory=AnytimeStudy)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        require(self.data.val == 0, "data.val", self.data.val, "0: megabatches hold their own validation parts")
        require(self.data.repeats == 1, "data.repeats", self.data.repeats, "1: an epoch has every example once")
        policy = self.data.auto_augment
        require(not policy, "data.auto_augment", policy, "empty: images are decoded once, then cropped and flipped")
        count = len(self.prune.densities)
        allowed = f"empty or one for each of the {self.stream.states} states"
        require(count in (0, self.stream.states), "prune.densities", self.prune.densities, allowed)
