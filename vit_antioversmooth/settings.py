"""The configuration of one training run and of the study; every YAML in configs/ fills this."""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from common.config import require
from common.data import DataConfig
from common.runs import RunConfig
from common.study import StudyConfig
from common.vit import ViTConfig, ViTTrainConfig

ARMS = (
    "plain",
    "attnscale",
    "featscale",
    "both",
    "attnscale-control",
    "featscale-control",
    "noskip-plain",
    "noskip-attnscale",
    "init",
)


@dataclass(frozen=True)
class ModelConfig(ViTConfig):
    """The network."""

    skip: bool = True
    """of vit: skip connection around attention"""
    drop: float = 0.0
    """dropout of embedding, projections and MLPs"""
    weights: str = ""
    """start from this file: model.pt of a run, or a state dict (.safetensors, .pth), timm's or the authors' names"""
    featscale_count: int = 1
    """how often the code behind `weights` adds FeatScale: 2 for released DeiT weights, else 1"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.skip or self.name == "vit", "model.skip", self.skip, "true for a timm model")
        require(0 <= self.drop < 1, "model.drop", self.drop, "in [0, 1)")
        fits = not (self.pretrained and self.weights)
        require(fits, "model.pretrained", self.pretrained, "false beside model.weights")
        require(self.featscale_count in (1, 2), "model.featscale_count", self.featscale_count, "1 or 2")


@dataclass(frozen=True)
class ScaleConfig:
    """Which scales the network carries."""

    method: Literal["plain", "attnscale", "featscale", "both"] = "plain"
    blind: bool = False
    """the frequency-blind control: (1 + omega) A, with as many parameters, or s = t, with half as many"""
    init: float = 0.0
    """of omega; s and t start at 0"""
    learn: bool = True
    """false keeps the scales as they start"""
    include_prefix: bool = True
    """class, distillation and register tokens count in the means, as in the authors' code"""
    share: Literal["none", "heads", "layers"] = "none"
    """one omega for all heads of a layer, or one a head for all layers"""
    per_channel: bool = True
    """false: one s and one t a layer"""
    lr_mult: float = 1.0
    """learning rate of the scales over that of the weights; 1 in the paper, more where a run is short"""

    def __post_init__(self) -> None:
        require(abs(self.init) < 1e6, "scales.init", self.init, "a finite number below 1e6")
        require(0 < self.lr_mult < math.inf, "scales.lr_mult", self.lr_mult, "positive and finite")
        tied = self.blind and self.method in ("plain", "both")
        require(not tied, "scales.blind", self.blind, "false unless scales.method is attnscale or featscale")


@dataclass(frozen=True)
class EvalConfig:
    """How many test images are looked into; accuracy is always that of all."""

    probe_images: int = 500
    """for frequencies, cosines and maps"""
    theory_images: int = 32
    """for the theorems, in float64; plain vision transformers only"""
    batch_size: int = 250

    def __post_init__(self) -> None:
        require(self.probe_images >= 1, "eval.probe_images", self.probe_images, "at least 1")
        require(self.theory_images >= 1, "eval.theory_images", self.theory_images, "at least 1")
        require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True)
class ScaleStudy(StudyConfig):
    """The study: every arm at every seed; arms of one seed share initial weights, order and augmentation."""

    arms: list[str] = field(default_factory=lambda: list(ARMS))
    """what to compare; init trains nothing"""
    omegas: list[float] = field(default_factory=lambda: [0.0, 1.0, 4.0, 20.0])
    """of the dose response at initialisation"""
    noskip_depth: int = 8
    """blocks of the arms without attention skip"""
    noskip_epochs: int = 6
    noskip_init: float = 20.0
    """omega of noskip-attnscale at the start"""
    tune_epochs: int = 2
    """of fine-tuning the plain network with and without fresh scales; 0: none"""
    tune_lr: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = set(self.arms) - set(ARMS)
        require(
            not unknown and "plain" in self.arms, "study.arms", self.arms, f"plain and any of {', '.join(ARMS[1:])}"
        )
        require(len(set(self.arms)) == len(self.arms), "study.arms", self.arms, "without repetition")
        rising = all(one < next_one for one, next_one in pairwise(self.omegas))
        allowed = len(self.omegas) >= 2 and all(abs(omega) < 1e6 for omega in self.omegas) and rising
        require(
            allowed, "study.omegas", self.omegas, "at least two finite numbers below 1e6, each above the one before"
        )
        require(self.noskip_depth >= 1, "study.noskip_depth", self.noskip_depth, "at least 1")
        require(self.noskip_epochs >= 1, "study.noskip_epochs", self.noskip_epochs, "at least 1")
        require(abs(self.noskip_init) < 1e6, "study.noskip_init", self.noskip_init, "a finite number below 1e6")
        require(self.tune_epochs >= 0, "study.tune_epochs", self.tune_epochs, "at least 0")
        require(self.tune_lr > 0, "study.tune_lr", self.tune_lr, "positive")


@dataclass(frozen=True)
class Config:
    """One training run."""

    seed: int = 0
    """of the initial weights, the order of the images and all augmentation"""
    data: DataConfig = field(default_factory=lambda: DataConfig(val=0.0))
    model: ModelConfig = field(default_factory=ModelConfig)
    scales: ScaleConfig = field(default_factory=ScaleConfig)
    train: ViTTrainConfig = field(default_factory=ViTTrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    study: ScaleStudy = field(default_factory=ScaleStudy)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        require(self.train.epochs >= 1, "train.epochs", self.train.epochs, "at least 1")
