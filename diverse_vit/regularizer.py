"""DiverseRegularizer: the training objective over any timm vision transformer, by hooks (spec c.1).

loss = CE over all tokens + emb_cos R_cos(h_last) + emb_nce R_nce(h_first, h_last) + attn_cos R_attn(block 0)
     + weight_cno * the sum over blocks and q, k, v of R_cno(W)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common import distributed
from common.runs import generator
from diverse_vit import library
from diverse_vit.capture import Capture
from diverse_vit.cosines import contrastive, cosine, full
from diverse_vit.gradient_diversity import gradient_diversity
from diverse_vit.head_cosine import attention_map, head_cosine
from diverse_vit.orthogonality import cno, cno_starts
from diverse_vit.patch_mixup import MixedBatch
from diverse_vit.timm_parts import attention_of, blocks_of, prefix_tokens, qkv_weights, queries_keys, stages, token_path
from diverse_vit.token_loss import image_cross_entropy, linear_cross_entropy, soft_cross_entropy

CHUNK = 64  # tokens at a time in the cross-entropy of patches


class Output(NamedTuple):
    """`loss` to differentiate, `logits` (batch, K) of the network, and each term, unweighted and detached, by name."""

    loss: Tensor
    logits: Tensor
    terms: dict[str, Tensor]


class DiverseRegularizer:
    """Call it in place of the network and the loss in a training step; the network gains no parameter and no state.

    Hooks are attached at once. Attach before the first compiled call: hooks that come later would be ignored.

    Args:
        model: a timm vision transformer or Swin, also compiled or wrapped for DDP.
        mix: cross-entropy of every patch against its own label, not of the image alone (spec f.1: no weight).
        emb_cos: weight of the mean cosine between patches after the last block.
        emb_nce: of the contrastive loss between the first block's input and the last block's output.
        attn_cos: of the mean cosine between heads.
        weight_cno: of the conditional orthogonality of every block's q, k, v weights, summed.
        attn_layers: blocks whose heads are compared, the mean over them; the paper's is the first.
        extra: weights of alternatives by name (see `library.EXTRAS`).
        seed: of the start vectors, with the rank and `step`.
        smoothing: of the labels.
        include_prefix: alternatives on embeddings see prefix tokens too, as released.
        token_head: maps patches after the last block (batch, n, d) to logits, where the network has no such path.
        power_iters, start: of the conditional orthogonality; see `cno` and `cno_starts`.
        rank: in the seed of the start vectors; None is this process's own.
        debug: look for NaN and Inf in images and terms, and name labels that are no class (else torch's IndexError or
            RuntimeError does on the CPU, an assertion on a GPU).

    Attributes:
        step: seeds the start vectors and grows by one a call; set it when a run is resumed.

    Raises:
        TypeError: for a model without blocks, or attention of a kind that is not known where it is needed.
        ValueError: for impossible weights, layers or names, and where the model cannot do what is asked.
    """

    def __init__(
        self,
        model: nn.Module,
        mix: bool = True,
        emb_cos: float = 0.5,
        emb_nce: float = 0.5,
        attn_cos: float = 1e-4,
        weight_cno: float = 5e-4,
        attn_layers: Sequence[int] = (0,),
        extra: Mapping[str, float] | None = None,
        seed: int = 0,
        *,
        smoothing: float = 0.1,
        include_prefix: bool = False,
        token_head: Callable[[Tensor], Tensor] | None = None,
        power_iters: int = 1,
        start: str = "uniform",
        rank: int | None = None,
        debug: bool = False,
    ) -> None:
        main = {"emb_cos": emb_cos, "emb_nce": emb_nce, "attn_cos": attn_cos, "weight_cno": weight_cno}
        self.weights = _checked_weights(main, extra or {})
        if mix not in (0, 1):
            raise ValueError(f"mix must be true or false, got {mix}")
        self.model, self.mix, self.smoothing, self.seed, self.step = model, bool(mix), smoothing, seed, 0
        self.include_prefix, self.token_head, self.rank, self.debug = include_prefix, token_head, rank, debug
        self.power_iters, self.start, self.attn_layers = power_iters, start, list(attn_layers)
        self._blocks, self._prefix = blocks_of(model), prefix_tokens(model)
        self._check_fit()
        self._path = token_path(model) if self.mix and token_head is None else None
        watched: dict[str, Any] = {}
        if self._uses("emb_nce", *library.EMBEDDING):
            watched["first"] = ("input", self._blocks[0])
        if self.mix or self._uses("emb_cos", "emb_nce", library.GRADIENT_DIVERSITY, *library.EMBEDDING):
            watched["last"] = ("output", self._blocks[-1])
        if self._uses("attn_cos", *library.ATTENTION):
            watched |= {f"attention {layer}": ("input", self._blocks[layer].attn) for layer in self.attn_layers}
        self._capture = Capture(watched)
        self.attach()

    def attach(self) -> "DiverseRegularizer":
        """Put the hooks in place; nothing happens where they are."""
        self._capture.attach()
        return self

    def detach(self) -> None:
        """Remove every hook: the network is as it was."""
        self._capture.detach()

    def __enter__(self) -> "DiverseRegularizer":
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __call__(self, images: Tensor, mixed: MixedBatch | Tensor) -> Output:
        """One forward pass of the network and the whole loss.

        Args:
            images: what the network sees, (batch, channels, height, width).
            mixed: their labels from `PatchMixup`, or plain labels (batch,).

        Raises:
            RuntimeError: after `detach`, or where the hooks did not fire.
            ValueError: where labels or tokens do not fit, or checkpointing is reentrant.
            FloatingPointError: in debug mode, for NaN or Inf.
        """
        if self.debug:
            _check_finite({"images": images})
        logits, seen = self._capture.run(self.model, images)
        # (batch, tokens, d); a Swin's (batch, height, width, d) in one row
        first = seen["first"][0][0].flatten(1, -2) if "first" in seen else None
        last = seen["last"].flatten(1, -2) if "last" in seen else None
        if isinstance(mixed, Tensor):
            count = 0 if last is None else last.shape[1] - self._prefix
            mixed = MixedBatch(images, mixed, mixed, 1.0, torch.ones(count, device=images.device))
        _check_labels(mixed, logits, self.debug)

        terms = {"ce": self._cross_entropy(logits, last, mixed)}
        with torch.autocast(images.device.type, enabled=False):
            if last is not None:
                terms |= self._embedding_terms(first, last, terms["ce"])
            terms |= self._attention_terms([seen[name] for name in seen if name.startswith("attention")])
            terms |= self._weight_terms()
        self.step += 1
        if self.debug:
            _check_finite(terms)
        loss = sum((weight * terms[name] for name, weight in self.weights.items()), start=terms["ce"])
        return Output(loss, logits, {name: term.detach() for name, term in terms.items()})

    def _cross_entropy(self, logits: Tensor, last: Tensor | None, mixed: MixedBatch) -> Tensor:
        of_image = image_cross_entropy(logits, mixed, self.smoothing)
        if not self.mix or last is None:
            return of_image
        patches = last[:, self._prefix :]
        count = patches.shape[1]
        if len(mixed.patch_weight) != count:
            wrong = f"got {len(mixed.patch_weight)} for {count} patches: is patch_size right?"
            raise ValueError(f"patch_weight must have one number a patch, {wrong}")
        labels = mixed.y1, mixed.y2, mixed.patch_weight, self.smoothing
        if self._path is not None and library.GRADIENT_DIVERSITY not in self.weights:
            path, head = self._path
            of_patches = linear_cross_entropy(path(patches), head, *labels, chunk=CHUNK)
        else:  # a head of its own, or a loss that is differentiated twice
            token_logits = self.token_head(patches) if self._path is None else self._path[1](self._path[0](patches))  # type: ignore[misc]
            if token_logits.shape[-1] != logits.shape[-1]:
                wanted, got = logits.shape[-1], token_logits.shape[-1]
                raise ValueError(f"token_head must give the network's {wanted} classes, got {got}")
            of_patches = soft_cross_entropy(token_logits, *labels)
        return (of_image + count * of_patches) / (1 + count)

    def _embedding_terms(self, first: Tensor | None, last: Tensor, loss: Tensor) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        patches, start = last[:, self._prefix :], 0 if self.include_prefix else self._prefix
        if "emb_cos" in self.weights:
            terms["emb_cos"] = cosine(patches)
        if first is not None and "emb_nce" in self.weights:
            terms["emb_nce"] = contrastive(first[:, self._prefix :], patches)
        for name in self._chosen(library.EMBEDDING):
            assert first is not None
            terms[name] = library.EMBEDDING[name](full(first[:, start:]), full(last[:, start:]), self._draws(name))
        if library.GRADIENT_DIVERSITY in self.weights:
            gradient = torch.autograd.grad(loss, last, create_graph=True)[0]
            terms[library.GRADIENT_DIVERSITY] = gradient_diversity(full(gradient[:, start:]))
        return terms

    def _attention_terms(self, calls: Sequence[Any]) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        attentions = [self._blocks[layer].attn for layer in self.attn_layers]
        parts = [queries_keys(attention, *call) for attention, call in zip(attentions, calls, strict=False)]
        if "attn_cos" in self.weights:
            terms["attn_cos"] = torch.stack([head_cosine(*part) for part in parts]).mean()
        if names := self._chosen(library.ATTENTION):
            maps = [attention_map(*part).flatten(2) for part in parts]
            terms |= {name: library.ATTENTION[name](maps, self._draws(name)) for name in names}
        return terms

    def _weight_terms(self) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if "weight_cno" in self.weights:
            draws = self._draws()
            stacks = [full(stack) for stack in self._qkv()]
            starts = [cno_starts(stack.shape[1], len(stack), draws, stack, start=self.start) for stack in stacks]
            losses = [cno(w, *pair, power_iters=self.power_iters)[0] for w, pair in zip(stacks, starts, strict=True)]
            terms["weight_cno"] = torch.cat(losses).sum()
        for name in self._chosen(library.WEIGHT):
            draws, loss = self._draws(name), library.WEIGHT[name]
            terms[name] = torch.stack([loss(full(stack), draws) for stack in self._qkv()]).sum()
        return terms

    def _qkv(self) -> Iterable[Tensor]:
        return (stack for layer, block in enumerate(self._blocks) for stack in qkv_weights(block, layer))

    def _draws(self, *extra: str) -> torch.Generator:
        rank = distributed.rank() if self.rank is None else self.rank
        return generator(self.seed, rank, self.step, *(1 + library.EXTRAS.index(name) for name in extra))

    def _uses(self, *names: str) -> bool:
        return any(name in names for name in self.weights)

    def _chosen(self, level: Mapping[str, Any]) -> list[str]:
        return [name for name in self.weights if name in level]

    def _check_fit(self) -> None:
        """Raise where the network cannot do what the weights ask for."""
        count, layers = len(self._blocks), self.attn_layers
        if outside := [layer for layer in layers if not 0 <= layer < count]:
            raise ValueError(f"attn_layers must be in [0, {count}), got {outside[0]}")
        needed = 2 if self._uses(*library.TWO_MAPS) else 1
        if self._uses("attn_cos", *library.ATTENTION):
            if len(layers) < needed or len(set(layers)) < len(layers):
                raise ValueError(f"attn_layers must be at least {needed} different blocks, got {layers}")
            for layer in layers:
                if attention_of(self._blocks[layer], layer).num_heads < 2:
                    raise ValueError(f"attn_layers must have at least 2 heads, block {layer} has 1")
        if self._uses("weight_cno", *library.WEIGHT):
            list(self._qkv())
        across = [name for name in ("emb_nce", "emb_across", "emb_across_abs") if name in self.weights]
        if across and stages(self.model) > 1:
            raise ValueError(f"{across[0]} must be 0 in a network of several stages: first and last tokens differ")


def _checked_weights(main: Mapping[str, float], extra: Mapping[str, float]) -> dict[str, float]:
    """The weights that are not 0. Raises ValueError for an unknown name or an impossible weight."""
    if unknown := [name for name in extra if name not in library.EXTRAS]:
        raise ValueError(f"extra must be among {', '.join(library.EXTRAS)}, got {unknown[0]!r}")
    weights = {**main, **extra}
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name} must be at least 0 and finite, got {weight}")
    return {name: weight for name, weight in weights.items() if weight}


def _check_labels(mixed: MixedBatch, logits: Tensor, debug: bool) -> None:
    """Raise ValueError unless there is one label an image and, in debug mode, of a class of the network."""
    batch, classes = logits.shape
    for labels in (mixed.y1, mixed.y2):
        if labels.shape != (batch,):  # one label alone would be spread over all images
            raise ValueError(f"labels must have shape ({batch},), one an image, got {tuple(labels.shape)}")
        if debug and (int(labels.min()) < 0 or int(labels.max()) >= classes):
            got = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"labels must be in [0, {classes}), the network's classes, got {got}")


def _check_finite(values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if not torch.isfinite(value).all():
            raise FloatingPointError(f"{name} must be finite, got NaN or Inf")
