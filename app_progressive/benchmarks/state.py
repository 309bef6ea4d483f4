"""The efficient forms against plain ones: mask update, training step, a whole state of the stream.

All numbers are ratios of processor time in one run, one thread, from interleaved repeats. Fails where the k-th smallest
of 2 million scores is found less than 5 times as fast as by kthvalue over their concatenation, or a whole state is less
than 2 times as fast as a faithful loop: images through PIL one by one, mask hooks, the network through a disk file. The
whole mask update, with its checks, is shown beside.

python app_progressive/benchmarks/state.py
"""

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision import transforms

from app_progressive import AnytimePruner
from app_progressive.images import epoch_batches
from app_progressive.models import build_model
from app_progressive.prunable import prunable
from app_progressive.threshold import kth_smallest, threshold
from common.bench import Ratio, conclude, interleaved, ratio
from common.data import DataConfig, ImageSet
from common.experiment import accuracy

LEAST_SELECTION, LEAST_STATE = 5.0, 2.0
BATCH, SCORED, TRAINED, HELD, EPOCHS = 64, 100, 450, 500, 50  # the paper's short stream, 12.5 times smaller
REPEATS = 9
AUGMENT = DataConfig(crop_padding=4, flip=True)


def faster(plain: Callable[[], object], efficient: Callable[[], object], repeats: int = 5) -> float:
    """How many times as long the plain form takes."""
    return ratio(interleaved({"plain": plain, "efficient": efficient}, repeats), "plain", "efficient")


def selection() -> list[Ratio]:
    """k-th smallest and mask update, growing in the number of weights; the former is judged, at 2 million."""
    found = []
    for total in (200_000, 2_000_000):
        scores = {str(i): torch.randn(total // 10, generator=torch.Generator().manual_seed(i)) ** 2 for i in range(10)}
        flat, k = torch.cat(list(scores.values())), int(0.6336 * total)
        assert kth_smallest([flat], k) == flat.kthvalue(k).values.item()

        def plain(scores: dict[str, Tensor] = scores, k: int = k) -> dict[str, Tensor]:
            cut = torch.cat([score.flatten() for score in scores.values()]).kthvalue(k).values
            return {name: score > cut for name, score in scores.items()}

        density = 1 - k / total - 1e-9
        assert all(torch.equal(mask, plain()[name]) for name, mask in threshold(scores, density).items())
        update = faster(plain, lambda scores=scores, density=density: threshold(scores, density))
        order = faster(
            lambda scores=scores, k=k: torch.cat(list(scores.values())).kthvalue(k),
            lambda scores=scores, k=k: kth_smallest(list(scores.values()), k),
        )
        least = LEAST_SELECTION if total == 2_000_000 else None
        found += [
            Ratio(f"k-th smallest of {total:,} scores: kthvalue of the concatenated / this", order, least),
            Ratio(f"mask update of {total:,} weights with all its checks: the same", update),
        ]
    return found


def hooked(net: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy under torch's mask hooks."""
    net = copy.deepcopy(net)
    for name, mask in masks.items():
        prune.custom_from_mask(net.get_submodule(name.removesuffix(".weight")), "weight", mask)
    return net


def stepper(net: nn.Module, x: Tensor, y: Tensor, pruner: AnytimePruner | None = None) -> Callable[[], None]:
    """A training step of the network on this batch."""
    optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=1e-4)
    if pruner is not None:
        pruner.attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net.train()(x), y).backward()
        optimizer.step()

    return step


def training_step() -> list[Ratio]:
    """A step with projection against one with masked forwards, ResNet-20s, growing in batch size."""
    found = []
    for batch in (8, 64):
        torch.manual_seed(0)
        net = build_model("resnet20s", 3, 10)
        pruner = AnytimePruner(net, 8, 4.5, "mag")
        pruner.step(None)
        x, y = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
        plain = stepper(hooked(net, dict(pruner.masks)), x, y)
        slower = faster(plain, stepper(net, x, y, pruner))
        found.append(Ratio(f"training step, batch {batch}: masked forward / projection", slower))
    return found


def state() -> list[Ratio]:
    """The first state of the paper's short CIFAR-10 stream at 1/12.5 of its images: score 100, 50 epochs of 450 and 50.

    Scoring and an epoch (training, validation, keeping the weights) are timed apart and added up in each repeat. The
    test images are left out, which both would take through the same network.
    """
    torch.manual_seed(0)
    start = build_model("resnet20s", 3, 10)
    images = torch.randint(256, (HELD, 3, 32, 32), dtype=torch.uint8)
    pool, rows = ImageSet(images, torch.randint(10, (HELD,)), 10), torch.arange(TRAINED)
    crop = transforms.Compose([transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    names = [name.removesuffix(".weight") for name in prunable(start)]

    def from_pil(order: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [
            (torch.stack([crop(Image.fromarray(arrays[i])) for i in chosen.tolist()]), pool.labels[chosen])
            for chosen in order.split(BATCH)
        ]

    def faithful_score() -> dict[str, Tensor]:
        net = hooked(start, {f"{name}.weight": torch.ones_like(start.get_submodule(name).weight) for name in names})
        for x, y in from_pil(rows[:SCORED]):
            F.cross_entropy(net.train()(x), y).backward()
        convs = {f"{name}.weight": net.get_submodule(name) for name in names}
        found = {name: (conv.weight_orig.grad * conv.weight_orig.detach()).abs() for name, conv in convs.items()}
        cut = torch.cat([score.flatten() for score in found.values()]).kthvalue(53_539).values
        return {name: score > cut for name, score in found.items()}

    net = hooked(start, faithful_score())
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-4)

    def faithful_epoch() -> None:
        net.train()
        for x, y in from_pil(torch.randperm(TRAINED)):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            sum(int((net(x).argmax(1) == y).sum()) for x, y in from_pil(torch.arange(TRAINED, HELD)))
        torch.save(net.state_dict(), disk)
        torch.load(disk, weights_only=True)

    ours = copy.deepcopy(start).to(memory_format=torch.channels_last)
    pruner = AnytimePruner(ours, 1, 1.0)

    def score() -> None:
        AnytimePruner(ours, 8, 4.5).step(epoch_batches(pool, rows[:SCORED], 100, AUGMENT, (0, 0), shuffle=False))

    pruner.step(epoch_batches(pool, rows[:SCORED], 100, AUGMENT, (0, 0), shuffle=False))
    fused = torch.optim.SGD(ours.parameters(), 0.1, 0.9, weight_decay=1e-4, fused=True)
    pruner.attach(fused)

    def epoch() -> None:
        ours.train()
        for x, y in epoch_batches(pool, rows, BATCH, AUGMENT, (0, 1)):
            fused.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = ours(x.contiguous(memory_format=torch.channels_last)).float()
            F.cross_entropy(logits, y).backward()
            fused.step()
        with torch.autocast("cpu", torch.bfloat16):
            accuracy(ours, pool.subset(torch.arange(TRAINED, HELD)))
        copy.deepcopy(ours.state_dict())

    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "best.pt"
        times = interleaved({work.__name__: work for work in (faithful_score, score, faithful_epoch, epoch)}, REPEATS)
    for whole, scored, trained in (("faithful", "faithful_score", "faithful_epoch"), ("ours", "score", "epoch")):
        times[whole] = [one + EPOCHS * many for one, many in zip(times[scored], times[trained], strict=True)]
    data = faster(lambda: from_pil(rows), lambda: list(epoch_batches(pool, rows, BATCH, AUGMENT, (0, 1))), 3)
    return [
        Ratio("augmented batches: PIL one by one / one gather", data),
        Ratio("score and mask: faithful loop / this", ratio(times, "faithful_score", "score")),
        Ratio("epoch: faithful loop / this", ratio(times, "faithful_epoch", "epoch")),
        Ratio("whole state: faithful loop / this", ratio(times, "faithful", "ours"), LEAST_STATE),
    ]


def main() -> int:
    """Print the ratios; 1 where one falls short."""
    torch.set_num_threads(1)
    np.random.seed(0)
    return conclude([*selection(), *training_step(), *state()])


if __name__ == "__main__":
    sys.exit(main())
