"""Facts about AttnScale: the authors' vectors, the definition, and what it does to each frequency."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Attention
from timm.models.cait import TalkingHeadAttn
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from vit_antioversmooth.attnscale import MODES, apply_attnscale, attnscale_combine, attnscale_reference
from vit_antioversmooth.frequency import hc
from vit_antioversmooth.scales import scale_parameters
from vit_antioversmooth.tests import nets

ATTENTIONS = {
    "attnscale_attention": lambda a: Attention(24, num_heads=3, qkv_bias=True),
    "attnscale_cait_talking_head": lambda a: TalkingHeadAttn(16, num_heads=4, qkv_bias=True),
    "attnscale_swin_window": lambda a: WindowAttention(12, num_heads=3, window_size=4),
}


class Block(nn.Module):
    """A place for one attention."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn


def scaled(name: str, dtype: torch.dtype, mode: str = "auto") -> tuple[nn.Module, dict[str, Tensor]]:
    """The released attention of a reference file in our form, and the file's arrays."""
    arrays, state = nets.reference(name)
    block = Block(ATTENTIONS[name](arrays)).to(dtype).eval()
    apply_attnscale(block, mode=mode)
    state["attnscale.omega"] = state.pop("lamb")
    state.pop("relative_position_index", None)
    block.attn.load_state_dict(state)
    return block.attn, arrays


def close(ours: Tensor, theirs: Tensor) -> bool:
    """The tolerances of the reference vectors' README."""
    if ours.dtype == torch.float64:
        return torch.allclose(ours, theirs, rtol=0, atol=1e-10)
    return torch.allclose(ours.double(), theirs, rtol=2e-5, atol=2e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name", list(ATTENTIONS))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_are_those_of_the_authors_code(name: str, mode: str, dtype: torch.dtype) -> None:
    attention, arrays = scaled(name, dtype, mode)
    x = arrays["x"].to(dtype).requires_grad_()
    out = attention(x, mask=arrays["mask"].to(dtype)) if "mask" in arrays else attention(x)
    assert close(out, arrays["out"])
    out.backward(arrays["grad_out"].to(dtype))
    assert close(x.grad, arrays["grad_x"])
    parameters = {key.replace("attnscale.omega", "lamb"): p for key, p in attention.named_parameters()}
    checked = [key for key in arrays if key.startswith("grad.")]
    assert "grad.lamb" in checked
    for key in checked:
        assert close(parameters[key.removeprefix("grad.")].grad, arrays[key]), key


def test_the_map_after_attnscale_is_the_authors_map() -> None:
    arrays, state = nets.reference("attnscale_attention")
    ours = attnscale_reference(arrays["attn_plain"], state["lamb"])
    assert torch.allclose(ours, arrays["attn_scaled"], rtol=0, atol=1e-12)


def test_a_two_by_two_example_by_hand_in_both_forms() -> None:
    attention, value = torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    omega = torch.tensor([0.5])
    ours = attnscale_reference(attention[None, None], omega)[0, 0]
    assert torch.allclose(ours, torch.tensor([[1.1, -0.1], [0.35, 0.65]]))
    expected = torch.tensor([[1.1, -0.2], [0.35, 1.3]])
    assert torch.allclose(ours @ value, expected)
    assert torch.allclose(attnscale_combine((attention @ value)[None], value.mean(0)[None, None], omega)[0], expected)


def test_high_frequencies_of_each_head_grow_by_exactly_1_plus_omega_and_rows_still_sum_to_1() -> None:
    draws = torch.Generator().manual_seed(0)
    attention = torch.randn(2, 4, 9, 9, generator=draws, dtype=torch.float64).softmax(-1)
    value = torch.randn(2, 4, 9, 5, generator=draws, dtype=torch.float64)
    omega = torch.tensor([-1.0, 0.0, 0.5, 7.0], dtype=torch.float64)
    ours = attnscale_reference(attention, omega)
    grown = (1 + omega).view(-1, 1, 1) * hc(attention @ value)
    assert torch.allclose(hc(ours @ value), grown, rtol=0, atol=1e-12)
    assert torch.allclose(ours.sum(-1), torch.ones(2, 4, 9, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(ours[:, 0] @ value[:, 0], value[:, 0].mean(1, keepdim=True).expand(-1, 9, -1), atol=1e-12)


def test_leading_keys_left_out_have_no_share_in_the_dc_part() -> None:
    attention, omega = torch.eye(4).expand(1, 1, 4, 4), torch.tensor([1.0])
    ours = attnscale_reference(attention, omega, prefix=2)[0, 0]
    direct = torch.tensor([0, 0, 0.5, 0.5])
    assert torch.equal(ours, 2 * torch.eye(4) - direct)


@pytest.mark.parametrize("name", ["plain", "distilled", "registers"])
def test_prefix_tokens_count_among_the_keys_unless_left_out(name: str) -> None:
    x, outputs = nets.images(name), []
    for include in (True, False):
        model = nets.build(name)
        apply_attnscale(model, include_prefix=include, init=0.8)
        outputs.append(model(x))
        tokens = {"plain": 1, "distilled": 2, "registers": 5}[name]
        assert {s.prefix for s in (b.attn.attnscale for b in model.blocks)} == {0 if include else tokens}
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_omega_is_shared_over_heads_or_layers_where_asked() -> None:
    counts = {}
    for share in ("none", "heads", "layers"):
        model = nets.build("plain")
        apply_attnscale(model, share=share)
        counts[share] = [tuple(parameter.shape) for parameter in scale_parameters(model)]
    assert counts == {"none": [(3,)] * 3, "heads": [(1,)] * 3, "layers": [(3,)]}


@pytest.mark.parametrize("mode", MODES)
def test_the_frequency_blind_control_scales_the_whole_map(mode: str) -> None:
    block = Block(Attention(24, num_heads=3)).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = block.attn(x) - block.attn.proj.bias
    apply_attnscale(block, init=0.5, blind=True, mode=mode)
    assert torch.allclose(block.attn(x) - block.attn.proj.bias, 1.5 * plain, atol=1e-12)


def test_attention_dropout_leaves_the_expectation_and_projection_dropout_alone() -> None:
    torch.manual_seed(0)
    block = Block(Attention(8, num_heads=2, attn_drop=0.3))
    apply_attnscale(block, init=0.7)
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        expected = block.attn.eval()(x)
        draws = block.attn.train()(x.expand(20000, -1, -1))
        error = (draws.mean(0) - expected[0]) / (draws.std(0) / len(draws) ** 0.5)
        assert error.abs().max() < 5
        block.attn.attn_drop.p, block.attn.proj_drop.p = 0.0, 0.5
        dropped = block.attn(x.expand(500, -1, -1))
    kept = dropped != 0
    assert torch.allclose(dropped[kept], (2 * expected).expand_as(dropped)[kept], atol=1e-5)
    assert abs(kept.float().mean().item() - 0.5) < 0.03
