"""Each regularizer in its efficient form against the plain one, and a whole training step against the plain network.

Shapes of DeiT-S: 197 tokens, 384 channels, 6 heads. Times are of forward and backward, processor seconds of one thread,
as ratios in one run. Fails where CNO is less than 4 times, the token loss less than 8 times as fast as the released
form (1,000 classes), where a step with all terms but mixing takes more than 1.10 times the plain one, or where its
peak memory does. `--full` adds steps with mixing and other numbers of classes.

python diverse_vit/benchmarks/regularizers.py
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from common.bench import Ratio, conclude, interleaved, ratio
from diverse_vit.cosines import contrastive, cosine
from diverse_vit.head_cosine import head_cosine
from diverse_vit.orthogonality import cno
from diverse_vit.patch_mixup import MixedBatch
from diverse_vit.regularizer import DiverseRegularizer
from diverse_vit.tests import plain
from diverse_vit.token_loss import fused_token_cross_entropy, token_cross_entropy

BATCH, TOKENS, DIM, HEADS, CLASSES = 8, 197, 384, 6, 1000
REPEATS, STEP_REPEATS = 5, 3
LEAST_CNO, LEAST_TOKEN_LOSS, MOST_STEP, MOST_MEMORY = 4.0, 8.0, 1.10, 1.10
Work = Callable[[], object]


def backward(loss: Callable[..., Tensor], *leaves: Tensor) -> Work:
    """Forward and backward of a loss."""

    def work() -> object:
        return torch.autograd.grad(loss(*leaves), leaves)

    return work


@contextmanager
def hushed() -> Iterator[None]:
    """Without the lines that the profiler's library writes to stderr."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def peak_bytes(work: Work) -> int:
    """Most memory that one call holds at a time above what it found, on the processor."""
    with hushed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def released_head_cosine(q: Tensor, k: Tensor) -> Tensor:
    """On the whole map."""
    return plain.cosine((q @ k.mT).softmax(-1).flatten(2))


def released_token_loss(z: Tensor, mixed: MixedBatch) -> Tensor:
    """With one-hot targets of all patches and a call for each, as in the released trainer."""
    first, second = (F.one_hot(y, z.shape[2]).float() * 0.9 + 0.1 / z.shape[2] for y in (mixed.y1, mixed.y2))
    weight = torch.cat([mixed.patch_weight.new_full((1,), mixed.lam), mixed.patch_weight])
    each = [first[..., None].expand(-1, -1, z.shape[1]), second[..., None].expand(-1, -1, z.shape[1])]
    target = (each[0] * weight + each[1] * (1 - weight)).mT
    losses = [-(target[:, i] * F.log_softmax(z[:, i], -1)).sum(-1).mean() for i in range(z.shape[1])]
    return torch.stack(losses).mean()


def released_cno(weights: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
    """W W^T of every matrix, one after another."""
    return torch.stack([plain.cno(*parts)[0] for parts in zip(weights, x1, x2, strict=True)]).sum()


def labels(classes: int, patches: int = TOKENS - 1) -> MixedBatch:
    """Random labels of a mixed batch."""
    y1, y2 = torch.randint(classes, (2, BATCH))
    return MixedBatch(torch.empty(0), y1, y2, 0.4, torch.rand(patches))


def terms() -> dict[str, tuple[Work, Work]]:
    """By name: efficient and released form."""
    first, last = torch.randn(2, BATCH, TOKENS - 1, DIM, requires_grad=True).unbind(0)
    first, last = (part.detach().requires_grad_() for part in (first, last))
    q, k = (torch.randn(BATCH, HEADS, TOKENS, 64).mul_(0.3).requires_grad_() for _ in range(2))
    weights = torch.randn(36, DIM, DIM).mul_(0.05).requires_grad_()
    x1, x2 = torch.rand(2, 36, DIM, 1)
    z = torch.randn(BATCH, TOKENS, CLASSES, requires_grad=True)
    mixed = labels(CLASSES)
    tokens, head = torch.randn(BATCH, TOKENS, DIM, requires_grad=True), nn.Linear(DIM, CLASSES)
    return {
        "cosine of patches": (backward(cosine, last), backward(plain.cosine, last)),
        "contrastive": (backward(contrastive, first, last), backward(plain.contrastive, first, last)),
        "cosine of heads": (backward(head_cosine, q, k), backward(released_head_cosine, q, k)),
        "CNO, 36 weights": (
            backward(lambda w: cno(w, x1, x2)[0].sum(), weights),
            backward(lambda w: released_cno(w, x1, x2), weights),
        ),
        "token loss": (
            backward(lambda z: token_cross_entropy(z, mixed), z),
            backward(lambda z: released_token_loss(z, mixed), z),
        ),
        "head and token loss": (
            backward(lambda t: fused_token_cross_entropy(t, head, mixed), tokens),
            backward(lambda t: released_token_loss(head(t), mixed), tokens),
        ),
    }


def step(kind: str, classes: int) -> Work:
    """A training step of DeiT-S: plain, all terms with or without mixing, or the released forms."""
    torch.manual_seed(0)
    model = VisionTransformer(embed_dim=DIM, num_heads=HEADS, num_classes=classes)
    images, mixed = torch.randn(BATCH, 3, 224, 224), labels(classes)
    if kind in ("released", "released, mixing"):
        return released_step(model, images, mixed, kind == "released, mixing")
    weights = dict.fromkeys(("emb_cos", "emb_nce", "attn_cos", "weight_cno"), 0.0) if kind == "plain" else {}
    found = DiverseRegularizer(model, mix=kind == "ours, mixing", **weights)

    def work() -> None:
        model.zero_grad()
        found(images, mixed).loss.backward()

    return work


def released_step(model: VisionTransformer, images: Tensor, mixed: MixedBatch, mix: bool) -> Work:
    """The terms from maps, W W^T and one-hot targets; every map of attention is formed, as in the released network."""
    kept: dict[str, Tensor] = {}
    for block in model.blocks:
        block.attn.fused_attn = False
    model.blocks[0].attn.attn_drop.register_forward_pre_hook(lambda _, args: kept.update(maps=args[0]))

    def work() -> None:
        model.zero_grad()
        first = model._pos_embed(model.patch_embed(images))
        last = model.blocks(first)
        z = model.head(model.norm(last) if mix else model.norm(last)[:, :1])
        own = mixed if mix else mixed._replace(patch_weight=mixed.patch_weight[:0])
        loss = released_token_loss(z, own)
        loss = loss + 0.5 * plain.cosine(last[:, 1:]) + 0.5 * plain.contrastive(first[:, 1:], last[:, 1:])
        loss = loss + 1e-4 * plain.cosine(kept["maps"].flatten(2))
        for block in model.blocks:
            w = block.attn.qkv.weight.view(3, DIM, DIM)
            loss = loss + 5e-4 * released_cno(w, *torch.rand(2, 3, DIM, 1))
        loss.backward()

    return work


def term_ratios() -> list[Ratio]:
    """Table of the efficient forms against the released ones; the ratios of time."""
    table = Table("term", "released / ours, time", "released / ours, memory", title=f"B {BATCH}, N {TOKENS}, d {DIM}")
    least: Mapping[str, float] = {"CNO, 36 weights": LEAST_CNO, "token loss": LEAST_TOKEN_LOSS}
    found = []
    for name, (ours, released) in terms().items():
        faster = ratio(interleaved({"ours": ours, "released": released}, REPEATS), "released", "ours")
        table.add_row(name, f"{faster:.1f}", f"{peak_bytes(released) / peak_bytes(ours):.1f}")
        found.append(Ratio(f"{name}, time: released / ours", faster, least.get(name, 1.0)))
    Console().print(table)
    return found


def step_ratios(kinds: list[str], classes: int) -> list[Ratio]:
    """Table of whole steps against the plain network; the ratios of ours."""
    title = f"training step, DeiT-S, {classes} classes, over the plain network"
    table = Table("objective", "time", "peak memory", title=title)
    works = {kind: step(kind, classes) for kind in kinds}
    times = interleaved(works, STEP_REPEATS)
    slower = {kind: ratio(times, kind, "plain") for kind in kinds}
    peaks = {kind: peak_bytes(work) for kind, work in works.items()}
    for kind in kinds:
        table.add_row(kind, f"{slower[kind]:.3f}", f"{peaks[kind] / peaks['plain']:.3f}")
    Console().print(table)
    words = f"DeiT-S step with every term but mixing, {classes} classes"
    return [
        Ratio(f"{words}, time: ours / plain", slower["ours"], most=MOST_STEP),
        Ratio(f"{words}, peak memory: ours / plain", peaks["ours"] / peaks["plain"], most=MOST_MEMORY),
    ]


def main() -> int:
    """Print the tables; 1 where a ratio is not as it should be."""
    torch.set_num_threads(1)
    full = "--full" in sys.argv[1:]
    ratios = term_ratios()
    kinds = ["plain", "ours", "released", *(["ours, mixing", "released, mixing"] if full else [])]
    for classes in (10, 100, 1000) if full else (1000,):
        ratios += step_ratios(kinds, classes)
    return conclude(ratios)


if __name__ == "__main__":
    sys.exit(main())
