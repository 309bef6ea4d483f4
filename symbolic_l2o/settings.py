"""The configuration of one run and of the study; every YAML in configs/ fills this."""

from dataclasses import dataclass, field
from typing import Literal

from common.config import require
from common.data import DataConfig
from common.runs import RunConfig
from common.study import StudyConfig

TeacherKind = Literal["dm", "dm_raw", "rp", "rp_s", "rp_si", "rp_5"]
ProblemName = Literal["sig", "relu01", "relu3", "tanh", "conv", "mlp_mnist", "mlp_mnist2", "resnet20"]
OptimizerName = Literal["symbolic", "sgd", "sgdm", "nesterov", "adam", "adamw", "rmsprop"]
BASELINES: tuple[OptimizerName, ...] = ("sgd", "sgdm", "nesterov", "adam", "adamw", "rmsprop")


@dataclass(frozen=True)
class MetaConfig:
    """How a teacher, or a rule's coefficients, are meta-trained."""

    epochs: int = 110
    """runs of `horizon` steps, each from a fresh start"""
    horizon: int = 100
    """steps of a run"""
    unroll: int = 20
    """steps of a window: one meta-gradient"""
    lr: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    """sgd: momentum 0.9"""
    clip: float = 0.0
    """largest norm of a meta-gradient; 0: none"""
    coords: int = 0
    """coordinates that a meta-gradient is estimated from, unbiased; 0: all, exact"""
    eta: float = 0.01
    """step of the optimizee"""
    mode: Literal["suffix", "forward"] = "suffix"
    """forward: memory independent of unroll, for rules only"""
    stale_tail: bool = False
    """take the last loss of a window one step early, as the released code does"""
    random_scale: float = 0.0
    """b: coordinates rescaled by exp(U(-b, b)) each epoch"""
    imitation: list[float] = field(default_factory=lambda: [0.0])
    """probability that an epoch imitates Adam, by stage of the curriculum"""
    horizons: list[int] = field(default_factory=list)
    """the curriculum's stages; empty: none"""
    evaluate_every: int = 10
    """epochs, and at the end; the best evaluated weights are kept"""
    evaluation_horizon: int = 100
    """steps of an evaluating run"""
    evaluation_runs: int = 2
    """runs whose losses are averaged"""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "meta.epochs", self.epochs, "at least 1")
        require(self.unroll >= 1, "meta.unroll", self.unroll, "at least 1")
        for horizon in (self.horizon, *self.horizons):
            fits = horizon >= self.unroll and horizon % self.unroll == 0
            require(fits, "meta.horizon", horizon, f"a multiple of meta.unroll = {self.unroll}")
        rising = list(self.horizons) == sorted(set(self.horizons))
        require(rising, "meta.horizons", self.horizons, "rising")
        require(self.lr > 0, "meta.lr", self.lr, "positive")
        require(self.clip >= 0, "meta.clip", self.clip, "at least 0")
        require(self.coords >= 0, "meta.coords", self.coords, "at least 0")
        suffix = self.mode == "suffix"
        require(suffix or not self.coords, "meta.coords", self.coords, "0 with meta.mode forward")
        require(suffix or not self.stale_tail, "meta.stale_tail", self.stale_tail, "false with meta.mode forward")
        require(self.eta > 0, "meta.eta", self.eta, "positive")
        require(0 <= self.random_scale <= 10, "meta.random_scale", self.random_scale, "in [0, 10]")
        shares = bool(self.imitation) and all(0 <= share <= 1 for share in self.imitation)
        require(shares, "meta.imitation", self.imitation, "probabilities, at least one")
        for name in ("evaluate_every", "evaluation_horizon", "evaluation_runs"):
            require(getattr(self, name) >= 1, f"meta.{name}", getattr(self, name), "at least 1")


@dataclass(frozen=True)
class ProblemConfig:
    """The optimizee: which network on which images."""

    name: ProblemName = "sig"
    batch_size: int = 128
    """over all ranks together"""
    shrink: bool = True
    """average 2x2 pixels"""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "problem.batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True)
class RuleConfig:
    """The rule that task tune starts from and task network uses."""

    source: str = "rp_pole_mnist5k"
    """name of a preset, or a rule.json"""
    gain: float = 1.0
    """its linear coefficients w, a, W times this"""
    form: Literal["log", "raw"] = "log"
    """of the trained coefficients"""

    def __post_init__(self) -> None:
        require(self.gain > 0, "rule.gain", self.gain, "positive")


@dataclass(frozen=True)
class NetworkConfig:
    """Task network: ordinary training with one optimiser."""

    optimizer: OptimizerName = "symbolic"
    lr: float = 0.003
    cosine: bool = True
    """half a cosine to 0; else constant"""
    weight_decay: float = 0.0
    epochs: int = 10
    amp: bool = False
    """bfloat16 autocast"""

    def __post_init__(self) -> None:
        require(self.lr > 0, "network.lr", self.lr, "positive")
        require(self.weight_decay >= 0, "network.weight_decay", self.weight_decay, "at least 0")
        require(self.epochs >= 1, "network.epochs", self.epochs, "at least 1")


@dataclass(frozen=True)
class RecordConfig:
    """What is recorded of a teacher and how equations are sought."""

    steps: int = 100
    """T of a recorded run"""
    runs: int = 6
    """recorded of each teacher"""
    length: int = 20
    """L of a window; the template of a DM teacher may look back further through its poles only"""
    per_tensor: int = 100
    """coordinates of each parameter tensor"""
    rows: int = 10_000
    """most training rows"""
    searches: int = 2
    """symbolic regressions, each with its own seed; 0: none"""
    evaluations: int = 150_000
    """of a search"""
    population: int = 500
    generations: int = 60

    def __post_init__(self) -> None:
        fits = self.length >= 4 and self.steps >= 3 * self.length
        require(fits, "records.steps", self.steps, f"at least three windows of records.length = {self.length} >= 4")
        for name in ("runs", "per_tensor", "rows", "evaluations", "population", "generations"):
            require(getattr(self, name) >= 1, f"records.{name}", getattr(self, name), "at least 1")
        require(self.searches >= 0, "records.searches", self.searches, "at least 0")


Arm = Literal["dm", "rp", "rp_s", "rp_si", "baselines", "tune", "sanity", "cost"]
ARMS: tuple[Arm, ...] = ("dm", "rp", "rp_s", "rp_si", "baselines", "tune", "sanity", "cost")
DEMO_GRID = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]


@dataclass(frozen=True)
class L2OStudy(StudyConfig):
    """The study: every arm at every seed; races of one seed share starts and batches."""

    arms: list[Arm] = field(default_factory=lambda: list(ARMS))
    epochs: list[int] = field(default_factory=lambda: [45, 50, 110, 110])
    """meta-training epochs of dm, rp, rp_s, rp_si"""
    lrs: list[float] = field(default_factory=lambda: [1e-3, 1e-3, 3e-3, 3e-3])
    """their meta learning rates"""
    race_steps: int = 300
    """of every race but the convolutional network's"""
    conv_steps: int = 100
    """of the race on the convolutional network"""
    inits: int = 10
    """starts of a race"""
    teacher_inits: int = 5
    """starts of a race between a teacher and its equations"""
    baselines: list[OptimizerName] = field(default_factory=lambda: ["sgdm", "adam"])
    """analytical optimizers that race"""
    grid: list[float] = field(default_factory=lambda: list(DEMO_GRID))
    """learning rates of each baseline; each with constant and cosine schedule"""
    tuning_inits: int = 2
    """starts on which a baseline's learning rate and schedule are chosen; others than those of the race"""
    unseen: list[ProblemName] = field(default_factory=lambda: ["relu3", "tanh", "conv"])
    """problems of the race that no teacher was trained on"""
    tune_epochs: int = 10
    """of meta-tuning the preset"""
    tune_lr: float = 0.1
    """meta learning rate there"""
    tune_gain: float = 0.1
    """the preset's linear coefficients are made this much smaller, then tuned on conv"""
    networks: list[str] = field(default_factory=list)
    """cifar and paper scale: optimiser:lr pairs that train problem.name, in place of the arms"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(set(self.arms)) == len(self.arms), "study.arms", self.arms, "without repetition")
        require(bool(self.arms or self.networks), "study.arms", self.arms, "not empty without study.networks")
        for name in ("epochs", "lrs"):
            allowed = "four positive numbers, of dm, rp, rp_s, rp_si"
            values = getattr(self, name)
            require(len(values) == 4 and min(values) > 0, f"study.{name}", values, allowed)
        for name in ("race_steps", "conv_steps", "inits", "teacher_inits", "tuning_inits", "tune_epochs"):
            require(getattr(self, name) >= 1, f"study.{name}", getattr(self, name), "at least 1")
        known = set(self.baselines) <= set(BASELINES) and bool(self.baselines)
        require(known, "study.baselines", self.baselines, f"any of {', '.join(BASELINES)}")
        require(bool(self.grid) and min(self.grid) > 0, "study.grid", self.grid, "positive numbers")
        require(self.tune_lr > 0 and self.tune_gain > 0, "study.tune_lr", self.tune_lr, "positive, as study.tune_gain")
        require("resnet20" not in self.unseen, "study.unseen", self.unseen, "problems that race: all but resnet20")
        for entry in self.networks:
            split_entry(entry)


def split_entry(entry: str) -> tuple[str, float]:
    """Optimiser and learning rate of "adam:0.003". Raises `ConfigError`."""
    name, _, rate = entry.partition(":")
    known = name in ("symbolic", "tuned", *BASELINES)
    try:
        value = float(rate)
    except ValueError:
        value = 0.0
    allowed = f"symbolic, tuned or one of {', '.join(BASELINES)}, a colon and a learning rate"
    require(known and value > 0, "study.networks", entry, allowed)
    return name, value


@dataclass(frozen=True)
class Config:
    """One run."""

    task: Literal["teacher", "tune", "network"] = "teacher"
    """teacher: meta-train an LSTM; tune: meta-train a rule's coefficients; network: train with an optimiser"""
    seed: int = 0
    """of initial weights, batches, coordinates"""
    data: DataConfig = field(default_factory=lambda: DataConfig(val=0.0))
    problem: ProblemConfig = field(default_factory=ProblemConfig)
    teacher: TeacherKind = "rp_s"
    meta: MetaConfig = field(default_factory=MetaConfig)
    rule: RuleConfig = field(default_factory=RuleConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    records: RecordConfig = field(default_factory=RecordConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(checkpoint_every=10))
    study: L2OStudy = field(default_factory=L2OStudy)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        chosen = not self.study.networks or self.data.val > 0
        require(chosen, "data.val", self.data.val, "positive with study.networks, whose learning rates it chooses")
        forward = self.meta.mode == "forward" and self.task == "teacher"
        require(not forward, "meta.mode", self.meta.mode, "suffix for a teacher")
