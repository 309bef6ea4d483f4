"""Incomplete verification of any graph that auto_LiRPA can parse (`verify.py --bounds auto_lirpa`).

Interval bounds, PGD, then CROWN or alpha-CROWN, all in float64. What they do not decide is unknown: nothing is split.
`CompleteVerifier` decides more, and sooner, on the chains it takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor, nn

from certified_pruning.attack import margin_of, pgd_attack
from certified_pruning.auto_lirpa import Method, bounded, lirpa_margins
from certified_pruning.ibp import channel_stats, input_box, margin_spec
from certified_pruning.verdicts import ImageVerdict, Status, VerifyConfig, VerifyReport
from certified_pruning.verifier import Normalization, check_tensors

APPLIED = ("pgd_steps", "pgd_restarts", "pgd_step", "root_steps", "max_images", "seed")
"""What of a `VerifyConfig` has an effect here."""


class LirpaVerifier:
    """Verdicts as those of `CompleteVerifier`, of which unknown says only that the bounds are too loose.

    Args:
        model: in eval mode, on the device to work on; a copy is made.
        input_shape: of one image, e.g. (3, 32, 32).
        eps: radius of the L-inf ball in raw pixel units [0, 1]; the ball is cut to [0, 1].
        n_classes: number of logits.
        config: of which `APPLIED` applies; root_steps 0 means CROWN, memory grows with max_images.
        normalize: (mean, std) a channel that the network expects; images are given raw.

    Raises:
        ValueError: eps outside [0, 1], n_classes that is not the number of logits, train mode, a graph the library
            cannot parse.
        MissingPackageError: auto_LiRPA is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        eps: float,
        n_classes: int,
        config: VerifyConfig | None = None,
        *,
        normalize: Normalization = ((0.0,), (1.0,)),
    ) -> None:
        if any(module.training for module in model.modules()):
            raise ValueError("model must be in eval mode (call model.eval()), got train mode")
        self.model = copy.deepcopy(model).double()
        self.graph = bounded(self.model, input_shape)
        if n_classes != self.graph.n_out:
            raise ValueError(f"n_classes must be the {self.graph.n_out} outputs of the model, got {n_classes}")
        self.like = next(model.parameters(), torch.zeros(())).new_zeros(1, *input_shape, dtype=torch.float64)
        input_box(self.like, eps)
        self.mean, self.std = channel_stats(*normalize, self.like)
        self.eps, self.n_classes, self.config = eps, n_classes, config or VerifyConfig()

    @torch.no_grad()
    def verify(self, x: Tensor, y: Tensor, progress: Callable[[float], None] | None = None) -> VerifyReport:
        """Verdicts on raw images; arguments and errors as `CompleteVerifier.verify`."""
        check_tensors(x, y)
        if tuple(x.shape[1:]) != tuple(self.like.shape[1:]) or len(y) != len(x):
            raise ValueError(
                f"x must be a batch of {tuple(self.like.shape[1:])} with a label each, got {tuple(x.shape)}"
            )
        raw, y, verdicts = x.to(self.like), y.to(self.like.device), list[ImageVerdict]()
        for images in torch.arange(len(raw), device=raw.device).split(self.config.max_images) if len(raw) else ():
            started = perf_counter()
            found = self._group(raw[images], y[images])
            for verdict in found:
                verdict.seconds = (perf_counter() - started) / len(found)
            verdicts += found
            if progress is not None:
                progress(len(verdicts) / len(raw))
        return VerifyReport(verdicts)

    def _group(self, raw: Tensor, y: Tensor) -> list[ImageVerdict]:
        config, raw_box = self.config, input_box(raw, self.eps)
        x, x_lb, x_ub = ((t - self.mean) / self.std for t in (raw, *raw_box))
        C, _ = margin_spec(y, self.n_classes, torch.float64)
        verdicts = [ImageVerdict() for _ in raw]
        still = torch.arange(len(raw), device=raw.device)

        def close(which: Tensor, status: Status, stage: str) -> None:
            nonlocal still
            for image in still[which].tolist():
                verdicts[image].status, verdicts[image].stage = status, stage
            still = still[~which]

        def bound(method: Method, stage: str) -> None:
            if not len(still):
                return
            lb = lirpa_margins(self.graph, x_lb[still], x_ub[still], C[still], method, config.root_steps).amin(1)
            for image, value in zip(still.tolist(), lb.tolist(), strict=True):
                best = max(value, verdicts[image].lb)  # in this order nan, no bound yet, gives value
                verdicts[image].lb, verdicts[image].stage = best, stage
            close(lb > 0, "verified", stage)

        close(~(margin_of(self.model(x), C).amin(1) > 0), "misclassified", "clean")
        bound("ibp", "ibp")
        step = config.pgd_step * self.eps / self.std
        tried = x[still], y[still], x_lb[still], x_ub[still]
        adv = pgd_attack(self.model, *tried, step, config.pgd_steps, config.pgd_restarts, seed=config.seed).x_adv
        witness = torch.clamp(adv * self.std + self.mean, raw_box[0][still], raw_box[1][still])
        wrong = margin_of(self.model((witness - self.mean) / self.std), C[still]).amin(1) < 0
        for image, found in zip(still[wrong].tolist(), witness[wrong], strict=True):
            verdicts[image].witness = found
        close(wrong, "falsified", "pgd")
        bound(*(("alpha-crown", "alpha") if config.root_steps else ("crown", "crown")))
        return verdicts
