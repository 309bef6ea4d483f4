"""Sub-problems of branch and bound: how a batch of domains is bounded, certified and given its next split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certified_pruning import leaf_lp
from certified_pruning.alpha_beta import ascend
from certified_pruning.branching import babsr, kfsb, kfsb_candidates
from certified_pruning.chain import ChainNet
from certified_pruning.frontier import Domains
from certified_pruning.rows import Relaxation, RowBatch, Splits, rows_at_once
from certified_pruning.verdicts import VerifyConfig


@dataclass
class Problem:
    """B images with their boxes, root bounds and specification, in working precision and in float64."""

    net: ChainNet
    exact: ChainNet  # float64: decides
    C: Tensor  # (B, S, out) float64; margins are rows of it
    x_lb: Tensor  # (B, n) float64
    x_ub: Tensor
    lower: Tensor  # (B, N) root bounds of the ReLU inputs, working precision, widened against its rounding
    upper: Tensor
    config: VerifyConfig

    def __post_init__(self) -> None:
        dtype = self.net.dtype
        self.relaxation = Relaxation.of(self.lower, self.upper)
        self.small_C, self.small_lb, self.small_ub = (t.to(dtype) for t in (self.C, self.x_lb, self.x_ub))
        unstable = self.relaxation.unstable
        self.n_unstable = unstable.sum(1)
        width = int(self.n_unstable.max()) if len(unstable) else 0
        # Numbers of the unstable neurons of each image, padded with N: a column that is thrown away.
        self.ids = torch.full((len(unstable), width), unstable.shape[1], device=unstable.device)
        image, neuron = unstable.nonzero(as_tuple=True)
        slot = (unstable.cumsum(1) - 1)[image, neuron]
        self.ids[image, slot] = neuron
        chosen = "bn_beta" if self.config.branching_bias == "bn_beta" else "bias"
        biases = [getattr(a, chosen) for a in self.net.affines[:-1]]
        self.bias = torch.cat(biases) if biases else self.lower.new_zeros(0)

    def roots(self, image: Tensor, target: Tensor) -> Domains:
        """Unsplit domains (R,), slopes as CROWN starts them."""
        n, device = len(image), image.device
        m = 1 if self.config.branching == "babsr" else 2 * self.config.kfsb_k + 1
        return Domains(
            image,
            target,
            torch.full((n,), -float("inf"), dtype=self.net.dtype, device=device),
            self._pack(self.relaxation.adaptive()[image], image),
            torch.zeros(n, 0, dtype=torch.int32, device=device),
            torch.zeros(n, 0, dtype=torch.int8, device=device),
            torch.zeros(n, 0, dtype=self.net.dtype, device=device),
            torch.full((n, m), -1, dtype=torch.int32, device=device),
        )

    def bound(self, domains: Domains, steps: int, lr_alpha: float, lr_beta: float = 0.0) -> tuple[Domains, Tensor]:
        """The domains with alpha and beta optimised, lb raised and candidates chosen, and x* (R, n) of each.

        A positive lb has been confirmed in float64.
        """
        parts, corners = [], []
        for rows in torch.arange(len(domains), device=domains.image.device).split(self.config.max_rows):
            part, x = self._bound(domains[rows], steps, lr_alpha, lr_beta)
            parts.append(part)
            corners.append(x)
        return Domains.cat(parts), torch.cat(corners)

    def _bound(self, d: Domains, steps: int, lr_alpha: float, lr_beta: float) -> tuple[Domains, Tensor]:
        splits = d.splits
        batch = self._batch(d, splits)
        beta = None if splits is None else d.beta[:, : splits.sign.shape[1]]
        alpha = self._unpack(d)
        result = ascend(batch, alpha, beta, steps, lr_alpha, lr_beta, self.config.decay, stop_above=0.0)
        lb = result.lb.clone()
        claimed = (lb > 0).nonzero().squeeze(1)
        if len(claimed):
            exact = self._exact_bound(d, splits, claimed, result.alpha, result.beta)
            lb[claimed] = exact.nan_to_num(nan=-float("inf"), posinf=float("inf")).to(lb)
        out = d[torch.arange(len(d), device=lb.device)]
        out.lb, out.alpha = torch.maximum(lb, d.lb), self._pack(result.alpha, d.image)
        if result.beta is not None:
            out.beta[:, : result.beta.shape[1]] = result.beta
        still = (out.lb <= 0).nonzero().squeeze(1)
        if len(still) and self.lower.shape[1]:
            h = result.relu_coef.index_select(0, still)
            out.candidates[still] = self._candidates(h, batch.relaxation.select(still)).int()
        return out, result.x_star

    def _candidates(self, relu_coef: Tensor, relaxation: Relaxation) -> Tensor:
        if self.config.branching == "babsr":
            return babsr(relu_coef, relaxation, self.bias, self.net.offsets, self.config.reduce)[:, None]
        return kfsb_candidates(relu_coef, relaxation, self.bias, self.config.kfsb_k, self.config.reduce)

    def _exact_bound(
        self, d: Domains, splits: Splits | None, rows: Tensor, alpha: Tensor, beta: Tensor | None
    ) -> Tensor:
        """The bound of some rows in float64, at the slopes and multipliers found."""
        image = d.image[rows]
        lower, upper = (t.index_select(0, image).double() for t in (self.lower, self.upper))
        relaxation = Relaxation.of(lower, upper)
        some = None if splits is None else splits.select(rows)
        index = torch.arange(len(rows), device=rows.device)
        C = self.C[image, d.target[rows]]
        batch = RowBatch.make(self.exact, C, self.x_lb[image], self.x_ub[image], relaxation, index, some)
        beta = None if beta is None else beta[rows].double().clamp_min(0)
        return batch.bound(alpha.index_select(0, rows).double(), beta)

    def choose(self, parents: Domains) -> Tensor:
        """Neuron to split in each domain, (R,) long."""
        candidates = parents.candidates.long()
        if self.config.branching == "babsr":
            return candidates[:, 0]

        def evaluate(rows: Tensor, neurons: Tensor) -> tuple[Tensor, Tensor]:
            bounds = []
            for part in torch.arange(len(rows), device=rows.device).split(rows_at_once(self.net) // 2):
                children = parents[rows[part]].children(neurons[part])
                batch = self._batch(children, children.splits)
                bounds.append(batch.bound(self._unpack(children)))
            pairs = torch.cat(bounds).view(-1, 2)
            return pairs[:, 0], pairs[:, 1]

        return kfsb(candidates, evaluate, self.config.reduce)

    def solve_leaf(self, d: Domains) -> leaf_lp.Leaf:
        """Exact answer for one domain (R = 1) without unstable neurons."""
        image, splits = int(d.image[0]), d.splits
        empty = torch.zeros(1, 0)
        splits = Splits(empty.long(), empty) if splits is None else Splits(splits.neuron.cpu(), splits.sign.cpu())
        C = self.C[image, int(d.target[0])]
        C, x_lb, x_ub, lower, upper = (
            t.cpu().double() for t in (C, self.x_lb[image], self.x_ub[image], self.lower[image], self.upper[image])
        )
        return leaf_lp.solve_leaf(self.exact.to(torch.float64, "cpu"), C, x_lb, x_ub, lower, upper, splits)

    def counterexamples(self, image: Tensor, x: Tensor) -> list[int]:
        """Rows of x (R, n) on which the working-precision net prefers another class; the first of each image."""
        margin = (self.small_C[image] @ self.net.forward(x).unsqueeze(2)).squeeze(2).amin(1)
        rows, seen = [], set()
        for row in (margin < 0).nonzero().squeeze(1).tolist():
            if int(image[row]) not in seen:
                seen.add(int(image[row]))
                rows.append(row)
        return rows

    def _batch(self, d: Domains, splits: Splits | None) -> RowBatch:
        C = self.small_C[d.image, d.target]
        return RowBatch.make(self.net, C, self.small_lb, self.small_ub, self.relaxation, d.image, splits)

    def _pack(self, alpha: Tensor, image: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(alpha, (0, 1))
        return padded.gather(1, self.ids[image]).half()

    def _unpack(self, d: Domains) -> Tensor:
        """Slopes (R, N); 0 on stable neurons, where they have no effect."""
        full = self.lower.new_zeros(len(d), self.lower.shape[1] + 1)
        return full.scatter_(1, self.ids[d.image], d.alpha.to(full))[:, :-1]
