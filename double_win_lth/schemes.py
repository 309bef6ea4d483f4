"""Data-limited schemes: how many target images, and which (spec c, f.3)."""

import torch

from common.config import require
from common.data import ImageSet, stratified_order
from common.runs import generator


def take(
    data: ImageSet, fraction: float, *, val: int = 0, subset: str = "stratified", keys: tuple[int, ...] = (0,)
) -> tuple[ImageSet, ImageSet]:
    """Training and held-out images of one scheme.

    Args:
        data: all that there are.
        fraction: of those left for training, rounded down.
        val: number of held-out images, the same ones for every fraction and every key but the first.
        subset: "stratified": random draws, a smaller part within a larger one, every class in proportion; "first":
            the first images for training and the last for validation, in the order of the data set.
        keys: seed of the split, then of the draw.

    Raises:
        ConfigError: too few images for one of each class, or only one class among the first ones.
    """
    require(val < len(data), "transfer.val", val, f"below the {len(data)} target images")

    def order(of: ImageSet, *seeds: int) -> torch.Tensor:
        return torch.arange(len(of)) if subset == "first" else stratified_order(of.labels, generator(*seeds))

    everything = order(data, keys[0])
    chosen = everything[len(data) - val :] if subset == "first" else everything[:val]
    kept = torch.ones(len(data), dtype=torch.bool)
    kept[chosen] = False
    pool, held_out = data.subset(kept.nonzero().squeeze(1)), data.subset(chosen)
    count = int(fraction * len(pool))
    train = pool.subset(order(pool, *keys)[:count])
    allowed = f"enough for one image of each of the {data.classes} classes, of {len(pool)} images"
    require(count >= data.classes, "transfer.fraction", fraction, allowed)
    classes = len(train.labels.unique())
    require(classes > 1, "transfer.subset", subset, "stratified where the data set is sorted by class (one class left)")
    return train, held_out
