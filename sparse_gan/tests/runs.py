"""The small configuration that the tests train and measure."""

from __future__ import annotations

from pathlib import Path

from common.config import parse
from sparse_gan.settings import Config

CONFIGS = Path(__file__).parents[1] / "configs"


def arguments(*options: object) -> list[str]:
    """The smoke configuration with options, as a command line."""
    return ["--config", str(CONFIGS / "smoke.yaml"), *map(str, options)]


def smoke(*options: object) -> Config:
    """The smoke configuration with options."""
    return parse(Config, arguments(*options), prog="train.py")
