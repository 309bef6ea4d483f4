"""AttnScale without the attention map against the map form and against plain fused attention; fold_ at inference.

One DeiT-S block: time of forward and backward, bytes saved for backward by its attention, as ratios to the plain block
in the same repeat, over the number of tokens (kB are those of one image); then targets, met or missed. Exit status 1
where one is missed. "folded" is apply_attnscale(mode="folded"), "map" its mode="reference", the authors' form.
About a minute on two idle cores.

python vit_antioversmooth/benchmarks/attnscale_step.py
"""

import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from common.bench import Ratio, conclude, interleaved, ratio
from vit_antioversmooth.attnscale import apply_attnscale
from vit_antioversmooth.featscale import apply_featscale
from vit_antioversmooth.fold import fold_

THREADS = 2
REPEATS = 9
DIM, HEADS = 384, 6
TOKENS = {65: 8, 197: 8, 577: 2, 1025: 2}  # tokens: images
JUDGED = 197
FORMS = {
    "plain": "plain, fused",
    "auto": "AttnScale",
    "folded": "AttnScale, folded",
    "reference": "AttnScale, map",
    "featscale": "FeatScale",
}
Ratios = dict[str, float]


def block(form: str) -> nn.Module:
    """One block in one of the forms; scales are not zero."""
    torch.manual_seed(0)
    model = Block(DIM, HEADS, qkv_bias=True)
    if form in ("auto", "folded", "reference"):
        apply_attnscale(model, init=0.3, mode=form)  # type: ignore[arg-type]
    elif form in ("both", "inference"):
        apply_attnscale(model, init=0.3)
    if form in ("featscale", "both", "inference"):
        apply_featscale(model, init=(0.1, 0.2))
    return fold_(model.eval()) if form == "inference" else model


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


def ratios(works: dict[str, Callable[[], None]], repeats: int = REPEATS) -> Ratios:
    """Wall time of each over that of the plain form."""
    times = interleaved(works, repeats, time.perf_counter)
    return {form: ratio(times, form, "plain") for form in works}


def training(tokens: int, images: int) -> tuple[Ratios, Ratios]:
    """Time of forward and backward over the plain block's, and bytes saved by the attention, of every form."""
    x = torch.randn(images, tokens, DIM, requires_grad=True)
    models = {form: block(form) for form in FORMS}

    def step(model: nn.Module) -> None:
        model.zero_grad()
        model(x).sum().backward()

    times = ratios({form: lambda model=model: step(model) for form, model in models.items()})  # type: ignore[misc]
    return times, {form: saved_bytes(model.attn, x) for form, model in models.items()}


def inference() -> Ratios:
    """Time of the block at JUDGED tokens without gradients over the plain one's."""
    x = torch.randn(TOKENS[JUDGED], JUDGED, DIM)
    models = {form: block(form).eval() for form in ("plain", "both", "inference")}

    def infer(model: nn.Module) -> None:
        with torch.no_grad():
            for _ in range(3):
                model(x)

    return ratios({form: lambda model=model: infer(model) for form, model in models.items()}, 3 * REPEATS)  # type: ignore[misc]


def main() -> int:
    """Print tables and targets; 1 where one is missed."""
    torch.set_num_threads(THREADS)
    console = Console()
    times, saved = {}, {}
    table = Table("tokens", "form", "step time", "saved, MB", "saved, ratio", "kB a token")
    table.title = f"training a DeiT-S block, {THREADS} threads, medians of {REPEATS}; saved by its attention"
    for tokens, images in TOKENS.items():
        times[tokens], saved[tokens] = training(tokens, images)
        for form, words in FORMS.items():
            kept = saved[tokens][form]
            numbers = (kept / 1e6, kept / saved[tokens]["plain"], kept / 1e3 / tokens / images)
            row = [f"{number:.{digits}f}" for number, digits in zip(numbers, (1, 2, 1), strict=True)]
            table.add_row(str(tokens), words, f"{times[tokens][form]:.3f}", *row)
        table.add_section()
    console.print(table)

    folded = inference()
    table = Table("form", "inference time, ratio", title=f"the same block at {JUDGED} tokens without gradients")
    for form, words in (("plain", "plain"), ("both", "AttnScale and FeatScale"), ("inference", "the same, fold_")):
        table.add_row(words, f"{folded[form]:.3f}")
    console.print(table)

    kept = saved[JUDGED]
    words = f"DeiT-S block, {JUDGED} tokens"
    return conclude(
        [
            Ratio(f"{words}, step time: AttnScale / plain", times[JUDGED]["auto"], most=1.05),
            Ratio(f"{words}, saved bytes: AttnScale / plain", kept["auto"] / kept["plain"], most=1.3),
            Ratio(f"{words}, saved bytes: map form / AttnScale", kept["reference"] / kept["auto"], least=2.5),
            Ratio(f"{words}, inference time: after fold_ / plain", folded["inference"], most=1.01),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
