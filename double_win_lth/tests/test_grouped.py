"""Facts about tickets trained as one network: they are what they would be alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from common.masks import Masks, keep_top, prunable_weights, random_scores
from double_win_lth import pgd_linf, stack_tickets
from double_win_lth.grouped import TicketBatch
from double_win_lth.models import build_model, head_name
from double_win_lth.pgd import mean_loss
from double_win_lth.regimes import Regime
from double_win_lth.training import sgd_step


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet8", 2, 3, [0.4], [0.3], 4).double()


def masks_of(net: nn.Module, count: int) -> list[Masks]:
    weights = prunable_weights(net)
    draws = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return [keep_top(random_scores(weights, each), 1500 - 400 * index) for index, each in enumerate(draws)]


def heads_of(net: nn.Module, count: int) -> list[nn.Linear]:
    torch.manual_seed(5)
    features = net.get_submodule(head_name(net)).in_features
    return [nn.Linear(features, 3).double() for _ in range(count)]


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x = torch.rand(8, 2, 12, 12, generator=draws, dtype=torch.float64)
    start = (2 * torch.rand(x.shape, generator=draws, dtype=torch.float64) - 1) * 0.1
    return x, torch.randint(3, (8,), generator=draws), start


def test_logits_attacks_and_five_training_steps_are_those_of_each_ticket_alone() -> None:
    net = network()
    masks, heads = masks_of(net, 3), heads_of(net, 3)
    together = stack_tickets(net, masks, heads)
    alone = []
    for mask, head in zip(masks, heads, strict=True):
        ticket = copy.deepcopy(net)
        mask.apply_(ticket)
        ticket.set_submodule("fc", copy.deepcopy(head))
        alone.append(ticket)
    x, y, start = batch()
    for training in (True, False):
        logits = together.train(training)(x)
        assert logits.shape == (3, 8, 3)
        singles = torch.stack([ticket.train(training)(x) for ticket in alone])
        assert torch.allclose(logits, singles, atol=1e-12)
    assert mean_loss(logits, y).item() == pytest.approx(sum(mean_loss(each, y).item() for each in singles))

    attack = {"eps": 0.1, "step_size": 0.03, "steps": 4}
    each = {"x": x.unsqueeze(1).expand(-1, 3, -1, -1, -1), "start": start.unsqueeze(1).expand(-1, 3, -1, -1, -1)}
    attacked = pgd_linf(together, each["x"], y, start=each["start"], **attack)
    for index, ticket in enumerate(alone):
        assert torch.allclose(attacked[:, index], pgd_linf(ticket, x, y, start=start, **attack), atol=1e-12)

    def trained(model: nn.Module, mask: Masks) -> nn.Module:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
        mask.attach(model, optimizer)
        for seed in range(5):
            sgd_step(model, optimizer, batch(seed), Regime("adv", 0.1, 0.03, 3), 0.1)
        return model

    trained(together, together.masks(masks))
    for index, (ticket, mask) in enumerate(zip(alone, masks, strict=True)):
        ours, theirs = together.ticket_state(index), trained(ticket, mask).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name].double(), value.double(), atol=1e-10) for name, value in theirs.items())
        assert all((ours[name][~kept] == 0).all() for name, kept in mask.items())
        ticket.load_state_dict(ours)


def test_without_heads_of_their_own_tickets_keep_the_models_and_the_model_stays_as_it_was() -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    masks = masks_of(net, 2)
    together = stack_tickets(net, masks)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for index in range(2):
        state = together.ticket_state(index)
        assert torch.equal(state["fc.weight"], before["fc.weight"])
        assert torch.equal(state["conv1.weight"], before["conv1.weight"] * masks[index]["conv1.weight"])


def test_torchvisions_resnet_can_be_grouped_too() -> None:
    torch.manual_seed(0)
    nets = [build_model("resnet18", 3, 4, [0.5, 0.4, 0.3], [0.2], 16).eval() for _ in range(2)]
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        singles = torch.stack([net(x) for net in nets])
        assert torch.allclose(TicketBatch(nets).eval()(x), singles, atol=1e-5)


def test_what_cannot_be_grouped_is_refused_by_name() -> None:
    with pytest.raises(
        TypeError, match="tickets can be grouped of Conv2d, BatchNorm2d and Linear layers, got GroupNorm"
    ):
        TicketBatch([nn.Sequential(nn.Conv2d(1, 2, 1), nn.GroupNorm(1, 2))])
    with pytest.raises(TypeError, match="got GroupNorm"):
        TicketBatch([nn.Sequential(nn.Conv2d(1, 2, 1), nn.GroupNorm(1, 2, affine=False))])
    gated = nn.Sequential(nn.Conv2d(1, 2, 1))
    gated.gate = nn.Parameter(torch.ones(()))
    with pytest.raises(TypeError, match="layers alone, got a module with its own gate"):
        TicketBatch([gated])
    with pytest.raises(ValueError, match="tickets must be at least one network, got none"):
        TicketBatch([])
    net = network()
    with pytest.raises(ValueError, match="heads must be 2 as the masks, got 1"):
        stack_tickets(net, masks_of(net, 2), heads_of(net, 1))
    with pytest.raises(ValueError, match=r"mask conv1.weight must be \(4, 2, 3, 3\), got \(4, 2, 7, 7\)"):
        stack_tickets(net, [{**masks_of(net, 1)[0], "conv1.weight": torch.ones(4, 2, 7, 7)}])


def test_masks_of_other_names_or_shapes_are_refused_by_name() -> None:
    net = network()
    one, other = masks_of(net, 2)
    count, less = len(one), {name: mask for name, mask in other.items() if name != "conv1.weight"}
    more = {**other, "fc.weight": torch.ones(3, 16)}
    with pytest.raises(ValueError, match=f"exactly the {count} prunable weights, only the model has conv1.weight"):
        stack_tickets(net, [one, less])
    with pytest.raises(ValueError, match=f"exactly the {count} prunable weights, only the ticket has fc.weight"):
        stack_tickets(net, [one, more])
    together = stack_tickets(net, [one, other])
    for masks, message in (
        ([one], "masks must be 2 as the tickets, got 1"),
        ([one, less], r"mask conv1\.weight of ticket 1 must be \(4, 2, 3, 3\), got none"),
        ([less, one], r"mask conv1\.weight of ticket 0 must be \(4, 2, 3, 3\), got none"),
        ([one, more], r"mask fc\.weight of ticket 0 must be \(3, 16\), got none"),
        ([one, {**other, "conv1.weight": torch.ones(4, 2, 7, 7)}], r"of ticket 1 must be .*, got \(4, 2, 7, 7\)"),
        ([{**each, "odd": torch.ones(1)} for each in (one, other)], "mask odd must name a parameter of the tickets"),
    ):
        with pytest.raises(ValueError, match=message):
            together.masks(masks)


def test_heads_can_be_masked_and_be_without_bias() -> None:
    net = network().eval()
    masks, heads = masks_of(net, 2), [nn.Linear(16, 7, bias=False).double() for _ in range(2)]
    together = stack_tickets(net, masks, heads).eval()
    x, _, _ = batch()
    for index, head in enumerate(heads):
        ticket = copy.deepcopy(net)
        masks[index].apply_(ticket)
        ticket.set_submodule("fc", head)
        assert torch.allclose(together(x)[index], ticket(x), atol=1e-12)
        ticket.load_state_dict(together.ticket_state(index))
    pruned = [{"fc.weight": torch.arange(7 * 16).view(7, 16) % 2 == index} for index in range(2)]
    together.masks(pruned).apply_(together)
    for index, head in enumerate(heads):
        left = head.weight.detach() * pruned[index]["fc.weight"]
        assert torch.equal(together.ticket_state(index)["fc.weight"], left)


def test_heads_and_networks_that_do_not_fit_together_are_refused_by_name() -> None:
    net = network()
    masks = masks_of(net, 2)
    for heads, message in (
        ([nn.Linear(15, 3), nn.Linear(15, 3)], "heads must have 16 inputs as the model's, got 15"),
        ([nn.Linear(16, 4), nn.Linear(16, 3)], r"got fc\.weight \(4, 16\) in 0, \(3, 16\) in 1"),
        ([nn.Linear(16, 3), nn.Linear(16, 3, bias=False)], r"got fc\.bias \(3,\) in 0, none in 1"),
        ([nn.Linear(16, 3, bias=False), nn.Linear(16, 3)], r"got fc\.bias none in 0, \(3,\) in 1"),
    ):
        with pytest.raises(ValueError, match=message):
            stack_tickets(net, masks, heads)
    with pytest.raises(ValueError, match=r"tickets must be of one architecture, got conv1\.weight"):
        TicketBatch([network(), build_model("resnet8", 2, 3, [0.4], [0.3], 8)])
    with pytest.raises(TypeError, match="tickets can be grouped with one Linear layer, the head, got 2"):
        TicketBatch([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))])
