"""Scans and Trojan scores of sparse ResNet-20s tickets: released loop against ours; ratios in one run, one thread.

    python backdoor_lth/benchmarks/inversion.py

The first ticket has the shape of the released one: 136 weights, as many live channels at every block, as many weights a
stage (see the specification, h2 and h4), values drawn here. The others keep the largest weights of a random network.
Fails where the whole scan of the first, ten labels of 100 steps with its compaction, is less than 25 times as fast as
the released loop. That loop would take minutes: a few of its steps are timed, all of which cost the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from backdoor_lth.barrier import error_barrier
from backdoor_lth.compaction import compact
from backdoor_lth.frozen import frozen
from backdoor_lth.inversion import invert
from backdoor_lth.models import BasicBlock, build_model
from backdoor_lth.tabor import tabor
from common.bench import Ratio, conclude
from common.masks import keep_top, prunable_weights

SHAPE, IMAGES, STEPS, LABELS = (3, 32, 32), 100, 100, 10
LEAST = 25.0
DENSITIES = (0.003, 0.01, 0.05)
STEM = (14, 3)  # weights, live channels behind it
BLOCKS = (None, (1, 1, 1), (2, 2, 1), (1, 1, 3), (3, 3, 3), (2, 1, 1), (4, 5, 7), (5, 3, 4), (8, 4, 4))
WEIGHTS = (18, 36, 68)  # of a stage


def network() -> nn.Module:
    """A ResNet-20s whose batch norms are not fresh, so that dead channels are constants other than 0."""
    torch.manual_seed(0)
    model = build_model("resnet20s", 3, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.bias, module.running_mean):
                nn.init.normal_(values, std=0.1)  # type: ignore[arg-type]
    return model.eval()


def released_ticket() -> nn.Module:
    """136 weights, placed like those of the released ticket."""
    model = network()
    names = {module: name for name, module in model.named_modules()}
    kept = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in prunable_weights(model).items()}

    def keep(conv: nn.Module, count: int, inputs: Tensor, outputs: Tensor) -> None:
        """`count` weights between these channels, every one of which is used."""
        mask, taps = kept[f"{names[conv]}.weight"], torch.randperm(9)
        for index in range(count):
            source, target = inputs[index % len(inputs)], outputs[index % len(outputs)]
            free = [tap for tap in taps.roll(index).tolist() if not mask[target, source].flatten()[tap]]
            mask[target, source].view(-1)[free[0]] = True

    def some(channels: Tensor, count: int) -> Tensor:
        return channels[torch.randperm(len(channels))[:count]]

    live = some(torch.arange(16), STEM[1])
    keep(model.conv1, STEM[0], torch.arange(3), live)  # type: ignore[arg-type]
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    for number, (block, widths) in enumerate(zip(blocks, BLOCKS, strict=True)):
        outputs = block.conv2.out_channels
        through = live + (outputs - block.conv1.in_channels) // 2  # option A pads channels on both sides
        if widths:
            stage = BLOCKS[3 * (number // 3) : 3 * (number // 3) + 3]
            convs = 2 * sum(each is not None for each in stage)
            before = 2 * sum(each is not None for each in stage[: number % 3])
            shares = [WEIGHTS[number // 3] * (k + 1) // convs - WEIGHTS[number // 3] * k // convs for k in range(convs)]
            middle, written = (some(torch.arange(outputs), width) for width in widths[1:])
            keep(block.conv1, shares[before], some(live, widths[0]), middle)
            keep(block.conv2, shares[before + 1], middle, written)
            through = torch.cat([through, written]).unique()
        live = through
    with torch.no_grad():
        for name, mask in kept.items():
            model.get_parameter(name).mul_(mask)
    return model


def random_ticket(density: float) -> nn.Module:
    """The largest weights of a random network."""
    model = network()
    weights = prunable_weights(model)
    count = round(density * sum(weight.numel() for weight in weights.values()))
    keep_top({name: weight.abs() for name, weight in weights.items()}, count).apply_(model)
    return model


def seconds(work: Callable[[], object]) -> float:
    """Processor time of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def released_step(model: nn.Module) -> float:
    """Seconds of a label-step of the released loop, which also differentiates by every weight."""
    plain = torch.autograd.grad

    def everything(loss: Tensor, variables: list[Tensor]) -> tuple[Tensor, ...]:
        return plain(loss, [*variables, *model.parameters()])[: len(variables)]

    torch.autograd.grad = everything  # type: ignore[assignment]
    try:
        return label_step(model, 2)
    finally:
        torch.autograd.grad = plain


def label_step(model: nn.Module, steps: int) -> float:
    """Seconds of a step of one label."""
    mark, mask = torch.randn(1, *SHAPE), torch.randn(1, *SHAPE[1:])
    noise = lambda step: torch.randn(1, IMAGES, *SHAPE)  # noqa: E731
    return seconds(lambda: tabor(model, torch.tensor([0]), mark, mask, noise, steps)) / steps


def frozen_step(model: nn.Module, steps: int) -> float:
    """The same with frozen weights."""
    with frozen(model):
        return label_step(model, steps)


def whole_scan() -> Ratio:
    """The first ticket: its whole scan against as many released steps; returns the ratio."""
    model = released_ticket()
    plain = [released_step(model) for _ in range(2)]
    ours = seconds(lambda: invert(compact(model, SHAPE), SHAPE, count=IMAGES, steps=STEPS))
    plain += [released_step(model) for _ in range(2)]
    found = LABELS * STEPS * sorted(plain)[1] / ours
    return Ratio(
        f"{kept(model):,} weights, scan of {LABELS} labels with compaction: released loop / ours", found, LEAST
    )


def kept(model: nn.Module) -> int:
    """Weights that are not zero."""
    return sum(int(weight.count_nonzero()) for weight in prunable_weights(model).values())


def exact(model: nn.Module, folded: nn.Module) -> float:
    """Largest difference of logits, as a share of the largest."""
    x = torch.randn(8, *SHAPE)
    with torch.no_grad():
        return float((model(x) - folded(x)).abs().max() / model(x).abs().max())


def main() -> int:
    """Print the ratios; 1 where one falls short."""
    torch.set_num_threads(1)
    ratios = [whole_scan()]
    for model in (released_ticket(), *map(random_ticket, DENSITIES)):
        folded = compact(model, SHAPE)
        steps = ([released_step(model), frozen_step(model, 2), frozen_step(folded, 4)] for _ in range(3))
        plain, cold, fast = map(min, zip(*steps, strict=True))
        words = f"{kept(model):,} weights, a {type(folded).__name__}"
        ratios += [
            Ratio(f"{words}, label-step: released / ours", plain / fast),
            Ratio(f"{words}, label-step: released / only frozen", plain / cold),
            Ratio(f"{words}, largest difference of logits / largest logit", exact(model, folded), most=1e-4),
        ]
    model, batch = released_ticket(), [(torch.randn(1024, *SHAPE), torch.randint(10, (1024,)))]
    state = model.state_dict()
    plain, fast = (seconds(lambda c=c: error_barrier(model, state, state, batch, compacted=c)) for c in (False, True))
    return conclude([*ratios, Ratio("Trojan score on 1,024 images, eleven points: dense / compacted", plain / fast)])


if __name__ == "__main__":
    sys.exit(main())
