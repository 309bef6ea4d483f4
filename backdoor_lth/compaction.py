"""Exact compaction of a sparse network in eval mode: channels that do not depend on the input become constants.

A channel is *live* if a surviving weight connects it to a live input. Every other channel is a fixed map (a map, not a
number: zero padding makes its borders differ), computed once and added where it is read. Live channels that nothing
reads are not computed at all. Equal to the network up to the order of its sums.
"""

import copy
import itertools
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

CHANNELWISE_MODULES = (
    (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish)
    + (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.Dropout, nn.Dropout2d)
)  # fmt: skip
CHANNELWISE_FUNCTIONS = (F.relu, torch.relu, F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, torch.mean)
Run = Callable[..., Tensor]


class _Unsupported(Exception):
    """An operation that the folding does not know."""


@dataclass
class _Channels:
    """What is known of one node's output.

    live: (C,) bool. const: (1, C, ...) values that do not depend on the input, 0 where a channel is live alone.
    bias: the constant part that a live channel still needs at run time, (1, C, ...).
    needed: (C,) bool, filled from the end. kept: positions of what is computed.
    """

    live: Tensor
    const: Tensor
    bias: Tensor | None = None
    needed: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """Positions of the channels to compute: live and read by something."""
        assert self.needed is not None
        return (self.live & self.needed).nonzero().squeeze(1)

    def ask(self, wanted: Tensor) -> None:
        """Something reads these channels."""
        self.needed = wanted if self.needed is None else self.needed | wanted


class Compacted(nn.Module):
    """The computation that is left: eval only. `widths` are the channels computed at each node, by its name."""

    def __init__(self, program: list[tuple[str, Run, list[str]]], widths: dict[str, int], like: Tensor) -> None:
        super().__init__()
        self.register_buffer("anchor", like.new_zeros(()), persistent=False)
        self.program, self.widths = program, widths
        self.training = False

    def train(self, mode: bool = True) -> "Compacted":
        """Only `eval()` is allowed. Raises RuntimeError."""
        if mode:
            raise RuntimeError("a compacted network must stay in eval mode: its batch norm is folded")
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the network it was made of."""
        values = {"input": x}
        for name, run, arguments in self.program:
            values[name] = run(*(values[argument] for argument in arguments))
        return values["output"]


def anchor(model: nn.Module) -> Tensor:
    """A tensor of the model's device and type; an empty float32 one where it holds none."""
    return next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))


@torch.no_grad()
def compact(model: nn.Module, input_shape: Sequence[int]) -> nn.Module:
    """A network that gives the same logits with input-independent channels folded away.

    Gradients with respect to the input are the same too; those of the weights are not available. Convolutions
    (ungrouped), batch norm, linear layers, sums, concatenation, pooling, common activations, slices and channel padding
    are known; with anything else the model itself comes back, with a warning.

    Args:
        model: any module torch.fx can trace; not changed. It is folded as in eval mode.
        input_shape: (channels, height, width).
    """
    try:
        graph: Any = fuse(copy.deepcopy(model).eval())
        return _Folding(graph, tuple(input_shape)).compacted()
    except (_Unsupported, fx.proxy.TraceError, NotImplementedError, TypeError, AttributeError) as error:
        warnings.warn(f"the model is used as it is, not compacted: {error}", stacklevel=2)
        return model


class _Folding:
    """Forward over the graph for live channels and constants, backward for needed ones, then the program."""

    def __init__(self, graph: fx.GraphModule, shape: tuple[int, ...]) -> None:
        self.modules = dict(graph.named_modules())
        self.nodes = [node for node in graph.graph.nodes if node.op != "get_attr"]
        like = next(graph.parameters())
        self.known: dict[fx.Node, _Channels] = {}
        ones = torch.ones(shape[0], dtype=torch.bool, device=like.device)
        self.input = _Channels(ones, like.new_zeros(1, *shape))
        for node in self.nodes:
            self.known[node] = self._forward(node)
        for node in reversed(self.nodes):
            self._backward(node)

    def compacted(self) -> Compacted:
        """The program of what is left."""
        program, names = [], {}
        for node in self.nodes:
            names[node] = "input" if node.op == "placeholder" else node.name
            if node.op == "placeholder":
                continue
            channels = self.known[node]
            if node.op == "output":
                program.append(("output", self._output(node), ["input", names[node.all_input_nodes[0]]]))
            elif len(channels.kept):
                sources = [each for each in node.all_input_nodes if len(self.known[each].kept)]
                program.append((node.name, self._run(node, sources), [names[each] for each in sources]))
        if not len(self.known[self.nodes[-1]].kept):  # nothing depends on the input
            program = [("output", self._output(self.nodes[-1]), ["input", "input"])]
        return Compacted(program, {names[node]: len(self.known[node].kept) for node in self.nodes}, self.input.const)

    def _kind(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "output"):
            return node.op
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
            return "conv"
        if isinstance(module, nn.Linear):
            return "linear"
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            return "norm"
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return "flatten"
        if isinstance(module, CHANNELWISE_MODULES) or node.target in CHANNELWISE_FUNCTIONS:
            return "channelwise"
        if node.op == "call_method":
            if node.target in ("relu", "mean"):
                return "channelwise"
            if node.target == "flatten" and node.args[1:] == (1,):
                return "flatten"
        if node.target in (operator.add, operator.iadd, torch.add) and len(node.all_input_nodes) == 2:
            return "add"
        if node.target is torch.flatten and node.args[1:] == (1,):
            return "flatten"
        if node.target is torch.cat and node.args[1:] == (1,):
            return "cat"
        if node.target is operator.getitem and _keeps_channels(node.args[1]):
            return "channelwise"
        if node.target is F.pad and len(node.args) == 2 and not any(node.args[1][:4]):  # type: ignore[index, arg-type]
            return "pad"
        raise _Unsupported(f"{node.op} {node.target}")

    def _function(self, node: fx.Node) -> Run:
        """A channelwise node as a function of its first argument."""
        if node.op == "call_module":
            return self.modules[str(node.target)]
        if node.op == "call_method":
            return lambda x: getattr(x, str(node.target))(*node.args[1:], **node.kwargs)
        return lambda x: node.target(x, *node.args[1:], **node.kwargs)  # type: ignore[operator]

    def _forward(self, node: fx.Node) -> _Channels:
        kind = self._kind(node)
        if kind == "placeholder":
            return self.input
        sources = [self.known[each] for each in node.all_input_nodes]
        first = sources[0]
        if kind == "output":
            return first
        if kind in ("conv", "linear"):
            module = self.modules[str(node.target)]
            live = (_connections(module) & first.live).any(1)
            return _channels(live, module(first.const))
        if kind == "add":
            live = sources[0].live | sources[1].live
            return _channels(live, sources[0].const + sources[1].const)
        if kind == "cat":
            return _channels(torch.cat([each.live for each in sources]), torch.cat([each.const for each in sources], 1))
        if kind == "pad":
            before, after = node.args[1][4:]  # type: ignore[index, misc]
            return _channels(F.pad(first.live, (before, after)), F.pad(first.const, node.args[1]))  # type: ignore[arg-type]
        if kind == "flatten":
            return _channels(first.live.repeat_interleave(first.const[0, 0].numel()), first.const.flatten(1))
        function = self.modules[str(node.target)] if kind == "norm" else self._function(node)
        const = function(first.const)
        if const.shape[1] != len(first.live):
            raise _Unsupported(f"{node.op} {node.target} that changes channels")
        return _channels(first.live, const)

    def _backward(self, node: fx.Node) -> None:
        channels, kind = self.known[node], self._kind(node)
        if kind in ("output", "placeholder"):  # logits are all read, inputs all given
            channels.ask(torch.ones_like(channels.live))
            return
        if channels.needed is None:
            channels.ask(torch.zeros_like(channels.live))
        needed = channels.needed
        assert needed is not None
        sources = [self.known[each] for each in node.all_input_nodes]
        if kind in ("conv", "linear"):
            sources[0].ask(_connections(self.modules[str(node.target)])[channels.live & needed].any(0))
        elif kind == "cat":
            for source, part in zip(sources, needed.split([len(each.live) for each in sources]), strict=True):
                source.ask(part)
        elif kind == "pad":
            before = node.args[1][4]  # type: ignore[index]
            sources[0].ask(needed[before : before + len(sources[0].live)])  # type: ignore[operator]
        elif kind == "flatten":
            asked = needed.view(len(sources[0].live), -1).any(1)
            sources[0].ask(asked)
            channels.needed = asked.repeat_interleave(len(needed) // len(asked))
        else:
            for source in sources:
                source.ask(needed)

    def _run(self, node: fx.Node, sources: list[fx.Node]) -> Run:
        """The node's computation on kept channels alone, of those sources that have any."""
        channels, kind = self.known[node], self._kind(node)
        kept = channels.kept
        if kind in ("conv", "linear"):
            return _folded(self.modules[str(node.target)], channels, self.known[sources[0]].kept)
        if kind == "norm":
            module = self.modules[str(node.target)]
            assert isinstance(module, nn.BatchNorm2d)
            scale = (module.running_var + module.eps).rsqrt()  # type: ignore[operator, union-attr]
            scale = scale * module.weight if module.affine else scale
            shift = (module.bias if module.affine else 0) - module.running_mean * scale  # type: ignore[operator]
            scale, shift = (t[kept].view(1, -1, 1, 1) for t in (scale, shift))
            return lambda x: torch.addcmul(shift, x, scale)
        if kind == "add":
            return _sum(channels, [self.known[each].kept for each in sources])
        if kind == "cat":
            return lambda *parts: torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        if kind == "pad":
            return lambda x: x
        if kind == "flatten":
            return lambda x: x.flatten(1)
        return self._function(node)

    def _output(self, node: fx.Node) -> Run:
        channels = self.known[node]
        const, kept = channels.const, channels.kept
        if not len(kept):  # still part of the autograd graph, as the network's own logits are
            return lambda x, _: const + 0 * x.flatten(1).sum(1, keepdim=True)
        if len(kept) == len(channels.live):
            return lambda _, logits: logits
        return lambda _, logits: const.expand(len(logits), -1).index_add(1, kept, logits)


def _channels(live: Tensor, values: Tensor) -> _Channels:
    """Constants where a channel is dead; the same values as bias where it is live."""
    dead = ~live.view(1, -1, *[1] * (values.ndim - 2))
    return _Channels(live, values * dead, values)


def _connections(module: nn.Module) -> Tensor:
    """(out, in) bool: whether any weight connects the two channels."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (weight != 0).flatten(2).any(2) if weight.ndim > 2 else weight != 0


def _keeps_channels(index: Any) -> bool:
    """Whether an index leaves the first two axes whole."""
    return isinstance(index, tuple) and len(index) >= 2 and index[:2] == (slice(None), slice(None))


def _folded(module: nn.Module, channels: _Channels, inputs: Tensor) -> Run:
    """A convolution or linear layer from kept inputs to kept outputs, constants of the dead inputs in its bias."""
    kept, bias = channels.kept, channels.bias
    assert isinstance(module.weight, Tensor) and bias is not None
    weight, bias = module.weight[kept][:, inputs].contiguous(), bias[:, kept].contiguous()
    if isinstance(module, nn.Linear):
        return lambda x: F.linear(x, weight, bias[0])
    assert isinstance(module, nn.Conv2d)
    stride, padding, dilation = module.stride, module.padding, module.dilation
    if bool((bias == bias[..., :1, :1]).all()):
        flat = bias[0, :, 0, 0].contiguous()
        return lambda x: F.conv2d(x, weight, flat, stride, padding, dilation)
    return lambda x: F.conv2d(x, weight, None, stride, padding, dilation) + bias


def _sum(channels: _Channels, inputs: list[Tensor]) -> Run:
    """A sum of one or two terms that may have different kept channels; constants of the dead ones included."""
    kept, bias = channels.kept, channels.bias
    assert bias is not None
    bias = bias[:, kept].contiguous()
    places = [torch.searchsorted(kept, each) for each in inputs]
    whole = [len(each) == len(kept) for each in inputs]
    plain = not bias.any()

    def run(*terms: Tensor) -> Tensor:
        if all(whole):
            total = terms[0] + terms[1] if len(terms) == 2 else terms[0]
            return total if plain else total + bias
        total = bias.expand(len(terms[0]), *bias.shape[1:])
        for term, place in zip(terms, places, strict=True):
            total = total.index_add(1, place, term)
        return total

    return run
