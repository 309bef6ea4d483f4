"""A ReLU chain: the only view of a network that the verifier has.

f = A_K . relu . A_{K-1} ... relu . A_0, each A_k affine on flattened activations. Batch normalisation in eval mode is
folded into the affine map before it, in float64, and only then cast. (Spec c.1; Zhang et al. 2018, "CROWN".)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from certified_pruning.affine import Affine, Conv, Dense, Pair, Scale, Shape
from certified_pruning.errors import UnsupportedLayerError
from certified_pruning.precision import full_precision


@dataclass(frozen=True)
class ChainNet:
    """K+1 affine maps with a ReLU between each two. Neurons are numbered through all ReLU layers, in order."""

    affines: tuple[Affine, ...]

    @staticmethod
    def from_module(model: nn.Module, input_shape: Shape, dtype: torch.dtype = torch.float32) -> ChainNet:
        """Read a chain off an `nn.Sequential` (nested ones too) in eval mode.

        Args:
            model: Conv2d, Linear, BatchNorm2d, ReLU, Flatten, AvgPool2d, Dropout, Identity.
            input_shape: of one input, e.g. (3, 32, 32) or (6,).
            dtype: of the extracted weights; folding is done in float64 whatever it is.

        Raises:
            UnsupportedLayerError: another layer, or an option of these that is not affine on a zero-padded map.
            ValueError: train mode, batch normalisation without running statistics, an input shape that does not fit,
                non-finite weights, or an extraction that does not reproduce the model (forward hooks).
        """
        if any(m.training for m in model.modules()):
            raise ValueError("model must be in eval mode (call model.eval()), got train mode")
        like = next(model.parameters(), torch.zeros(()))
        builder = _Builder(tuple(int(n) for n in input_shape), like.device)
        for name, layer in _leaves(model, ""):
            builder.add(name, layer)
        net = ChainNet(tuple(builder.finish()))
        if not all(a.bias.isfinite().all() and all(op.weight.isfinite().all() for op in a.ops) for a in net.affines):
            raise ValueError("model must have finite weights and running statistics, got NaN or Inf")
        _check_same(model, net)
        return net.to(dtype)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> ChainNet:
        """A cast copy. For float64 bounds extract in float64 instead: a cast from float32 keeps its rounding."""
        return ChainNet(tuple(a.to(dtype, device) for a in self.affines))

    def head(self, k: int) -> ChainNet:
        """The chain whose output is the pre-activation z_k of ReLU layer k."""
        return ChainNet(self.affines[: k + 1])

    def scale_output(self, factor: float) -> ChainNet:
        """The chain with its outputs multiplied by `factor`."""
        last = self.affines[-1]
        if not last.ops:
            raise ValueError("the last affine map must have an operation to scale, got the identity")
        ops = (*last.ops[:-1], replace(last.ops[-1], weight=last.ops[-1].weight * factor))
        scaled = replace(last, ops=ops, bias=last.bias * factor, bn_beta=last.bn_beta * factor)
        return ChainNet((*self.affines[:-1], scaled))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, out) of x (batch, *input_shape) or (batch, inputs)."""
        x = self.affines[0].forward(x.flatten(1))
        for affine in self.affines[1:]:
            x = affine.forward(x.relu())
        return x

    __call__ = forward

    @property
    def input_shape(self) -> Shape:
        return self.affines[0].in_shape

    @property
    def n_in(self) -> int:
        return prod(self.input_shape)

    @property
    def n_out(self) -> int:
        return prod(self.affines[-1].out_shape)

    @cached_property
    def sizes(self) -> list[int]:
        """Neurons of each ReLU layer."""
        return [prod(a.out_shape) for a in self.affines[:-1]]

    @cached_property
    def offsets(self) -> list[int]:
        """Number of the first neuron of each ReLU layer, then the number of all neurons."""
        total = [0]
        for n in self.sizes:
            total.append(total[-1] + n)
        return total

    @property
    def n_neurons(self) -> int:
        return self.offsets[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.affines[0].bias.dtype

    @property
    def device(self) -> torch.device:
        return self.affines[0].bias.device


def _leaves(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    # A subclass of Sequential with its own forward is not a chain.
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        # Not named_children: it skips a layer that is used twice, which forward does not.
        children = [(f"{name}.{key}" if name else key, child) for key, child in module._modules.items()]
        return [leaf for key, child in children if child is not None for leaf in _leaves(child, key)]
    return [(name or "model", module)]


class _Builder:
    """Collects ops and biases of the current affine map; a ReLU closes it."""

    def __init__(self, input_shape: Shape, device: torch.device) -> None:
        self.shape = self.start = input_shape
        self.done: list[Affine] = []
        self.steps: list[tuple[Conv | Dense | Scale, Tensor]] = []
        self.beta: Tensor | None = None
        self.device = device

    def add(self, name: str, layer: nn.Module) -> None:
        if isinstance(layer, nn.ReLU):
            self._close()
        elif isinstance(layer, nn.Flatten):
            if layer.start_dim != 1 or layer.end_dim not in (-1, len(self.shape)):
                raise UnsupportedLayerError(name, layer, "only start_dim=1, end_dim=-1")
            self.shape = (prod(self.shape),)
        elif isinstance(layer, nn.Conv2d):
            self._conv(name, layer)
        elif isinstance(layer, nn.AvgPool2d):
            self._pool(name, layer)
        elif isinstance(layer, nn.Linear):
            if len(self.shape) != 1:
                raise UnsupportedLayerError(name, layer, f"put a Flatten before it, its input has shape {self.shape}")
            if self.shape[0] != layer.in_features:
                self._misfit(name, layer.in_features, "features")
            bias = _f64(layer.bias) if layer.bias is not None else _f64(layer.weight).new_zeros(layer.out_features)
            self._push(Dense(_f64(layer.weight)), bias, (layer.out_features,))
        elif isinstance(layer, nn.BatchNorm2d):
            self._norm(name, layer)
        elif not isinstance(layer, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity)):
            raise UnsupportedLayerError(name, layer)

    def finish(self) -> list[Affine]:
        self._close()
        return self.done

    def _push(self, op: Conv | Dense | Scale, bias: Tensor, shape: Shape) -> None:
        self.steps.append((op, bias))
        self.shape, self.beta = shape, None

    def _close(self) -> None:
        bias = torch.zeros(prod(self.start), dtype=torch.float64, device=self.device)
        for op, b in self.steps:
            bias = op.linear(bias[None])[0] + b
        ops = tuple(op for op, _ in self.steps)
        beta = bias if self.beta is None else self.beta
        self.done.append(Affine(ops, bias, beta, self.start, self.shape))
        self.start, self.steps, self.beta = self.shape, [], None

    def _misfit(self, name: str, expected: int, what: str) -> None:
        raise ValueError(f"input_shape does not fit: layer '{name}' expects {expected} {what}, it gets {self.shape}")

    def _map(self, name: str, channels: int | None) -> None:
        if len(self.shape) != 3 or (channels is not None and self.shape[0] != channels):
            self._misfit(name, channels or 1, "channels of a (channels, h, w) map")

    def _conv(self, name: str, layer: nn.Conv2d) -> None:
        self._map(name, layer.in_channels)
        if layer.padding_mode != "zeros" or not isinstance(layer.padding, tuple):
            raise UnsupportedLayerError(name, layer, f"padding {layer.padding!r}, mode {layer.padding_mode!r}")
        weight = _f64(layer.weight)
        bias = _f64(layer.bias) if layer.bias is not None else weight.new_zeros(layer.out_channels)
        self._push_conv(name, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    def _pool(self, name: str, layer: nn.AvgPool2d) -> None:
        self._map(name, None)
        kernel, padding = _pair(layer.kernel_size), _pair(layer.padding)
        if layer.ceil_mode or (padding != (0, 0) and not layer.count_include_pad):
            raise UnsupportedLayerError(name, layer, "only ceil_mode=False and count_include_pad=True")
        c = self.shape[0]
        share = 1 / (layer.divisor_override or prod(kernel))
        weight = torch.full((c, 1, *kernel), share, dtype=torch.float64, device=self.device)
        self._push_conv(name, weight, weight.new_zeros(c), _pair(layer.stride), padding, (1, 1), c)

    def _push_conv(
        self, name: str, weight: Tensor, bias: Tensor, stride: Shape, padding: Shape, dilation: Shape, groups: int
    ) -> None:
        s, p, d = _pair(stride), _pair(padding), _pair(dilation)
        k = weight.shape[2:]
        h, w = ((self.shape[i + 1] + 2 * p[i] - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i in (0, 1))
        if h < 1 or w < 1:
            self._misfit(name, d[0] * (k[0] - 1) + 1 - 2 * p[0], "rows at least")
        shape = (weight.shape[0], h, w)
        op = Conv(weight, s, p, d, groups, self.shape, shape)
        self._push(op, bias.repeat_interleave(h * w), shape)

    def _norm(self, name: str, layer: nn.BatchNorm2d) -> None:
        self._map(name, layer.num_features)
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(f"model layer '{name}' must have running statistics, got track_running_stats=False")
        mean, var = _f64(layer.running_mean), _f64(layer.running_var)
        gamma = _f64(layer.weight) if layer.affine else torch.ones_like(mean)
        beta = _f64(layer.bias) if layer.affine else torch.zeros_like(mean)
        factor = gamma / (var + layer.eps).sqrt()
        area = self.shape[1] * self.shape[2]
        flat_factor, flat_shift = factor.repeat_interleave(area), (beta - factor * mean).repeat_interleave(area)
        if self.steps and isinstance(self.steps[-1][0], Conv):
            op, bias = self.steps.pop()
            assert isinstance(op, Conv)
            op = replace(op, weight=op.weight * factor[:, None, None, None])
            self._push(op, bias * flat_factor + flat_shift, self.shape)
        else:
            self._push(Scale(flat_factor), flat_shift, self.shape)
        self.beta = beta.repeat_interleave(area)


def _f64(t: Tensor) -> Tensor:
    return t.detach().to(torch.float64, copy=True)  # the network may go on training


def _pair(value: int | Shape) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


@full_precision()
@torch.no_grad()
def _check_same(model: nn.Module, net: ChainNet) -> None:
    """Soundness guard: a hook or an overridden layer must not make us verify another function."""
    like = next(model.parameters(), torch.zeros(()))
    x = torch.rand((2, *net.input_shape), generator=torch.Generator().manual_seed(0))
    ours = net.forward(x.to(like.device, torch.float64))
    theirs = model(x.to(like)).flatten(1).to(torch.float64)
    if theirs.shape != ours.shape or (ours - theirs).abs().max() > 1e-3 * ours.abs().max().clamp_min(1.0):
        raise ValueError("model does not compute what its layers say (forward hooks, stale pruned weights?)")
