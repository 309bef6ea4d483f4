"""Sparsity can uncover a Trojan's trigger (arXiv 2205.11819), with the controls that say what that means."""

from backdoor_lth.barrier import error_barrier, trojan_score
from backdoor_lth.compaction import compact
from backdoor_lth.detection import anomaly_index, detect
from backdoor_lth.inversion import invert
from backdoor_lth.poisoning import poison
from backdoor_lth.triggers import Trigger

__all__ = ["Trigger", "anomaly_index", "compact", "detect", "error_barrier", "invert", "poison", "trojan_score"]
