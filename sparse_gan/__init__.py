"""Sparse-to-sparse GAN training (STU-GAN, arXiv 2203.02770): pieces for any generator, Adam or SGD."""

from sparse_gan.dynamic_sparsity import DynamicSparsity
from sparse_gan.flops import sparse_flops
from sparse_gan.generative_evaluator import GenerativeEvaluator, frechet_distance
from sparse_gan.masked_adam import MaskedAdam
from sparse_gan.models import build_discriminator, build_generator
from sparse_gan.pruning import sparse_masks
from sparse_gan.sparse_ema import SparseEMA

__all__ = [
    "DynamicSparsity",
    "GenerativeEvaluator",
    "MaskedAdam",
    "SparseEMA",
    "build_discriminator",
    "build_generator",
    "frechet_distance",
    "sparse_flops",
    "sparse_masks",
]
