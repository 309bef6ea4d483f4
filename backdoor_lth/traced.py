"""The computation graph of a network in eval mode, its operations sorted into the few kinds that compaction knows."""

import copy
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CHANNELWISE_MODULES = (nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.MaxPool2d)
LINEAR_MODULES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
SAME_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d)
CHANNELWISE_FUNCTIONS = (F.max_pool2d,)
LINEAR_FUNCTIONS = (F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, "mean")
RELU_FUNCTIONS = (F.relu, torch.relu, "relu")


def anchor(model: nn.Module) -> Tensor:
    """A tensor of the model's device and type; an empty float32 one where it holds none."""
    return next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))


def called(node: fx.Node) -> str:
    """What a node does, in words."""
    return f"{node.op} {getattr(node.target, '__name__', node.target)}"


class UnsupportedError(Exception):
    """An operation that compaction does not know."""


class Traced:
    """Nodes in order and the modules they call, batch norm behind a convolution fused into it.

    Raises what torch.fx raises where a network cannot be traced, `UnsupportedError` where it writes over a value that
    something else reads later.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval()
        self.nodes = list(fx.symbolic_trace(self.model).graph.nodes)
        self.like = anchor(self.model)
        for place, node in enumerate(self.nodes):
            inplace = node.target is operator.iadd or node.kwargs.get("inplace")
            if node.op == "call_module":
                inplace = getattr(self.model.get_submodule(str(node.target)), "inplace", False)
            if inplace and not node.all_input_nodes[0].users.keys().isdisjoint(self.nodes[place + 1 :]):
                raise UnsupportedError(f"{called(node)} in place")
        for module in self.model.modules():
            if hasattr(module, "inplace"):  # what is left of a sum may be another node's own value
                module.inplace = False  # type: ignore[assignment]
        self._fuse()

    def loaded(self, state: Mapping[str, Tensor]) -> "Traced":
        """The same graph with other weights; it becomes this one."""
        self.model.load_state_dict(state)
        self._fuse()
        return self

    def _fuse(self) -> None:
        self.modules, self.fused = dict(self.model.named_modules()), set()
        calls = Counter(node.target for node in self.nodes if node.op == "call_module")
        for node in self.nodes:
            if node.op == "call_module" and self.kind(node) == "norm":
                conv = node.all_input_nodes[0]
                once = conv.op == "call_module" and calls[conv.target] == len(conv.users) == 1
                if once and isinstance(self.module(conv), nn.Conv2d):
                    self.modules[conv.target] = fuse_conv_bn_eval(self.module(conv), self.module(node))
                    self.fused.add(node)

    def module(self, node: fx.Node) -> Any:
        """What a call_module node calls."""
        return self.modules[str(node.target)]

    def kind(self, node: fx.Node) -> str:
        """placeholder, output, conv, linear, norm, add, cat, pad, flatten; of one channel each: relu, same (nothing is
        done), pixels (linear in them), channelwise (anything else). Raises `UnsupportedError`."""
        if node.op in ("placeholder", "output"):
            return node.op
        if node in self.fused:
            return "same"
        if node.op == "call_module":
            found = self._module_kind(self.module(node))
        else:
            found = "" if node.op == "get_attr" else _function_kind(node)
        if not found:
            raise UnsupportedError(called(node))
        return found

    @staticmethod
    def _module_kind(module: nn.Module) -> str:
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
            return "conv"
        if isinstance(module, nn.Linear):
            return "linear"
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            return "norm"
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return "flatten"
        kinds = (
            ("relu", nn.ReLU),
            ("same", SAME_MODULES),
            ("pixels", LINEAR_MODULES),
            ("channelwise", CHANNELWISE_MODULES),
        )
        return next((kind for kind, classes in kinds if isinstance(module, classes)), "")

    def function(self, node: fx.Node) -> Callable[[Tensor], Tensor]:
        """A node of one channel each as a function of its first argument."""
        if node in self.fused:
            return lambda x: x
        if node.op == "call_module":
            return self.module(node)  # type: ignore[no-any-return]
        if self.kind(node) == "relu":
            return F.relu
        if node.op == "call_method":
            return lambda x: getattr(x, str(node.target))(*node.args[1:], **node.kwargs)
        return lambda x: node.target(x, *node.args[1:], **node.kwargs)  # type: ignore[operator]


def _function_kind(node: fx.Node) -> str:
    target: Any = node.target
    rest: Any = node.args[1:]
    kinds = (("relu", RELU_FUNCTIONS), ("pixels", LINEAR_FUNCTIONS), ("channelwise", CHANNELWISE_FUNCTIONS))
    for kind, functions in kinds:
        if target in functions:
            return kind
    if target is F.pad:
        channels = len(rest) == 1 and len(rest[0]) == 6 and not any(rest[0][:4]) and min(rest[0]) >= 0
        return "pad" if channels and not node.kwargs.get("value") else ""
    if node.kwargs:
        return ""
    if target in (operator.add, operator.iadd, torch.add) and len(node.all_input_nodes) == 2:
        return "add"
    if target in (torch.flatten, "flatten") and rest == (1,):
        return "flatten"
    if target is torch.cat and rest == (1,) and list(node.args[0]) == node.all_input_nodes:  # type: ignore[arg-type]
        return "cat"
    return "pixels" if target is operator.getitem and _keeps_channels(rest[0]) else ""


def normalization(module: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift, (channels,), of a batch norm in eval mode."""
    assert module.running_mean is not None and module.running_var is not None
    scale = (module.running_var + module.eps).rsqrt()
    scale = scale * module.weight if module.affine else scale
    return scale, (module.bias if module.affine else 0) - module.running_mean * scale


def _keeps_channels(index: Any) -> bool:
    """Whether an index leaves the first two axes whole."""
    return isinstance(index, tuple) and len(index) >= 2 and index[:2] == (slice(None), slice(None))
