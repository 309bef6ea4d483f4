"""Diversity for vision transformers (arXiv 2203.06345): for any timm ViT, regularizers and a redundancy report."""

from diverse_vit.cosines import contrastive, cosine
from diverse_vit.orthogonality import cno
from diverse_vit.patch_mixup import MixedBatch, PatchMixup
from diverse_vit.redundancy import redundancy_report
from diverse_vit.regularizer import DiverseRegularizer
from diverse_vit.token_loss import token_cross_entropy

__all__ = [
    "DiverseRegularizer",
    "MixedBatch",
    "PatchMixup",
    "cno",
    "contrastive",
    "cosine",
    "redundancy_report",
    "token_cross_entropy",
]
