"""Standard and robust accuracy, SA and RA, of one network or of several tickets at once (spec c)."""

import torch
from torch import Tensor, nn

from common.data import ImageSet, in_order, pixels
from common.runs import generator
from double_win_lth.pgd import pgd_survivors, uniform_start
from double_win_lth.regimes import Regime
from double_win_lth.training import each_ticket
from double_win_lth.views import centre_crop

CLEAN = Regime.std()


def accuracies(
    model: nn.Module,
    data: ImageSet,
    attack: Regime = CLEAN,
    *,
    worst: bool = False,
    size: int = 0,
    batch_size: int = 250,
    seed: int = 0,
) -> list[float]:
    """Accuracy in percent, in eval mode and float32, however the network was trained: one number a ticket.

    Args:
        model: a network, or a `TicketBatch`.
        data: its images.
        attack: PGD, judged at its last iterate; none: clean images.
        worst: an image also counts as broken if any earlier iterate is misclassified; of one network only.
        size: side that the network wants, see `views.centre_crop`.
        batch_size: changes time, not values: starts are drawn image by image.
        seed: of the random starts, the same for every network.

    Raises:
        FloatingPointError: logits, or the loss of the attack, are NaN or infinite.
    """
    model.eval()
    device, draws = next(model.parameters()).device, generator(seed)
    right = torch.zeros(())
    for raw, labels in in_order(data, batch_size):
        x, y = centre_crop(pixels(raw), size), labels.to(device)
        random = attack.steps and attack.random_start
        start = uniform_start(tuple(x.shape), attack.eps, draws) if random else torch.zeros_like(x)
        x, start = each_ticket(model, x.to(device)), each_ticket(model, start.to(device))
        right = right + _right(model, x, y, attack, start, worst).sum(-1).cpu()
    return (100 * right / max(len(data), 1)).reshape(-1).tolist()


def _right(model: nn.Module, x: Tensor, y: Tensor, attack: Regime, start: Tensor, worst: bool) -> Tensor:
    if worst:
        limits = {"eps": attack.eps, "step_size": attack.step_size, "steps": attack.steps}
        return pgd_survivors(model, x, y, start=start, **limits)  # type: ignore[arg-type]
    with torch.no_grad():
        logits = model(attack.perturb(model, x, y, start=start))
    if odd := int((~logits.isfinite()).sum()):
        raise FloatingPointError(f"logits must be finite, got {odd} of {logits.numel()} that are not")
    return logits.argmax(-1) == y
