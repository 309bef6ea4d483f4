"""auto_LiRPA 0.3 on today's torch and numpy: bounds of any graph it can parse, such as a residual net (Xu et al. 2020).

Our own engine (`ChainNet`, `CompleteVerifier`) bounds chains, and is the one to use on them. This file serves graphs
that are no chains, CROWN-IBP training by the library the paper used, and the tests, which hold our engine against it.

The release of 2022, the last one on PyPI, neither imports nor runs here as it is. `library` mends, once and only when
asked (spec f, T2 to T4): what torch and numpy moved since; `_named_members`, which torch calls with a new argument;
and a silent failure: alpha-CROWN clamps alpha inside its graph and starts it at the bounds of the clamp, where the
gradient has become 0, so that without any error it returns exactly the CROWN bound (`repaired=False` shows it).
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from certified_pruning.ibp import PreBounds
from certified_pruning.optional import MissingPackageError, need
from certified_pruning.train_ibp import check_box

VERSION = "0.3"
INSTALL = f"--no-deps auto_LiRPA=={VERSION} appdirs"
"""Its metadata asks for torch < 1.13, hence --no-deps; appdirs is what it imports at run time."""

Method = Literal["ibp", "crown-ibp", "crown", "alpha-crown"]
METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")

BoundedModule = Any
"""auto_LiRPA.BoundedModule: the library has no types, and is not imported before it is used."""


@functools.cache
def library() -> types.ModuleType:
    """The package auto_LiRPA, adapted; the first call imports and adapts it.

    Raises:
        MissingPackageError: it is absent, or another version, which these repairs do not fit.
    """
    _supply_what_moved()
    with _contained():
        package = need("auto_LiRPA", INSTALL)
        if package.__version__ != VERSION:
            raise MissingPackageError(f"auto_LiRPA must be {VERSION}, got {package.__version__}; pip install {INSTALL}")
        relu = importlib.import_module("auto_LiRPA.operators.activation").BoundRelu
        weights = importlib.import_module("auto_LiRPA.operators.leaf").BoundParams
    if not hasattr(relu, "_upstream_mask_alpha"):
        relu._upstream_mask_alpha, relu._relu_mask_alpha = relu._relu_mask_alpha, staticmethod(_mask_alpha)
        weights.forward = lambda node: node.param  # upstream freezes the network's own weights in eval mode
        members = package.BoundedModule._named_members
        package.BoundedModule._named_members = lambda *given, remove_duplicate=True, **named: members(*given, **named)
    return package


def bounded(
    model: nn.Module, input_shape: Sequence[int], device: torch.device | str | None = None, steps: int = 100
) -> BoundedModule:
    """The model as a graph the library can bound; weights and running statistics stay those of `model`, shared.

    Args:
        model: any graph of layers the library knows; it keeps its train or eval mode, which the result has too. In
            train mode call the result on the clean batch first: bounds then use that batch's statistics.
        input_shape: of one input, e.g. (3, 32, 32).
        device: where to work; the model is moved there. None: where the model is.
        steps: of Adam in alpha-CROWN (lr 0.1, decay 0.98), where a call does not say.

    Raises:
        MissingPackageError: see `library`. ValueError: the library knows no bound for a layer, or parsing failed.
    """
    package = library()
    if device is not None:
        model.to(device)
    like = next(model.parameters(), torch.zeros(()))
    # The default corrupts shapes when over 90 % of a layer is unstable somewhere in the batch (T3).
    options = {"sparse_features_alpha": False, "optimize_bound_args": {"lr_alpha": 0.1, "lr_decay": 0.98}}
    modes = {module: module.training for module in model.modules()}
    model.eval()  # the parser knows batch norm in this mode only
    try:
        module = package.BoundedModule(model, torch.zeros(1, *input_shape).to(like), bound_opts=options)
    except (NotImplementedError, RuntimeError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"model must be a graph that auto_LiRPA {VERSION} can parse, got {_line(error)}") from error
    finally:
        for part, mode in modes.items():
            part.training = mode
    buffers = dict(model.named_buffers())
    for node in module._modules.values():
        if getattr(node, "ori_name", None) in buffers and "buffer" in node._buffers:
            node._buffers["buffer"] = buffers[node.ori_name]  # the library copies it, and would train the copy
    module.train(model.training)
    module.steps = steps
    module.n_out = module.final_shape[-1]  # final_shape itself changes with the first C
    return module


def lirpa_margins(
    model: nn.Module | BoundedModule,
    x_lb: Tensor,
    x_ub: Tensor,
    C: Tensor,
    method: Method = "crown",
    steps: int | None = None,
    *,
    pre: PreBounds | None = None,
    repaired: bool = True,
) -> Tensor:
    """Lower bounds (B, S) of C . logits over a box: incomplete verification of any graph the library can parse.

    Args:
        model: a network in eval mode, or what `bounded` made of one.
        x_lb, x_ub: box (B, ...) in the network's (normalised) coordinates, of the type of its weights.
        C: specification rows (B, S, out), e.g. e_y - e_t; see `margin_spec`.
        method: ibp; crown-ibp, crown: interval, CROWN bounds inside; alpha-crown: CROWN bounds inside, then the
            slopes of the last bound optimised, for ReLUs (Heaviside layers stay at the CROWN bound).
        steps: of alpha-crown; None: those given to `bounded`, or 100.
        pre: bounds of the ReLU inputs to use instead of the library's own, in its order of ReLUs.
        repaired: False leaves alpha-crown as released: on torch 2.14 it then equals crown, on 2.9 not.

    Raises:
        ValueError: an unknown method, steps < 0, train mode, shapes that do not fit, x_lb > x_ub, NaN or Inf; see
            `bounded`.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if steps is not None and steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}")
    if model.training:
        raise ValueError("model must be in eval mode (call model.eval()), got train mode")
    module = cast(Any, model) if hasattr(model, "compute_bounds") else bounded(model, x_lb.shape[1:])
    x = _perturbed(module, x_lb, x_ub, C)
    inside = None if pre is None else _named(module, pre)
    steps = module.steps if steps is None else steps
    if method != "alpha-crown" or steps == 0:
        names = {"ibp": "IBP", "crown-ibp": "CROWN-IBP"}
        with torch.no_grad():
            return _lower(module, x, C, names.get(method, "CROWN"), inside)
    if inside is None:
        with torch.no_grad():  # or every step would compute them anew
            _lower(module, x, C, "CROWN", None)
        nodes = [node.inputs[0] for node in module.optimizable_activations]
        inside = {node.name: [node.lower.detach(), node.upper.detach()] for node in nodes}
    # The library counts evaluations, one more than steps.
    module.bound_opts["optimize_bound_args"] |= {"iteration": steps + 1, "early_stop_patience": steps + 1}
    released = nullcontext() if repaired else _alpha_as_released()
    with torch.enable_grad(), _default_dtype(x.dtype), _frozen(module), released:
        return _lower(module, x, C, "CROWN-Optimized", inside).detach()


def crown_ibp_margins(bounded_model: BoundedModule, x_lb: Tensor, x_ub: Tensor, C: Tensor, eps_frac: float) -> Tensor:
    """(1 - eps_frac) CROWN-IBP + eps_frac IBP: lower bounds (B, S) of C . logits to train on (Zhang et al. 2020).

    Differentiable in the weights that `bounded_model` shares with its network, without loss fusion (spec c.4).

    Args:
        bounded_model: from `bounded`. In train mode, call it on the clean batch first, as often as it is to update the
            running statistics: the bounds use that batch's mean and biased variance, gradient included.
        x_lb, x_ub: box (B, ...) in the network's coordinates.
        C: specification rows (B, S, out).
        eps_frac: eps / eps_max in [0, 1]; 1 is IBP alone.

    Raises:
        ValueError: eps_frac outside [0, 1]; shapes that do not fit, x_lb > x_ub, NaN or Inf.
    """
    if not 0 <= eps_frac <= 1:
        raise ValueError(f"eps_frac must be in [0, 1], got {eps_frac}")
    x = _perturbed(bounded_model, x_lb, x_ub, C)
    if eps_frac == 1:
        return _lower(bounded_model, x, C, "IBP", None)
    crown = _lower(bounded_model, x, C, "CROWN-IBP", None)
    return (1 - eps_frac) * crown + eps_frac * bounded_model.ibp_lower


def relu_input_bounds(module: BoundedModule) -> PreBounds:
    """Bounds of the ReLU inputs that the last call on `module` used, flattened, in the library's order."""
    nodes = [relu.inputs[0] for relu in module.relus]
    return [(node.lower.flatten(1).detach(), node.upper.flatten(1).detach()) for node in nodes]


def _lower(module: BoundedModule, x: Any, C: Tensor, method: str, inside: dict[str, list[Tensor]] | None) -> Tensor:
    try:
        bounds = module.compute_bounds(x=(x,), C=C, method=method, bound_upper=False, intermediate_layer_bounds=inside)
    except (NotImplementedError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"model must have layers that auto_LiRPA {VERSION} bounds by {method}, got {_line(error)}"
        ) from error
    return cast(Tensor, bounds[0])


def _perturbed(module: BoundedModule, x_lb: Tensor, x_ub: Tensor, C: Tensor) -> Any:
    check_box(x_lb, x_ub)
    out = module.n_out
    if C.dim() != 3 or len(C) != len(x_lb) or C.shape[2] != out:
        raise ValueError(f"C must have shape ({len(x_lb)}, S, {out}), got {tuple(C.shape)}")
    package = library()
    ball = package.PerturbationLpNorm(norm=np.inf, x_L=x_lb, x_U=x_ub)
    return package.BoundedTensor(x_lb, ball)


def _named(module: BoundedModule, pre: PreBounds) -> dict[str, list[Tensor]]:
    """Flat bounds of the ReLU inputs, shaped and named as the library wants them."""
    nodes = [relu.inputs[0] for relu in module.relus]
    if len(pre) != len(nodes):
        raise ValueError(f"pre must have bounds of {len(nodes)} ReLU layers, got {len(pre)}")
    pairs = zip(nodes, pre, strict=True)
    return {node.name: [bound.unflatten(1, node.output_shape[1:]) for bound in pair] for node, pair in pairs}


@contextmanager
def _contained() -> Iterator[None]:
    """The library's import sets the warning filter and the root logger of the whole process: both are put back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with warnings.catch_warnings(record=True):  # a filter would not do: the import puts its own before it
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@contextmanager
def _frozen(module: BoundedModule) -> Iterator[None]:
    """No gradients for the weights: the library's alpha loop calls a bare `backward`."""
    free = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in free:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in free:
            parameter.requires_grad_(True)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The alpha loop keeps its best bounds in torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _alpha_as_released() -> Iterator[None]:
    relu = importlib.import_module("auto_LiRPA.operators.activation").BoundRelu
    relu._relu_mask_alpha = staticmethod(relu._upstream_mask_alpha)
    try:
        yield
    finally:
        relu._relu_mask_alpha = staticmethod(_mask_alpha)


def _supply_what_moved() -> None:
    """T4: names that the release imports and that torch and numpy have moved or dropped."""
    if "numpy.lib.arraysetops" not in sys.modules:
        module = types.ModuleType("numpy.lib.arraysetops")
        module.isin = np.isin  # type: ignore[attr-defined]
        sys.modules["numpy.lib.arraysetops"] = module
    # Not `from torch.onnx import ...`, which gives other module objects than the ones the library will import from.
    helper, utils = (cast(Any, importlib.import_module(f"torch.onnx.{name}")) for name in ("symbolic_helper", "utils"))
    exporter = "torch.onnx._internal.torchscript_exporter"
    moved, settings = (cast(Any, importlib.import_module(f"{exporter}.{name}")) for name in ("utils", "_globals"))
    if not hasattr(helper, "_set_opset_version"):
        helper._set_opset_version = lambda version: setattr(settings.GLOBALS, "export_onnx_opset_version", version)
    if not hasattr(utils, "_optimize_graph"):
        utils._optimize_graph = moved._optimize_graph
    onnx, node = cast(Any, torch.onnx), cast(Any, torch._C.Node)
    if not hasattr(onnx, "OperatorExportTypes"):
        onnx.OperatorExportTypes = torch._C._onnx.OperatorExportTypes
    if not hasattr(node, "__getitem__"):
        node.__getitem__ = lambda self, key: getattr(self, self.kindOf(key))(key)


def _mask_alpha(lower: Tensor, upper: Tensor, lb_slope: Tensor | None, ub_slope: Tensor | None) -> tuple[Any, ...]:
    """T2: upstream's formula without the clamp of alpha, which is projected on [0, 1] after each step anyway."""
    on, off = (lower >= 0).to(lower.dtype), upper <= 0
    free = (1.0 - on) * (1.0 - off.to(upper.dtype))
    slopes = [None if slope is None else slope * free + on for slope in (lb_slope, ub_slope)]
    return slopes[0], slopes[1], off.all()


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
