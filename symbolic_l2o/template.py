"""Fitting the paper's common form psi, and its pole form, to a teacher's records (spec c.8).

psi has weights W_g,tau and a gamma for each feature; the pole form keeps one decaying sum a feature instead of a
window. Both are fitted by L-BFGS in float64: least squares plus 1e-5 |W|^2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from symbolic_l2o.records import SRData
from symbolic_l2o.rule import SymbolicRule, fir_rule, pole_rule

RIDGE = 1e-5
FIRST_GAMMA = 0.3
MOST_GAMMA = 1e3


def saturate(X: Tensor, log_gamma: Tensor) -> Tensor:
    """gamma tanh(z / gamma) of windows (N, L, F), gamma at most 1e3."""
    gamma = log_gamma.exp().clamp(max=MOST_GAMMA)
    return gamma * torch.tanh(X / gamma)


def _minimise(parameters: list[Tensor], loss: Callable[[], Tensor], iterations: int) -> float:
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-12
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return float(loss().detach())


def fit_fir(
    data: SRData, features: Sequence[str], outer_tanh: bool = False, iterations: int = 150, **options: Any
) -> SymbolicRule:
    """psi with all L x F weights, fitted to `data`; with `outer_tanh` tanh(psi)."""
    X, y = data.X.double(), data.y.double()
    weights = torch.zeros(X.shape[1:], dtype=torch.float64, requires_grad=True)
    log_gamma = torch.full((X.shape[2],), FIRST_GAMMA, dtype=torch.float64).log().requires_grad_()

    def loss() -> Tensor:
        out = -(saturate(X, log_gamma) * weights).sum((1, 2))
        out = torch.tanh(out) if outer_tanh else out
        return ((out - y) ** 2).mean() + RIDGE * (weights**2).sum()

    _minimise([weights, log_gamma], loss, iterations)
    gamma = log_gamma.detach().exp().clamp(max=MOST_GAMMA).tolist()
    return fir_rule(features, weights.detach(), gamma, outer_tanh=outer_tanh, **options)


def fit_pole(data: SRData, features: Sequence[str], iterations: int = 150, **options: Any) -> SymbolicRule:
    """The pole form, fitted to `data`: the best of three starts of the decays."""
    X, y = data.X.double(), data.y.double()
    count = X.shape[2]
    powers = torch.arange(X.shape[1], dtype=torch.float64)[:, None]
    best: tuple[float, list[Tensor]] = (float("inf"), [])
    for rho in (0.2, 0.7, 0.95):
        w, a = (torch.zeros(count, dtype=torch.float64, requires_grad=True) for _ in range(2))
        logit = torch.full((count,), rho, dtype=torch.float64).logit().requires_grad_()
        log_gamma = torch.full((count,), FIRST_GAMMA, dtype=torch.float64).log().requires_grad_()

        def loss(w: Tensor = w, a: Tensor = a, logit: Tensor = logit, log_gamma: Tensor = log_gamma) -> Tensor:
            phi = saturate(X, log_gamma)
            past = (phi * torch.sigmoid(logit) ** powers).sum(1)
            out = -(phi[:, 0] @ w + past @ a)
            return ((out - y) ** 2).mean() + RIDGE * ((w**2).sum() + (a**2).sum())

        value = _minimise([w, a, logit, log_gamma], loss, iterations)
        if value < best[0]:
            best = (value, [t.detach() for t in (w, a, logit.sigmoid(), log_gamma.exp().clamp(max=MOST_GAMMA))])
    if not best[1]:
        raise ValueError("the pole form must fit the data, got a loss that is not finite")
    weights, sums, decays, gamma = (tensor.tolist() for tensor in best[1])
    return pole_rule(features, weights, sums, [min(decay, 0.9999) for decay in decays], gamma, **options)
