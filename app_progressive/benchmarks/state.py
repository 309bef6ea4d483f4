"""The efficient forms against plain ones: mask update, training step, a whole state of the stream.

All numbers are ratios of processor time in one run, one thread, medians of interleaved repeats. Fails where the mask
update of 2 million weights is less than 5 times as fast as kthvalue over their concatenation, or a whole state less
than 2 times as fast as a faithful loop: images through PIL one by one, mask hooks, the network through a disk file.

python app_progressive/benchmarks/state.py
"""

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision import transforms

from app_progressive import AnytimePruner
from app_progressive.images import epoch_batches
from app_progressive.models import build_model
from app_progressive.pruner import prunable
from app_progressive.threshold import kth_smallest, threshold
from common.data import DataConfig, ImageSet

LEAST_SELECTION, LEAST_STATE = 5.0, 2.0
AUGMENT = DataConfig(crop_padding=4, flip=True)


def ratio(plain: Callable[[], object], efficient: Callable[[], object], repeats: int = 5) -> float:
    """Median over the repeats of plain time over efficient time."""
    plain(), efficient()  # the first call pays for caches
    found = []
    for repeat in range(repeats):
        spent = {}
        for work in (plain, efficient)[:: 1 if repeat % 2 else -1]:
            start = time.process_time()
            work()
            spent[work] = time.process_time() - start
        found.append(spent[plain] / spent[efficient])
    return median(found)


def selection(table: Table) -> float:
    """k-th smallest and mask update, growing in the number of weights; returns the ratio at 2 million."""
    last = 0.0
    for total in (200_000, 2_000_000):
        scores = {str(i): torch.randn(total // 10, generator=torch.Generator().manual_seed(i)) ** 2 for i in range(10)}
        flat, k = torch.cat(list(scores.values())), int(0.6336 * total)
        assert kth_smallest(flat, k) == flat.kthvalue(k).values.item()

        def plain(scores: dict[str, Tensor] = scores, k: int = k) -> dict[str, Tensor]:
            cut = torch.cat([score.flatten() for score in scores.values()]).kthvalue(k).values
            return {name: score > cut for name, score in scores.items()}

        density = 1 - k / total - 1e-9
        assert all(torch.equal(mask, plain()[name]) for name, mask in threshold(scores, density).items())
        update = ratio(plain, lambda scores=scores, density=density: threshold(scores, density))
        last = ratio(
            lambda scores=scores, k=k: torch.cat(list(scores.values())).kthvalue(k),
            lambda scores=scores, k=k: kth_smallest(torch.cat(list(scores.values())), k),
        )
        table.add_row(f"order statistic of {total:,} scores against concatenated kthvalue", f"{last:.2f}")
        table.add_row(f"mask update of {total:,} weights, with all its checks", f"{update:.2f}")
    return last


def hooked(net: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy under torch's mask hooks."""
    net = copy.deepcopy(net)
    for name, mask in masks.items():
        prune.custom_from_mask(net.get_submodule(name.removesuffix(".weight")), "weight", mask)
    return net


def stepper(net: nn.Module, x: Tensor, y: Tensor, pruner: AnytimePruner | None = None) -> Callable[[], None]:
    optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=1e-4)
    if pruner is not None:
        pruner.attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net.train()(x), y).backward()
        optimizer.step()

    return step


def training_step(table: Table) -> None:
    """A step with projection against one with masked forwards, ResNet-20s, growing in batch size."""
    for batch in (8, 64):
        torch.manual_seed(0)
        net = build_model("resnet20s", 3, 10)
        pruner = AnytimePruner(net, 8, 4.5, "mag")
        pruner.step(None)
        x, y = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
        plain = stepper(hooked(net, dict(pruner.masks)), x, y)
        table.add_row(
            f"training step, batch {batch}, masked forward / projection",
            f"{ratio(plain, stepper(net, x, y, pruner)):.2f}",
        )


def state(table: Table) -> float:
    """Score, mask, train two epochs, load the best weights back: 480 images of 32x32, ResNet-20s."""
    torch.manual_seed(0)
    start = build_model("resnet20s", 3, 10)
    images = torch.randint(256, (480, 3, 32, 32), dtype=torch.uint8)
    pool, rows = ImageSet(images, torch.randint(10, (480,)), 10), torch.arange(480)
    crop = transforms.Compose([transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()

    def from_pil(order: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [
            (torch.stack([crop(Image.fromarray(arrays[i])) for i in chosen.tolist()]), pool.labels[chosen])
            for chosen in order.split(64)
        ]

    def faithful(path: Path) -> None:
        weights = prunable(start)
        net = hooked(start, {name: torch.ones_like(weight) for name, weight in weights.items()})
        for x, y in from_pil(rows[:96]):
            F.cross_entropy(net.train()(x), y).backward()
        found = {}
        for name in weights:
            module = net.get_submodule(name.removesuffix(".weight"))
            found[name] = (module.weight_orig.grad * module.weight_orig.detach()).abs()
        cut = torch.cat([score.flatten() for score in found.values()]).kthvalue(53_539).values
        net = hooked(start, {name: score > cut for name, score in found.items()})
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-4)
        for _ in range(2):
            net.train()
            for x, y in from_pil(torch.randperm(480)):
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
            torch.save(net.state_dict(), path)
        net.load_state_dict(torch.load(path, weights_only=True))

    def efficient() -> None:
        net = copy.deepcopy(start).to(memory_format=torch.channels_last)
        pruner = AnytimePruner(net, 8, 4.5)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-4, fused=True)
        pruner.attach(optimizer)
        pruner.step(epoch_batches(pool, rows[:96], 100, AUGMENT, (0, 0), shuffle=False))
        best: dict[str, Tensor] = {}
        for epoch in range(2):
            net.train()
            for x, y in epoch_batches(pool, rows, 64, AUGMENT, (0, 1, epoch)):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    logits = net(x.contiguous(memory_format=torch.channels_last)).float()
                F.cross_entropy(logits, y).backward()
                optimizer.step()
            best = copy.deepcopy(net.state_dict())
        net.load_state_dict(best)

    with tempfile.TemporaryDirectory() as folder:
        found = ratio(lambda: faithful(Path(folder) / "best.pt"), efficient, 3)
    data = ratio(lambda: from_pil(rows), lambda: list(epoch_batches(pool, rows, 64, AUGMENT, (0, 1, 0))), 3)
    table.add_row("augmented batches, PIL one by one / one gather", f"{data:.1f}")
    table.add_row("whole state, faithful loop / this", f"{found:.2f}")
    return found


def main() -> int:
    torch.set_num_threads(1)
    np.random.seed(0)
    table = Table("what", "ratio", title="app_progressive: plain time over efficient time, one thread")
    selected = selection(table)
    training_step(table)
    whole = state(table)
    Console(width=110).print(table)
    for name, found, least in (("order statistic", selected, LEAST_SELECTION), ("whole state", whole, LEAST_STATE)):
        if found < least:
            print(f"{name}: {found:.2f} is less than {least}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
