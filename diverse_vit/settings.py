"""The configuration of one training run and of the study; every YAML in configs/ fills this."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import timm

from common.config import ConfigError, require
from common.data import DataConfig
from common.experiment import InputConfig
from common.runs import RunConfig
from common.study import StudyConfig
from diverse_vit.library import EXTRAS


@dataclass(frozen=True)
class ModelConfig(InputConfig):
    """The network."""

    name: str = "vit"
    """vit: a class-token ViT of the sizes below; else the name of a timm model with its own sizes"""
    dim: int = 64
    """of vit: channels"""
    heads: int = 2
    """of vit"""
    patch: int = 7
    """side in pixels of a patch, of which the last layer has one token: of vit, or of the timm model (Swin: 32)"""
    depth: int = 12
    """blocks; 0: the timm model's own"""
    drop_path: float = 0.0
    """stochastic depth"""
    pretrained: bool = False
    """start from timm's weights, downloaded once"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.name == "vit" or timm.is_model(self.name), "model.name", self.name, "vit or a timm model")
        require(self.heads >= 1, "model.heads", self.heads, "at least 1")
        require(self.dim >= 1 and self.dim % self.heads == 0, "model.dim", self.dim, "a multiple of model.heads")
        require(self.patch >= 1, "model.patch", self.patch, "at least 1")
        least = 1 if self.name == "vit" else 0
        require(self.depth >= least, "model.depth", self.depth, f"at least {least}")
        require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "in [0, 1)")
        require(not (self.pretrained and self.name == "vit"), "model.pretrained", self.pretrained, "false for vit")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is added to the cross-entropy, with its weights; nothing at all is the plain network."""

    mix: bool = False
    """cross-entropy of every patch against its own label; on or off, it has no weight"""
    emb_cos: float = 0.0
    """of the cosine between patches after the last block; released: 0.5"""
    emb_nce: float = 0.0
    """of the contrastive loss between first and last layer; released: 0.5"""
    attn_cos: float = 0.0
    """of the cosine between heads; released: 1e-4"""
    weight_cno: float = 0.0
    """of the conditional orthogonality of q, k, v; released: 5e-4"""
    attn_layers: list[int] = field(default_factory=lambda: [0])
    """blocks whose heads are compared"""
    extra: dict[str, float] = field(default_factory=dict)
    """weights of alternatives by name, for instance {weight_so: 1e-4}"""

    def __post_init__(self) -> None:
        for name in ("emb_cos", "emb_nce", "attn_cos", "weight_cno"):
            _require_weight(name, getattr(self, name))
        for name, weight in self.extra.items():
            require(name in EXTRAS, "objective.extra", name, f"among {', '.join(EXTRAS)}")
            _require_weight(f"extra.{name}", weight)
        require(all(layer >= 0 for layer in self.attn_layers), "objective.attn_layers", self.attn_layers, "at least 0")


@dataclass(frozen=True)
class TrainConfig:
    """How the network is trained: AdamW, cosine schedule, soft labels."""

    epochs: int = 8
    """0 keeps the starting weights, to measure them"""
    batch_size: int = 100
    """over all ranks together"""
    lr: float = 1e-3
    min_lr: float = 0.0
    """at the end of the cosine"""
    warmup: float = 0.8
    """epochs over which lr rises in a straight line"""
    warmup_lr: float = 0.0
    """where it starts"""
    schedule: Literal["steps", "epochs"] = "steps"
    """epochs: lr changes between epochs only and lags one behind, as in the released code"""
    weight_decay: float = 0.05
    """not on 1-D tensors, position and class tokens"""
    clip: float = 0.0
    """largest gradient norm; 0: none"""
    smoothing: float = 0.1
    """of the labels"""
    roll: int = 0
    """images are rolled by up to this many pixels"""
    mixup: float = 0.0
    """alpha; 0: none"""
    cutmix: float = 0.0
    """alpha; 0: none; where both are on each takes half of the batches"""
    erasing: float = 0.0
    """probability of random erasing"""
    ema: float = 0.0
    """decay of the moving average of the weights, measured beside them; 0: none"""
    amp: bool = False
    """bfloat16 autocast; the regularizers stay in float32"""
    compile: bool = False
    """torch.compile of the network"""

    def __post_init__(self) -> None:
        require(self.epochs >= 0, "train.epochs", self.epochs, "at least 0")
        require(self.batch_size >= 2, "train.batch_size", self.batch_size, "at least 2")
        mixing = self.mixup > 0 or self.cutmix > 0
        require(not (mixing and self.batch_size % 2), "train.batch_size", self.batch_size, "even with mixup or cutmix")
        require(self.lr > 0, "train.lr", self.lr, "positive")
        require(0 <= self.min_lr <= self.lr, "train.min_lr", self.min_lr, "in [0, train.lr]")
        require(0 <= self.warmup <= self.epochs, "train.warmup", self.warmup, "in [0, train.epochs]")
        require(0 <= self.warmup_lr <= self.lr, "train.warmup_lr", self.warmup_lr, "in [0, train.lr]")
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "at least 0")
        require(self.clip >= 0, "train.clip", self.clip, "at least 0")
        require(0 <= self.smoothing < 1, "train.smoothing", self.smoothing, "in [0, 1)")
        require(self.roll >= 0, "train.roll", self.roll, "at least 0")
        require(self.mixup >= 0, "train.mixup", self.mixup, "at least 0")
        require(self.cutmix >= 0, "train.cutmix", self.cutmix, "at least 0")
        require(0 <= self.erasing <= 1, "train.erasing", self.erasing, "in [0, 1]")
        require(0 <= self.ema < 1, "train.ema", self.ema, "in [0, 1)")


@dataclass(frozen=True)
class EvalConfig:
    """How a finished run is measured."""

    images: int = 512
    """first test images of the redundancy report; accuracy is always that of all"""
    batch_size: int = 256

    def __post_init__(self) -> None:
        require(self.images >= 1, "eval.images", self.images, "at least 1")
        require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True)
class DiverseStudy(StudyConfig):
    """The study: every arm at every seed; arms of one seed share initial weights, order and augmentation."""

    arms: dict[str, dict[str, Any]] = field(default_factory=lambda: {"plain": {}})
    """name and objective of each arm; plain has none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.arms.get("plain") == {}, "study.arms", list(self.arms), "arms that begin with plain: {}")
        for name in self.arms:
            self.objective(name)

    def objective(self, arm: str) -> ObjectiveConfig:
        """The objective of one arm. Raises `ConfigError` where its settings are none."""
        settings, known = self.arms[arm], asdict(ObjectiveConfig())
        require(isinstance(settings, dict), f"study.arms.{arm}", settings, "a mapping of objective settings")
        for key, value in settings.items():
            require(key in known, f"study.arms.{arm}", key, f"among {', '.join(known)}")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = number if isinstance(known[key], float) else isinstance(value, type(known[key]))
            require(fits, f"study.arms.{arm}.{key}", value, f"a {type(known[key]).__name__}")
        try:
            return ObjectiveConfig(**settings)
        except ConfigError as error:
            raise ConfigError(f"study.arms.{arm}: {error}") from error


@dataclass(frozen=True)
class Config:
    """One training run."""

    seed: int = 0
    """of the initial weights, the order of the images, augmentation and start vectors"""
    data: DataConfig = field(default_factory=lambda: DataConfig(val=0.0))
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    study: DiverseStudy = field(default_factory=DiverseStudy)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "at least 0")


def _require_weight(name: str, weight: float) -> None:
    require(0 <= weight < float("inf"), f"objective.{name}", weight, "at least 0 and finite")
