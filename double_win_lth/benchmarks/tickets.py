"""The efficient forms against plain ones: in-place masks, attack without weight gradients, selection, grouped tickets.

All numbers are ratios of processor time in one run, one thread, medians of interleaved repeats. Fails where a PGD-20
evaluation is less than 1.25 times as fast as with weight gradients and mask hooks, or a selection among 20 million
weights less than 2 times as fast as a top-k over their concatenation.

python double_win_lth/benchmarks/tickets.py
"""

import copy
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import prune

from common.bench import Ratio, conclude, interleaved, ratio
from common.masks import Masks, keep_top, prunable_weights
from double_win_lth.grouped import TicketBatch
from double_win_lth.models import build_model
from double_win_lth.pgd import pgd_linf, uniform_start
from double_win_lth.regimes import Regime
from double_win_lth.selection import keep_largest
from double_win_lth.training import sgd_step

REPEATS = 5
LEAST_EVALUATION, LEAST_SELECTION = 1.25, 2.0
EPS, STEP = 8 / 255, 2 / 255


def faster(plain: Callable[[], None], efficient: Callable[[], None], repeats: int = REPEATS) -> float:
    """How many times as long the plain form takes."""
    return ratio(interleaved({"plain": plain, "efficient": efficient}, repeats), "plain", "efficient")


def plain_pgd(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """PGD as usually written: `backward` leaves gradients in every weight."""
    delta = torch.zeros_like(x)
    for _ in range(steps):
        delta.requires_grad_()
        F.cross_entropy(model(x + delta), y).backward()
        assert delta.grad is not None
        delta = (delta.detach() + STEP * delta.grad.sign()).clamp(-EPS, EPS)
        delta = (x + delta).clamp(0, 1) - x
        model.zero_grad()
    return (x + delta).clamp(0, 1)


def network(name: str, width: int, channels: int) -> nn.Module:
    """Of five classes, always from the same seed."""
    torch.manual_seed(0)
    return build_model(name, channels, 5, [0.5], [0.25], width)


def masked(net: nn.Module) -> tuple[nn.Module, Masks]:
    """A copy under torch's mask hooks at 80 % sparsity, and the masks."""
    weights = prunable_weights(net)
    total = sum(weight.numel() for weight in weights.values())
    masks = keep_top({name: weight.abs() for name, weight in weights.items()}, total // 5)
    hooked = copy.deepcopy(net)
    for name, mask in masks.items():
        prune.custom_from_mask(hooked.get_submodule(name.removesuffix(".weight")), "weight", mask)
    masks.apply_(net)
    return hooked, masks


def attack_ratios(table: Table) -> float:
    """Rows of one training step and one evaluation; returns the smallest ratio of the evaluations."""
    worst = float("inf")
    for name, width, channels, side, batch in (("resnet8", 16, 1, 28, 64), ("resnet20", 16, 3, 32, 32)):
        net = network(name, width, channels)
        hooked, masks = masked(net)
        x, y = torch.rand(batch, channels, side, side), torch.randint(5, (batch,))
        optimizers = [torch.optim.SGD(each.parameters(), 1e-4, 0.9, weight_decay=5e-4) for each in (hooked, net)]
        masks.attach(net, optimizers[1])
        regime = Regime("adv", EPS, STEP, 10, False)

        def plain_step(model: nn.Module = hooked, optimizer: torch.optim.Optimizer = optimizers[0]) -> None:
            model.train()
            loss = F.cross_entropy(model(plain_pgd(model, x, y, 10)), y)  # noqa: B023
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        def our_step(model: nn.Module = net, optimizer: torch.optim.Optimizer = optimizers[1]) -> None:
            sgd_step(model, optimizer, (x, y, None), regime, 1e-4)  # noqa: B023

        training = faster(plain_step, our_step)
        hooked.eval(), net.eval()
        limits = {"eps": EPS, "step_size": STEP, "steps": 20, "random_start": False}
        evaluation = faster(lambda: plain_pgd(hooked, x, y, 20), lambda: pgd_linf(net, x, y, **limits))  # noqa: B023
        table.add_row(f"{name}, batch {batch}", f"{training:.2f}", f"{evaluation:.2f}")
        worst = min(worst, evaluation)
    return worst


def selection_ratio(count: int) -> float:
    """Two histograms against a top-k over all entries put together, by four tensors."""
    draws = torch.Generator().manual_seed(0)
    weights = {str(index): torch.randn(count // 4, generator=draws) for index in range(4)}
    keep = count - round(0.2 * count)

    def top_k() -> None:
        flat = torch.cat([weight.abs() for weight in weights.values()])
        mask = torch.ones(count, dtype=torch.bool)
        mask[flat.topk(count - keep, largest=False).indices] = False
        mask.split(count // 4)

    return faster(top_k, lambda: keep_largest(weights, keep) and None, 3)


def grouped_ratio(tickets: int, batch: int) -> float:
    """T tickets trained one after another against all as one network: one PGD-3 step of the demo's network."""
    alone = [network("resnet8", 16, 1) for _ in range(tickets)]
    together = TicketBatch(alone)
    regime = Regime("adv", 0.1, 0.025, 3)
    one = (torch.rand(batch, 1, 28, 28), torch.randint(5, (batch,)), uniform_start((batch, 1, 28, 28), 0.1))
    optimizers = [torch.optim.SGD(net.parameters(), 1e-4, 0.9) for net in (*alone, together)]

    def solo() -> None:
        for net, optimizer in zip(alone, optimizers, strict=False):
            sgd_step(net, optimizer, one, regime, 1e-4)

    return faster(solo, lambda: sgd_step(together, optimizers[-1], one, regime, 1e-4) and None, 3)


def main() -> int:
    """Print the tables; 1 where a ratio is not as it should be."""
    torch.set_num_threads(1)
    table = Table("network", "PGD-10 training step", "PGD-20 evaluation")
    table.title = "masks in place, no weight gradients, over hooks of torch.nn.utils.prune and full backward"
    evaluation = attack_ratios(table)
    Console().print(table)

    table = Table("weights", "ratio", title="selection by histograms over concatenation and top-k")
    for count in (200_000, 2_000_000, 20_000_000):
        selection = selection_ratio(count)
        table.add_row(f"{count:,}", f"{selection:.2f}")
    Console().print(table)

    batches = (16, 64, 256)
    table = Table("tickets", *(f"batch {batch}" for batch in batches), title="T tickets alone over T grouped, float32")
    for tickets in (1, 2, 4, 8, 16):
        row = [f"{grouped_ratio(tickets, batch):.2f}" if tickets * batch <= 1024 else "-" for batch in batches]
        table.add_row(str(tickets), *row)
    Console().print(table)
    return conclude(
        [
            Ratio("PGD-20 evaluation: mask hooks, full backward / ours", evaluation, LEAST_EVALUATION),
            Ratio("selection among 20 million weights: top-k / histograms", selection, LEAST_SELECTION),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
