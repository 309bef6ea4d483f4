"""Imitation: the learner is shown Adam's steps and learns to output them (spec c.5)."""

import torch
from torch import Tensor

from symbolic_l2o.inner import Learner, State
from symbolic_l2o.problems import Problem


class AdamLabels:
    """Steps of Adam in TensorFlow's form: -lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + 1e-8)."""

    def __init__(self, like: Tensor, lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.m, self.v, self.t = torch.zeros_like(like), torch.zeros_like(like), 0
        self.lr, self.beta1, self.beta2 = lr, beta1, beta2

    def __call__(self, g: Tensor) -> Tensor:
        """x_{t+1} - x_t (P,) for the gradient (P,)."""
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g * g
        rate = self.lr * (1 - self.beta2**self.t) ** 0.5 / (1 - self.beta1**self.t)
        return -rate * self.m / (self.v.sqrt() + 1e-8)


@torch.no_grad()
def demonstrate(
    learner: Learner, problem: Problem, steps: int, rng: torch.Generator, keys: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """A run of Adam from a fresh start: features (steps, P, F) of its gradients, and its steps (steps, P)."""
    x = problem.init(rng)
    moments, adam = learner.features.init(x), AdamLabels(x)
    features, labels = [], []
    for step in range(steps):
        _, g = problem.gradient(x, problem.batch(*keys, step, 0))
        features.append(learner.features(g, moments))
        labels.append(adam(g))
        x = x + labels[-1]
    return torch.stack(features), torch.stack(labels)


def imitation_loss(
    learner: Learner, features: Tensor, labels: Tensor, state: State, eta: float
) -> tuple[Tensor, State]:
    """Half the squared difference between the steps and eta * output: mean over coordinates, summed over steps.

    Also the learner's state at the end, detached: the next window gives it no credit.
    """
    loss = torch.zeros((), dtype=features.dtype)
    for z, label in zip(features, labels, strict=True):
        out, state = learner.step(z, state)
        loss = loss + 0.5 * ((label - eta * out) ** 2).mean()
    return loss, [tensor.detach() for tensor in state]
