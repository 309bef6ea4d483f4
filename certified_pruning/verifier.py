"""Complete verification of ReLU networks on L-inf boxes: attack, bounds, branch and bound (spec c.8).

Images go through ever dearer stages and leave at the first that decides them: clean prediction, interval bounds, PGD,
CROWN, alpha-CROWN, branch and bound with beta-CROWN, exact LPs at its leaves. Work is in float32. Float64 confirms
every counterexample, and every bound that decides, from bounds of the ReLU inputs of which those that CROWN tightened
are float32's, widened (`stages.outward`, `stages.confirmed`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log

import torch
from torch import Tensor, nn

from certified_pruning.chain import ChainNet
from certified_pruning.ibp import channel_stats, check_box, input_box, margin_spec
from certified_pruning.precision import full_precision
from certified_pruning.stages import Group, Setting
from certified_pruning.verdicts import ImageVerdict, VerifyConfig, VerifyReport

__all__ = ["CompleteVerifier", "ImageVerdict", "VerifyConfig", "VerifyReport"]

Normalization = tuple[Sequence[float] | Tensor, Sequence[float] | Tensor]
Box = tuple[Tensor, Tensor]


class CompleteVerifier:
    """Verifier of one network: is the class of each image the same on its whole box?

    Args:
        model: an `nn.Sequential` chain in eval mode (see `ChainNet.from_module`), on the device to work on; taken as it
            is now, what is trained later is not verified.
        input_shape: of one image, e.g. (1, 28, 28).
        eps: radius of the L-inf ball in raw pixel units [0, 1]; the ball is cut to [0, 1].
        n_classes: number of logits.
        config: budgets and steps.
        box: instead of eps, (lower, upper) in raw units, each broadcastable to the images; not cut to [0, 1].
        normalize: (mean, std) a channel that the network expects; images and boxes are given raw.

    Raises:
        ValueError: both or neither of eps and box, eps outside [0, 1], n_classes that is not the number of logits,
            model in train mode; `UnsupportedLayerError` for a layer outside the chain.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        eps: float | None,
        n_classes: int,
        config: VerifyConfig | None = None,
        *,
        box: Box | None = None,
        normalize: Normalization = ((0.0,), (1.0,)),
    ) -> None:
        if (eps is None) == (box is None):
            raise ValueError(f"exactly one of eps and box must be given, got eps={eps} and box={box}")
        net = ChainNet.from_module(model, input_shape)
        exact = ChainNet.from_module(model, input_shape, torch.float64)
        if n_classes != net.n_out:
            raise ValueError(f"n_classes must be the {net.n_out} outputs of the model, got {n_classes}")
        unit = _unit(exact)
        if unit != 1.0:
            net, exact = net.scale_output(1 / unit), exact.scale_output(1 / unit)
        like = torch.zeros(1, *input_shape, dtype=torch.float64, device=net.device)
        mean, std = channel_stats(*normalize, like)
        if eps is not None:
            input_box(like, eps)
        self.box = box
        self.setting = Setting(net, exact, mean, std, eps, unit, config or VerifyConfig())

    @torch.no_grad()
    def verify(self, x: Tensor, y: Tensor, progress: Callable[[float], None] | None = None) -> VerifyReport:
        """Verdicts on raw images.

        Args:
            x: (batch, *input_shape), floating point, pixels in [0, 1] (any finite values with `box`).
            y: (batch,) integer labels in [0, n_classes).
            progress: called with the fraction of images decided, in [0, 1], never decreasing.

        Raises:
            ValueError: no tensors, wrong shape or type, NaN or Inf, pixels or labels out of range, a box with
                lower > upper.
        """
        net = self.setting.net
        check_tensors(x, y)
        if not x.dtype.is_floating_point or tuple(x.shape[1:]) != tuple(net.input_shape):
            shape = ", ".join(map(str, net.input_shape))
            raise ValueError(f"x must be floating point of shape (batch, {shape}), got {x.dtype} {tuple(x.shape)}")
        if len(y) != len(x):
            raise ValueError(f"y must have {len(x)} labels, got {len(y)}")
        raw, y = x.to(net.device, torch.float64), y.to(net.device)
        margin_spec(y, net.n_out)
        lower, upper = self._raw_box(raw)
        verdicts = [ImageVerdict() for _ in range(len(x))]
        images = torch.arange(len(x), device=raw.device)
        with full_precision():
            for part in images.split(self.setting.config.max_images) if len(x) else ():
                before, total = int(part[0]), len(x)

                def report(group: Group, before: int = before, total: int = total) -> None:
                    if progress is not None:
                        progress((before + len(group.verdicts) - len(group.open)) / total)

                group = Group(self.setting, raw[part], y[part], lower[part], upper[part], report)
                verdicts[before : before + len(part)] = group.run()
        for v in verdicts:
            v.lb *= self.setting.unit
        if progress is not None:
            progress(1.0)
        return VerifyReport(verdicts)

    def _raw_box(self, raw: Tensor) -> Box:
        if self.box is None:
            assert self.setting.eps is not None
            return input_box(raw, self.setting.eps)
        lower, upper = (t.to(raw).expand_as(raw) for t in self.box)
        if not raw.isfinite().all():
            raise ValueError("x must be finite, got NaN or Inf")
        check_box(self.setting.exact, lower, upper)
        return lower, upper


def check_tensors(x: object, y: object) -> None:
    """Raise ValueError unless both are tensors."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def _unit(net: ChainNet) -> float:
    """Power of 64 nearest to the root mean square of the last layer's weights.

    Adam's steps in beta and the thresholds of branching are absolute. Logits measured in this unit suit them whatever
    their scale; ordinary networks have unit 1, and a power of two changes no rounding.
    """
    if not net.affines[-1].ops:
        return 1.0
    rows = net.affines[-1].transposed(torch.eye(net.n_out, dtype=net.dtype, device=net.device))
    rms = float(rows.square().mean().sqrt())
    return 64.0 ** round(log(rms, 64)) if rms > 0 else 1.0
