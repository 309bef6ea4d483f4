"""The configuration of one training run and of the study; every YAML in configs/ fills this."""

from dataclasses import asdict, dataclass, field
from typing import Any

from common.config import ConfigError, require
from common.data import DataConfig
from common.runs import RunConfig
from common.study import StudyConfig
from common.vit import ViTConfig, ViTTrainConfig
from diverse_vit.library import EXTRAS


@dataclass(frozen=True)
class ModelConfig(ViTConfig):
    """The network."""

    patch: int = 7
    """side in pixels of a patch, of which the last layer has one token: of vit, or of the timm model (Swin: 32)"""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is added to the cross-entropy, with its weights; nothing at all is the plain network."""

    mix: bool = False
    """cross-entropy of every patch against its own label; on or off, it has no weight; with mixup, cutmix or emb_*"""
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

    def parts_patches(self) -> bool:
        """Whether a term drives patches apart, against the pull of one label for all of them."""
        extra = any(weight for name, weight in self.extra.items() if name.startswith("emb_"))
        return self.emb_cos > 0 or self.emb_nce > 0 or extra


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
    train: ViTTrainConfig = field(default_factory=ViTTrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    study: DiverseStudy = field(default_factory=DiverseStudy)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        batch, mixing = self.train.batch_size, self.train.mixup > 0 or self.train.cutmix > 0
        require(not (mixing and batch % 2), "train.batch_size", batch, "even with mixup or cutmix")
        self.check_mix(self.objective, "objective")

    def check_mix(self, objective: ObjectiveConfig, name: str) -> None:
        """Raise `ConfigError` where every patch would have the image's label and nothing against it (spec i)."""
        mixing = self.train.mixup > 0 or self.train.cutmix > 0
        alone = objective.mix and not mixing and not objective.parts_patches()
        require(not alone, f"{name}.mix", True, "false without mixup, cutmix or an embedding term")


def _require_weight(name: str, weight: float) -> None:
    require(0 <= weight < float("inf"), f"objective.{name}", weight, "at least 0 and finite")
