"""Unstructured baselines: scores of single weights, and the gradual schedule. They save no FLOPs of dense kernels."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from common.masks import Masks, keep_top, saliency_scores


def magnitude_mask(weights: Mapping[str, Tensor], density: float) -> Masks:
    """Keep the largest of all weights together."""
    return top_share({name: weight.detach().abs() for name, weight in weights.items()}, density)


def taylor_scores(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """|weight times its gradient summed over the batches|: the first-order change of the loss without it."""
    model.zero_grad()
    for inputs, targets in batches:
        loss(model(inputs), targets).backward()
    gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
    model.zero_grad()
    return saliency_scores(weights, gradients)


def top_share(scores: Mapping[str, Tensor], density: float) -> Masks:
    """Keep the share `density` with the largest scores; floor((1 - density) * number) go, as in the authors' code."""
    total = sum(score.numel() for score in scores.values())
    return keep_top(scores, total - int((1 - density) * total))


def gradual_sparsity(step: int, final: float, start: int, every: int, times: int) -> float:
    """Of gradual magnitude pruning at `step`, which rises as a cubic from 0 to `final`.

    Args:
        step: of training.
        final: sparsity at the end.
        start: step at which pruning starts.
        every: steps between two prunings.
        times: number of prunings.
    """
    done = min(max((step - start) / (every * times), 0), 1)
    return final * (1 - (1 - done) ** 3)
