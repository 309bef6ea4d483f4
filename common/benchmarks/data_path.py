"""Images a second of the in-memory batches against torchvision's usual pipeline; fails below five times as many.

python common/benchmarks/data_path.py
"""

import itertools
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, PILToTensor, RandomCrop, RandomHorizontalFlip

from common.bench import Ratio, conclude
from common.data import DataConfig, ImageSet, batches

THREADS = 2
REPEATS = 5
IMAGES, BATCH = 50_000, 128
LEAST = 5.0


class PilImages(Dataset[tuple[Any, int]]):
    """What torchvision.datasets.CIFAR10 does for one image, on the same arrays."""

    def __init__(self, data: ImageSet) -> None:
        assert isinstance(data.images, torch.Tensor)
        self.arrays = data.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.labels.tolist()
        self.transform = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), PILToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def images_per_second(stream: Iterable[Any], count: int) -> float:
    """Over `count` batches of a running stream; the first one, which starts the workers, is not timed."""
    running = iter(stream)
    next(running)
    start = time.perf_counter()
    for images, _ in itertools.islice(running, count):
        assert images.shape == (BATCH, 3, 32, 32) and images.dtype == torch.uint8
    return count * BATCH / (time.perf_counter() - start)


def main() -> int:
    """Print the table; 1 where the ratio is below the least allowed."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    data = ImageSet(torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (IMAGES,)), 10)
    config = DataConfig(crop_padding=4, flip=True)
    usual = DataLoader(PilImages(data), BATCH, shuffle=True, drop_last=True, num_workers=2)
    ours_rates, usual_rates = [], []
    for repeat in range(REPEATS):  # interleaved: both forms see the same load of the machine
        ours_rates.append(images_per_second(batches(data, BATCH, config, seed=repeat), IMAGES // BATCH))
        usual_rates.append(images_per_second(usual, IMAGES // BATCH - 1))
    ours, theirs = statistics.median(ours_rates), statistics.median(usual_rates)
    title = f"{IMAGES:,} images 3x32x32, crop 4 + flip, batch {BATCH}; medians of {REPEATS}"
    table = Table("pipeline", "threads", "images/s", "lowest to highest", "ratio", title=title)
    for name, threads, rates in (
        ("common.data.batches", f"{THREADS}", ours_rates),
        ("torchvision, PIL, DataLoader", "1 + 2 workers", usual_rates),
    ):
        middle = statistics.median(rates)
        table.add_row(
            name, threads, f"{middle:,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}", f"{middle / theirs:.1f}"
        )
    Console().print(table)
    return conclude(
        [Ratio("augmented batches a second: in memory / torchvision, PIL, DataLoader", ours / theirs, LEAST)]
    )


if __name__ == "__main__":
    sys.exit(main())
