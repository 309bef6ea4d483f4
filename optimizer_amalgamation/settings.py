"""The configuration of one run and of the study; every YAML in configs/ fills this."""

from dataclasses import dataclass, field
from math import inf
from typing import Literal, NamedTuple

from common.config import ConfigError, require
from common.data import DataConfig
from common.runs import RunConfig
from common.study import StudyConfig
from optimizer_amalgamation.networks import PROBLEMS
from optimizer_amalgamation.pool import Teacher
from optimizer_amalgamation.schedules import ScheduleConfig

OTHER_DATA = ("mnist5k", "mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100", "svhn")


@dataclass(frozen=True)
class ProblemConfig:
    """The optimizee of meta-training."""

    name: str = "tiny14"
    """its network"""
    batch_size: int = 32
    shrink: bool = True
    """average 2x2 pixels"""

    def __post_init__(self) -> None:
        require(self.name in PROBLEMS, "problem.name", self.name, f"one of {', '.join(PROBLEMS)}")
        require(self.batch_size >= 1, "problem.batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True)
class MethodConfig:
    """What is meta-trained, and by whom it is taught."""

    student: Literal["rnnprop", "choice", "original", "scale"] = "rnnprop"
    teachers: list[str] = field(default_factory=list)
    """analytical ones with their rates, adam:0.005 for instance; empty without policy: meta loss only"""
    policy: str = ""
    """a choice policy as one more teacher: its weights file, or the folder of the run that trained it"""
    policy_replicate: int = 0
    """which of that run's replicates, by place; -1: each student has the policy of its own number"""
    reduce: Literal["max", "mean"] = "max"
    """over the distances to the teachers"""
    pool: Literal["small", "large"] = "large"
    """of a choice policy"""
    pool_rates: Literal["choice", "teachers"] = "choice"
    """of its members: choice, as the released policies have them, ten times the teachers' for half of them"""
    layers: int = 2
    """of rnnprop's LSTM"""
    head: Literal["free", "adam", "rmsprop"] = "free"
    """of rnnprop: what its output means"""
    hardness: float = 0.0
    """of a choice policy: above 0 it chooses by Gumbel noise"""

    def __post_init__(self) -> None:
        for entry in self.teachers:
            parse_teacher(entry)
        require(self.layers >= 1, "method.layers", self.layers, "at least 1")
        require(0 <= self.hardness < inf, "method.hardness", self.hardness, "at least 0 and finite")
        require(self.policy_replicate >= -1, "method.policy_replicate", self.policy_replicate, "at least -1")


def parse_teacher(entry: str) -> Teacher:
    """The teacher of "adam:0.005". Raises `ConfigError`."""
    name, _, rate = entry.partition(":")
    try:
        return Teacher(name, float(rate))
    except ValueError as error:
        raise ConfigError(
            f"method.teachers must be names with rates such as adam:0.005, got {entry!r} ({error})"
        ) from None


@dataclass(frozen=True)
class PerturbationConfig:
    """Noise on the student's weights, or its inputs, in meta-training (Sec. 4)."""

    kind: Literal["none", "gaussian", "relative", "fgsm", "pgd", "cgd", "input"] = "none"
    magnitude: float = 5e-4
    """deviation, step or radius"""
    steps: int = 1
    """of an adversarial kind"""
    lr: float = 0.1
    """of pgd"""
    norm: Literal["l2", "linf"] = "linf"
    """of pgd"""
    normalize: bool = False
    """cgd: always the whole length, as eq. 6 has it"""
    perturb_validation: bool = False
    """gaussian and relative noise in validations too, as the released code has it"""
    each_tensor: bool = True
    """gaussian and relative noise anew for every tensor of the optimizee, not only for every inner step"""

    def __post_init__(self) -> None:
        require(0 <= self.magnitude < inf, "perturbation.magnitude", self.magnitude, "at least 0 and finite")
        require(self.steps >= 1, "perturbation.steps", self.steps, "at least 1")
        require(0 < self.lr < inf, "perturbation.lr", self.lr, "positive and finite")


@dataclass(frozen=True)
class MetaConfig:
    """How it is meta-trained."""

    replicates: list[int] = field(default_factory=lambda: [0])
    """their numbers; each has its own weights and draws, all are trained at once"""
    unroll: int = 100
    """N: steps of an unroll"""
    lr: float = 1e-3
    """of Adam"""
    spread: float = 3.0
    """scales are exp(U(-spread, spread))"""
    warmup_rate: float = 0.05

    def __post_init__(self) -> None:
        numbers = self.replicates
        fits = bool(numbers) and min(numbers) >= 0 and len(set(numbers)) == len(numbers)
        require(fits, "meta.replicates", numbers, "different numbers of at least 0, one or more")
        require(self.unroll >= 1, "meta.unroll", self.unroll, "at least 1")
        require(0 < self.lr < inf, "meta.lr", self.lr, "positive and finite")
        require(0 <= self.spread <= 10, "meta.spread", self.spread, "in [0, 10]")
        require(0 <= self.warmup_rate < inf, "meta.warmup_rate", self.warmup_rate, "at least 0 and finite")


@dataclass(frozen=True)
class EvaluationConfig:
    """On what a learnt optimizer, or a pool, is judged."""

    problems: list[str] = field(default_factory=lambda: ["tiny14", "small14"])
    """networks; @svhn after the name: on other data, :16: with another batch size, :dp: with private gradients"""
    epochs: int = 12
    repeats: int = 4
    """J: evaluations of a replicate, each from a fresh start"""
    warmup: int = 100
    """steps of SGD before a learnt optimizer takes over"""
    warmup_rate: float = 0.05
    seed: int = 1_000_000
    """of starts and minibatches: the same for all optimizers"""

    def __post_init__(self) -> None:
        for entry in self.problems:
            split_problem(entry)
        for name in ("epochs", "repeats"):
            require(getattr(self, name) >= 1, f"evaluation.{name}", getattr(self, name), "at least 1")
        require(self.warmup >= 0, "evaluation.warmup", self.warmup, "at least 0")
        require(0 <= self.warmup_rate < inf, "evaluation.warmup_rate", self.warmup_rate, "at least 0 and finite")
        require(self.seed >= 0, "evaluation.seed", self.seed, "at least 0")


class Raced(NamedTuple):
    """A problem that optimizers are judged on: network, data set ("": the run's), batch size (0: the run's)."""

    network: str
    data: str
    batch_size: int
    private: bool


def split_problem(entry: str) -> Raced:
    """Of "train@svhn:32" or "small14:dp". Raises `ConfigError`."""
    name, _, option = entry.partition(":")
    network, _, data = name.partition("@")
    fits = network in PROBLEMS and (option in ("", "dp") or (option.isdigit() and int(option) > 0))
    fits = fits and ("@" not in name or data in OTHER_DATA)
    allowed = f"one of {', '.join(PROBLEMS)}, behind it @ and one of {', '.join(OTHER_DATA)}, and :dp or :<batch size>"
    require(fits, "evaluation.problems", entry, allowed)
    return Raced(network, data, int(option) if option.isdigit() else 0, option == "dp")


ARMS = (
    *("pool", "choice-large", "choice-small", "minmax", "mean", "rnnprop", "stronger", "original", "scale"),
    *("shipped", "noise", "nearest", "memory"),
)
KINDS = ("relative", "gaussian", "fgsm", "pgd", "cgd", "input")


@dataclass(frozen=True)
class AmalgamationStudy(StudyConfig):
    """The study: every arm at every seed; an arm meta-trains and measures all of `meta.replicates`."""

    arms: list[str] = field(default_factory=lambda: ["pool", "choice-large", "minmax", "rnnprop"])
    factors: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0])
    """the rates tried for a member of the pool, in parts of the rate that the paper's authors found"""
    tuning_repeats: int = 3
    """starts on which a member's rate is chosen; others than those it is then measured on"""
    pool_repeats: int = 6
    """starts on which the pool is measured"""
    distill: bool = False
    """train a student on each choice policy too"""
    choice_schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(kind="repeat"))
    """of the choice policies; `schedule` is that of the students"""
    noise: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3, 1.0])
    """magnitudes of the arm noise"""
    noise_kinds: list[str] = field(default_factory=lambda: ["relative"])
    noise_steps: int = 60
    """meta-steps of depth 1 of the arms noise and nearest; 0: the whole schedule, and evaluations"""
    noise_replicates: int = 0
    """of these arms, numbered from 0; 0: those of meta.replicates"""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = set(self.arms) <= set(ARMS) and bool(self.arms)
        require(known, "study.arms", self.arms, f"any of {', '.join(ARMS)}")
        require(len(set(self.arms)) == len(self.arms), "study.arms", self.arms, "without repetition")
        for name in ("tuning_repeats", "pool_repeats"):
            require(getattr(self, name) >= 1, f"study.{name}", getattr(self, name), "at least 1")
        for name in ("noise_steps", "noise_replicates"):
            require(getattr(self, name) >= 0, f"study.{name}", getattr(self, name), "at least 0")
        positive = bool(self.factors) and all(0 < one < inf for one in self.factors)
        require(positive, "study.factors", self.factors, "positive numbers, one or more")
        require(all(0 <= one < inf for one in self.noise), "study.noise", self.noise, "finite numbers of at least 0")
        require(
            set(self.noise_kinds) <= set(KINDS), "study.noise_kinds", self.noise_kinds, f"any of {', '.join(KINDS)}"
        )


@dataclass(frozen=True)
class Config:
    """One run."""

    seed: int = 0
    """of everything drawn; replicate i of one seed is the same whatever others run beside it"""
    data: DataConfig = field(default_factory=lambda: DataConfig(val=0.0))
    problem: ProblemConfig = field(default_factory=ProblemConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    perturbation: PerturbationConfig = field(default_factory=PerturbationConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(checkpoint_every=1))
    study: AmalgamationStudy = field(default_factory=AmalgamationStudy)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        for name in ("teachers", "policy"):
            taught = getattr(self.method, name)
            require(
                self.method.student != "choice" or not taught, f"method.{name}", taught, "empty for a choice policy"
            )
