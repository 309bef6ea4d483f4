"""The configuration of one lottery-ticket chain and of its verification; every YAML in configs/ fills this."""

from dataclasses import dataclass, field
from typing import Literal

from certified_pruning.models import BUILDERS
from certified_pruning.verdicts import VerifyConfig
from common.config import require
from common.data import DataConfig
from common.experiment import InputConfig
from common.runs import RunConfig
from common.study import StudyConfig

Regime = Literal["standard", "fgsm", "fgsm_gradalign", "crown_ibp", "fast_ibp"]
Method = Literal["imp", "random", "snip", "taylor", "hydra", "imp+nrs", "slim", "refill", "nrs", "l1-channel"]
CHANNEL_METHODS = ("slim", "refill", "nrs", "l1-channel")


@dataclass(frozen=True)
class ModelConfig(InputConfig):
    """The network."""

    name: str = "cnn_s"
    """see models.py"""
    channels: list[int] = field(default_factory=list)
    """widths of the convolutions; empty: the network's own"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.name in BUILDERS, "model.name", self.name, f"one of {', '.join(BUILDERS)}")
        require(all(width > 0 for width in self.channels), "model.channels", self.channels, "positive widths")


@dataclass(frozen=True)
class TrainConfig:
    """How each lottery round is trained."""

    regime: Regime = "fgsm"
    """fgsm starts at random in the box; fgsm_gradalign and crown_ibp are the paper's"""
    eps: float = 0.1
    """radius of the L-inf box in pixel units"""
    epochs: int = 5
    batch_size: int = 64
    """over all ranks together"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """adam has the paper's momenta, 0.9 and 0.999, and an L2 term as weight decay"""
    lr: float = 0.05
    warmup: float = 0.1
    """share of the steps over which lr rises; then it falls to 0 in a straight line"""
    milestones: list[int] = field(default_factory=list)
    """epochs after which lr is divided by 10; given, they replace warm-up and decay"""
    milestones_early: int = 0
    """by so many epochs the milestones of rounds after the first come earlier; 8 in the released FGSM code"""
    momentum: float = 0.9
    """of sgd"""
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
    """weight of the stability regulariser, for the methods imp+nrs and nrs"""
    slim: float = 1.0e-4
    """weight of the mean batch-norm scale, for the method slim"""
    loss_fusion: bool = True
    """crown_ibp bounds the sum of exponentials at once instead of every margin"""
    bounds: Literal["native", "auto_lirpa"] = "native"
    """auto_lirpa: crown_ibp trains on that package's bounds, with loss_fusion false; pruners' scores stay native"""

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
        require(self.eps_start >= 0, "train.eps_start", self.eps_start, "at least 0")
        require(self.eps_length >= 1, "train.eps_length", self.eps_length, "at least 1")
        require(0 <= self.eps_mid < 1, "train.eps_mid", self.eps_mid, "in [0, 1)")
        require(self.gradalign >= 0, "train.gradalign", self.gradalign, "at least 0")
        require(self.nrs >= 0, "train.nrs", self.nrs, "at least 0")
        require(self.slim >= 0, "train.slim", self.slim, "at least 0")
        require(self.milestones_early >= 0, "train.milestones_early", self.milestones_early, "at least 0")
        possible = self.bounds == "native" or (self.regime == "crown_ibp" and not self.loss_fusion)
        allowed = "native, or else with regime crown_ibp and loss_fusion false"
        require(possible, "train.bounds", self.bounds, allowed)


@dataclass(frozen=True)
class PruneConfig:
    """The lottery: train, prune, rewind, again."""

    method: Method = "imp"
    """of weights: imp, random, snip, taylor, hydra, imp+nrs; of channels: slim, refill, nrs, l1-channel"""
    rate: float = 0.5
    """share of the remaining convolution weights (or channels) that a round prunes"""
    rounds: int = 5
    """trained levels, the dense one included"""
    prune_type: Literal["lt", "rewind_lt", "pt", "rewind_trained", "finetune"] = "lt"
    """a round starts from: lt the initial weights; rewind_lt those of epoch rewind_epoch of round 0; pt those that
    round 0 ends with; rewind_trained the same for convolutions, all else goes on, as in the released certified
    training; finetune what the round before ended with"""
    rewind_epoch: int = 8
    """of rewind_lt"""
    at_init: bool = False
    """one-shot: prune the initial weights by rate, then train the one round there is (snip, taylor)"""
    prunable: Literal["conv", "conv+linear"] = "conv"
    """layers whose weights are pruned; channels are those of convolutions"""
    scope: Literal["global", "layer"] = "global"
    """one threshold for all layers, or one a layer; hydra and l1-channel always have one a layer"""
    min_channels: int = 0
    """1: pruning channels spares the best one of each layer; 0: an emptied layer is an error"""
    imp_rate: float = 0.2
    """refill: share of weights that a magnitude step removes before filters are ranked"""
    search_epochs: int = 20
    """hydra: length of the search for scores"""
    search_lr: float = 0.01
    """hydra: learning rate of the search; 0.001 in the released certified training"""

    def __post_init__(self) -> None:
        require(0 < self.rate < 1, "prune.rate", self.rate, "in (0, 1)")
        of_weights = self.prunable == "conv" or self.method not in CHANNEL_METHODS
        require(of_weights, "prune.prunable", self.prunable, f"conv with method {self.method}")
        require(self.rounds >= 1, "prune.rounds", self.rounds, "at least 1")
        require(self.rewind_epoch >= 1, "prune.rewind_epoch", self.rewind_epoch, "at least 1")
        once = not self.at_init or (self.rounds == 1 and self.prune_type == "lt" and self.method in ("snip", "taylor"))
        require(once, "prune.at_init", self.at_init, "with method snip or taylor, rounds 1 and prune_type lt")
        require(self.min_channels in (0, 1), "prune.min_channels", self.min_channels, "0 or 1")
        require(0 <= self.imp_rate < 1, "prune.imp_rate", self.imp_rate, "in [0, 1)")
        require(self.search_epochs >= 1, "prune.search_epochs", self.search_epochs, "at least 1")
        require(self.search_lr > 0, "prune.search_lr", self.search_lr, "positive")


@dataclass(frozen=True)
class EvalConfig:
    """How many images are verified, and with what budget; a level is chosen on validation and reported on test."""

    images: int = 100
    """verified images of the validation and of the test split, the first ones"""
    val_root_steps: int = 10
    """alpha-CROWN steps on validation images, without branch and bound"""
    first_round: int = 0
    """rounds before this one are not verified; 1 where another chain of the study verifies the same dense net"""

    def __post_init__(self) -> None:
        require(self.first_round >= 0, "eval.first_round", self.first_round, "at least 0")
        require(self.images >= 1, "eval.images", self.images, "at least 1")
        require(self.val_root_steps >= 0, "eval.val_root_steps", self.val_root_steps, "at least 0")


@dataclass(frozen=True)
class StudyCell:
    """One chain of the study at every seed: what differs from the configuration; null takes the configuration's."""

    method: Method = "imp"
    regime: Regime | None = None
    eps: float | None = None
    epochs: int | None = None
    eps_start: int | None = None
    eps_length: int | None = None
    weight_decay: float | None = None
    rate: float | None = None
    rounds: int | None = None
    first_round: int | None = None
    at_init: bool | None = None


@dataclass(frozen=True)
class PruningStudy(StudyConfig):
    """The study: every cell at every seed."""

    cells: list[StudyCell] = field(
        default_factory=lambda: [StudyCell("imp"), StudyCell("random"), StudyCell("imp+nrs")]
    )
    """chains to compare; of each regime imp's first level is the dense reference"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.cells) > 0, "study.cells", self.cells, "at least one cell")


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
        rewinds = self.prune.prune_type != "rewind_lt" or self.prune.rewind_epoch <= self.train.epochs
        require(rewinds, "prune.rewind_epoch", self.prune.rewind_epoch, f"at most train.epochs, {self.train.epochs}")
        ramp = self.train.eps_start + self.train.eps_length - 1
        within = self.train.eps_start == 0 or ramp <= self.train.epochs
        allowed = f"at most train.epochs, {self.train.epochs}: eps would not reach train.eps"
        require(within, "train.eps_start + train.eps_length - 1", ramp, allowed)
        verified = self.eval.first_round < self.prune.rounds
        require(verified, "eval.first_round", self.eval.first_round, f"below prune.rounds, {self.prune.rounds}")
