"""Pruning for certified robustness (arXiv 2206.07311): stability-regularised tickets and a complete verifier."""

from certified_pruning.certified_loss import crown_ibp_loss
from certified_pruning.chain import ChainNet
from certified_pruning.compress import compress_channels
from certified_pruning.fgsm import fgsm_gradalign_loss
from certified_pruning.nrs import nrs_loss
from certified_pruning.tickets import find_ticket
from certified_pruning.verdicts import VerifyConfig
from certified_pruning.verifier import CompleteVerifier

__all__ = [
    "ChainNet",
    "CompleteVerifier",
    "VerifyConfig",
    "compress_channels",
    "crown_ibp_loss",
    "fgsm_gradalign_loss",
    "find_ticket",
    "nrs_loss",
]
