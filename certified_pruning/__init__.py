"""Pruning for certified robustness (arXiv 2206.07311): stability-regularised tickets and a complete verifier."""

from certified_pruning.chain import ChainNet
from certified_pruning.compress import compress_channels
from certified_pruning.fgsm import fgsm_gradalign_loss, fgsm_random_start_loss
from certified_pruning.nrs import nrs_loss
from certified_pruning.pruners import prune
from certified_pruning.verdicts import VerifyConfig
from certified_pruning.verifier import CompleteVerifier

__all__ = [
    "ChainNet",
    "CompleteVerifier",
    "VerifyConfig",
    "compress_channels",
    "fgsm_gradalign_loss",
    "fgsm_random_start_loss",
    "nrs_loss",
    "prune",
]
