"""Gradients of DP-SGD: clipped sample by sample, with noise on their sum (the problem MNIST-DP of Sec. 5)."""

import math

import torch
from torch import Tensor
from torch.func import grad, vmap

from optimizer_amalgamation.problems import Batch, Problem


def private_gradients(
    problem: Problem, params: Tensor, batch: Batch, generator: torch.Generator, clip: float = 1.0, noise: float = 1.1
) -> tuple[Tensor, Tensor]:
    """Losses and gradients of DP-SGD: each sample's gradient clipped to norm `clip`, then noise on the sum.

    N(0, (clip noise)²) a coordinate; over B (Abadi et al.; the problem MNIST-DP of Sec. 5). Arguments and result as
    `gradients`.
    """
    clipped, losses = per_sample_gradients(problem, params, batch, clip)
    drawn = torch.randn(params.shape, generator=generator).to(params)
    return losses, (clipped.sum(1) + clip * noise * drawn) / batch[1].shape[1]


def per_sample_gradients(
    problem: Problem, params: Tensor, batch: Batch, clip: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Each sample's gradient (R, B, n), its norm at most `clip`, and the mean losses (R,)."""

    def loss(one: Tensor, sample: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        found = problem.sample_losses(one[None], (sample[None, None], label[None, None]))[0, 0]
        return found, found

    every = vmap(grad(loss, has_aux=True), (None, 0, 0))
    parts = [every(one, inputs, labels) for one, inputs, labels in zip(params.detach(), *batch, strict=True)]
    found, losses = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
    return found * (clip / found.norm(dim=2, keepdim=True)).clamp(max=1), losses.mean(1)
