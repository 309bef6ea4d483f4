"""Trigger inversion on a sparse ResNet-20s: released loop, frozen weights, compacted; ratios in one run, one thread.

    python backdoor_lth/benchmarks/inversion.py [weights]

The network has 136 surviving weights (the released ticket's count) or as many as given, alive from end to end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from backdoor_lth.compaction import Compacted, compact
from backdoor_lth.inversion import frozen
from backdoor_lth.models import build_model
from backdoor_lth.tabor import tabor
from common.masks import Masks, prunable_weights

SHAPE, IMAGES, STEPS, REPEATS = (3, 32, 32), 100, 2, 3


def ticket(left: int) -> nn.Module:
    """A ResNet-20s with `left` convolution weights: the same share of every layer, largest first, at least two."""
    torch.manual_seed(0)
    model = build_model("resnet20s", 3, 10)
    weights = prunable_weights(model)
    masks = {}
    for name, weight in weights.items():
        keep = max(2, round(left / len(weights)))
        order = weight.detach().abs().flatten().argsort(descending=True)
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[order[:keep]] = True
        masks[name] = mask.view(weight.shape)
    Masks(masks).apply_(model)
    return model.eval()


def search(model: nn.Module, freeze: bool) -> float:
    """Seconds of a label-step: the released loop also differentiates by every weight."""
    labels = torch.tensor([0])
    mark, mask = torch.randn(1, *SHAPE), torch.randn(1, *SHAPE[1:])

    def run() -> None:
        tabor(model, labels, mark, mask, lambda step: torch.randn(1, IMAGES, *SHAPE), STEPS)

    def best(work: Callable[[], None]) -> float:
        times = []
        for _ in range(REPEATS):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return min(times) / STEPS

    if freeze:
        with frozen(model):
            return best(run)
    # torch.autograd.grad inside tabor skips the weights' gradients; the released loop's backward does not.
    plain = torch.autograd.grad

    def everything(loss: torch.Tensor, variables: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return plain(loss, [*variables, *model.parameters()])[: len(variables)]

    torch.autograd.grad = everything  # type: ignore[assignment]
    try:
        return best(run)
    finally:
        torch.autograd.grad = plain


def main() -> None:
    """Print the ratios."""
    torch.set_num_threads(1)
    for left in [int(word) for word in sys.argv[1:]] or [136, 2669]:
        model = ticket(left)
        folded = compact(model, SHAPE)
        assert isinstance(folded, Compacted)
        x = torch.randn(4, *SHAPE)
        with torch.no_grad():
            gap = float((model(x) - folded(x)).abs().max() / model(x).abs().max())
        released, cold, fast = search(model, False), search(model, True), search(folded, True)
        kept = Masks({name: w != 0 for name, w in prunable_weights(model).items()}).kept
        ratios = f"released loop / frozen {released / cold:.2f}, released / compacted {released / fast:.1f}"
        print(f"{kept:>7,} weights: {ratios};")
        print(f"        logits differ by {gap:.1e} of the largest; widest node {max(folded.widths.values())} channels")


if __name__ == "__main__":
    main()
