"""Facts about compressing in one call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from uvc_vit import Plan, UVCConfig, compress, slim
from uvc_vit.distill import KDConfig
from uvc_vit.macs import count_flops, macs
from uvc_vit.tests import nets
from uvc_vit.tests.test_slim import changed, distilled

LOADER = [(nets.images(8, seed=batch), torch.arange(8) % 5) for batch in range(4)]


def compressed(model: nn.Module, budget: float = 0.5, **options: Any) -> Any:
    return compress(model, LOADER, (16, 16), UVCConfig(budget=budget), epochs=(2, 2), **options)


@pytest.mark.parametrize("kind", [nets.vit, distilled])
def test_a_model_comes_out_smaller_within_the_budget_and_the_given_one_stays(kind: Any) -> None:
    model = kind()
    before = copy.deepcopy(model.state_dict())
    found = compressed(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    head = sum(layer.weight.numel() for layer in (model.head, getattr(model, "head_dist", None)) if layer is not None)
    counted = (count_flops(found.model, (16, 16)) / 2 - head) / (macs(model, (16, 16)) - head)
    assert 0.48 < counted <= 0.5 and counted == pytest.approx(found.share, rel=1e-12)
    assert len(found.history) == 8 and not found.model.training
    assert found.model(nets.images()).shape == (2, 5)


@pytest.mark.parametrize("layout", ["grouped", "padded"])
@pytest.mark.parametrize(("dim", "align"), [(16, 8), (32, 0), (32, 8)])  # heads of 8, no wider than align; of 16
def test_either_layout_meets_the_budget_by_torchs_count(layout: Any, dim: int, align: int) -> None:
    model = nets.vit(dim=dim)
    found = compress(model, LOADER, (16, 16), UVCConfig(align=align), epochs=(2, 1), layout=layout)
    head = model.head.weight.numel()
    counted = (count_flops(found.model, (16, 16)) / 2 - head) / (macs(model, (16, 16)) - head)
    assert 0.48 < counted <= 0.5 and counted == pytest.approx(found.share, rel=1e-12)
    assert layout == "grouped" or all(len(set(sizes.v_dims)) <= 1 for sizes in found.plan.left())


def test_heads_of_unequal_width_are_not_padded() -> None:
    model = slim(nets.vit(), changed(nets.vit(), keep_dim=((3,), (0, 2, 5))))
    for budget in (0.5, 1.0):
        with pytest.raises(ValueError, match="layout must be grouped for a model whose heads are unequally wide"):
            compressed(model, budget, layout="padded")


def test_the_same_call_gives_the_same_model_and_another_seed_another() -> None:
    one, two, other = (compressed(nets.vit(), seed=seed) for seed in (0, 0, 1))
    assert one.plan == two.plan and torch.equal(one.model(nets.images()), two.model(nets.images()))
    assert not torch.equal(one.model(nets.images()), other.model(nets.images()))


def test_training_lowers_the_loss_of_the_small_model() -> None:
    loss = []
    for epochs in ((2, 0), (2, 12)):
        found = compress(nets.vit(), LOADER, (16, 16), UVCConfig(), epochs=epochs, kd=KDConfig("none"), smoothing=0.0)
        loss.append(sum(nn.functional.cross_entropy(found.model(x), y).item() for x, y in LOADER))
    assert loss[1] < loss[0]


def test_a_model_can_be_compressed_twice() -> None:
    first = compressed(nets.vit(depth=4), 0.7)  # [26]
    second = compressed(first.model, 0.7)
    whole = macs(nets.vit(depth=4), (16, 16)) - 80
    assert (macs(second.model, (16, 16)) - 80) / whole == pytest.approx(first.share * second.share, rel=1e-12)


@pytest.mark.parametrize("mode", ["solve", "fixed"])
def test_a_model_with_a_block_without_neurons_or_heads_can_be_compressed(mode: Any) -> None:
    model = nets.vit(depth=4)
    once = slim(model, changed(model, keep_mlp=()))
    bare = slim(once, changed(once, 2, keep_head=(False, False)))
    found = compress(bare, LOADER, (16, 16), UVCConfig(budget=0.5, mode=mode), epochs=(1, 1))
    assert 0.48 < found.share <= 0.5


@pytest.mark.parametrize(("dim", "align"), [(16, 8), (32, 0)])  # heads of 8, no wider than align; of 16 without it
def test_the_plan_rebuilds_the_model_that_its_weights_fit(dim: int, align: int) -> None:
    found = compress(nets.vit(dim=dim), LOADER, (16, 16), UVCConfig(align=align), epochs=(2, 1))
    assert any(len(set(sizes.v_dims)) > 1 for sizes in found.plan.left())  # heads of unequal width
    fresh: Any = slim(nets.vit(dim=dim, seed=5), Plan.from_json(found.plan.to_json())).eval()
    fresh.load_state_dict(found.model.state_dict())
    assert torch.equal(fresh(nets.images()), found.model(nets.images()))


def test_without_a_clip_gradients_are_as_they_are() -> None:
    one, two = (compressed(nets.vit(), clip=clip) for clip in (0, 1e9))
    assert torch.equal(one.model(nets.images()), two.model(nets.images()))


def test_any_module_that_gives_logits_can_teach() -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    torch.manual_seed(0)
    found = [compressed(nets.vit(), teacher=net) for net in (teacher, None)]
    assert not torch.equal(*(one.model(nets.images()) for one in found))


def test_a_budget_of_one_gives_the_dense_model() -> None:
    model = nets.vit()  # [25]
    found = compressed(model, 1.0)
    torch.testing.assert_close(found.model(nets.images()), model(nets.images()), rtol=0, atol=1e-5)
    assert found.share == 1 and found.history == []


def test_what_cannot_be_is_refused_before_any_training() -> None:
    def never() -> Any:
        pytest.fail("training began")
        yield

    class Loader:
        __iter__ = staticmethod(never)

        def __len__(self) -> int:
            return 4

    with pytest.raises(ValueError, match=r"budget must be at least 0\.\d+ for this model, got 0.001"):  # [25]
        compress(nets.vit(), Loader(), (16, 16), UVCConfig(budget=0.001))
    with pytest.raises(ValueError, match="mode must be solve or fixed here, got released"):
        compress(nets.vit(), Loader(), (16, 16), UVCConfig(mode="released", accounting="released"))
    with pytest.raises(ValueError, match="warmup_steps must be below the 8 steps of stage 1, got 8"):
        compress(nets.vit(), Loader(), (16, 16), UVCConfig(warmup_steps=8), epochs=(2, 2))
    with pytest.raises(ValueError, match=r"input_size must be \(height, width\) in pixels, got 16"):
        compress(nets.vit(), Loader(), 16, UVCConfig())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"input_size must be the model's \(16, 16\), got \(32, 32\)"):
        compress(nets.vit(), Loader(), (32, 32), UVCConfig(budget=1.0))
    with pytest.raises(TypeError, match="train_loader must have a length, got int without"):
        compress(nets.vit(), 16, (16, 16), UVCConfig())
    for epochs in ((0, 1), (1, -1), (1,)):
        with pytest.raises(ValueError, match=r"epochs must be at least \(1, 0\), got"):
            compress(nets.vit(), Loader(), (16, 16), UVCConfig(), epochs=epochs)
    with pytest.raises(ValueError, match="the teacher must have the student's 5 classes, got 7"):
        compress(nets.vit(), Loader(), (16, 16), UVCConfig(), teacher=nets.vit(num_classes=7))


def test_a_loss_that_is_no_number_stops_with_its_step() -> None:
    loader = [*LOADER[:2], (LOADER[2][0] * torch.nan, LOADER[2][1])]
    with pytest.raises(FloatingPointError, match="loss is nan at step 2"):
        compress(nets.vit(), loader, (16, 16), UVCConfig(), epochs=(1, 1))
