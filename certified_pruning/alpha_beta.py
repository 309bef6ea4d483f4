"""alpha- and beta-CROWN by projected Adam with closed-form gradients (Xu et al. 2021, Wang et al. 2021; spec h.1).

Between sign changes the bound is multilinear in the lower slopes alpha and linear in the multipliers beta. By
Danskin's theorem its gradient is read off one forward sweep of the point that minimises it, so a step costs one
backward (transposed) and one forward pass, no autograd graph. Projection happens after the step: a clamp inside a graph
would have zero gradient where alpha starts, at 0 and 1 (spec f, T2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from certified_pruning.chain import ChainNet
from certified_pruning.ibp import PreBounds
from certified_pruning.rows import Backward, RowBatch, Splits, layers, row_batch, rows_at_once


@dataclass
class Result:
    """What `optimize_alpha_beta` found, per row.

    Attributes:
        lb: best lower bound, shaped as the rows of C: (B, S) or (R,).
        alpha, beta: (rows, N) and (rows, D), which give `lb`; beta is None without splits. The alpha of a stable neuron
            has no meaning.
        x_star: (rows, n), corner of the box minimising the last linear bound: a candidate counterexample.
        relu_coef: (rows, N), coefficients H on the ReLU outputs at the last iterate, for branching. Rows that left
            early because their bound passed `stop_above` keep the values they had then.
    """

    lb: Tensor
    alpha: Tensor
    beta: Tensor | None
    x_star: Tensor
    relu_coef: Tensor

    @staticmethod
    def cat(parts: list[Result]) -> Result:
        lb, alpha, x_star, relu_coef = (
            torch.cat([getattr(p, name) for p in parts]) for name in ("lb", "alpha", "x_star", "relu_coef")
        )
        betas = [p.beta for p in parts if p.beta is not None]
        return Result(lb, alpha, torch.cat(betas) if betas else None, x_star, relu_coef)

    def select(self, rows: Tensor) -> Result:
        lb, alpha, x_star, relu_coef = (
            t.index_select(0, rows) for t in (self.lb, self.alpha, self.x_star, self.relu_coef)
        )
        return Result(lb, alpha, None if self.beta is None else self.beta[rows], x_star, relu_coef)


def gradient(
    batch: RowBatch, b: Backward, positions: list[tuple[Tensor, Tensor, Tensor]], beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The bound lb (R,), d lb / d alpha (R, N) and d lb / d beta (R, D) at the slopes that produced `b`.

    d lb / d alpha = max(H, 0) z and d lb / d beta = -sign z, with z the ReLU inputs at the minimiser. Entries of stable
    neurons are not zeroed: their alpha has no effect. The bound is what the net with lines for ReLUs puts out at the
    minimiser, which saves the constant of the backward pass. Uses up `b.below`.
    """
    g_alpha = batch.C.new_empty(len(batch.C), batch.net.n_neurons)
    g_beta = None if beta is None else torch.zeros_like(beta)
    g = b.corner
    for k, (start, end) in enumerate(layers(batch.net)):
        z = batch.net.affines[k].forward(g)
        torch.clamp(b.relu_coef[k], min=0, out=g_alpha[:, start:end]).mul_(z)
        if g_beta is not None:
            rows, slots, local = positions[k]
            assert batch.splits is not None
            g_beta[rows, slots] = -batch.splits.sign[rows, slots] * z[rows, local]
        g = b.below[k].mul_(batch.relaxation.intercept[:, start:end]).addcmul_(b.slope[k], z)
    lb = (batch.C * batch.net.affines[-1].forward(g)).sum(1)
    if beta is not None and g_beta is not None:
        lb += (beta * g_beta).sum(1)
    return batch.or_empty(lb), g_alpha, g_beta


class _Adam:
    """Adam ascent on a tensor of independent rows; one fused kernel a step, 3 times as fast as seven plain ones."""

    def __init__(self, like: Tensor) -> None:
        self.m, self.v = torch.zeros_like(like), torch.zeros_like(like)
        self.t = torch.zeros((), device=like.device)

    def step(self, value: Tensor, grad: Tensor, lr: float) -> None:
        adam(
            [value],
            [grad],
            [self.m],
            [self.v],
            [],
            [self.t],
            lr=lr,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            amsgrad=False,
            maximize=True,
            fused=True,
        )

    def select(self, rows: Tensor) -> None:
        self.m, self.v = self.m.index_select(0, rows), self.v.index_select(0, rows)


def ascend(
    batch: RowBatch,
    alpha: Tensor,
    beta: Tensor | None,
    steps: int,
    lr_alpha: float,
    lr_beta: float,
    decay: float = 0.98,
    stop_above: float = float("inf"),
) -> Result:
    """Maximise the bound of every row; see `optimize_alpha_beta`, which checks its arguments first.

    Does `steps` updates and `steps + 1` evaluations; the best evaluation of each row is kept. Rows above `stop_above`
    leave the batch once they are a sixteenth of it.
    """
    size = rows_at_once(batch.net)
    if len(alpha) > size:
        parts = []
        for rows in torch.arange(len(alpha), device=alpha.device).split(size):
            some = batch.select(rows), alpha[rows], None if beta is None else beta[rows]
            parts.append(ascend(*some, steps, lr_alpha, lr_beta, decay, stop_above))
        return Result.cat(parts)
    rows = torch.arange(len(alpha), device=alpha.device)  # rows still worked on, as numbers of the result
    alpha, beta = alpha.clone(), None if beta is None else beta.clone()
    left: list[tuple[Tensor, Result]] = []  # rows that are done, and what was found
    # Best so far of the rows still worked on.
    top, top_alpha = alpha.new_full((len(alpha),), -float("inf")), alpha.clone()
    top_beta = None if beta is None else beta.clone()
    adam_alpha, adam_beta = _Adam(alpha), None if beta is None else _Adam(beta)
    positions = batch.split_positions()
    for t in range(1, steps + 2):
        b, g_alpha, g_beta = batch.backward(alpha, beta, positions), None, None
        if t <= steps:
            lb, g_alpha, g_beta = gradient(batch, b, positions, beta)
        else:
            lb = batch.concretize(b)
        better = (lb > top).to(lb)[:, None]
        top = torch.maximum(top, lb)
        top_alpha.lerp_(alpha, better)  # weight 0 or 1: a copy of the better rows
        if beta is not None and top_beta is not None:
            top_beta.lerp_(beta, better)
        done = top > stop_above
        n_done = int(done.sum())
        last = g_alpha is None or n_done == len(rows)
        shrink = not last and 16 * n_done >= len(rows)
        if last or shrink:
            found = Result(top, top_alpha, top_beta, b.corner, torch.cat([*b.relu_coef, alpha[:, :0]], 1))
            leaving = done.nonzero().squeeze(1)
            left.append((rows, found) if last else (rows[leaving], found.select(leaving)))
        if last or g_alpha is None:
            break
        adam_alpha.step(alpha, g_alpha, lr_alpha * decay ** (t - 1))
        alpha.clamp_(0, 1)
        if beta is not None and adam_beta is not None and g_beta is not None:
            adam_beta.step(beta, g_beta, lr_beta * decay ** (t - 1))
            beta.clamp_(min=0)
        if shrink:
            keep = (~done).nonzero().squeeze(1)
            rows, batch, alpha = rows[keep], batch.select(keep), alpha.index_select(0, keep)
            top, top_alpha = top[keep], top_alpha.index_select(0, keep)
            adam_alpha.select(keep)
            positions = batch.split_positions()
            if beta is not None and top_beta is not None and adam_beta is not None:
                beta, top_beta = beta[keep], top_beta[keep]
                adam_beta.select(keep)
    result = Result.cat([part for _, part in left])
    return result if len(left) == 1 else result.select(torch.cat([numbers for numbers, _ in left]).argsort())


@torch.no_grad()
def optimize_alpha_beta(
    net: ChainNet,
    C: Tensor,
    x_lb: Tensor,
    x_ub: Tensor,
    pre: PreBounds,
    splits: Splits | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    steps: int = 20,
    lr_alpha: float = 0.1,
    lr_beta: float = 0.05,
    decay: float = 0.98,
    stop_above: float = float("inf"),
    image: Tensor | None = None,
) -> Result:
    """Best lower bound of C . logits over the box and the splits that `steps` Adam steps find; sound at every step.

    Arguments up to `beta` and `image` as in `crown_lower`. Without splits this is alpha-CROWN at the root.

    Args:
        steps: Adam updates; 0 evaluates the given alpha and beta once.
        lr_alpha, lr_beta: learning rates, multiplied by `decay` after every step.
        stop_above: rows whose bound passes this leave early.

    Raises:
        ValueError: as `crown_lower`; steps < 0.
    """
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}")
    batch, lead = row_batch(net, C, x_lb, x_ub, pre, splits, image)
    alpha = batch.relaxation.adaptive() if alpha is None else alpha.clamp(0, 1)
    if batch.splits is not None:
        beta = torch.zeros_like(batch.splits.sign) if beta is None else beta.clamp_min(0)
    else:
        beta = None
    result = ascend(batch, alpha, beta, steps, lr_alpha, lr_beta, decay, stop_above)
    result.lb = result.lb.view(lead)
    return result
