"""Symbolic learning to optimise (arXiv 2203.06578): a learnt optimiser, read off as an equation and used as one."""

from symbolic_l2o.distill import distill
from symbolic_l2o.meta_gradient import meta_gradient
from symbolic_l2o.meta_training import meta_train
from symbolic_l2o.optimizer import SymbolicOptimizer
from symbolic_l2o.presets import presets
from symbolic_l2o.records import collect
from symbolic_l2o.rule import SymbolicRule
from symbolic_l2o.tuning import meta_tune

__all__ = [
    "SymbolicOptimizer",
    "SymbolicRule",
    "collect",
    "distill",
    "meta_gradient",
    "meta_train",
    "meta_tune",
    "presets",
]
