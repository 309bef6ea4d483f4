"""How well a network does and how well a trigger works, with the controls that tell the two apart (spec c10, K1-K3).

SA accuracy on clean images; ASR share of triggered images of other classes that get the target label; CTR the same
share without a trigger; lift = ASR - CTR. A network that answers the target to everything has ASR 100 and lift 0.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from backdoor_lth.frozen import frozen
from backdoor_lth.tabor import SoftTrigger
from backdoor_lth.traced import anchor
from common.data import ImageSet, in_order, pixels

Normalize = Callable[[Tensor], Tensor]
BATCH = 500


@torch.no_grad()
def answers(model: nn.Module, inputs: Iterator[Tensor]) -> Tensor:
    """The label of every input, (n,) on the CPU, in eval mode; the modes come back."""
    with frozen(model):
        return torch.cat([model(x).argmax(1).cpu() for x in inputs])


def inputs(data: ImageSet, normalize: Normalize, device: torch.device) -> Iterator[Tensor]:
    """The network's inputs for all images, in order."""
    for images, _ in in_order(data, BATCH):
        yield normalize(pixels(images.to(device)))


def evaluate(
    model: nn.Module, clean: ImageSet, triggered: ImageSet, target: int, normalize: Normalize = lambda x: x
) -> dict[str, float]:
    """sa, asr_all, asr, ctr, lift, null, top_share in percent and top_class of a network.

    Args:
        model: on any device.
        clean: test images.
        triggered: the same images with the trigger; their labels are not looked at.
        target: of the attack. asr_all and null (without a trigger) count images of this class too, as the paper does;
            asr and ctr do not.
        normalize: pixels in [0, 1] to inputs.

    Raises:
        ValueError: no images, or not as many triggered ones.
    """
    if not len(clean) or len(clean) != len(triggered):
        raise ValueError(f"clean and triggered must be equally many images, got {len(clean)} and {len(triggered)}")
    device = anchor(model).device
    on_clean, on_triggered = (answers(model, inputs(data, normalize, device)) for data in (clean, triggered))
    return rates(on_clean, on_triggered, clean.labels, target)


def rates(on_clean: Tensor, on_triggered: Tensor, labels: Tensor, target: int) -> dict[str, float]:
    """The metrics of `evaluate` from the labels given to clean and to triggered images, each (n,)."""
    others = labels != target

    def share(hits: Tensor) -> float:
        return 100 * hits.double().mean().item() if len(hits) else 0.0

    asr, ctr = share(on_triggered[others] == target), share(on_clean[others] == target)
    top_class = int(on_clean.bincount().argmax())
    return {
        "sa": share(on_clean == labels),
        "asr_all": share(on_triggered == target),
        "asr": asr,
        "ctr": ctr,
        "lift": asr - ctr,
        "null": share(on_clean == target),
        "top_class": top_class,
        "top_share": share(on_clean == top_class),
    }


def hard_mask(mask: Tensor, size: int) -> Tensor:
    """1 at the size^2 largest entries of a mask (height, width), else 0; among equal ones the last in order win.

    Raises ValueError where that is more than the mask has, or less than one.
    """
    count = size**2
    if not 1 <= count <= mask.numel():
        raise ValueError(f"size must have a square in [1, {mask.numel()}], got {size}")
    hard = torch.zeros_like(mask).flatten()
    hard[mask.flatten().argsort(stable=True)[-count:]] = 1
    return hard.view_as(mask)


def recovered_success(
    model: nn.Module, data: ImageSet, mark: Tensor, mask: Tensor, label: int, size: int, normalize: Normalize
) -> float:
    """Percent of all images that a recovered trigger turns into `label`, its mask cut to size^2 pixels.

    `mark` (channels, height, width) and `mask` (height, width) lie in the network's input space; `size` is the true
    patch's, which a defender would not know.
    """
    device = anchor(model).device
    trigger = SoftTrigger(mark.to(device), hard_mask(mask, size).to(device))
    stamped = (x + trigger.mask * (trigger.mark - x) for x in inputs(data, normalize, device))
    return 100 * (answers(model, stamped) == label).double().mean().item()


def implanted(dense: Mapping[str, float], kind: str) -> bool:
    """Whether an attack of this kind, if it has a trigger at all, turns 90 % of the dense network's images (spec i)."""
    return kind not in ("dirty", "clean_label") or dense["asr"] >= 90


def trigger_driven(lift: float, transfer: float, null: float) -> bool:
    """Whether a ticket's attack is one of its trigger and no mere collapse to the target (spec i, K1-K5).

    Args:
        lift: of the ticket, percent.
        transfer: success of the trigger recovered on the ticket, on the dense network, percent.
        null: share that the dense network gives the label without a trigger, percent.
    """
    return lift >= 50 and transfer > null + 20
