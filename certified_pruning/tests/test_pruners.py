"""Facts about pruning: the released masks, exact nested counts, and channels that stay silent."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from certified_pruning.channel_pruners import (
    channel_masks,
    dense_channel_masks,
    density,
    nrs_scores,
    prune_channels,
    prune_input_channels,
    refill_scores,
    slim_loss,
    slim_scores,
)
from certified_pruning.compress import compress_channels
from certified_pruning.errors import EmptyLayerError
from certified_pruning.fgsm import fgsm_gradalign_loss
from certified_pruning.hydra import hydra_scores, popup_init, straight_through_mask
from certified_pruning.models import cifar_model_deep, cnn_a, cnn_s
from certified_pruning.nrs import nrs_loss
from certified_pruning.pruners import (
    KINDS,
    dense_masks,
    keep_of_rate,
    keep_of_remain,
    magnitude,
    prune_weights,
    saliency,
)
from certified_pruning.tests.nets import load, randomise_norms, reference
from certified_pruning.tickets import Record, find_ticket
from certified_pruning.verdicts import VerifyConfig
from certified_pruning.verifier import CompleteVerifier
from common.masks import Masks, keep_top, random_scores

NORMS = ("1", "4", "7", "10", "13")
SIZES = dict(zip(NORMS, (6, 8, 8, 10, 10), strict=True))


@pytest.fixture
def deep() -> tuple[nn.Sequential, dict[str, Tensor]]:
    """The five convolutions of mask_prune.npz, and its vectors."""
    data, layers, width = reference("mask_prune"), [], 3
    for channels, kernel, stride in zip(SIZES.values(), (3, 4, 3, 4, 4), (1, 2, 1, 2, 2), strict=True):
        layers += [nn.Conv2d(width, channels, kernel, stride, 1), nn.BatchNorm2d(channels), nn.ReLU()]
        width = channels
    return load(nn.Sequential(*layers, nn.Flatten(), nn.Linear(160, 100), nn.ReLU(), nn.Linear(100, 10)), data), data


def assert_masks(masks: Masks, data: dict[str, Tensor], prefix: str) -> None:
    for name, mask in masks.items():
        assert torch.equal(mask, data[f"{prefix}{name}_mask"].bool()), name


# The released masks


def test_three_rounds_of_global_magnitude_give_the_released_masks(deep: tuple) -> None:
    net, data = deep
    masks = dense_masks(net)
    for number in range(3):
        masks = prune_weights(magnitude(net), masks, keep_of_rate(masks, 0.2))
        assert_masks(masks, data, f"l1_round{number}_")
        assert 100 * masks.density == pytest.approx(data[f"l1_round{number}_remain"].item())


@pytest.mark.parametrize("per_layer", [False, True])
def test_slimming_gives_the_released_masks(deep: tuple, per_layer: bool) -> None:
    net, data = deep
    masks = prune_channels(slim_scores(net), dense_channel_masks(net), keep_of_remain(SIZES, 0.6, per_layer))
    assert_masks(masks, data, f"slim_local{int(per_layer)}_")


def test_stability_prunes_the_released_channels(deep: tuple) -> None:
    net, data = deep
    scores = {name: -data[f"nrs_in_{name}"] for name in NORMS}
    assert_masks(prune_channels(scores, dense_channel_masks(net), keep_of_remain(SIZES, 0.6)), data, "nrs_")


def test_refilling_ranks_channels_as_released_and_refuses_the_layer_that_release_emptied(deep: tuple) -> None:
    net, data = deep
    masks = dense_channel_masks(net, convolutions=True)
    scores, keep = refill_scores(net, masks, imp_rate=0.3), keep_of_remain(SIZES, 0.6)
    kept = keep_top(scores, keep)
    for norm in NORMS:
        assert torch.equal(kept[norm], data[f"refill_{norm}.weight_mask"].bool())
        whole = kept[norm].view(-1, 1, 1, 1).expand_as(masks[f"{int(norm) - 1}.weight"])
        assert torch.equal(whole, data[f"refill_{int(norm) - 1}.weight_mask"].bool())
    assert not kept["13"].any()
    with pytest.raises(EmptyLayerError, match="layer '13' would keep nothing"):
        prune_channels(scores, masks, keep)
    spared = prune_channels(scores, masks, keep, min_channels=1)
    assert int(spared["13.weight"].sum()) == 1 and spared["13.weight"][scores["13"].argmax()]
    assert channel_masks(spared).kept == keep


def test_the_slim_loss_is_the_released_one(deep: tuple) -> None:
    assert slim_loss(deep[0]).item() == pytest.approx(deep[1]["slim_loss"].item(), abs=1e-6)


@pytest.mark.parametrize("remain", [0.9, 0.5, 0.1])
def test_scores_give_the_released_masks_except_for_ties_which_here_leave_exact_counts(remain: float) -> None:
    data = reference("score_prune")
    scores = {name: data[f"gsm_scores_{name}"] for name in "ab"}
    masks = prune_weights(scores, Masks.ones_like(scores), keep_of_remain({"a": 120, "b": 180}, remain))
    assert masks.kept == 300 - math.floor((1 - remain) * 300)
    pruned = torch.cat([score[~masks[name]] for name, score in scores.items()])
    for name, score in scores.items():
        differ = masks[name] != data[f"gsm_{remain}_{name}"].bool()
        assert (score[differ] == pruned.max()).all()


def scored_net() -> tuple[nn.Sequential, dict[str, Tensor]]:
    data = reference("score_prune")
    layers = [nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 4, 2, 1), nn.BatchNorm2d(5)]
    return load(nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(80, 10)), data), data


def test_three_rounds_of_snip_give_the_released_masks_which_are_those_of_taylor() -> None:
    net, data = scored_net()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]))

    def loss(network: nn.Module) -> Tensor:
        start = {"uniform_start": data["uniform_delta"], "legacy_double_input": True}
        return fgsm_gradalign_loss(
            network, data["raw"], data["y"], data["eps"].item(), lambda raw: (raw - mean) / std, 0.2, **start
        )[0]

    masks = dense_masks(net)
    sizes = {name: mask.numel() for name, mask in masks.items()}
    for number, remain in enumerate((0.8, 0.64, 0.512)):
        masks.apply_(net)
        before = [tensor.clone() for tensor in net.state_dict().values()]
        masks = prune_weights(saliency(net, loss), masks, keep_of_remain(sizes, remain))
        assert_masks(masks, data, f"snip_round{number}_")
        assert_masks(masks, data, f"taylor1ScorerAbs_round{number}_")
        assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))


def test_hydra_starts_and_masks_as_released() -> None:
    data = reference("hydra")
    torch.testing.assert_close(popup_init(data["weight"]), data["popup_init"], rtol=0, atol=1e-6)
    for k in (0.2, 0.5, 0.9):
        keep = keep_of_remain({"": 63}, k)
        assert torch.equal(straight_through_mask(data["scores"], keep), data[f"getsubnet_{k}"])


def test_hydra_passes_the_gradient_straight_to_the_scores_and_none_to_the_weights() -> None:
    data = reference("hydra")
    scores = data["popup_init"].clone().requires_grad_()
    keep = keep_of_remain({"": scores.numel()}, 0.3)
    y = torch.nn.functional.conv2d(data["x"], data["weight"] * straight_through_mask(scores, keep), data["bias"], 2, 1)
    torch.testing.assert_close(y, data["y"], rtol=0, atol=1e-5)
    y.backward(data["gout"])
    torch.testing.assert_close(scores.grad, data["popup_grad"], rtol=0, atol=1e-5)


# Weights


def test_sixteen_rounds_of_rate_02_prune_exactly_what_torch_prunes_and_are_nested() -> None:
    torch.manual_seed(0)
    net = cifar_model_deep(3, 32, 10, channels=[4, 8, 8, 16, 16])
    masks = dense_masks(net)
    kept = masks.total
    for number in range(16):
        scores = random_scores(dict(net.named_parameters()), torch.Generator().manual_seed(number))
        narrower = prune_weights({name: scores[name] for name in masks}, masks, keep_of_rate(masks, 0.2))
        kept -= round(0.2 * kept)
        assert narrower.kept == kept
        assert not any((narrower[name] & ~masks[name]).any() for name in masks)
        masks = narrower


def test_global_magnitude_ranks_all_layers_together_and_layer_scope_each_on_its_own() -> None:
    torch.manual_seed(0)
    net = cnn_s(1, 28, 10)
    with torch.no_grad():
        net[3].weight.mul_(10)
    masks = dense_masks(net)
    kept = {
        name: int(mask.sum()) for name, mask in prune_weights(magnitude(net), masks, keep_of_rate(masks, 0.05)).items()
    }
    assert kept["0.weight"] < 128 * 0.9 and kept["3.weight"] > 2048 * 0.95
    each = prune_weights(magnitude(net), masks, keep_of_rate(masks, 0.05, per_layer=True))
    assert [int(mask.sum()) for mask in each.values()] == [128 - 6, 2048 - 102]


def test_a_layer_without_a_weight_is_an_error() -> None:
    net = cnn_s(1, 28, 10)
    with torch.no_grad():
        net[0].weight.mul_(1e-9)
    masks = dense_masks(net)
    with pytest.raises(EmptyLayerError, match=r"'0.weight' would keep nothing"):
        prune_weights(magnitude(net), masks, keep_of_rate(masks, 0.2))


@pytest.mark.parametrize("remain", [0.0, 1.5, -1.0, math.nan])
def test_what_remains_must_be_a_share(remain: float) -> None:
    with pytest.raises(ValueError, match=r"remain must be in \(0, 1\], got"):
        keep_of_remain({"a": 10}, remain)
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), got"):
        keep_of_rate(Masks({"a": torch.ones(10)}), 1 - remain if remain != 1.5 else 1.5)


def test_everything_remains_where_all_of_it_shall() -> None:
    net = cnn_s(1, 28, 10)
    masks, channels = dense_masks(net), dense_channel_masks(net)
    assert prune_weights(magnitude(net), masks, keep_of_remain({"all": masks.total}, 1.0)).density == 1
    assert density(prune_channels(slim_scores(net), channels, keep_of_remain({"1": 8, "4": 16}, 1.0))) == 1


def test_hydra_keeps_exact_counts_a_layer_within_its_masks_and_leaves_the_network_alone() -> None:
    torch.manual_seed(0)
    net = randomise_norms(cnn_s(1, 28, 10), 0)
    dense = dense_masks(net)
    masks = prune_weights(magnitude(net), dense, keep_of_rate(dense, 0.5))
    masks.apply_(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x, y = torch.rand(16, 1, 28, 28), torch.arange(16) % 10
    losses = []

    def loss(network: nn.Module, step: int) -> Tensor:
        value = nn.functional.cross_entropy(network(x), y)
        losses.append(value.item())
        return value

    keep = keep_of_remain({name: mask.numel() for name, mask in masks.items()}, 0.2, per_layer=True)
    keep["0.weight"] = min(keep["0.weight"], int(masks["0.weight"].sum()))
    found = prune_weights(hydra_scores(net, masks, keep, loss, steps=30, lr=0.1), masks, keep)
    assert {name: int(mask.sum()) for name, mask in found.items()} == keep
    assert keep["3.weight"] == 2048 - int(0.8 * 2048)
    assert not any((found[name] & ~masks[name]).any() for name in masks)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    assert losses[-1] < 0.8 * losses[0]  # the search does search


def test_linear_layers_are_pruned_where_they_are_asked_for_and_by_one_threshold() -> None:
    torch.manual_seed(0)
    net = cnn_s(1, 28, 10)
    kinds = KINDS["conv+linear"]
    linear = [f"{name}.weight" for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    masks = dense_masks(net, kinds)
    assert linear and set(masks) == {*dense_masks(net), *linear}
    kept = prune_weights(magnitude(net, kinds), masks, keep_of_rate(masks, 0.5))
    sizes = torch.cat([net.get_parameter(name).detach().abs().flatten() for name in masks])
    assert kept.kept == masks.total - round(0.5 * masks.total)
    for name in masks:
        assert torch.equal(kept[name], net.get_parameter(name).abs() > sizes.sort().values[masks.total - kept.kept - 1])
    x, y = torch.rand(8, 1, 28, 28), torch.arange(8)
    scores = saliency(net, lambda network: nn.functional.cross_entropy(network(x), y), kinds)
    assert set(scores) == set(masks) and all(score.any() for score in scores.values())


# Channels


def channel_rounds(method: str, net: nn.Sequential) -> list[Masks]:
    """Masks of four rounds of a channel method on one trained network."""
    rounds = [dense_channel_masks(net, convolutions=method in ("refill", "l1-channel"))]
    for number in range(1, 4):
        masks, keep = rounds[-1], keep_of_remain({"1": 8, "4": 16}, 0.75**number)
        if method == "slim":
            masks = prune_channels(slim_scores(net), masks, keep, 1)
        elif method == "refill":
            masks = prune_channels(refill_scores(net, masks), masks, keep, 1)
        elif method == "nrs":
            stats = nrs_loss(net, torch.zeros(3, 1, 28, 28), torch.full((3, 1, 28, 28), 0.1))[1]
            masks = prune_channels(nrs_scores(net, stats), masks, keep, 1)
        else:
            masks = prune_input_channels(net, masks, 0.25)
        masks.apply_(net)
        rounds.append(masks)
    return rounds


@pytest.fixture(params=["slim", "refill", "nrs", "l1-channel"])
def rounds(request: pytest.FixtureRequest) -> tuple[str, nn.Sequential, list[Masks]]:
    torch.manual_seed(1)
    net = randomise_norms(cnn_s(1, 28, 10), 3).eval()
    return request.param, net, channel_rounds(request.param, net)


def test_channel_masks_are_nested_and_exact(rounds: tuple) -> None:
    method, _, masks = rounds
    for wider, narrower in pairwise(masks):
        assert all(not (narrower[name] & ~wider[name]).any() for name in wider)
    counts = [channel_masks(each).kept for each in masks]
    assert counts == ([24, 22, 20, 19] if method == "l1-channel" else [24, 18, 14, 11])
    assert [density(each) for each in masks] == [count / 24 for count in counts]


def test_a_pruned_channel_is_silent_whatever_comes_in(rounds: tuple) -> None:
    _, net, masks = rounds
    for index in (1, 4):
        out = net[: index + 2](10 * torch.randn(20, 1, 28, 28))
        assert not out[:, ~masks[-1][f"{index}.weight"]].any()
        assert torch.equal(masks[-1][f"{index}.weight"], masks[-1][f"{index}.bias"])


def test_the_network_without_its_pruned_channels_computes_and_verifies_the_same(rounds: tuple) -> None:
    _, net, masks = rounds
    small = compress_channels(net)
    assert small[0].out_channels + small[3].out_channels == channel_masks(masks[-1]).kept
    x = torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small(x), net(x), rtol=0, atol=1e-5)
    budget, y = VerifyConfig(pgd_steps=5, pgd_restarts=1, root_steps=3, bab_steps=3, max_nodes=8), net(x).argmax(1)
    found = [CompleteVerifier(each, (1, 28, 28), 0.005, 10, budget).verify(x, y) for each in (net, small)]
    assert [v.status for v in found[0].images] == [v.status for v in found[1].images]
    assert found[0].counts["verified"] > 0


def test_refilled_channels_keep_all_their_weights_and_others_none() -> None:
    torch.manual_seed(1)
    net = randomise_norms(cnn_s(1, 28, 10), 3).eval()
    last = channel_rounds("refill", net)[-1]
    for conv, norm in (("0.weight", "1.weight"), ("3.weight", "4.weight")):
        assert torch.equal(last[conv].flatten(1).all(dim=1), last[norm])
        assert torch.equal(last[conv].flatten(1).any(dim=1), last[norm])


def test_a_channel_method_needs_batch_norms() -> None:
    with pytest.raises(ValueError, match="model must have a batch norm directly after a convolution, found none"):
        dense_channel_masks(cnn_a(1, 28, 10))


# Tickets

LEVELS = [Record(1, 97.0, 50), Record(0.5, 96.5, 60), Record(0.25, 96.1, 70), Record(0.1, 95.0, 80)]


def test_the_certified_ticket_is_the_sparsest_level_within_tau_of_dense() -> None:
    assert find_ticket(LEVELS, tau=1) == LEVELS[2]
    assert find_ticket([Record(1, 64.4, 50), Record(0.5, 63.4, 50)], tau=1) == Record(
        0.5, 63.4, 50
    )  # a tie, but for rounding
    assert find_ticket(LEVELS, tau=0) is None
    assert find_ticket(LEVELS, tau=2) == LEVELS[3]
    assert find_ticket([LEVELS[0], Record(0.5, 97.5, 48.5)], tau=1) is None


def test_a_ticket_needs_its_dense_level() -> None:
    with pytest.raises(ValueError, match="records must hold one dense level"):
        find_ticket(LEVELS[1:])
