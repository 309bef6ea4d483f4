"""Facts about FeatScale: the authors' vectors with their counts, where its mean is taken, and its variants."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.models.cait import LayerScaleBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vit_antioversmooth.attnscale import apply_attnscale
from vit_antioversmooth.featscale import apply_featscale, featscale
from vit_antioversmooth.frequency import dc, hc
from vit_antioversmooth.scales import scale_parameters
from vit_antioversmooth.tests import nets
from vit_antioversmooth.tests.test_attnscale import close

BLOCKS = {
    "featscale_block_deit_released": lambda: Block(24, 3, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)),
    "featscale_block_cait": lambda: LayerScaleBlock(16, 4, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)),
    "featscale_block_swin": lambda: SwinTransformerBlock(12, (8, 8), num_heads=3, window_size=4, shift_size=2),
}
COUNTS = {"featscale_block_deit_released": 2, "featscale_block_cait": 1, "featscale_block_swin": 1}


def scaled(name: str, count: int, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """The released block of a reference file in our form, and the file's arrays."""
    arrays, state = nets.reference(name)
    block = BLOCKS[name]().to(dtype).eval()
    apply_featscale(block)
    state["featscale.s"], state["featscale.t"] = count * state.pop("lamb1"), count * state.pop("lamb2")
    block.load_state_dict({key: value for key, value in state.items() if not key.endswith(("_index", "attn_mask"))})
    return block, arrays


def run(block: nn.Module, x: Tensor) -> Tensor:
    """The block's output; Swin's takes an image."""
    if isinstance(block, SwinTransformerBlock):
        return block(x.unflatten(1, (8, 8))).flatten(1, 2)
    return block(x)


@pytest.mark.parametrize("name", list(BLOCKS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_are_those_of_the_authors_code(name: str, dtype: torch.dtype) -> None:
    block, arrays = scaled(name, COUNTS[name], dtype)
    x = arrays["x"].to(dtype).requires_grad_()
    out = run(block, x)
    assert close(out, arrays["out"])
    out.backward(arrays["grad_out"].to(dtype))
    assert close(x.grad, arrays["grad_x"])
    assert close(COUNTS[name] * block.featscale.s.grad, arrays["grad.lamb1"])
    assert close(COUNTS[name] * block.featscale.t.grad, arrays["grad.lamb2"])
    parameters = dict(block.named_parameters())
    for key in (key.removeprefix("grad.") for key in arrays if key.startswith("grad.") and "lamb" not in key):
        assert close(parameters[key].grad, arrays[f"grad.{key}"]), key


def test_a_single_count_is_not_what_the_released_deit_block_computes() -> None:
    block, arrays = scaled("featscale_block_deit_released", 1, torch.float64)
    assert (run(block, arrays["x"]) - arrays["out"]).abs().max() > 1e-2


def test_a_two_by_two_example_by_hand_and_its_double_count() -> None:
    x, s, t = torch.tensor([[[3.0, 1], [1, 5]]]), torch.tensor([0.5, -0.5]), torch.tensor([1.0, 0])
    assert torch.equal(featscale(x, s, t)[0], torch.tensor([[5, -0.5], [1, 3.5]]))
    assert torch.equal(featscale(x, 2 * s, 2 * t)[0], torch.tensor([[7.0, -2], [1, 2]]))


def test_mean_and_rest_are_scaled_apart() -> None:
    draws = torch.Generator().manual_seed(0)
    y = torch.randn(2, 9, 4, generator=draws, dtype=torch.float64)
    s, t = torch.randn(2, 4, generator=draws, dtype=torch.float64)
    ours = featscale(y, s, t)
    assert torch.allclose(dc(ours), (1 + s) * dc(y), atol=1e-12) and torch.allclose(
        hc(ours), (1 + t) * hc(y), atol=1e-12
    )


def test_swins_mean_is_over_the_image_and_not_over_each_window() -> None:
    block, arrays = scaled("featscale_block_swin", 1, torch.float64)
    scale = block.featscale
    for handle in scale.handles:
        handle.remove()
    scale.handles = [block.attn.register_forward_hook(scale.scale_output, with_kwargs=True)]
    assert (run(block, arrays["x"]) - arrays["out"]).abs().max() > 1e-3
    y = torch.randn(1, 8, 8, 12, generator=torch.Generator().manual_seed(0))
    permuted = y.unflatten(1, (2, 4)).flip(1).flatten(1, 2)
    swapped = scale(permuted.double()).unflatten(1, (2, 4)).flip(1).flatten(1, 2)
    assert torch.allclose(scale(y.double()), swapped, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "distilled", "registers"])
def test_prefix_tokens_enter_the_mean_unless_left_out(name: str) -> None:
    tokens = {"plain": 1, "distilled": 2, "registers": 5}[name]
    model, y = nets.build(name), torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(0))
    apply_featscale(model, init=(0.5, 0.0), include_prefix=False)
    assert torch.allclose(model.blocks[0].featscale(y), y + 0.5 * y[:, tokens:].mean(1, keepdim=True), atol=1e-6)
    other = nets.build(name)
    apply_featscale(other, init=(0.5, 0.0))
    assert torch.allclose(other.blocks[0].featscale(y), y + 0.5 * dc(y), atol=1e-6)


def test_the_frequency_blind_control_has_one_scale_for_both_parts() -> None:
    model, y = nets.build("plain"), torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
    apply_featscale(model, init=(0.5, 0.5), tied=True)
    assert torch.allclose(model.blocks[0].featscale(y), 1.5 * y)
    assert [tuple(parameter.shape) for parameter in scale_parameters(model)] == [(24,)] * 3
    with pytest.raises(ValueError, match="two equal numbers"):
        apply_featscale(nets.build("plain"), init=(0.5, 0.0), tied=True)


def test_one_scale_a_layer_stands_for_all_channels() -> None:
    one, all_channels, x = nets.build("plain"), nets.build("plain"), nets.images("plain")
    apply_featscale(one, init=(0.3, -0.2), per_channel=False)
    apply_featscale(all_channels, init=(0.3, -0.2))
    assert [tuple(parameter.shape) for parameter in scale_parameters(one)] == [(1,)] * 6
    assert torch.allclose(one(x), all_channels(x), atol=1e-6)


def test_both_scales_work_together_as_one_after_the_other() -> None:
    model = nets.build("plain")
    apply_attnscale(model, init=0.6)
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
    attended = model.blocks[0].attn(x)
    apply_featscale(model, init=(0.2, 0.4))
    assert torch.allclose(model.blocks[0].attn(x), attended + 0.2 * dc(attended) + 0.4 * hc(attended), atol=1e-5)


def test_a_block_that_is_a_sequence_is_refused() -> None:
    with pytest.raises(TypeError, match="must lie in a transformer block, got Sequential"):
        apply_featscale(nn.Sequential(nets.build("plain").blocks[0].attn))


def test_an_init_that_is_no_pair_of_finite_numbers_is_refused_by_name() -> None:
    model = nets.build("plain")
    for kind, wrong, told in (
        (TypeError, 0.5, "0.5"),
        (TypeError, ("a", "b"), r"\('a', 'b'\)"),
        (ValueError, (0.5,), r"\(0.5,\)"),
        (ValueError, (0.0, float("nan")), r"\(0.0, nan\)"),
    ):
        with pytest.raises(kind, match=rf"init must be two finite numbers, \(s, t\), got {told}"):
            apply_featscale(model, init=wrong)
    assert scale_parameters(model) == []
