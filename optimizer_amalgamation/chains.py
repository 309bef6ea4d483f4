"""R copies of a chain of layers at once: loss, gradient and Hessian times a vector, written out (spec h7).

Forward, each layer leaves its columns X and its slope dy/dz (`layers.py`); the gradient goes back through these. A dash
is the derivative along a vector (Pearlmutter's R): the Hessian times the vector is the dash of the gradient. It takes
less than half of autograd's time where a network is so small that its time goes into calls; where the columns are many,
convolutions without them are faster.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimizer_amalgamation.layers import Layer

MOST = 4096  # columns of a sample: beyond, a convolution without them is faster


@dataclass(frozen=True)
class Step:
    """A layer as it was gone through."""

    layer: Layer
    kernel: Tensor
    columns: Tensor
    slope: Tensor | None
    shape: torch.Size
    """of its inputs, without copies"""
    y: Tensor


class Chain:
    """R copies of a chain.

    Args:
        layers: it, first to last; a ReLU stands behind the max-pool, which is the same as before it.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.sizes = [size for layer in layers for size in (layer.outputs * layer.inputs, layer.outputs)]

    @classmethod
    def of(cls, module: nn.Module, sample: torch.Size) -> "Chain | None":
        """That of an `nn.Sequential` of convolutions, dense layers behind a flattening, ReLUs, sigmoids, max-pools and
        a mean over all positions, on samples of this shape; None for any other module, or one with many columns."""
        if not isinstance(module, nn.Sequential):
            return None
        layers: list[Layer] = []
        flat, mean = False, False
        for part in module:
            last = layers[-1] if layers else None
            if isinstance(part, nn.Conv2d) and not flat and not mean and _plain(part):
                size = part.weight[0].numel()
                layers.append(Layer(part.out_channels, size, part.kernel_size[0], part.stride[0]))
            elif isinstance(part, nn.Linear) and flat and part.bias is not None:
                layers.append(Layer(part.out_features, part.in_features, mean=mean))
                mean = False
            elif isinstance(part, nn.Flatten) and not flat and (part.start_dim, part.end_dim) == (1, -1):
                flat = True
            elif isinstance(part, nn.Sigmoid) and last and last.activation == "none" and last.pool == 1 and not mean:
                layers[-1] = replace(last, activation="sigmoid")
            elif isinstance(part, nn.ReLU) and last and last.activation == "none" and not mean:
                layers[-1] = replace(last, activation="relu")
            elif isinstance(part, nn.MaxPool2d) and last and last.kernel and last.pool == 1 and not flat:
                side = part.kernel_size
                settings = (part.stride, part.padding, part.dilation, part.ceil_mode, part.return_indices)
                fits = settings == (side, 0, 1, False, False) and last.activation != "sigmoid" and not mean
                if not isinstance(side, int) or not fits:
                    return None
                layers[-1] = replace(last, pool=side)
            elif isinstance(part, nn.AdaptiveAvgPool2d) and last and not flat and part.output_size in (1, (1, 1)):
                mean = True
            else:
                return None
        found = cls(layers) if layers and not layers[-1].kernel else None
        return found if found and found.most_columns(sample) <= MOST else None

    def most_columns(self, sample: torch.Size) -> int:
        """Elements of the largest X of one sample."""
        most, sides = 0, sample[1:]
        for layer in self.layers:
            if layer.kernel:
                sides = torch.Size(layer.places(side) for side in sides)
            most = max(most, layer.inputs * (layer.pool**2 * sides.numel() if layer.kernel else 1))
        return most

    def parts(self, params: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Kernel (R, outputs, inputs) and bias (R, outputs, 1) of each layer, of params (R, n)."""
        split = iter(params.split(self.sizes, 1))
        return [(next(split).unflatten(1, (one.outputs, one.inputs)), next(split).unsqueeze(2)) for one in self.layers]

    def begin(self, inputs: Tensor) -> Tensor:
        """Inputs (R, B, ...) as the first layer's, samples last."""
        return inputs.movedim(1, -1).contiguous() if self.layers[0].kernel else inputs.flatten(2).mT

    @torch.no_grad()
    def losses(self, params: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy (R, B) of every sample; arguments as `gradients`."""
        return F.cross_entropy(self.logits(params, inputs), labels, reduction="none")

    def logits(self, params: Tensor, inputs: Tensor) -> Tensor:
        """(R, classes, B) for params (R, n) and inputs (R, B, channels, h, w) or (R, B, ...)."""
        x = self.begin(inputs)
        for layer, (kernel, bias) in zip(self.layers, self.parts(params), strict=True):
            x = layer.placed(layer.activated(torch.baddbmm(bias, kernel, layer.columns(x))), x)
        return x

    @torch.no_grad()
    def gradients(self, params: Tensor, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy (R,) of each copy over its samples, labels (R, B), and its gradient (R, n)."""
        x, steps = self.begin(inputs), []
        for layer, (kernel, bias) in zip(self.layers, self.parts(params), strict=True):
            columns = layer.columns(x)
            z = torch.baddbmm(bias, kernel, columns)
            y = layer.activated(z)
            steps.append(Step(layer, kernel, columns, layer.slope(z, y), x.shape[1:], y))
            x = layer.placed(y, x)
        losses, back = _loss(x, labels)
        found: list[Tensor] = []
        for step in reversed(steps):
            back = _times(back, step.slope)
            found += [back.sum(2), (back @ step.columns.mT).flatten(1)]
            if step is not steps[0]:
                back = step.layer.fold(step.kernel.mT @ back, step.shape).flatten(2)
        return losses, torch.cat(found[::-1], 1)

    @torch.no_grad()
    def curvature(self, params: Tensor, inputs: Tensor, labels: Tensor, vectors: Tensor) -> Tensor:
        """Hessian of each copy's mean cross-entropy at params (R, n) times its vector (R, n)."""
        x, steps = self.begin(inputs), []
        dash: Tensor | None = None
        dashes: list[tuple[Tensor, Tensor | None, Tensor]] = []
        both = zip(self.layers, self.parts(params), self.parts(vectors), strict=True)
        for layer, (kernel, bias), (kernel_dash, bias_dash) in both:
            columns = layer.columns(x)
            z, z_dash = torch.baddbmm(bias, kernel, columns), torch.baddbmm(bias_dash, kernel_dash, columns)
            columns_dash: Tensor | None = None if dash is None else layer.columns(dash)
            if columns_dash is not None:
                z_dash.baddbmm_(kernel, columns_dash)
            y = layer.activated(z)
            slope = layer.slope(z, y)
            steps.append(Step(layer, kernel, columns, slope, x.shape[1:], y))
            dashes.append((kernel_dash, columns_dash, z_dash))
            moved = z_dash if slope is None else (slope * z_dash.unflatten(2, slope.shape[2:])).sum(2)
            x, dash = layer.placed(y, x), layer.placed(moved, x)
        _, back = _loss(x, labels)
        chance = x.softmax(1)
        back_dash = chance * (dash - (chance * dash).sum(1, keepdim=True)) / labels.shape[1]  # type: ignore[operator]
        found: list[Tensor] = []
        for step, (kernel_dash, columns_dash, z_dash) in zip(reversed(steps), reversed(dashes), strict=True):
            bent = None
            if step.layer.activation == "sigmoid" and step.slope is not None:  # the slope changes too: by (1 - 2 y) y'
                bent = back * step.slope.squeeze(2) * (1 - 2 * step.y) * z_dash
            back, back_dash = _times(back, step.slope), _times(back_dash, step.slope)
            back_dash = back_dash if bent is None else back_dash + bent
            of_kernel = back_dash @ step.columns.mT
            if columns_dash is not None:
                of_kernel.baddbmm_(back, columns_dash.mT)
            found += [back_dash.sum(2), of_kernel.flatten(1)]
            if step is not steps[0]:
                down = step.kernel.mT @ back_dash
                pair = torch.stack([step.kernel.mT @ back, down.baddbmm_(kernel_dash.mT, back)])
                back, back_dash = step.layer.fold(pair, step.shape).flatten(3)
        return torch.cat(found[::-1], 1)


def _plain(part: nn.Conv2d) -> bool:
    """A square convolution of one group, without padding and dilation, with a bias."""
    sides = (set(part.kernel_size), set(part.stride))
    square = all(len(side) == 1 for side in sides)
    settings: Any = (part.padding, part.dilation, part.groups)
    return square and settings == ((0, 0), (1, 1), 1) and part.bias is not None


def _times(back: Tensor, slope: Tensor | None) -> Tensor:
    """Gradient (R, outputs, L) with respect to z of that (R, outputs, L / p²) with respect to y."""
    return back if slope is None else (slope * back.unsqueeze(2)).flatten(2)


def _loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy (R,) of logits (R, classes, B), and its gradient with respect to them."""
    logs, at = F.log_softmax(logits, 1), labels.unsqueeze(1)
    ones = logs.new_full((), -1.0).expand(at.shape)
    return -logs.gather(1, at).mean((1, 2)), logs.exp().scatter_add_(1, at, ones).div_(labels.shape[1])
