"""Facts about the redundancy report: each number against its definition, on matrices and networks worked out apart."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diverse_vit.redundancy import gaussian_rre, redundancy_report, spectrum, spectrum_measures
from diverse_vit.tests import plain
from diverse_vit.tests.nets import build, images, unfused_map
from diverse_vit.timm_parts import blocks_of
from diverse_vit.train import hook_count


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))[0]


def test_measures_of_an_orthogonal_matrix() -> None:
    found = spectrum_measures(orthogonal(20))
    assert found["rre_25"] == pytest.approx(math.sqrt(0.75)) and found["rre_50"] == pytest.approx(math.sqrt(0.5))
    assert found["k95"] == 0.95 and found["effective_rank"] == pytest.approx(1)
    assert found["row_cosine"] == pytest.approx(0, abs=1e-6)
    assert spectrum_measures(torch.eye(3))["k95"] == 1  # .95 of 3, rounded up


@pytest.mark.parametrize("rank", [2, 4])
def test_a_matrix_of_low_rank_is_reconstructed(rank: int) -> None:
    draws = torch.Generator().manual_seed(0)
    w = torch.randn(8, rank, generator=draws).double() @ torch.randn(rank, 12, generator=draws).double()
    found = spectrum_measures(w)
    assert (found["rre_25"] < 1e-7) == (rank == 2) and found["rre_50"] < 1e-7
    assert found["k95"] <= rank / 8


def test_measures_are_those_of_the_best_approximation() -> None:
    w = torch.randn(8, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    for name, k in (("rre_25", 2), ("rre_50", 4)):
        best = (u[:, :k] * s[:k]) @ v[:k]
        assert spectrum_measures(w)[name] == pytest.approx(((w - best).norm() / w.norm()).item())
    assert spectrum_measures(w)["effective_rank"] == pytest.approx((s.square().sum() ** 2 / (s**4).sum() / 8).item())
    expected = plain.cosine(w, absolute=True, diagonal=False).item()
    assert spectrum_measures(w)["row_cosine"] == pytest.approx(expected)
    assert spectrum_measures(5 * w) == pytest.approx(spectrum_measures(w))


def test_the_zero_matrix_has_nothing_to_measure() -> None:
    assert set(spectrum_measures(torch.zeros(4, 4)).values()) == {0.0}


def test_a_gaussian_matrix_has_the_error_of_the_specification() -> None:
    assert gaussian_rre((64, 64)) == pytest.approx(0.613, abs=0.006)


def tokens_of(model: Any, x: Tensor) -> list[Tensor]:
    tokens = [model._pos_embed(model.patch_embed(x))]
    for block in model.blocks:
        tokens.append(block(tokens[-1]))
    return [t[:, 1:] for t in tokens]


@pytest.mark.parametrize("split", [(4,), (3, 1)])
def test_every_layer_is_measured_as_defined_whatever_the_batches(split: tuple[int, ...]) -> None:
    model, x = build(), images(count=6)
    loader = [(part, "label") for part in x[:4].split(list(split))] + [(x[4:], "more than asked for")]
    with torch.no_grad():
        report = redundancy_report(model, loader, max_images=4)
        tokens = tokens_of(model, x[:4])
        maps = [unfused_map(model, x[:4], layer).flatten(2) for layer in range(3)]
    for layer, t in enumerate(tokens):
        for name, absolute in (("embedding_cosine", False), ("embedding_cosine_abs", True)):
            expected = plain.cosine(t, absolute=absolute, diagonal=False).item()
            assert report[name][layer] == pytest.approx(expected, abs=1e-5)
    pairs = itertools.pairwise(tokens)
    crossed = [torch.cosine_similarity(a, b, dim=-1).abs().mean().item() for a, b in pairs]
    assert report["embedding_cross"] == pytest.approx(crossed, abs=1e-5)
    ends = torch.cosine_similarity(tokens[0], tokens[-1], dim=-1).abs().mean().item()
    assert report["embedding_first_last"] == pytest.approx(ends, abs=1e-5)
    heads = [plain.cosine(m, diagonal=False).item() for m in maps]
    assert report["head_cosine"] == pytest.approx(heads, abs=1e-5)
    crossed = [torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in itertools.pairwise(maps)]
    assert report["head_cross"] == pytest.approx(crossed, abs=1e-5)
    spread = [17 * m.std(1, correction=0).mean().item() for m in maps]
    assert report["head_std"] == pytest.approx(spread, abs=1e-5)


def test_weights_are_measured_block_by_block() -> None:
    model = build()
    report = redundancy_report(model, [images()])["weights"]
    assert list(report) == ["q", "k", "v", "proj", "fc1", "fc2"]
    block = model.blocks[1]
    expected = {"k": block.attn.qkv.weight[24:48], "proj": block.attn.proj.weight, "fc2": block.mlp.fc2.weight}
    for name, weight in expected.items():
        assert {measure: values[1] for measure, values in report[name].items()} == spectrum_measures(weight)


def test_the_spectrum_is_relative_to_its_largest_value() -> None:
    model = build()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.copy_(torch.diag(torch.linspace(2, 0, 24)).repeat(3, 1))
    assert spectrum(model) == pytest.approx(torch.linspace(1, 0, 24).tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["registers", "gap", "distilled", "eva", "rope", "beit", "relpos", "swin", "one_head"])
def test_every_supported_network_is_measured_and_left_as_it_was(name: str) -> None:
    model = build(name).train()
    report = redundancy_report(model, [images(name)])
    depth = len(blocks_of(model))
    assert model.training and hook_count(model) == 0
    assert len(report["embedding_cosine"]) == depth + 1 and all(-1 <= c <= 1 for c in report["embedding_cosine"])
    assert ("head_cosine" in report) == (name != "one_head")
    if name == "swin":  # tokens are merged between its stages
        assert report["embedding_cross"][-1] is None and report["embedding_first_last"] is None
        assert report["embedding_cross"][0] is not None


def test_a_broken_image_leaves_no_hook() -> None:
    model = build()
    with pytest.raises(Exception):  # noqa: B017 the network's own
        redundancy_report(model, [torch.zeros(1, 3, 5, 5)])
    assert hook_count(model) == 0


def test_without_images_there_is_no_report() -> None:
    with pytest.raises(ValueError, match="loader must yield at least one image, got none"):
        redundancy_report(build(), [])


def test_attention_of_unknown_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="TalkingHeadAttn"):
        redundancy_report(build("cait"), [images()])
