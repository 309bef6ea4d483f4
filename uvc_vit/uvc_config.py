"""The settings of the compression itself."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.config import load
from uvc_vit.released import ReleasedSettings
from uvc_vit.setting_error import require


@dataclass(frozen=True)
class UVCConfig:
    """Of stage 1. Step sizes of modes solve and fixed are for 200 steps; they are scaled to `stage1_steps`.

    Raises:
        ValueError: naming the setting that cannot be.
    """

    budget: float = 0.5
    """share of the dense model's cost that may stay, classifier not counted"""
    mode: Literal["solve", "fixed", "released"] = "solve"
    """solve: z is solved for at each step; fixed: z by damped dual ascent; released: the authors' code, for audits"""
    accounting: Literal["exact", "released", "latency"] = "exact"
    """exact: removed value dimensions leave qkv too; released: the authors' count; latency: times of `table`"""
    table: str = ""
    """of accounting latency: what python -m uvc_vit.latency wrote"""
    prune: bool = True
    """whether heads, value dimensions and neurons may go"""
    skip: bool = True
    """whether blocks may be skipped"""
    stage1_steps: int = 200
    warmup_steps: int = 0
    """first steps, in which every block runs by half and nothing but the weights moves; the authors': 5 epochs"""
    protect_blocks: list[int] = field(default_factory=list)
    """blocks that are neither pruned nor skipped"""
    align: int = 8
    """in heads wider than this, all of a block keep equally many value dimensions, a multiple of it; 0: any number"""
    es: float = 0.004
    """step of the amounts' shares"""
    ey: float = 0.2
    """step of y"""
    ep: float = 0.2
    """step of p"""
    eg: float = 0.006
    """step of the gates"""
    eta_p: float = 0.03
    """step of the proximal operator"""
    task_weight: float = 1.0
    """of the loss in the gates' gradient"""
    resource_weight: float = 1.0
    """of R in the gates' gradient"""
    z_max: float = 200.0
    """largest z"""
    ez: float = 1.0
    """mode fixed: step of z"""
    mu: float = 80.0
    """mode fixed: weight of R - budget itself in z, against oscillation"""
    tau: float = 0.5
    """temperature of the noisy gates"""
    hard: bool = False
    """noisy gates are 0 or 1, with the soft ones' gradient"""
    released: ReleasedSettings = field(default_factory=ReleasedSettings)
    """of mode released"""

    @classmethod
    def from_yaml(cls, path: Path) -> "UVCConfig":
        """The settings in a file, defaults where it is silent. Raises ConfigError naming what cannot be."""
        return load(cls, path)

    def __post_init__(self) -> None:
        require(0 < self.budget <= 1, "method.budget", self.budget, "in (0, 1]")
        require(self.prune or self.skip or self.budget == 1, "method.prune", self.prune, "true where skip is false")
        timed = self.accounting == "latency"
        require(timed or not self.table, "method.table", self.table, "empty but for accounting latency")
        require(self.stage1_steps >= 1, "method.stage1_steps", self.stage1_steps, "at least 1")
        require(self.warmup_steps >= 0, "method.warmup_steps", self.warmup_steps, "at least 0")
        require(self.align >= 0, "method.align", self.align, "at least 0")
        for name in ("es", "ey", "ep", "eg", "eta_p", "task_weight", "resource_weight", "ez", "mu"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"method.{name}", value, "at least 0 and finite")
        require(0 < self.z_max < math.inf, "method.z_max", self.z_max, "positive and finite")
        require(0 < self.tau < math.inf, "method.tau", self.tau, "positive and finite")
        allowed = "true both, with accounting released, where method.mode is released"
        plain = self.prune and self.skip and self.accounting == "released" and not self.protect_blocks
        require(self.mode != "released" or plain, "method.prune and skip", (self.prune, self.skip), allowed)
