"""APP, Anytime Progressive Pruning: pruning along a stream of data (arXiv 2204.01640)."""

from app_progressive.metrics import AnytimeMetrics, generalization_gap
from app_progressive.prunable import prunable
from app_progressive.pruner import AnytimePruner, OneShotPruner
from app_progressive.schedules import delta_schedule, density_schedule
from app_progressive.scores import scores
from app_progressive.stream import MegabatchStream
from app_progressive.threshold import threshold

__all__ = [
    "AnytimeMetrics",
    "AnytimePruner",
    "MegabatchStream",
    "OneShotPruner",
    "delta_schedule",
    "density_schedule",
    "generalization_gap",
    "prunable",
    "scores",
    "threshold",
]
