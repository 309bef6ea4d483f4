"""Facts about finding and keeping tickets: the reference chain, rewinding, nesting, files, going on, bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from common.masks import Masks
from common.runs import CheckpointError
from double_win_lth import TicketBook, find_tickets, one_shot_tickets
from double_win_lth.models import build_model
from double_win_lth.tests import nets
from double_win_lth.tickets import conv_weights, shuffled, survivors


def chain_net(arrays: dict[str, Tensor]) -> nn.Module:
    """A network whose convolutions are those of the reference chain, with a head and batch norm that are not pruned."""
    net = nn.Module()
    for name in nets.constants()["conv_order"]:
        weight = arrays[f"init/{name}.weight"]
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]))
        conv.weight.data.copy_(weight)
        parent = net
        *path, last = name.split(".")
        for step in path:
            if not hasattr(parent, step):
                parent.add_module(step, nn.Module())
            parent = getattr(parent, step)
        parent.add_module(last, conv)
    net.add_module("bn", nn.BatchNorm2d(3))
    net.add_module("fc", nn.Linear(4, 2))
    return net


def test_the_chain_of_masks_is_that_of_the_released_code_and_every_ticket_is_rewound() -> None:
    arrays = nets.reference("imp_masks")
    net = chain_net(arrays)
    start = copy.deepcopy(net.state_dict())
    checked = []

    def train_round(model: nn.Module, masks: Masks, level: int) -> None:
        for name, weight in conv_weights(model).items():
            assert torch.equal(weight, start[name] * masks[name])
            weight.data.copy_(arrays[f"trained{level + 1}/{name}"])  # pruned entries hold values of 3 to 4
        model.bn.running_mean += 1
        model.fc.weight.data.zero_()

    def on_ticket(book: TicketBook) -> None:
        level = book.levels
        masks = book.mask(level)
        for name, mask in masks.items():
            assert torch.equal(mask, arrays[f"mask{level}/{name}"].bool()), (level, name)
            assert not (mask & ~book.mask(level - 1)[name]).any()
            assert torch.equal(net.state_dict()[name], start[name] * mask)
        others = set(start) - set(masks)
        assert all(torch.equal(net.state_dict()[name], start[name]) for name in others) and len(others) > 6
        checked.append(book.remaining(level))

    find_tickets(net, train_round, rate=0.2, rounds=6, on_ticket=on_ticket)
    assert all(torch.equal(value, start[name]) for name, value in net.state_dict().items())
    assert checked == nets.constants()["remaining_count"]
    total = sum(nets.constants()["numel"].values())
    assert [100 * n / total for n in checked] == pytest.approx(nets.constants()["remaining_percent"], abs=1e-9)
    half = one_shot_tickets(net, [nets.constants()["random_prune_half_total_remaining"]], score="random")
    assert half.remaining(1) == total - round(0.5 * total)


def counted(survivors: int, rate: float) -> int:
    """Survivors of one round in a network with that many weights."""
    net = nn.Sequential(nn.Conv2d(1, survivors, 1, bias=False))
    return find_tickets(net, lambda *_: None, rate=rate, rounds=1).remaining(1)


@pytest.mark.parametrize(("survivors", "rate", "lost"), [(5, 0.5, 2), (7, 0.5, 4), (4, 0.2, 1), (2, 0.2, 0)])
def test_a_round_removes_a_share_rounded_half_to_even(survivors: int, rate: float, lost: int) -> None:
    assert counted(survivors, rate) == survivors - lost


def test_survivors_of_resnet50_are_the_papers_and_all_its_53_convolutions_are_masked() -> None:
    weights = {name: torch.empty(size) for name, size in nets.constants()["resnet50_convs"]}
    with torch.device("meta"):
        net = build_model("resnet50", 3, 1000, [0.0], [1.0], 16)
        small = build_model("resnet18", 3, 1000, [0.0], [1.0], 16)
    convolutions = conv_weights(net)
    assert [(name.removesuffix(".weight"), w.numel()) for name, w in convolutions.items()] == [
        (name, w.numel()) for name, w in weights.items()
    ]
    assert len(convolutions) == 53 and {"conv1.weight", "layer1.0.downsample.0.weight"} <= convolutions.keys()
    assert sum(w.numel() for w in conv_weights(small).values()) == 11_166_912
    counts = survivors(23_454_912, 0.2, 11)
    assert counts == nets.constants()["remaining_sequence"][:12]
    assert counts[10:] == [2_518_453, 2_014_762]
    found = [f"{100 * (1 - counts[k] / counts[0]):.2f}" for k in (6, 7, 8, 10, 11)]
    assert found == ["73.79", "79.03", "83.22", "89.26", "91.41"]


def trained(model: nn.Module, masks: Masks, level: int) -> None:
    """A round of training that is only a seeded disturbance."""
    draws = torch.Generator().manual_seed(level)
    for weight in conv_weights(model).values():
        weight.data.add_(0.1 * torch.randn(weight.shape, generator=draws))
    masks.apply_(model)


def test_the_first_ticket_is_one_shot_and_baselines_have_equal_counts_and_nest() -> None:
    net = nets.small_net()
    imp = find_tickets(net, trained, rate=0.3, rounds=4)
    counts = [imp.remaining(level) for level in range(1, 5)]
    omp = one_shot_tickets(net, counts)
    rp = one_shot_tickets(net, counts, score="random", generator=torch.Generator().manual_seed(0))
    mixed = shuffled(imp, torch.Generator().manual_seed(0))
    assert all(torch.equal(omp.mask(1)[name], mask) for name, mask in imp.mask(1).items())
    assert omp.iou(imp, 4) < 1 and rp.iou(imp, 4) < 0.9
    for book in (omp, rp, mixed):
        assert [book.remaining(level) for level in range(1, 5)] == counts and book.levels == 4
        for level in range(1, 5):
            assert not any((book.mask(level)[n] & ~book.mask(level - 1)[n]).any() for n in book.survived)
    assert all(mixed.mask(4)[name].sum() == mask.sum() for name, mask in imp.mask(4).items()) and mixed.iou(imp, 4) < 1


def test_a_chain_that_was_interrupted_between_rounds_goes_on_without_training_a_round_again() -> None:
    net = nets.small_net()
    levels: list[int] = []
    whole = find_tickets(net, trained, rate=0.3, rounds=4)
    half = find_tickets(net, trained, rate=0.3, rounds=2)

    def noted(model: nn.Module, masks: Masks, level: int) -> None:
        levels.append(level)
        trained(model, masks, level)

    again = find_tickets(net, noted, rate=0.3, rounds=4, found=half)
    assert levels == [2, 3]
    assert all(torch.equal(again.survived[name], value) for name, value in whole.survived.items())
    assert find_tickets(net, noted, rate=0.3, rounds=2, found=half) is half and levels == [2, 3]
    with pytest.raises(ValueError, match="found must hold at most rounds=2 tickets, got 4"):
        find_tickets(net, noted, rate=0.3, rounds=2, found=whole)


@pytest.mark.parametrize("level", [0, 2, 4])
def test_a_ticket_of_the_model_that_it_was_found_in_has_the_books_sparsity(level: int) -> None:
    net = nets.small_net()
    start = copy.deepcopy(net.state_dict())
    book = find_tickets(net, trained, rate=0.3, rounds=4)
    book.apply_to(net, level)
    weights = conv_weights(net)
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert zeros / sum(weight.numel() for weight in weights.values()) == book.sparsity(level)
    assert all(torch.equal(weight, start[name] * book.mask(level)[name]) for name, weight in weights.items())


# Files


def test_a_book_survives_its_file_which_has_one_byte_a_weight(tmp_path: Path) -> None:
    book = find_tickets(nets.small_net(), trained, rate=0.3, rounds=3)
    book.save(tmp_path / "tickets.safetensors")
    again = TicketBook.load(tmp_path / "tickets.safetensors")
    assert again.levels == 3 and book.sparsity(0) == 0 and again.sparsity(3) == book.sparsity(3) > 0.6
    for level in range(4):
        assert all(torch.equal(again.mask(level)[name], mask) for name, mask in book.mask(level).items())
    weights = sum(value.numel() for value in book.survived.values())
    assert weights < (tmp_path / "tickets.safetensors").stat().st_size < weights + 400
    for level in (4, -1):
        with pytest.raises(IndexError, match=rf"level must be in \[0, 3\], got {level}"):
            book.mask(level)


def test_files_that_are_damaged_or_something_else_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tickets.safetensors"
    find_tickets(nets.small_net(), trained, rate=0.3, rounds=2).save(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:3], b"", safetensors.torch.save({"a": torch.ones(2)})):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a file of tickets") as told:
            TicketBook.load(path)
        assert str(path) in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(CheckpointError, match="no such file of tickets"):
        TicketBook.load(tmp_path / "absent")


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, r"rate must be in \(0, 1\), got 0.0"),
        ({"rate": 1.0}, r"rate must be in \(0, 1\), got 1.0"),
        ({"rate": 1.5}, r"rate must be in \(0, 1\), got 1.5"),
        ({"rate": float("nan")}, r"rate must be in \(0, 1\), got nan"),
        ({"rounds": 0}, r"rounds must be in \[1, 255\], got 0"),
        ({"rounds": 256}, r"rounds must be in \[1, 255\], got 256"),
        ({"rate": 0.9, "rounds": 4}, "round 3 must leave at least one weight, removes all 3 at rate 0.9"),
        ({"prunable": lambda model: {}}, "model must have a weight to prune, got none"),
    ],
)
def test_an_impossible_chain_is_refused_before_a_round_is_trained(options: dict[str, Any], message: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 300, 1, bias=False))
    before = net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        find_tickets(net, lambda *_: pytest.fail("trained"), **{"rate": 0.2, "rounds": 1, **options})
    assert torch.equal(net[0].weight, before)


def test_networks_without_convolutions_and_weights_that_are_not_finite_are_named() -> None:
    with pytest.raises(ValueError, match=r"model must have a weight to prune in \['Conv2d'\], got none"):
        find_tickets(nn.Sequential(nn.Linear(2, 2)), trained, rounds=1)
    net = nets.small_net()
    net[3].weight.data.view(-1)[:3] = torch.nan
    with pytest.raises(ValueError, match=r"3\.weight has 3 non-finite values"):
        find_tickets(net, trained, rounds=1)


def test_a_ticket_of_another_network_is_refused_by_name_and_changes_nothing() -> None:
    book = one_shot_tickets(nn.Sequential(nn.Conv2d(3, 4, 7)), [10])
    other = nn.Sequential(nn.Conv2d(3, 4, 3))
    before = other[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"mask 0.weight must be \(4, 3, 3, 3\), got \(4, 3, 7, 7\)"):
        book.apply_to(other, 1)
    more = nn.Sequential(nn.Conv2d(3, 4, 7), nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match=r"exactly the 2 prunable weights, only the model has 1\.weight"):
        book.apply_to(more, 1)
    with pytest.raises(ValueError, match=r"only the ticket has 0\.weight"):
        book.apply_to(nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 7)), 1)
    assert torch.equal(other[0].weight, before)


def test_books_hold_only_counts_and_nested_tickets_that_are_not_empty() -> None:
    with pytest.raises(ValueError, match=r"survived a must be uint8, got torch.float32"):
        TicketBook({"a": torch.ones(2)})
    with pytest.raises(ValueError, match="survived must hold at least one entry, got none"):
        TicketBook({})
    book = TicketBook({"a": torch.tensor([1, 0, 1], dtype=torch.uint8)})
    with pytest.raises(ValueError, match="mask must lie within the last ticket's"):
        book.followed_by(Masks({"a": torch.tensor([True, True, False])}))
    with pytest.raises(ValueError, match="round 2 must leave at least one weight, got 0 of 2"):
        book.followed_by(Masks({"a": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"mask a must hold only 0 and 1, got values in \[0\.5"):
        Masks({"a": torch.full((3,), 0.5)})


@pytest.mark.parametrize(
    ("counts", "score", "message"),
    [
        ([0], "magnitude", r"remaining must not rise and be in \[1, 270\], got 0"),
        ([100, 101], "magnitude", r"remaining must not rise and be in \[1, 100\], got 101"),
        ([100], "luck", "score must be magnitude or random, got 'luck'"),
    ],
)
def test_impossible_one_shot_tickets_are_refused(counts: list[int], score: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_shot_tickets(nets.small_net(), counts, score=score)
