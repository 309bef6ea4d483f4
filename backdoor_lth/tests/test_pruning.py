"""Facts about pruning and rewinding (acceptance checks 1 to 4 and 18)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_lth.pruning import (
    disconnected,
    global_magnitude,
    grasp_scores,
    masked,
    next_masks,
    prune_and_rewind,
    snip_scores,
    survivors,
)
from backdoor_lth.tests.nets import reference
from common.masks import Masks, prunable_weights

CIFAR = """214157 171326 137061 109649 87719 70175 56140 44912 35930 28744 22995 18396 14717 11774 9419 7535 6028 4822
3858 3086 2469 1975 1580 1264 1011 809 647 518 414 331 265 212 170 136 109 87 70 56 45 36 29 23 18 14 11 9 7 6 5 4"""


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 12, 3, bias=False)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * 16, 5))


def small_batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 6, 6, generator=draws), torch.randint(5, (8,), generator=draws)


def test_survivor_counts_are_the_papers() -> None:
    counts = survivors(267_696, 0.2, 50)[1:]
    assert counts == [int(count) for count in CIFAR.split()] and counts[33] == 136 and counts[49] == 4
    assert survivors(810, 0.2, 6) == [810, 648, 518, 414, 331, 265, 212]
    assert [n - survivors(n, 0.1, 1)[1] for n in (5, 15, 25)] == [0, 2, 2]  # halves go to even


def test_six_rounds_without_training_give_the_authors_masks() -> None:
    arrays = reference("prune")
    net = nn.ModuleDict({"conv1": nn.Conv2d(3, 6, 3, bias=False), "conv2": nn.Conv2d(6, 12, 3, bias=False)})
    net.load_state_dict({f"{name}.weight": arrays[f"w_{name}"] for name in net})
    masks = None
    for number in range(1, 7):
        masks = global_magnitude(net, masks, 0.2)
        assert masks.kept == arrays["counts"][number - 1]
        assert 100 * masks.density == pytest.approx(float(arrays["remain_percent"][number - 1]))
        for name in net:
            assert torch.equal(masks[f"{name}.weight"], arrays[f"mask{number}_{name}"].bool())


def test_pruning_ranks_all_convolutions_together_and_nothing_else() -> None:
    net = small_net()
    with torch.no_grad():
        net[3].weight.mul_(1e6)
    masks = global_magnitude(net, None, 0.1)
    assert set(masks) == {"0.weight", "3.weight"}
    assert masks["3.weight"].all() and int((~masks["0.weight"]).sum()) == round(0.1 * 810)


def sgd_fit(rewind_step: int = 1, steps: int = 3, decay: float = 5e-4):
    """A `fit` of a few steps that checks masked weights after each and keeps the state after `rewind_step`."""

    def fit(model: nn.Module, masks: Masks, number: int) -> Mapping[str, Tensor] | None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
        detach, early = masks.attach(model, optimizer), None
        model.train()
        for step in range(steps):
            x, y = small_batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            weights = prunable_weights(model)
            assert all(not weights[name][~mask].any() for name, mask in masks.items())
            assert all(
                not optimizer.state[weights[name]]["momentum_buffer"][~mask].any() for name, mask in masks.items()
            )
            if step + 1 == rewind_step:
                early = copy.deepcopy(model.state_dict())
        detach()
        return early

    return fit


def test_masked_weights_stay_zero_and_masks_are_nested() -> None:
    net = small_net()
    rounds = list(prune_and_rewind(net, sgd_fit(), rounds=4))
    assert [each.masks.kept for each in rounds] == [648, 518, 414, 331]
    for before, after in itertools.pairwise(rounds):
        assert all((after.masks[name] <= before.masks[name]).all() for name in after.masks)
        assert all(not after.trained[name][~mask].any() for name, mask in before.masks.items())


def test_a_ticket_is_the_trained_weights_under_the_next_mask_with_stale_statistics() -> None:
    net = small_net()
    first, second = prune_and_rewind(net, sgd_fit(), rounds=2)
    for each in (first, second):
        for name, value in each.ticket.items():
            wanted = each.trained[name] * each.masks[name] if name in each.masks else each.trained[name]
            assert torch.equal(value, wanted)
    assert torch.equal(first.masks["0.weight"], global_magnitude(_loaded(first.trained), None, 0.2)["0.weight"])


def _loaded(state: Mapping[str, Tensor]) -> nn.Module:
    net = small_net()
    net.load_state_dict(state)
    return net


def test_rewinding_restores_statistics_and_head_of_the_early_epoch() -> None:
    starts, early = [], {}
    inner = sgd_fit()

    def fit(model: nn.Module, masks: Masks, number: int) -> Mapping[str, Tensor] | None:
        starts.append(copy.deepcopy(model.state_dict()))
        state = inner(model, masks, number)
        early.setdefault(number, state)
        return state

    list(prune_and_rewind(small_net(), fit, rounds=3))
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked", "5.weight", "5.bias", "0.bias"):
        assert torch.equal(starts[2][name], early[0][name]) and torch.equal(starts[1][name], early[0][name])
    assert not torch.equal(starts[0]["1.running_mean"], early[0]["1.running_mean"])


def test_a_chain_taken_up_after_a_round_is_bit_identical() -> None:
    early = {}

    def fit(model: nn.Module, masks: Masks, number: int) -> Mapping[str, Tensor] | None:
        state = sgd_fit()(model, masks, number)
        early.setdefault(number, state)
        return state

    whole = list(prune_and_rewind(small_net(), fit, rounds=3))
    rest = list(prune_and_rewind(small_net(5), sgd_fit(), rounds=3, start=1, masks=whole[0].masks, rewind=early[0]))
    for one, other in zip(whole[1:], rest, strict=True):
        assert one.number == other.number
        assert all(torch.equal(value, other.trained[name]) for name, value in one.trained.items())


def test_snip_and_grasp_rank_by_their_definitions() -> None:
    net, (x, y) = small_net().double(), (small_batch()[0].double(), small_batch()[1])
    weights = prunable_weights(net)
    gradients = torch.autograd.grad(F.cross_entropy(net(x), y), list(weights.values()), create_graph=True)
    for name, score in zip(weights, snip_scores(net, x, y).values(), strict=True):
        gradient = dict(zip(weights, gradients, strict=True))[name]
        torch.testing.assert_close(score, (weights[name] * gradient).abs().detach())
    # H g by a difference of gradients along g.
    grasp, step = grasp_scores(net, x, y), 1e-6
    there = copy.deepcopy(net)
    with torch.no_grad():
        for weight, gradient in zip(prunable_weights(there).values(), gradients, strict=True):
            weight.add_(step * gradient)
    moved = torch.autograd.grad(F.cross_entropy(there(x), y), list(prunable_weights(there).values()))
    for (name, weight), before, after in zip(weights.items(), gradients, moved, strict=True):
        torch.testing.assert_close(grasp[name], (weight * (after - before) / step).detach(), rtol=1e-3, atol=1e-6)


def test_fixed_scores_give_nested_masks_of_the_same_counts() -> None:
    net = small_net()
    scores = snip_scores(net, *small_batch())
    rounds = list(prune_and_rewind(net, sgd_fit(), rounds=3, rank=lambda model, number: scores))
    assert [each.masks.kept for each in rounds] == [648, 518, 414]
    lowest = next_masks(scores, None, 0.2)
    assert all(torch.equal(lowest[name], mask) for name, mask in rounds[0].masks.items())


def test_a_weight_without_survivors_is_named_and_no_error() -> None:
    net = small_net()
    with torch.no_grad():
        net[3].weight.mul_(1e-6)
    masks = global_magnitude(net, None, 0.9)
    assert disconnected(masks) == ["3.weight"]
    net.load_state_dict(masked(net.state_dict(), masks))
    assert net.eval()(small_batch()[0]).var(0).max() == 0


def test_what_cannot_be_pruned_is_refused() -> None:
    net = small_net()
    for fraction in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"fraction must be in \[0, 1\), got {fraction}"):
            global_magnitude(net, None, fraction)
    whole = global_magnitude(net, None, 0)
    wrong = (
        ({}, r"masks must have one for every weight to prune, have none for 0\.weight"),
        ({"0.weight": whole["0.weight"]}, r"masks must have one for every weight to prune, have none for 3\.weight"),
        (
            {**whole, "5.weight": torch.ones(5, 192)},
            r"mask 5\.weight must name a weight to prune, got none of that",
        ),
        ({**whole, "3.weight": torch.ones(12, 6)}, r"mask 3\.weight must be \(12, 6, 3, 3\), got \(12, 6\)"),
    )
    for masks, message in wrong:
        for given in (masks, Masks(masks)):
            with pytest.raises(ValueError, match=message):
                global_magnitude(net, given, 0.2)
    with pytest.raises(ValueError, match="model must have a weight to prune"):
        global_magnitude(nn.Linear(2, 2), None, 0.2)
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weight 0\.weight must not hold NaN, got 1"):
        global_magnitude(net, None, 0.2)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        list(prune_and_rewind(net, sgd_fit(), rounds=0))
    with pytest.raises(ValueError, match="rewind must be a state dict after round 0"):
        list(prune_and_rewind(small_net(), sgd_fit(rewind_step=9), rounds=2))
