"""What masks cost: ResNet-18 at 80 % sparsity through Masks.attach against the same training without masks.

Fails where optimizer.step() or a whole training step takes more than 1.1 times as long, with SGD or fused AdamW.
AdamW's default form is shown but not judged: on Intel's MKL the square root of an exact zero (the second moment of a
masked weight, in every form of masking) takes several times as long as that of another number. Use fused=True.

python common/benchmarks/masked_step.py
"""

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import nn, optim
from torch.nn.utils import prune
from torchvision.models import resnet18

from common.bench import Ratio, conclude, interleaved, ratio
from common.masks import Masks, keep_top, prunable_weights

THREADS = 2
REPEATS = 16
BATCH, SPARSITY = 64, 0.8
MOST = 1.10
FORMS = {"none": "no masks", "attach": "Masks.attach", "plain": "weight * mask"}
OPTIMISERS: dict[str, Callable[[Iterator[nn.Parameter]], optim.Optimizer]] = {
    "SGD": lambda parameters: optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4),
    "AdamW fused": lambda parameters: optim.AdamW(parameters, lr=1e-3, fused=True),
    "AdamW": lambda parameters: optim.AdamW(parameters, lr=1e-3),
}
JUDGED = ("SGD", "AdamW fused")


def magnitude_masks(model: nn.Module) -> Masks:
    """Global magnitude over all convolutions."""
    scores = {name: weight.detach().abs() for name, weight in prunable_weights(model).items()}
    total = sum(score.numel() for score in scores.values())
    return keep_top(scores, total - round(SPARSITY * total))


class Training:
    """One ResNet-18 in training, masked in one of the FORMS."""

    def __init__(self, form: str, build: Callable[[Iterator[nn.Parameter]], optim.Optimizer]) -> None:
        torch.manual_seed(0)
        self.images, self.labels = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
        self.model = resnet18(num_classes=10)
        masks = magnitude_masks(self.model)
        if form == "plain":
            for name, mask in masks.items():
                prune.custom_from_mask(self.model.get_submodule(name.removesuffix(".weight")), "weight", mask)
        self.optimizer = build(self.model.parameters())
        if form == "attach":
            masks.attach(self.model, self.optimizer)

    def whole_step(self) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()

    def update(self) -> None:
        """optimizer.step() alone, on the gradients that are there."""
        self.optimizer.step()


def main() -> int:
    """Print the table; 1 where a ratio of Masks.attach is above the most allowed."""
    torch.set_num_threads(THREADS)
    table = Table("optimiser", "timed", "form", "median, ms", "ratio")
    table.title = f"ResNet-18, 32x32, batch {BATCH}, {SPARSITY:.0%} sparse, {THREADS} threads, {REPEATS} repeats"
    table.caption = "ratio: median over the repeats of the time over that without masks in the same repeat"
    ratios = []
    for name, build in OPTIMISERS.items():
        trainings = {form: Training(form, build) for form in FORMS}
        for timed, work in (("whole step", Training.whole_step), ("optimizer.step()", Training.update)):
            works = {form: partial(work, training) for form, training in trainings.items()}
            times = interleaved(works, REPEATS, time.perf_counter)
            for form, label in FORMS.items():
                found = ratio(times, form, "none")
                table.add_row(name, timed, label, f"{1e3 * median(times[form]):.1f}", f"{found:.3f}")
                if form == "attach":
                    most = MOST if name in JUDGED else None
                    ratios.append(Ratio(f"ResNet-18, {name}, {timed}: Masks.attach / no masks", found, most=most))
    Console().print(table)
    return conclude(ratios)


if __name__ == "__main__":
    sys.exit(main())
