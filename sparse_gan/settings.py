"""The configuration of one training run and of the study; every YAML in configs/ fills this."""

from dataclasses import dataclass, field
from typing import Literal

from common.config import ConfigError, require
from common.data import DataConfig
from common.runs import RunConfig
from common.study import StudyConfig

ARMS = (
    "dense",
    "static",
    "static-uniform",
    "stu",
    "stu-dense-moments",
    "set",
    "only-d",
    "both",
    "balanced",
    "snip",
    "gmp",
    "oneshot-global-g",
    "oneshot-uniform-g",
    "oneshot-global-both",
    "oneshot-uniform-both",
    "imp",
)


@dataclass(frozen=True)
class ModelConfig:
    """The two networks."""

    name: Literal["sngan", "biggan"] = "sngan"
    """biggan: conditional, spectral norm in both networks, projection discriminator"""
    size: int = 32
    """side of the images, 4 times a power of two; others are pooled and padded to it"""
    width_g: int = 256
    """channels of the generator's blocks"""
    width_d: int = 128
    """channels of the discriminator's blocks"""
    z_dim: int = 128

    def __post_init__(self) -> None:
        power = self.size >= 8 and self.size & (self.size - 1) == 0
        require(power, "model.size", self.size, "a power of two, at least 8")
        require(self.width_g >= 1, "model.width_g", self.width_g, "at least 1")
        require(self.width_d >= 1, "model.width_d", self.width_d, "at least 1")
        require(self.z_dim >= 1, "model.z_dim", self.z_dim, "at least 1")


@dataclass(frozen=True)
class SparsityConfig:
    """How the networks become sparse; densities are over all convolution weights of a network."""

    method: Literal["dense", "static", "dynamic", "snip", "gmp", "oneshot", "imp"] = "dynamic"
    """static, dynamic: at random from the first step, the topology fixed or moving; snip: by saliency before training;
    gmp: gradually; oneshot: after dense training, then fine-tuned; imp: iteratively, with rewinding"""
    density_g: float = 0.2
    """share of the generator's weights that stay"""
    density_d: float = 0.3
    """of the discriminator's; neither counts for dense, and gmp leaves the discriminator dense"""
    distribution: Literal["erk", "uniform"] = "erk"
    """of static and dynamic: densities of the layers"""
    explore: Literal["g", "d", "both"] = "g"
    """dynamic: whose topology moves; g is STU-GAN"""
    growth_g: Literal["gradient", "random"] = "gradient"
    """how the generator's new weights are found; random is SET"""
    growth_d: Literal["gradient", "random"] = "random"
    """how the discriminator's are, where it moves"""
    regrown: Literal["zero", "keep"] = "zero"
    """where a weight starts that is dropped and grown in the same move; the authors' code keeps it"""
    update_every: int = 500
    """generator steps between two moves (Delta T), and between two prunings of gmp"""
    drop_fraction: float = 0.5
    """of the active weights that the first move exchanges, falling as a cosine"""
    drop_end: float = 0.005
    """of those that the last exchanges"""
    moments: Literal["sparse", "dense"] = "sparse"
    """static, dynamic, snip: dense lets Adam's moments of inactive weights accumulate, as in the authors' code"""
    scope: Literal["global", "uniform"] = "global"
    """oneshot: one threshold for a network, or the same density in every layer"""
    prune: Literal["g", "both"] = "g"
    """oneshot, imp: whose weights are pruned; the discriminator goes to density_d"""
    tune_steps: int = 0
    """oneshot: generator steps of fine-tuning"""
    rounds: int = 1
    """imp: rounds of pruning, 20 % of the remaining weights each, but never below density_g and density_d"""
    rewind_step: int = 0
    """imp: to whose weights each round goes back"""
    balance: float = 0.0
    """dynamic, explore g: change of the discriminator's density when the balance ratio leaves 0.45 to 0.55"""
    balance_every: int = 1000
    """generator steps between two such changes"""

    def __post_init__(self) -> None:
        for name in ("density_g", "density_d"):
            density = getattr(self, name)
            require(0 < density <= 1, f"sparsity.{name}", density, "in (0, 1]")
        require(self.update_every >= 1, "sparsity.update_every", self.update_every, "at least 1")
        drops = 0 <= self.drop_end <= self.drop_fraction <= 1
        require(drops, "sparsity.drop_fraction", self.drop_fraction, "in [sparsity.drop_end, 1]")
        tuned = self.tune_steps >= (self.method == "oneshot")
        require(tuned, "sparsity.tune_steps", self.tune_steps, "at least 0, with oneshot at least 1")
        require(self.rounds >= 1, "sparsity.rounds", self.rounds, "at least 1")
        require(self.rewind_step >= 0, "sparsity.rewind_step", self.rewind_step, "at least 0")
        require(0 <= self.balance < 1, "sparsity.balance", self.balance, "in [0, 1)")
        alone = not self.balance or (self.method, self.explore, self.moments) == ("dynamic", "g", "sparse")
        require(alone, "sparsity.balance", self.balance, "0 unless sparsity is dynamic, explore g and moments sparse")
        require(self.balance_every >= 1, "sparsity.balance_every", self.balance_every, "at least 1")
        masked = self.method in ("static", "dynamic", "snip") or self.moments == "sparse"
        require(masked, "sparsity.moments", self.moments, "sparse unless sparsity.method is static, dynamic or snip")


@dataclass(frozen=True)
class TrainConfig:
    """Hinge losses, Adam; one step is one generator step with its n_dis discriminator steps."""

    steps: int = 50_000
    """generator steps; of each round for imp, of the dense training for oneshot"""
    batch_size: int = 64
    """over all ranks together, real and generated alike"""
    n_dis: int = 5
    """discriminator steps to one of the generator"""
    lr_g: float = 2e-4
    lr_d: float = 2e-4
    beta1: float = 0.0
    beta2: float = 0.999
    decay: bool = False
    """learning rates fall to 0 in a straight line"""
    ema: float = 0.999
    """decay of the generator's moving averages, which are what is measured"""
    ema_start: int = 0
    """step before which they are copies"""
    dequantize: bool = False
    """uniform noise of one grey level of 1/128 on real images"""
    snapshots: int = 10
    """moments at which the averaged generator is kept, evenly over the steps"""

    def __post_init__(self) -> None:
        for name in ("steps", "n_dis", "snapshots"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        require(self.batch_size >= 2, "train.batch_size", self.batch_size, "at least 2")
        for name in ("lr_g", "lr_d"):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "positive")
        for name in ("beta1", "beta2", "ema"):
            require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name), "in [0, 1)")
        require(self.ema_start >= 0, "train.ema_start", self.ema_start, "at least 0")


@dataclass(frozen=True)
class EvalConfig:
    """How the generator is measured: a Fréchet distance in the features of a classifier of the same images."""

    split: Literal["test", "val"] = "test"
    """real images to compare with; val for choosing settings"""
    samples: int = 5000
    """of the trained generator"""
    curve_samples: int = 1000
    """of each snapshot"""
    batch_size: int = 500
    feature_dim: int = 64
    """of the classifier's last hidden layer"""
    widths: list[int] = field(default_factory=lambda: [32, 64])
    """channels of the classifier's stages, each of which halves the resolution"""
    convs: int = 1
    """convolutions a stage"""
    epochs: int = 8
    """of its training"""
    crop_padding: int = 1
    """of its augmentation"""
    flip: bool = False
    min_accuracy: float = 97.0
    """test accuracy in percent below which it is no measure"""
    fidelity: bool = False
    """also FID, IS and KID by torch-fidelity, whose Inception weights must be had from the network"""

    def __post_init__(self) -> None:
        for name in ("samples", "curve_samples"):
            allowed = "more than eval.feature_dim"
            require(getattr(self, name) > self.feature_dim, f"eval.{name}", getattr(self, name), allowed)
        for name in ("batch_size", "feature_dim", "convs", "epochs"):
            require(getattr(self, name) >= 1, f"eval.{name}", getattr(self, name), "at least 1")
        require(len(self.widths) >= 1 and min(self.widths) >= 1, "eval.widths", self.widths, "positive widths")
        require(self.crop_padding >= 0, "eval.crop_padding", self.crop_padding, "at least 0")
        require(0 <= self.min_accuracy <= 100, "eval.min_accuracy", self.min_accuracy, "in [0, 100]")


@dataclass(frozen=True)
class Arm:
    """One arm of the study: a name in ARMS and the densities of the two networks."""

    name: str
    density_g: float
    density_d: float


@dataclass(frozen=True)
class GanStudy(StudyConfig):
    """The study: every arm at every seed; arms of one seed share initial weights, images and noise."""

    arms: list[str] = field(default_factory=lambda: ["dense", "static 0.05 0.3", "stu 0.05 0.3"])
    """each "name", or "name density_g density_d"; names: see ARMS"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(set(self.parsed())) == len(self.arms) > 0, "study.arms", self.arms, "at least one, none twice")

    def parsed(self) -> list[Arm]:
        """The arms. Raises `ConfigError` on one that cannot be."""
        found = []
        for text in self.arms:
            name, *densities = text.split()
            require(name in ARMS, "study.arms", text, f"a name of {', '.join(ARMS)}")
            try:
                density_g, density_d = map(float, densities or (1, 1))
            except ValueError:
                raise ConfigError(f"study.arms must be name density_g density_d, got {text!r}") from None
            require(0 < density_g <= 1 and 0 < density_d <= 1, "study.arms", text, "with densities in (0, 1]")
            whole = name != "dense" or density_g == density_d == 1
            require(whole, "study.arms", text, "dense without densities below 1")
            found.append(Arm(name, density_g, density_d))
        return found


@dataclass(frozen=True)
class Config:
    """One training run."""

    seed: int = 0
    """of the initial weights and masks, the order of the images and all noise"""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    study: GanStudy = field(default_factory=GanStudy)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        there = self.eval.split == "test" or self.data.val > 0
        require(there, "eval.split", self.eval.split, "test unless data.val is above 0")
        stages = self.model.size.bit_length() - 1
        allowed = f"at most {stages} stages for images of side {self.model.size}"
        require(len(self.eval.widths) <= stages, "eval.widths", self.eval.widths, allowed)
        ends = self.train.steps % self.sparsity.update_every <= self.train.steps / 5
        allowed = "with gmp such that one of its multiples is in the last fifth of train.steps"
        require(self.sparsity.method != "gmp" or ends, "sparsity.update_every", self.sparsity.update_every, allowed)
        rewinds = self.sparsity.method != "imp" or self.sparsity.rewind_step < self.train.steps
        require(rewinds, "sparsity.rewind_step", self.sparsity.rewind_step, "less than train.steps")
