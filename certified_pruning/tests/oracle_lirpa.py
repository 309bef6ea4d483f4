"""auto_LiRPA 0.3 as an oracle for our bounds. Tests only; nothing in the product imports it.

The release (2022, the last one on PyPI) does not run on current torch and numpy; the shims below supply what was moved
or removed since, and undo one silent failure: alpha is clamped inside its graph and starts at the bounds of the clamp,
where its gradient has become 0, so that alpha-CROWN returns exactly the CROWN bound (spec f, T2 to T4).
Install with `pip install --no-deps auto_LiRPA==0.3 appdirs`: its metadata asks for torch < 1.13.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certified_pruning.ibp import PreBounds


def _patch_imports() -> None:
    if "numpy.lib.arraysetops" not in sys.modules:
        module = types.ModuleType("numpy.lib.arraysetops")
        module.isin = np.isin  # type: ignore[attr-defined]
        sys.modules["numpy.lib.arraysetops"] = module
    # Not `from torch.onnx import ...`, which gives other module objects than the ones the library will import from.
    symbolic_helper, utils = (importlib.import_module(f"torch.onnx.{name}") for name in ("symbolic_helper", "utils"))
    if not hasattr(symbolic_helper, "_set_opset_version"):
        from torch.onnx._internal.torchscript_exporter._globals import GLOBALS

        def set_opset_version(version: int) -> None:
            GLOBALS.export_onnx_opset_version = version

        symbolic_helper._set_opset_version = set_opset_version
    if not hasattr(utils, "_optimize_graph"):
        from torch.onnx._internal.torchscript_exporter import utils as moved

        utils._optimize_graph = moved._optimize_graph
    if not hasattr(torch.onnx, "OperatorExportTypes"):
        torch.onnx.OperatorExportTypes = torch._C._onnx.OperatorExportTypes  # type: ignore[misc]
    if not hasattr(torch._C.Node, "__getitem__"):
        torch._C.Node.__getitem__ = lambda node, key: getattr(node, node.kindOf(key))(key)  # type: ignore[attr-defined]


def _patch_library() -> None:
    from auto_LiRPA import BoundedModule
    from auto_LiRPA.operators.activation import BoundRelu

    original = BoundedModule._named_members

    def named_members(self: Any, get: Any, prefix: str = "", recurse: bool = True, **_: Any) -> Iterator[Any]:
        return original(self, get, prefix, recurse)

    def mask_alpha(lower: Tensor, upper: Tensor, lb_slope: Tensor | None, ub_slope: Tensor | None) -> tuple:
        on, off = (lower >= 0).to(lower.dtype), upper <= 0
        free = (1.0 - on) * (1.0 - off.to(upper.dtype))
        slopes = [None if slope is None else slope * free + on for slope in (lb_slope, ub_slope)]
        return slopes[0], slopes[1], off.all()

    if getattr(BoundedModule._named_members, "__name__", "") != "named_members":
        BoundedModule._named_members = named_members
    BoundRelu._relu_mask_alpha = staticmethod(mask_alpha)


@contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Oracle:
    """Bounds of auto_LiRPA for one model and one box.

    Args:
        model: chain in eval mode.
        x_lb, x_ub: (batch, ...) box.
    """

    def __init__(self, model: nn.Module, x_lb: Tensor, x_ub: Tensor) -> None:
        _patch_imports()
        with _quiet():
            from auto_LiRPA import BoundedModule, BoundedTensor
            from auto_LiRPA.perturbations import PerturbationLpNorm

            _patch_library()
            options = {
                "sparse_features_alpha": False,
                "optimize_bound_args": {
                    "iteration": 101,  # evaluations: 100 steps
                    "lr_alpha": 0.1,
                    "lr_decay": 0.98,
                    "early_stop_patience": 1000,
                },
            }
            self.module = BoundedModule(model, x_lb, bound_opts=options)
        self.x = BoundedTensor(x_lb, PerturbationLpNorm(norm=np.inf, x_L=x_lb, x_U=x_ub))
        self.bound_args = options["optimize_bound_args"]

    def margins(self, C: Tensor, method: str, pre: PreBounds | None = None) -> Tensor:
        """Lower bounds (batch, S) of C logits; method IBP, CROWN-IBP, CROWN or CROWN-Optimized.

        Args:
            pre: keep these bounds of the ReLU inputs instead of computing them.
        """
        fixed = None
        if pre is not None:
            names = [relu.inputs[0].name for relu in self.module.relus]
            shapes = [relu.inputs[0].output_shape[1:] for relu in self.module.relus]
            fixed = {
                name: [bound.reshape(-1, *shape) for bound in bounds]
                for name, bounds, shape in zip(names, pre, shapes, strict=True)
            }
        with _quiet():
            lb, _ = self.module.compute_bounds(
                x=(self.x,), C=C, method=method, bound_upper=False, intermediate_layer_bounds=fixed
            )
        return lb.detach()

    def pre(self) -> PreBounds:
        """Bounds of the ReLU inputs that the last call of `margins` used, flattened."""
        nodes = [relu.inputs[0] for relu in self.module.relus]
        return [(node.lower.flatten(1).detach(), node.upper.flatten(1).detach()) for node in nodes]
