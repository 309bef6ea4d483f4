"""Facts about the whole objective: the authors' small network, what each term sees, what is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from diverse_vit import library, regularizer
from diverse_vit.cosines import contrastive, cosine
from diverse_vit.head_cosine import head_cosine
from diverse_vit.hyperspherical import mgd, mhs
from diverse_vit.orthogonality import cno, so
from diverse_vit.patch_mixup import MixedBatch, PatchMixup
from diverse_vit.regularizer import DiverseRegularizer
from diverse_vit.tests import nets, plain
from diverse_vit.tests.nets import build, gradients, images, labels, unfused_map
from diverse_vit.tests.vectors import reference
from diverse_vit.timm_parts import prefix_tokens
from diverse_vit.token_loss import fused_token_cross_entropy, linear_cross_entropy, token_cross_entropy
from diverse_vit.train import hook_count

RELEASED = {"emb_cos": 0.5, "emb_nce": 0.5, "attn_cos": 1e-4, "weight_cno": 5e-4}
NOTHING = dict.fromkeys(RELEASED, 0.0)


def regularized(model: nn.Module, **options: Any) -> DiverseRegularizer:
    return DiverseRegularizer(model, **{"mix": False, **NOTHING, **options})


def mixed(name: str = "plain", patch: int = 4, count: int = 4) -> MixedBatch:
    return PatchMixup(patch_size=patch, generator=np.random.RandomState(0))(images(name, count), labels(count))


# The authors' network


@pytest.mark.parametrize("patches", ["plain", "fused"])
def test_every_term_the_loss_and_six_gradients_are_the_authors(patches: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = reference("objective_small_vit")
    heads, patch, depth = (int(vectors[name]) for name in ("num_heads", "patch", "depth"))
    model = VisionTransformer(
        img_size=16, patch_size=patch, embed_dim=24, depth=depth, num_heads=heads, num_classes=5
    ).double()
    model.load_state_dict({k.removeprefix("sd."): v for k, v in vectors.items() if k.startswith("sd.")})
    starts = zip(vectors["x_largest"].split(3), vectors["x_smallest"].split(3), strict=True)
    monkeypatch.setattr(regularizer, "cno_starts", lambda *_, **__: next(starts))
    # The stored targets are any distributions over the classes, ours have two labels: only they are put in.
    image_target, patch_target = vectors["image_target"][:, None], vectors["patch_target"]

    def fused(z: Tensor, head: nn.Linear, *_: object, **__: object) -> Tensor:
        """By our loss for two labels: a target t costs sum_k (t_k CE_k + (1 - t_k) CE_0) - 4 CE_0."""
        zero, losses = torch.tensor([0]), []
        for tokens, target in zip(z.split(1), patch_target, strict=True):
            each = [linear_cross_entropy(tokens, head, zero + k, zero, target[:, k], 0.0, chunk=3) for k in range(5)]
            losses.append(sum(each) - 4 * linear_cross_entropy(tokens, head, zero, zero, target[:, 0], 0.0, chunk=3))
        return torch.stack(losses).mean()

    by_targets = {"plain": lambda z, head, *_, **__: plain.soft_cross_entropy(head(z), patch_target), "fused": fused}
    monkeypatch.setattr(
        regularizer, "image_cross_entropy", lambda z, *_: plain.soft_cross_entropy(z[:, None], image_target)
    )
    monkeypatch.setattr(regularizer, "linear_cross_entropy", by_targets[patches])
    output = DiverseRegularizer(model.train())(vectors["x"], torch.zeros(4, dtype=torch.long))
    names = {"ce": "ce_mix", "emb_cos": "cosine", "emb_nce": "contrastive", "attn_cos": "cosine_attn"}
    for ours, theirs in {**names, "weight_cno": "cno_sum"}.items():
        assert output.terms[ours].item() == pytest.approx(vectors[f"term.{theirs}"].item(), rel=1e-10), ours
    assert output.loss.item() == pytest.approx(vectors["loss_total"].item(), rel=1e-10)
    torch.testing.assert_close(output.logits, vectors["token_logits"][:, 0], rtol=1e-10, atol=1e-10)
    found = gradients(model, output.loss)
    wanted = {key.removeprefix("grad."): value for key, value in vectors.items() if key.startswith("grad.")}
    assert len(wanted) == 6
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model.eval()(vectors["x"]), vectors["eval_logits"], rtol=1e-10, atol=1e-10)


# What each term sees


def test_zero_weights_are_plain_training_exactly() -> None:
    model, x, y = build(), images(), labels()
    output = regularized(model)(x, y)
    expected = nn.functional.cross_entropy(model(x), y, label_smoothing=0.1)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6) and set(output.terms) == {"ce"}
    ours, theirs = gradients(model, output.loss), gradients(model, expected)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", RELEASED)
def test_a_weight_scales_its_term_alone(name: str) -> None:
    x, y = images(), labels()
    once, thrice = (regularized(build(), **{name: weight})(x, y) for weight in (1.0, 3.0))
    assert set(once.terms) == {"ce", name}
    assert once.terms[name] == thrice.terms[name] != 0
    assert (thrice.loss - thrice.terms["ce"]).item() == pytest.approx(3 * once.terms[name].item(), rel=1e-5)


def test_the_last_tokens_are_those_before_the_final_norm() -> None:
    model, x, batch = build(), images(), mixed()
    before = DiverseRegularizer(model)(x, batch).terms
    with torch.no_grad():
        model.norm.weight.mul_(3)
    after = DiverseRegularizer(model)(x, batch).terms
    assert before["emb_cos"] == after["emb_cos"] and before["ce"] != after["ce"]


def test_the_first_tokens_are_those_with_their_position() -> None:
    model, x, y = build(), images(), labels()
    before = regularized(model, emb_nce=1)(x, y).terms["emb_nce"]
    with torch.no_grad():
        model.pos_embed[:, 1:].add_(torch.randn_like(model.pos_embed[:, 1:]))
    assert regularized(model, emb_nce=1)(x, y).terms["emb_nce"] != before


def test_the_contrastive_loss_reaches_the_patches_through_the_first_tokens() -> None:
    model, x = build(), images()
    tokens = model._pos_embed(model.patch_embed(x))
    expected = contrastive(tokens[:, 1:], model.blocks(tokens).detach()[:, 1:])
    through_first = torch.autograd.grad(expected, model.patch_embed.proj.weight)[0]
    assert through_first.abs().max() > 0
    expected = contrastive(tokens.detach()[:, 1:], model.blocks(model._pos_embed(model.patch_embed(x)))[:, 1:])
    through_last = torch.autograd.grad(expected, model.patch_embed.proj.weight)[0]
    output = regularized(model, emb_nce=1)(x, labels())
    whole = torch.autograd.grad(output.loss - _ce(model, x), model.patch_embed.proj.weight)[0]
    torch.testing.assert_close(whole, through_first + through_last, rtol=1e-3, atol=1e-5)


def _ce(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), labels(), label_smoothing=0.1)


@pytest.mark.parametrize(("name", "prefix"), [("plain", 1), ("distilled", 2), ("registers", 5), ("gap", 0)])
def test_embedding_terms_drop_exactly_the_prefix_and_heads_keep_it(name: str, prefix: int) -> None:
    model, x = build(name), images(name)
    assert prefix_tokens(model) == prefix
    tokens = model._pos_embed(model.patch_embed(x))
    terms = regularized(model, emb_cos=1, attn_cos=1)(x, labels()).terms
    expected = cosine(model.blocks(tokens)[:, prefix:]).item()
    assert terms["emb_cos"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["attn_cos"].item() == pytest.approx(cosine(unfused_map(model, x).flatten(2)).item(), rel=1e-5)


KINDS = [
    "plain",
    "qk_norm",
    "registers",
    "pre_norm",
    "eva",
    "eva_fused",
    "rope",
    "beit",
    "beit_shared",
    "relpos",
    "swin",
]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("layer", [0, 1])
def test_the_recomputed_map_is_the_one_of_unfused_attention(name: str, layer: int) -> None:
    model, x = build(name), images(name)
    expected, output = unfused_map(model, x, layer), model(x)
    for fused in (True, False):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        found = regularized(model, attn_cos=1, attn_layers=(layer,))(x, labels())
        assert found.terms["attn_cos"].item() == pytest.approx(cosine(expected.flatten(2)).item(), abs=1e-5)
        torch.testing.assert_close(found.logits, output, rtol=1e-4, atol=1e-4)


def test_several_layers_of_heads_count_their_mean() -> None:
    model, x, y = build(), images(), labels()
    alone = [regularized(model, attn_cos=1, attn_layers=(k,))(x, y).terms["attn_cos"].item() for k in (0, 2)]
    both = regularized(model, attn_cos=1, attn_layers=(0, 2))(x, y).terms["attn_cos"].item()
    assert both == pytest.approx(sum(alone) / 2)


@pytest.mark.parametrize("name", ["plain", "registers", "gap", "swin_one_stage", "eva"])
def test_every_patch_is_classified_like_the_image(name: str) -> None:
    model, x = build(name), images(name)
    batch = mixed(name)
    output = regularized(model, mix=True)(x, batch)
    prefix = prefix_tokens(model)
    features = model.forward_features(x).flatten(1, -2)[:, prefix:]
    head = model.head.fc if name.startswith("swin") else model.head
    logits = head(features if name.startswith("swin") else model.fc_norm(features))
    weights = torch.cat([torch.tensor([batch.lam]), batch.patch_weight])
    targets = plain.targets(batch.y1, batch.y2, weights, 5, 0.1)
    expected = plain.soft_cross_entropy(torch.cat([model(x)[:, None], logits], 1).double(), targets)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_plain_labels_mean_unmixed_images() -> None:
    model, x, y = build(), images(), labels()
    ones = MixedBatch(x, y, y.flip(0), 1.0, torch.ones(16))
    for mix in (False, True):
        assert regularized(model, mix=mix)(x, y).loss == regularized(model, mix=mix)(x, ones).loss


def test_a_head_of_its_own_classifies_patches_where_the_network_cannot() -> None:
    model, x = build("map"), images()
    with pytest.raises(ValueError, match="mix needs a network that classifies a token by itself, or token_head"):
        DiverseRegularizer(model)
    own = nn.Linear(24, 5)
    output = DiverseRegularizer(model, token_head=own)(x, mixed())
    output.loss.backward()
    assert own.weight.grad is not None and own.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="token_head must give the network's 5 classes, got 4"):
        DiverseRegularizer(model, token_head=nn.Linear(24, 4))(x, mixed())


@pytest.mark.parametrize("name", ["distilled", "cait"])
def test_networks_without_a_path_from_token_to_class_are_refused_for_mixing(name: str) -> None:
    with pytest.raises(ValueError, match="mix needs a network"):
        regularized(build(name), mix=True)
    assert regularized(build(name), emb_cos=1)(images(name), labels()).terms["emb_cos"].isfinite()


# Alternatives


@pytest.mark.parametrize("name", library.EXTRAS)
def test_every_alternative_has_a_value_and_reaches_the_weights(name: str) -> None:
    model, x = build(), images()
    output = regularized(model, extra={name: 1.0}, attn_layers=(0, 1))(x, labels())
    assert output.terms[name].isfinite() and output.terms[name] != 0
    found = gradients(model, output.loss - output.terms["ce"])
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["blocks.0.attn.qkv.weight"].abs().max() > 0


def test_alternatives_on_embeddings_see_the_prefix_only_if_told() -> None:
    model, x, y = build(), images(), labels()
    values = [regularized(model, extra={"emb_so": 1.0}, include_prefix=p)(x, y).terms["emb_so"] for p in (False, True)]
    assert values[0] != values[1]


def test_gradient_diversity_is_that_of_the_losss_gradient() -> None:
    model, x, y = build(), images(), labels()
    tokens = model.blocks(model._pos_embed(model.patch_embed(x)))
    loss = nn.functional.cross_entropy(model.head(model.norm(tokens)[:, 0]), y, label_smoothing=0.1)
    gradient = torch.autograd.grad(loss, tokens)[0]
    expected = -(gradient.square().sum((1, 2)) / gradient.sum(1).square().sum(1)).mean().item()
    term = regularized(model, extra={"emb_gradient": 1.0}, include_prefix=True)(x, y).terms["emb_gradient"]
    assert term.item() == pytest.approx(expected, rel=1e-4) == pytest.approx(-1, rel=1e-4)


# Start vectors


def test_start_vectors_depend_on_seed_rank_and_step_alone() -> None:
    x, y = images(), labels()

    def value(**options: Any) -> float:
        step = options.pop("step", 0)
        found = regularized(build(), weight_cno=1, **options)
        found.step = step
        return found(x, y).terms["weight_cno"].item()

    assert value() == value(rank=0)
    assert len({value(), value(seed=1), value(rank=1), value(step=1), value(start="normal"), value(power_iters=2)}) == 6
    found = regularized(build(), weight_cno=1)
    assert found(x, y).terms != found(x, y).terms and found.step == 2


# What is left behind, and copies


def test_detaching_leaves_no_trace() -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with DiverseRegularizer(model) as found:
        assert hook_count(model) == 3 and list(model.state_dict()) == list(before)
        found(images(), mixed())
        assert found.attach() is found and hook_count(model) == 3
    assert hook_count(model) == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in build().parameters())
    with pytest.raises(RuntimeError, match=r"the hooks are detached: call attach\(\) first"):
        found(images(), mixed())
    found.attach()
    assert found(images(), mixed()).loss.isfinite()


def test_a_copy_of_the_network_writes_into_no_store() -> None:
    model = build()
    found = DiverseRegularizer(model)
    average = copy.deepcopy(model)
    first = found(images(), mixed())
    taps = [
        hook.__self__
        for m in average.modules()
        for hook in [*m._forward_hooks.values(), *m._forward_pre_hooks.values()]
    ]
    originals = list(found._capture._taps.values())
    assert len(taps) == 3 and not any(tap is other for tap in taps for other in originals)
    average(images())
    assert all(tap.kept is None and not tap.open for tap in (*taps, *originals))
    found.step = 0
    assert torch.equal(found(images(), mixed()).loss, first.loss)


def test_a_network_can_be_copied_between_forward_and_backward() -> None:
    model = build()
    output = DiverseRegularizer(model)(images(), mixed())
    average = copy.deepcopy(model)
    output.loss.backward()
    assert model.head.weight.grad is not None and average.head.weight.grad is None


def test_a_copied_regularizer_works_on_its_own_network() -> None:
    found = DiverseRegularizer(build())
    copied = copy.deepcopy(found)
    assert copied.model is not found.model
    with torch.no_grad():
        copied.model.head.weight.zero_()
        copied.model.blocks[2].mlp.fc2.weight.mul_(2)
    ours, theirs = found(images(), mixed()), copied(images(), mixed())
    assert theirs.terms["emb_cos"] != ours.terms["emb_cos"]
    copied.detach()
    assert hook_count(copied.model) == 0 and hook_count(found.model) == 3


def checkpointed(use_reentrant: bool) -> nn.Module:
    model = build().train()
    model.set_grad_checkpointing()
    if use_reentrant:
        model.blocks = _Reentrant(*model.blocks)
        model.set_grad_checkpointing(False)
    return model


class _Reentrant(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=True)


def test_activation_checkpointing_changes_nothing() -> None:
    reference, model = build().train(), checkpointed(False)
    outputs = [DiverseRegularizer(m)(images(), mixed()) for m in (reference, model)]
    assert outputs[0].loss == outputs[1].loss
    expected, found = (gradients(m, o.loss) for m, o in zip((reference, model), outputs, strict=True))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="checkpointing must not be reentrant"):
        DiverseRegularizer(checkpointed(True))(images(), mixed())


@pytest.mark.parametrize(("backend", "in_place"), [("eager", True), ("aot_eager", False)])
def test_a_compiled_network_gives_the_eager_loss(backend: str, in_place: bool) -> None:
    torch._dynamo.reset()
    reference, model = build(depth=2).train(), build(depth=2).train()
    expected = DiverseRegularizer(reference)(images(), mixed())
    if in_place:
        found = DiverseRegularizer(model)
        model.compile(fullgraph=True, backend=backend)
    else:
        found = DiverseRegularizer(torch.compile(model, fullgraph=True, backend=backend))
    output = found(images(), mixed())
    torch.testing.assert_close(output.loss, expected.loss)
    theirs, ours = gradients(reference, expected.loss), gradients(model, output.loss)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)
    model.eval()
    torch.testing.assert_close(found.model(images()), reference.eval()(images()), rtol=1e-4, atol=1e-5)
    assert all(tap.kept is None for tap in found._capture._taps.values())


def test_hooks_that_come_after_compilation_are_noticed() -> None:
    torch._dynamo.reset()
    model = build().train()
    compiled = torch.compile(model, backend="eager")
    compiled(images())
    with pytest.raises(RuntimeError, match="did not fire: attach before the first compiled call"):
        DiverseRegularizer(compiled)(images(), mixed())


STARTS = torch.rand(2, 4, 5, 1, generator=torch.Generator().manual_seed(0))
LABELS = MixedBatch(torch.empty(0), torch.tensor([0, 1]), torch.tensor([3, 2]), 0.4, torch.linspace(0, 1, 4))
HEAD = nn.Linear(4, 4)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of two tensors (batch, heads, rows, 4)
    "cosine": lambda a, b: cosine(b),
    "cosine_abs": lambda a, b: cosine(b, absolute=True, chunk=2),
    "across_abs": lambda a, b: library.cosine_across(a, b, absolute=True),
    "contrastive": contrastive,
    "head_cosine": lambda a, b: head_cosine(a, b, chunk=2),
    "cno": lambda a, b: cno(b.flatten(0, 1), *STARTS)[0].sum(),
    "so": lambda a, b: so(b, normalise=False),
    "mhs": lambda a, b: mhs(b),
    "mgd": lambda a, b: mgd(b),
    "token_cross_entropy": lambda a, b: token_cross_entropy(b[:, 0], LABELS),
    "fused_token_cross_entropy": lambda a, b: fused_token_cross_entropy(b[:, 0], HEAD, LABELS, chunk=2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_compiles_into_one_graph(name: str) -> None:
    torch._dynamo.reset()
    loss = LOSSES[name]
    a, b = torch.randn(2, 2, 2, 5, 4, generator=torch.Generator().manual_seed(1)).requires_grad_().unbind()
    compiled, eager = torch.compile(loss, fullgraph=True, backend="aot_eager")(a, b), loss(a, b)
    torch.testing.assert_close(compiled, eager)
    gradients = [torch.autograd.grad(value, b)[0] for value in (compiled, eager)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_regularizers_are_float32(dtype: torch.dtype) -> None:
    model = build().train()
    found = DiverseRegularizer(model)
    with torch.autocast("cpu", dtype):
        output = found(images(), mixed())
    assert all(term.dtype == torch.float32 and term.isfinite() for term in output.terms.values())
    output.loss.backward()
    exact = DiverseRegularizer(model)(images(), mixed()).terms
    for name in ("attn_cos", "weight_cno"):
        assert output.terms[name].item() == pytest.approx(exact[name].item(), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_large_weights_have_finite_terms_and_the_gradients_of_float32(dtype: torch.dtype) -> None:
    model = build().train()
    weights = [nn.init.normal_(block.attn.qkv.weight, std=10) for block in model.blocks]
    found = regularized(model, **dict.fromkeys(RELEASED, 1.0))
    exact = torch.autograd.grad(found(images(), labels()).loss, weights)
    found.step = 0
    with torch.autocast("cpu", dtype):
        output = found(images(), labels())
    assert all(term.dtype == torch.float32 and term.isfinite() for term in output.terms.values())
    for half, whole in zip(torch.autograd.grad(output.loss, weights), exact, strict=True):
        assert (half - whole).norm() < 1e-4 * whole.norm()  # of the conditional orthogonality, beyond float16


# Training


def test_ten_steps_on_the_cosine_lower_it() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(**nets.IMAGE, **nets.SIZES)
    found, optimizer = regularized(model, emb_cos=1), torch.optim.AdamW(model.parameters(), lr=1e-3)
    values = []
    for _ in range(11):
        output = found(images(), labels())
        values.append(output.terms["emb_cos"].item())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert values[-1] < values[0] - 0.01


@pytest.mark.parametrize("kind", ["mixed", "plain"])
def test_the_mean_over_two_ranks_is_the_gradient_of_the_whole_batch(kind: str) -> None:
    model, batch = build(), mixed()
    parts: list[tuple[Tensor, Any]] = [(batch.x, batch), *((batch.x[s], _part(batch, s)) for s in HALVES)]
    if kind == "plain":
        parts = [(x, b.y1) for x, b in parts]
    options = {"mix": kind == "mixed", "rank": 0, "attn_cos": 0.1}  # start vectors shared between the ranks
    found = []
    for x, target in parts:
        output = DiverseRegularizer(model, **options)(x, target)
        found.append(gradients(model, output.loss))
    for name, whole in found[0].items():
        torch.testing.assert_close((found[1][name] + found[2][name]) / 2, whole, rtol=1e-4, atol=1e-6)


HALVES = (slice(0, 2), slice(2, 4))


def _part(batch: MixedBatch, rows: slice) -> MixedBatch:
    return MixedBatch(batch.x[rows], batch.y1[rows], batch.y2[rows], batch.lam, batch.patch_weight)


# Refusals


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("plain", {"emb_cos": -0.1}, ValueError, "emb_cos must be at least 0 and finite, got -0.1"),
        ("plain", {"attn_cos": float("nan")}, ValueError, "attn_cos must be at least 0 and finite, got nan"),
        ("plain", {"mix": 0.5}, ValueError, "mix must be true or false, got 0.5"),
        ("plain", {"extra": {"emb_magic": 1}}, ValueError, "extra must be among .*, got 'emb_magic'"),
        ("plain", {"attn_layers": (3,)}, ValueError, r"attn_layers must be in \[0, 3\), got 3"),
        ("plain", {"attn_layers": (0, 0), "attn_cos": 1}, ValueError, r"at least 1 different blocks, got \[0, 0\]"),
        ("plain", {"extra": {"attn_nce": 1}}, ValueError, r"at least 2 different blocks, got \[0\]"),
        ("one_head", {"attn_cos": 1}, ValueError, "at least 2 heads, block 0 has 1"),
        ("swin", {"emb_nce": 1}, ValueError, "emb_nce must be 0 in a network of several stages"),
        ("cait", {"attn_cos": 1}, TypeError, "attention of block 0 must be one of timm's .*, got TalkingHeadAttn"),
        ("cait", {"weight_cno": 1}, TypeError, "attention of block 0 must be one of timm's .*, got TalkingHeadAttn"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(
    name: str, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model = build(name)
    with pytest.raises(kind, match=message):
        regularized(model, **options)
    assert hook_count(model) == 0


def test_networks_without_blocks_are_refused() -> None:
    with pytest.raises(TypeError, match="model must be a timm vision transformer with blocks, got Linear"):
        DiverseRegularizer(nn.Linear(3, 3))


def test_sharded_weights_are_refused() -> None:
    model = build()
    model.blocks[1].attn.qkv.weight = nn.Parameter(model.blocks[1].attn.qkv.weight.flatten())
    with pytest.raises(ValueError, match=r"whole matrices, got sharded q, k, v weights in block 1"):
        regularized(model, weight_cno=1)


def test_weights_of_which_a_rank_has_a_part_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    weight = model.blocks[1].attn.qkv.weight
    monkeypatch.setattr(weight, "full_tensor", lambda: weight, raising=False)  # what a DTensor has
    with pytest.raises(ValueError, match=r"whole matrices, got sharded q, k, v weights in block 1"):
        regularized(model, weight_cno=1)


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_labels_but_one_an_image_is_refused(count: int, mix: bool) -> None:
    found = regularized(build(), mix=mix)
    with pytest.raises(ValueError, match=rf"labels must have shape \(4,\), one an image, got \({count},\)"):
        found(images(), labels(count))
    with pytest.raises(ValueError, match=r"labels must have shape"):
        found(images(), mixed()._replace(y2=labels(count)))


def test_labels_of_another_patch_size_are_refused() -> None:
    with pytest.raises(ValueError, match="patch_weight must have one number a patch, got 4 for 16 patches"):
        DiverseRegularizer(build())(images(), mixed(patch=8))


@pytest.mark.parametrize(("shift", "got"), [(2, "2 to 5"), (-1, "-1 to 2")])
def test_labels_of_another_network_are_named_in_debug_mode_and_never_pass(shift: int, got: str) -> None:
    for mix in (False, True):
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 5\), the network's classes, got {got}"):
            regularized(build(), mix=mix, debug=True)(images(), labels() + shift)
        with pytest.raises((IndexError, RuntimeError)):
            regularized(build(), mix=mix)(images(), labels() + shift)


def test_debug_mode_names_what_is_not_finite() -> None:
    model = build()
    with pytest.raises(FloatingPointError, match="images must be finite, got NaN or Inf"):
        DiverseRegularizer(model, debug=True)(images().fill_(float("nan")), mixed())
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="weight_cno must be finite"):
        regularized(build_inf_weights(), weight_cno=1, debug=True)(images(), labels())


def build_inf_weights() -> nn.Module:
    """Values of attention beyond every number, unseen by the logits."""
    model = build()
    with torch.no_grad():
        model.blocks[2].attn.proj.weight.zero_()
        model.blocks[2].attn.qkv.weight[48:] = 1e30
    return model
