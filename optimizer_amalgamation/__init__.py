"""Optimizer amalgamation (arXiv 2203.06474): one learnt optimiser out of a pool of analytical ones."""

from optimizer_amalgamation.choice import ChoiceRule
from optimizer_amalgamation.optimizers import (
    AddSign,
    AmalgamatedOptimizer,
    ChoiceOptimizer,
    LearnedGD,
    PoolAdam,
    PoolMomentum,
    PoolRMSProp,
    PoolSGD,
    PowerSign,
    ScaleOptimizer,
)
from optimizer_amalgamation.pool import LARGE_CHOICE, LARGE_TEACHERS, SMALL_CHOICE, SMALL_TEACHERS, Pool, Teacher
from optimizer_amalgamation.rule import Context
from optimizer_amalgamation.scale import ScaleRule
from optimizer_amalgamation.students import OriginalRule, StudentRule
from optimizer_amalgamation.weights import load_keras_npz, load_weights, provenance, save_weights, shipped

__all__ = [
    "LARGE_CHOICE",
    "LARGE_TEACHERS",
    "SMALL_CHOICE",
    "SMALL_TEACHERS",
    "AddSign",
    "AmalgamatedOptimizer",
    "ChoiceOptimizer",
    "ChoiceRule",
    "Context",
    "LearnedGD",
    "OriginalRule",
    "Pool",
    "PoolAdam",
    "PoolMomentum",
    "PoolRMSProp",
    "PoolSGD",
    "PowerSign",
    "ScaleOptimizer",
    "ScaleRule",
    "StudentRule",
    "Teacher",
    "load_keras_npz",
    "load_weights",
    "provenance",
    "save_weights",
    "shipped",
]
