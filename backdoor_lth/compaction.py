"""Exact compaction of a sparse network in eval mode: channels that do not depend on the input become constants.

A channel is *live* if a surviving weight connects it to a live input. Every other channel is a fixed map (a map, not a
number: zero padding makes its borders differ), computed once and added where it is read. Live channels that nothing
reads are not computed at all. Equal to the network up to the order of its sums.
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from backdoor_lth.channel_program import Compacted, Run, layer, total
from backdoor_lth.frozen import frozen, stateless
from backdoor_lth.pixel_program import pixel_program
from backdoor_lth.traced import Traced, UnsupportedError, called, normalization

SPARSE, WIDTH = 10, 16
"""times cheaper is a multiplication in a dense convolution than alone, on one thread; inputs that it costs at least"""
LOGITS, GRADIENTS = 1e-3, 1e-2
"""how far they may be from the model's own, as a share; a rectified value near 0 may fall on the other side"""


class NotFiniteError(UnsupportedError):
    """Logits that are not numbers, whatever computes them."""


@dataclass
class _Channels:
    """What is known of one node's output.

    live: (C,) bool. const: (1, C, ...) values that do not depend on the input, 0 where a channel is live alone.
    bias: the constant part that a live channel still needs at run time, (1, C, ...).
    needed: (C,) bool, filled from the end. kept: positions of what is computed.
    """

    live: Tensor
    const: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        self.needed = torch.zeros_like(self.live)

    @property
    def kept(self) -> Tensor:
        """Positions of the channels to compute: live and read by something."""
        return (self.live & self.needed).nonzero().squeeze(1)

    def ask(self, wanted: Tensor) -> None:
        """Something reads these channels."""
        self.needed = self.needed | wanted


def compact(model: nn.Module, input_shape: Sequence[int]) -> nn.Module:
    """A network that gives the same logits with input-independent channels folded away.

    Gradients with respect to the input are the same too; those of the weights are not available. Convolutions
    (ungrouped), batch norm, linear layers, sums, concatenation, pooling, common activations, slices and channel padding
    are known; with anything else, and where logits or input gradients of two random images turn out different, the
    model itself comes back, with a warning. On a CPU what has very few weights left, and no other activation than ReLU,
    becomes a `PixelProgram`.

    Args:
        model: any module torch.fx can trace; not changed. It is folded as in eval mode.
        input_shape: (channels, height, width).
    """
    try:
        with frozen(model):
            return _checked(Traced(model), tuple(input_shape), model)
    except Exception as error:  # of torch.fx, of any module: whatever it is, the model itself still works
        warnings.warn(f"the model is used as it is, not compacted: {error}", stacklevel=2)
        return model


def compact_states(
    model: nn.Module, input_shape: Sequence[int], states: Iterable[Mapping[str, Tensor]]
) -> Iterator[nn.Module]:
    """`compact` of the model with each of these state dicts in turn; the graph is traced once for all.

    A state whose logits are not finite comes back without a warning: whoever measures it will say so.
    """
    graph = None
    for state in states:
        try:
            graph = graph or Traced(model)
            with frozen(model):
                network = _checked(graph.loaded(state), tuple(input_shape), stateless(model, state))
        except Exception as error:
            if not isinstance(error, NotFiniteError):
                warnings.warn(f"the model is used as it is, not compacted: {error}", stacklevel=2)
            network = copy.deepcopy(model).eval()
            network.load_state_dict(state)
        yield network


def _checked(graph: Traced, shape: tuple[int, ...], network: Callable[..., Tensor]) -> nn.Module:
    """The network compacted. Raises `UnsupportedError` unless it answers two random images as `network` does."""
    folded = _compacted(graph, shape)
    images, found = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(graph.like), []
    with torch.enable_grad():
        for each in (network, folded):
            x = images.clone().requires_grad_()
            logits = each(x)
            found.append((logits, *torch.autograd.grad(logits.square().sum(), x)))
    (own, gradient), (ours, its) = found
    if not own.isfinite().all():
        raise NotFiniteError("its logits are not finite")
    if not (own - ours).norm() <= LOGITS * own.norm():
        raise UnsupportedError("its logits come out different")
    noise = torch.finfo(own.dtype).eps * own.square().sum()  # gradients below it are of rounded logits
    if not (gradient - its).norm() <= GRADIENTS * gradient.norm() + noise:
        raise UnsupportedError("its input gradients come out different")
    return folded


@torch.no_grad()
def _compacted(graph: Traced, shape: tuple[int, ...]) -> nn.Module:
    folding = _Folding(graph, shape)
    if graph.like.device.type == "cpu" and folding.sparse:
        with contextlib.suppress(UnsupportedError):
            return pixel_program(graph, shape)
    return folding.compacted()


class _Folding:
    """Forward over the graph for live channels and constants, backward for needed ones, then the program."""

    def __init__(self, graph: Traced, shape: tuple[int, ...]) -> None:
        self.graph, self.nodes = graph, graph.nodes
        self.known: dict[fx.Node, _Channels] = {}
        ones = torch.ones(shape[0], dtype=torch.bool, device=graph.like.device)
        zeros = graph.like.new_zeros(1, *shape)
        self.input = _Channels(ones, zeros, zeros)
        for node in self.nodes:
            self.known[node] = self._forward(node)
        for node in reversed(self.nodes):
            self._backward(node)
        for node in self.nodes:
            self._widen(node)

    @property
    def sparse(self) -> bool:
        """Whether weight by weight is less work than the kept channels' convolutions."""
        dense = few = 0
        for node in self.nodes:
            if self.graph.kind(node) == "conv":
                channels, inputs = self.known[node], self.known[node.all_input_nodes[0]].kept
                weight = self.graph.module(node).weight[channels.kept][:, inputs]
                pixels = channels.const[0, 0].numel()
                dense += pixels * len(weight) * max(len(inputs), WIDTH) * math.prod(weight.shape[2:])
                few += pixels * int(weight.count_nonzero())
        return few * SPARSE < dense

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

    def _forward(self, node: fx.Node) -> _Channels:
        kind = self.graph.kind(node)
        if kind == "placeholder":
            return self.input
        sources = [self.known[each] for each in node.all_input_nodes]
        first = sources[0]
        if kind == "output":
            return first
        if kind in ("conv", "linear"):
            module = self.graph.module(node)
            live = (_connections(module) & first.live).any(1)
            return _channels(live, module(first.const))
        if kind == "add":
            if first.const.shape != sources[1].const.shape:
                raise UnsupportedError(f"{called(node)} of different shapes")
            return _channels(first.live | sources[1].live, first.const + sources[1].const)
        if kind == "cat":
            return _channels(torch.cat([each.live for each in sources]), torch.cat([each.const for each in sources], 1))
        if kind == "pad":
            before, after = node.args[1][4:]  # type: ignore[index, misc]
            return _channels(F.pad(first.live, (before, after)), F.pad(first.const, node.args[1]))  # type: ignore[arg-type]
        if kind == "flatten":
            return _channels(first.live.repeat_interleave(first.const[0, 0].numel()), first.const.flatten(1))
        function = self.graph.function(node)
        const = function(first.const)
        alone = kind != "pixels" or function(first.const[:, :1]).shape[1:2] == (1,)
        if const.shape[1:2] != first.live.shape or not alone:
            raise UnsupportedError(f"{called(node)} that changes channels")
        return _channels(first.live, const)

    def _backward(self, node: fx.Node) -> None:
        channels, kind = self.known[node], self.graph.kind(node)
        if kind in ("output", "placeholder"):  # logits are all read, inputs all given
            channels.ask(torch.ones_like(channels.live))
            return
        needed = channels.needed
        sources = [self.known[each] for each in node.all_input_nodes]
        if kind in ("conv", "linear"):
            sources[0].ask(_connections(self.graph.module(node))[channels.live & needed].any(0))
        elif kind == "cat":
            for source, part in zip(sources, needed.split([len(each.live) for each in sources]), strict=True):
                source.ask(part)
        elif kind == "pad":
            before = node.args[1][4]  # type: ignore[index]
            sources[0].ask(needed[before : before + len(sources[0].live)])  # type: ignore[operator]
        elif kind == "flatten":
            sources[0].ask(needed.view(len(sources[0].live), -1).any(1))
        else:
            for source in sources:
                source.ask(needed)

    def _widen(self, node: fx.Node) -> None:
        """Layers choose among the channels that a source computes for all its readers; other nodes take them all."""
        channels, kind = self.known[node], self.graph.kind(node)
        needed = [self.known[each].needed for each in node.all_input_nodes]
        if kind == "cat":
            channels.needed = torch.cat(needed)
        elif kind == "pad":
            channels.needed = F.pad(needed[0], node.args[1][4:])  # type: ignore[index, arg-type]
        elif kind == "flatten":
            channels.needed = needed[0].repeat_interleave(len(channels.live) // len(needed[0]))
        elif kind not in ("conv", "linear"):
            for each in needed:
                channels.ask(each)

    def _run(self, node: fx.Node, sources: list[fx.Node]) -> Run:
        """The node's computation on kept channels alone, of those sources that have any."""
        channels, kind = self.known[node], self.graph.kind(node)
        kept = channels.kept
        if kind in ("conv", "linear"):
            return layer(self.graph.module(node), channels.bias, kept, self.known[sources[0]].kept)
        if kind == "norm":
            scale, shift = normalization(self.graph.module(node))
            scale, shift = (t[kept].view(1, -1, 1, 1) for t in (scale, shift))
            return lambda x: torch.addcmul(shift, x, scale)
        if kind == "add":
            return total(channels.bias, kept, [self.known[each].kept for each in sources])
        if kind == "cat":
            return lambda *parts: torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        if kind == "pad":
            return lambda x: x
        if kind == "flatten":
            return lambda x: x.flatten(1)
        return self.graph.function(node)

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
