"""What the scales cost: parameters of the paper's networks, counted on networks without memory, and time of a step."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_antioversmooth.attnscale import apply_attnscale
from vit_antioversmooth.featscale import apply_featscale
from vit_antioversmooth.scales import scale_parameters

# timm name, depth (0: its own); AttnScale's and FeatScale's parameters by the authors' code
PAPER_COUNTS = {
    "DeiT-S-12": ("deit_small_patch16_224", 0, 72, 9216),
    "DeiT-S-24": ("deit_small_patch16_224", 24, 144, 18432),
    "CaiT-S-24": ("cait_s24_224", 0, 192, 18432),
    "Swin-S": ("swin_small_patch4_window7_224", 0, 282, 18048),
}


def added_parameters(name: str, depth: int = 0) -> tuple[int, int, int]:
    """Parameters that AttnScale adds, that FeatScale adds, and of the plain network, for a timm model."""
    counts = []
    with torch.device("meta"):
        options: dict[str, Any] = {"depth": depth} if depth else {}
        own = sum(parameter.numel() for parameter in timm.create_model(name, **options).parameters())
        for apply in (apply_attnscale, apply_featscale):
            model = timm.create_model(name, **options)
            apply(model)  # type: ignore[operator]
            counts.append(sum(parameter.numel() for parameter in scale_parameters(model)))
    return counts[0], counts[1], own


def step_time_ratios(
    models: Mapping[str, nn.Module], images: Tensor, classes: int, repeats: int = 12, amp: bool = False
) -> dict[str, float]:
    """Median time of forward, backward and AdamW step over that of the first model in the same repeat.

    Interleaved and in turning order, so that all see the same load of the machine.

    Args:
        models: by name, the plain one first; they are trained on `images` meanwhile.
        images: (batch, channels, height, width), on the models' device.
        classes: of the labels.
        repeats: timed steps of each.
        amp: under bfloat16 autocast, as in training.
    """
    labels = torch.arange(len(images), device=images.device) % classes
    steps: dict[str, Callable[[], None]] = {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

        step()
        steps[name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats):
        for name in list(steps)[:: 1 if repeat % 2 else -1]:
            start = time.perf_counter()
            steps[name]()
            if images.is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    base = times[next(iter(steps))]
    return {name: median(own / plain for own, plain in zip(spent, base, strict=True)) for name, spent in times.items()}
