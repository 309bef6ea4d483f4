"""Facts about T2T-ViT and exported models. Numbers in brackets are acceptance checks of the specification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from common.config import ConfigError
from common.data import ImageSet
from common.runs import CheckpointError
from uvc_vit.adapter import ViTAdapter
from uvc_vit.choose import build, network
from uvc_vit.export import export
from uvc_vit.macs import block_macs, count_flops, macs
from uvc_vit.masked import apply_plan
from uvc_vit.models import Performer, sinusoids, t2t_vit
from uvc_vit.slim import slim
from uvc_vit.tests import nets
from uvc_vit.tests.test_slim import random_plan
from uvc_vit.tests.test_train import config
from uvc_vit.verify import verify

SMALL: dict[str, Any] = {"img_size": 32, "num_classes": 5, "embed_dim": 32, "depth": 3, "num_heads": 2}


@pytest.mark.parametrize("layers", [14, 19])
def test_t2t_has_the_multiply_adds_that_torch_counts(layers: Any) -> None:
    entries = json.loads((nets.REFERENCE / "macs.json").read_text())  # [8], [14]
    entry = next(entry for entry in entries if entry["name"].startswith(f"t2t_vit_{layers}"))
    with torch.device("meta"):
        model = t2t_vit(layers)
    adapter = ViTAdapter(model)
    assert len(adapter.dims) == layers and adapter.tokens((224, 224)) == 197
    assert adapter.embed_macs((224, 224)) == entry["embed_macs_true"]
    assert block_macs(adapter.dims[0], 197).total == entry["block_total"]
    assert count_flops(model, (224, 224)) == 2 * macs(model, (224, 224))


def test_linear_attention_is_attention_with_the_features_kernel() -> None:
    torch.manual_seed(0)
    block = Performer(10).eval()
    x = torch.randn(2, 7, 10)
    k, q, v = block.kqv(block.norm1(x)).chunk(3, dim=-1)
    kernel = block.features(q) @ block.features(k).transpose(1, 2)
    y = v + block.proj(kernel / (kernel.sum(-1, keepdim=True) + 1e-8) @ v)
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)), rtol=1e-4, atol=1e-5)
    assert not block.w.requires_grad
    torch.testing.assert_close(block.w @ block.w.T, 32 * torch.eye(32), rtol=0, atol=1e-4)


def test_the_position_table_is_fixed_and_its_first_row_is_zero_and_one() -> None:
    table = sinusoids(5, 6)
    assert table[0].tolist() == [0, 1] * 3
    assert table[3, 2:4].tolist() == pytest.approx([0.13879810, 0.99032076], abs=1e-6)  # 3 / 10000^(1/3) = .139248
    model = t2t_vit(14, **SMALL)
    assert not model.pos_embed.requires_grad and torch.equal(model.pos_embed[0], sinusoids(5, 32))


def test_t2t_can_be_slimmed() -> None:
    torch.manual_seed(0)
    model = nets.randomized(t2t_vit(14, **SMALL).eval())
    plan = random_plan(model)
    smaller = slim(model, plan)
    apply_plan(model, plan)
    verify(model, smaller, nets.images(3, 32))  # [12]
    assert count_flops(smaller, (32, 32)) == 2 * macs(smaller, (32, 32))
    assert F.cross_entropy(model.train()(nets.images(3, 32)), torch.arange(3)).isfinite()


def test_t2t_is_chosen_by_name_and_reads_the_authors_names(tmp_path: Path) -> None:
    options = ("--model.name", "t2t_vit_14", "--model.depth", 1, "--arm", "dense", "--data.fraction", 0.02)
    data = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), 5)
    first, other = (build(config(*options), data) for _ in range(2))
    names = {key.replace("patch_embed.", "tokens_to_token."): value for key, value in first.state_dict().items()}
    assert sum(key.startswith("tokens_to_token.attention1.") for key in names) > 5
    path = tmp_path / "t2t.pth.tar"
    torch.save({"state_dict_ema": names}, path)
    loaded = network(config(*options, "--model.weights", path), data)
    assert all(map(torch.equal, loaded.state_dict().values(), first.state_dict().values()))
    assert not all(map(torch.equal, loaded.state_dict().values(), other.state_dict().values()))
    for content, message in ((b"no", "not a checkpoint of the T2T authors"), (None, "no such checkpoint")):
        path.write_bytes(content) if content else path.unlink()
        with pytest.raises(CheckpointError, match=message):
            network(config(*options, "--model.weights", path), data)
    torch.save({"state_dict": {"w": torch.ones(1)}}, path)
    with pytest.raises(CheckpointError, match="not the weights of this run's network"):
        network(config(*options, "--model.weights", path), data)
    with pytest.raises(ConfigError, match="no weights to download"):
        build(config(*options, "--model.pretrained", "true"), data)


# Export


@pytest.mark.parametrize("layout", ["padded", "grouped"])
def test_an_exported_program_takes_any_batch(tmp_path: Path, layout: Any) -> None:
    model = nets.vit()  # [17]
    smaller = slim(model, random_plan(model), layout)
    assert export(smaller, tmp_path / "slim.pt2", nets.images()) <= 1e-5
    program = torch.export.load(tmp_path / "slim.pt2").module()
    for count in (1, 64):
        torch.testing.assert_close(program(nets.images(count)), smaller(nets.images(count)), rtol=0, atol=1e-5)


def test_an_onnx_file_gives_the_same_outputs_at_any_batch(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    model = nets.vit()  # [17]
    smaller = slim(model, random_plan(model), "grouped")
    path = tmp_path / "slim.onnx"
    assert export(smaller, path, nets.images(), "onnx") <= 1e-5
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    reference = onnx.reference.ReferenceEvaluator(str(path))
    for count in (1, 5):
        images = nets.images(count)
        inputs = {session.get_inputs()[0].name: images.numpy()}
        for found in (session.run(None, inputs)[0], reference.run(None, inputs)[0]):
            torch.testing.assert_close(torch.from_numpy(found), smaller(images), rtol=0, atol=1e-5)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    model = nets.vit()
    with pytest.raises(ValueError, match="format must be pt2 or onnx, got 'jit'"):
        export(model, tmp_path / "x", nets.images(), "jit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images must be at least two, got 1"):
        export(model, tmp_path / "x", nets.images(1))
    with pytest.raises(ValueError, match="must be in eval mode"):
        export(model.train(), tmp_path / "x", nets.images())
    (tmp_path / "x").write_text("an earlier export")
    with pytest.raises(ValueError, match="must be within -1"):
        export(model.eval(), tmp_path / "x", nets.images(), atol=-1)
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "an earlier export"
