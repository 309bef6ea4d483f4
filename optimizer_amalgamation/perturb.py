"""Noise on a student's weights, random or adversarial, while it is meta-trained (Sec. 4; spec c8).

Each weight tensor has its own noise, and the gradient is applied to the weights without it. All functions take weights
by name; where these are `batched`, their first axis is that of replicates, which do not see each other.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optimizer_amalgamation.rule import Weights

NORMS = ("l2", "linf")


def norms(x: Tensor, batched: bool = False) -> Tensor:
    """Euclidean norm of a tensor, or (R, 1, ...) of each of the R along its first axis."""
    if not batched:
        return x.norm()
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1)) if x.dim() > 1 else x.abs()


def standard_normal(like: Weights, generators: torch.Generator | Sequence[torch.Generator]) -> Weights:
    """Noise N(0, 1) for each weight; one generator for each replicate where the weights are batched."""
    if isinstance(generators, torch.Generator):
        return {name: torch.randn(w.shape, generator=generators, dtype=w.dtype).to(w) for name, w in like.items()}
    drawn = [standard_normal({name: w[r] for name, w in like.items()}, g) for r, g in enumerate(generators)]
    return {name: torch.stack([one[name] for one in drawn]) for name in like}


def gaussian(weights: Weights, noise: Weights, sigma: float) -> Weights:
    """Weights with noise of standard deviation `sigma`; `noise` is N(0, 1)."""
    return {name: w + sigma * noise[name] for name, w in weights.items()}


def relative_gaussian(weights: Weights, noise: Weights, sigma: float, batched: bool = False) -> Weights:
    """As `gaussian`, its deviation `sigma` times the root of the mean of w^2 + 1e-8; differentiable in the weights."""
    found = {}
    for name, w in weights.items():
        squares = w.square() + 1e-8
        axes = tuple(range(1 if batched else 0, w.dim()))
        found[name] = w + sigma * (squares.mean(axes, keepdim=True) if axes else squares).sqrt() * noise[name]
    return found


def add(weights: Weights, delta: Mapping[str, Tensor]) -> Weights:
    """Weights + delta."""
    return {name: w + delta[name] for name, w in weights.items()}


def fgsm(delta: Weights, gradient: Weights, step: float) -> Weights:
    """One step up: delta + step sign(gradient)."""
    return {name: d + step * gradient[name].sign() for name, d in delta.items()}


def pgd(
    delta: Weights, gradient: Weights, lr: float, magnitude: float, norm: str = "linf", batched: bool = False
) -> Weights:
    """One step up by lr times the gradient, then back into each tensor's ball of radius `magnitude`.

    Raises:
        ValueError: for a norm other than l2 and linf.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    found = {}
    for name, d in delta.items():
        moved = d + lr * gradient[name]
        if norm == "linf":
            found[name] = moved.clamp(-magnitude, magnitude)
        else:
            found[name] = moved * (magnitude / norms(moved, batched).clamp_min(1e-30)).clamp_max(1.0)
    return found


def cgd(
    delta: Weights,
    gradient: Weights,
    weights: Weights,
    epsilon: float,
    normalize: bool = False,
    batched: bool = False,
) -> Weights:
    """One step up by the gradient, at most `epsilon` times the norm of the tensor's weights.

    The released code clips; eq. 6 always takes that length: `normalize`.
    """
    found = {}
    for name, d in delta.items():
        g = gradient[name]
        factor = epsilon * norms(weights[name], batched) / norms(g, batched).clamp_min(1e-30)
        found[name] = d + g * (factor if normalize else factor.clamp_max(1.0))
    return found
