"""AttnScale without the attention map against the map form and against plain fused attention; fold_ at inference.

One DeiT-S block: time of forward and backward, bytes saved for backward by its attention, as ratios to the plain block
in the same repeat, over the number of tokens. Fails where, at 197 tokens, AttnScale takes over 1.05 times the plain
step or saves more than 1.3 times its bytes, where the map form saves less than 2.5 times what AttnScale does, or where
a folded block takes more than 1.01 times the plain one at inference.

python vit_antioversmooth/benchmarks/attnscale_step.py
"""

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vit_antioversmooth.attnscale import apply_attnscale
from vit_antioversmooth.featscale import apply_featscale
from vit_antioversmooth.fold import fold_

THREADS = 2
REPEATS = 9
DIM, HEADS = 384, 6
TOKENS = {65: 8, 197: 8, 577: 2, 1025: 2}  # tokens: images
JUDGED = 197
MOST_TIME, MOST_BYTES, LEAST_SAVING, MOST_FOLDED = 1.05, 1.3, 2.5, 1.01


def block(form: str) -> nn.Module:
    """One block in one of the forms; scales are not zero."""
    torch.manual_seed(0)
    model = Block(DIM, HEADS, qkv_bias=True)
    if form in ("attnscale", "map", "both", "folded"):
        apply_attnscale(model, init=0.3, mode="reference" if form == "map" else "auto")
    if form in ("featscale", "both", "folded"):
        apply_featscale(model, init=(0.1, 0.2))
    return fold_(model.eval()) if form == "folded" else model


def saved_bytes(attention: nn.Module, x: Tensor) -> int:
    """Bytes that the attention keeps for backward, its parameters and its input aside."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = attention(x)
    for tensor in (x, *attention.parameters()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del out
    return sum(storages.values())


def ratios(works: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median over the repeats of each time over the first one's in the same repeat; interleaved, in turning order."""
    times: dict[str, list[float]] = {form: [] for form in works}
    for work in works.values():
        work()
    for repeat in range(REPEATS):
        for form in list(works)[:: 1 if repeat % 2 else -1]:
            start = time.perf_counter()
            works[form]()
            times[form].append(time.perf_counter() - start)
    base = times[next(iter(works))]
    return {form: median(own / plain for own, plain in zip(spent, base, strict=True)) for form, spent in times.items()}


def main() -> int:
    """Print the tables; 1 where a ratio is not as it should be."""
    torch.set_num_threads(THREADS)
    wrong = []
    forms = {"plain": "plain, fused", "attnscale": "AttnScale", "featscale": "FeatScale", "map": "AttnScale on the map"}
    table = Table("tokens", "form", "step time, ratio", "saved by attention, MB", "ratio")
    table.title = f"DeiT-S block, {THREADS} threads, medians of {REPEATS}"
    for tokens, batch in TOKENS.items():
        x = torch.randn(batch, tokens, DIM, requires_grad=True)
        models = {form: block(form) for form in forms}

        def step(model: nn.Module, x: Tensor = x) -> None:
            model.zero_grad()
            model(x).sum().backward()

        times = ratios({form: lambda model=model: step(model) for form, model in models.items()})  # type: ignore[misc]
        saved = {form: saved_bytes(model.attn, x) for form, model in models.items()}
        for form, words in forms.items():
            numbers = (f"{times[form]:.3f}", f"{saved[form] / 1e6:.1f}", f"{saved[form] / saved['plain']:.2f}")
            table.add_row(str(tokens), words, *numbers)
        if tokens == JUDGED:
            if times["attnscale"] > MOST_TIME:
                wrong.append(f"step time of AttnScale must be at most {MOST_TIME}, got {times['attnscale']:.3f}")
            if saved["attnscale"] > MOST_BYTES * saved["plain"]:
                ratio = saved["attnscale"] / saved["plain"]
                wrong.append(f"saved bytes of AttnScale must be at most {MOST_BYTES} of plain, got {ratio:.2f}")
            if saved["map"] < LEAST_SAVING * saved["attnscale"]:
                ratio = saved["map"] / saved["attnscale"]
                wrong.append(f"the map form must save at least {LEAST_SAVING} times the bytes, got {ratio:.2f}")
    Console().print(table)

    table = Table("form", "inference time, ratio", title=f"the same block at {JUDGED} tokens without gradients")
    x = torch.randn(TOKENS[JUDGED], JUDGED, DIM)
    models = {form: block(form).eval() for form in ("plain", "both", "folded")}

    def infer(model: nn.Module) -> None:
        with torch.no_grad():
            for _ in range(3):
                model(x)

    times = ratios({form: lambda model=model: infer(model) for form, model in models.items()})  # type: ignore[misc]
    for form, words in (("plain", "plain"), ("both", "AttnScale and FeatScale"), ("folded", "the same, folded")):
        table.add_row(words, f"{times[form]:.3f}")
    if times["folded"] > MOST_FOLDED:
        wrong.append(f"inference time of a folded block must be at most {MOST_FOLDED}, got {times['folded']:.3f}")
    Console().print(table)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
