"""The stages a group of images goes through, from the cheapest to branch and bound (spec c.8.2 to c.8.7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from certified_pruning.attack import margin_of, pgd_attack
from certified_pruning.bab import branch_and_bound
from certified_pruning.chain import ChainNet
from certified_pruning.crown import crown_intermediate
from certified_pruning.frontier import Domains
from certified_pruning.ibp import PreBounds, ibp, interval, margin_spec
from certified_pruning.problem import Problem
from certified_pruning.rows import join
from certified_pruning.verdicts import ImageVerdict, Status, VerifyConfig

ROUNDING = 2e-6
"""Relative error granted to float32 intermediate bounds, see `outward`."""


@dataclass(frozen=True)
class Setting:
    """What the images of a verification share."""

    net: ChainNet
    exact: ChainNet  # float64: decides
    mean: Tensor  # float64, broadcast over images
    std: Tensor
    eps: float | None  # raw units; None for a box of another form
    unit: float  # true logits are this many times those of the nets
    config: VerifyConfig


class Group:
    """One group of images on its way through the stages."""

    def __init__(
        self,
        setting: Setting,
        raw: Tensor,
        y: Tensor,
        raw_lb: Tensor,
        raw_ub: Tensor,
        report: Callable[[Group], None],
    ) -> None:
        self.v, self.config, self.report = setting, setting.config, report
        self.raw_lb, self.raw_ub = raw_lb, raw_ub
        self.x, self.x_lb, self.x_ub = ((t - setting.mean) / setting.std for t in (raw, raw_lb, raw_ub))
        self.y = y
        self.C, _ = margin_spec(y, setting.net.n_out, torch.float64)
        self.verdicts = [ImageVerdict() for _ in range(len(raw))]
        self.open = list(range(len(raw)))

    def run(self) -> list[ImageVerdict]:
        for stage in (self._clean, self._ibp, self._pgd):
            images = list(self.open)
            if images:
                started = perf_counter()
                stage(torch.tensor(images, device=self.x.device))
                self._charge(images, perf_counter() - started)
        if self.open:
            self._bounds()
        return self.verdicts

    def _close(self, image: int, status: Status, stage: str) -> None:
        self.verdicts[image].status, self.verdicts[image].stage = status, stage
        self.open.remove(image)

    def _charge(self, images: list[int], seconds: float) -> None:
        for image in images:
            self.verdicts[image].seconds += seconds / len(images)
        self.report(self)

    def _clean(self, images: Tensor) -> None:
        margin = margin_of(self.v.exact.forward(self.x[images]), self.C[images]).amin(1)
        for image in images[~(margin > 0)].tolist():
            self._close(image, "misclassified", "clean")

    def _ibp(self, images: Tensor) -> None:
        bounds = ibp(self.v.exact, self.x_lb[images], self.x_ub[images], self.C[images])
        for image, lb in zip(images.tolist(), bounds.out[0].amin(1).tolist(), strict=True):
            self.verdicts[image].lb = lb
            if lb > 0:
                self._close(image, "verified", "ibp")

    def _pgd(self, images: Tensor) -> None:
        net, c = self.v.net, self.config
        if c.pgd_restarts == 0:
            return
        if self.v.eps is not None:
            step = c.pgd_step * self.v.eps / self.v.std
        else:
            step = c.pgd_step * (self.x_ub - self.x_lb)[images] / 2
        x, lb, ub = (t[images].to(net.dtype) for t in (self.x, self.x_lb, self.x_ub))
        found = pgd_attack(net, x, self.y[images], lb, ub, step.to(net.dtype), c.pgd_steps, c.pgd_restarts, seed=c.seed)
        for row in (found.margin < 0).nonzero().squeeze(1).tolist():
            image = int(images[row])
            self._falsify(image, found.x_adv[row], "pgd")

    def _falsify(self, image: int, x: Tensor, stage: str) -> bool:
        witness = self.witness(image, x)
        if witness is None:
            return False
        self.verdicts[image].witness = witness
        self._close(image, "falsified", stage)
        return True

    def witness(self, image: int, x: Tensor) -> Tensor | None:
        """The raw image of point x, put in the raw box, if float64 sees another class win there."""
        v = self.v
        raw = x.to(torch.float64).reshape(1, *v.net.input_shape) * v.std + v.mean
        raw = torch.clamp(raw, self.raw_lb[image], self.raw_ub[image])
        margin = margin_of(v.exact.forward((raw - v.mean) / v.std), self.C[[image]])
        return raw[0] if bool((margin < 0).any()) else None

    def _bounds(self) -> None:
        """CROWN, alpha-CROWN, branch and bound."""
        images = list(self.open)
        started = perf_counter()
        index = torch.tensor(images, device=self.x.device)
        problem = self._problem(index)
        n_targets = self.C.shape[1]
        rows = torch.arange(len(images), device=index.device)
        roots = problem.roots(
            rows.repeat_interleave(n_targets), torch.arange(n_targets, device=index.device).repeat(len(images))
        )
        roots, _ = problem.bound(roots, 0, self.config.root_lr)
        self._settle(images, roots, "crown")
        proven = _smallest(roots, roots.lb > 0, len(images))
        self._charge(images, perf_counter() - started)

        undecided = [i for i in images if i in self.open]
        if not undecided:
            return
        started = perf_counter()
        roots = roots[roots.lb <= 0]
        if self.config.root_steps:
            roots, corners = problem.bound(roots, self.config.root_steps, self.config.root_lr)
            for row in problem.counterexamples(roots.image, corners):
                self._falsify(images[int(roots.image[row])], corners[row], "alpha")
            self._settle(images, roots, "alpha")
            proven = torch.minimum(proven, _smallest(roots, roots.lb > 0, len(images)))
        self._charge(undecided, perf_counter() - started)

        for image in list(self.open):
            self.verdicts[image].stage = "alpha"
        hopeless = self.config.hopeless_below
        keep = torch.tensor([i in self.open for i in images], device=index.device)
        if hopeless is not None:
            keep &= torch.tensor([self.verdicts[i].lb * self.v.unit > hopeless for i in images], device=index.device)
        roots = roots[(roots.lb <= 0) & keep[roots.image]]
        if self.config.max_nodes != 0 and len(roots):
            self._branch(images, problem, roots, proven)

    def _branch(self, images: list[int], problem: Problem, roots: Domains, proven: Tensor) -> None:
        for i in set(roots.image.tolist()):
            self.verdicts[images[i]].stage = ""
            self.verdicts[images[i]].lb = float(proven[i])

        def done() -> None:
            self.open = [i for i in self.open if self.verdicts[i].stage == ""]
            self.report(self)

        verdicts = [self.verdicts[i] for i in images]
        branch_and_bound(problem, roots, verdicts, lambda i, x: self.witness(images[i], x), done)

    def _settle(self, images: list[int], roots: Domains, stage: str) -> None:
        """Raise the bounds of the images to their root bounds; an image whose targets are all above 0 is verified."""
        worst = _smallest(roots, torch.ones_like(roots.image, dtype=torch.bool), len(images))
        for image, lb in zip(images, worst.tolist(), strict=True):
            if image in self.open:
                self.verdicts[image].lb = max(self.verdicts[image].lb, lb)
                if lb > 0:
                    self._close(image, "verified", stage)

    def _problem(self, index: Tensor) -> Problem:
        net = self.v.net
        lb, ub = self.x_lb[index].flatten(1), self.x_ub[index].flatten(1)
        small_lb, small_ub = lb.to(net.dtype), ub.to(net.dtype)
        pre = crown_intermediate(net, small_lb, small_ub, self.config.refine_iters)
        wide = confirmed(net, self.v.exact, lb, ub, pre, outward(net, small_lb, small_ub, pre))
        lower, upper = join(wide, small_lb)
        return Problem(net, self.v.exact, self.C[index], lb, ub, lower, upper, self.config)


def _smallest(roots: Domains, which: Tensor, n_images: int) -> Tensor:
    """(n_images,) smallest lb over some domains of each image; +inf where there is none."""
    worst = torch.full((n_images,), float("inf"), dtype=roots.lb.dtype, device=roots.lb.device)
    return worst.scatter_reduce(0, roots.image[which], roots.lb[which], "amin")


def outward(net: ChainNet, x_lb: Tensor, x_ub: Tensor, pre: PreBounds) -> PreBounds:
    """Bounds widened by what rounding in working precision may have taken, neuron by neuron.

    Of a layer's own sums 2e-6 of |W| |h| + |b|; of the layers before it, and of the box itself, |W| times theirs: a
    relaxation is off by no more than the bounds it was made of, and no slope is above 1. 2e-6 is about 30 float32
    roundings (6e-8), the root-mean-square error of a sum of 1,000 terms; the worst case of n terms is n roundings.
    Neurons that are constant zero (pruned channels) stay exactly so.
    """
    wide = []
    size = torch.maximum(x_lb.abs(), x_ub.abs()).flatten(1)
    slack = ROUNDING * size
    for k, (lower, upper) in enumerate(pre):
        slack = net.affines[k].radius(slack + ROUNDING * size) + ROUNDING * net.affines[k].bias.abs()
        wide.append((lower - slack, upper + slack))
        size = wide[-1][1].relu()
    return wide


def confirmed(net: ChainNet, exact: ChainNet, x_lb: Tensor, x_ub: Tensor, pre: PreBounds, wide: PreBounds) -> PreBounds:
    """`wide`, wider still where it is a layer's interval bound and float64 sees that bound outside it.

    Left as they are: bounds that CROWN tightened, of neurons beyond the first layer that intervals leave unstable.

    Args:
        net, exact: the chain in working precision and in float64.
        x_lb, x_ub: box (B, n), float64.
        pre: what `crown_intermediate` found for `net`; wide: `outward` of it.
    """
    sure: PreBounds = []
    for k, (lower, upper) in enumerate(wide):
        low, high = interval(exact, k, x_lb, x_ub)
        if k:
            below, above = interval(net, k, *(t.relu() for t in pre[k - 1]))
            tightened = (below < 0) & (above > 0)
            low, high = low.masked_fill(tightened, float("inf")), high.masked_fill(tightened, -float("inf"))
        sure.append((torch.minimum(lower, _at_most(low, lower)), torch.maximum(upper, -_at_most(-high, upper))))
        x_lb, x_ub = (t.to(x_lb).relu() for t in sure[-1])
    return sure


def _at_most(value: Tensor, like: Tensor) -> Tensor:
    """The largest number of the type of `like` that is not above `value`."""
    near = value.to(like)
    return torch.where(near.to(value) > value, torch.nextafter(near, torch.full_like(near, -float("inf"))), near)
