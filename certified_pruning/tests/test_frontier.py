"""The frontier gives back what was put in, hands out domains fairly, and children carry one split more."""

from __future__ import annotations

import torch
from torch import Tensor

from certified_pruning.frontier import Domains, Frontier

torch.set_num_threads(1)


def domains(image: list[int], lb: list[float]) -> Domains:
    n = len(image)
    g = torch.Generator().manual_seed(n)
    return Domains(
        torch.tensor(image, dtype=torch.long),
        torch.arange(n),
        torch.tensor(lb),
        torch.rand((n, 5), generator=g).half(),
        torch.zeros(n, 0, dtype=torch.int32),
        torch.zeros(n, 0, dtype=torch.int8),
        torch.zeros(n, 0),
        torch.zeros(n, 1, dtype=torch.int32),
    )


def unlimited(n: int) -> Tensor:
    return torch.full((n,), 1000)


def test_images_take_turns_and_each_gives_its_worst_domain_first() -> None:
    frontier = Frontier(domains([], []))
    frontier.push(domains([0, 0, 0, 2, 2], [-1.0, -3.0, -2.0, -0.1, -0.2]))
    chosen = frontier.pop(frontier.choose(4, unlimited(3)))
    assert chosen.image.tolist() == [0, 2, 0, 2]
    assert torch.equal(chosen.lb, torch.tensor([-3.0, -0.2, -2.0, -0.1]))
    assert len(frontier) == 1 and frontier.holds(0) and not frontier.holds(2)


def test_an_image_gets_no_more_rows_than_its_limit() -> None:
    frontier = Frontier(domains([], []))
    frontier.push(domains([0, 0, 0, 1], [-1.0, -3.0, -2.0, -0.1]))
    assert frontier.store.image[frontier.choose(9, torch.tensor([2, 0]))].tolist() == [0, 0]


def test_ties_go_to_the_earlier_domain_whatever_slot_it_is_in() -> None:
    frontier = Frontier(domains([], []))
    frontier.push(domains([1, 1, 0], [-1.0, -1.0, -1.0]))
    frontier.pop(torch.tensor([0]))
    late = domains([0], [-1.0])
    late.target[:] = 77
    frontier.push(late)  # takes the free slot 0, before the older domain of its image
    assert frontier.pop(frontier.choose(9, unlimited(2))).target.tolist() == [2, 1, 77]


def test_pushed_domains_come_back_unchanged_through_growth() -> None:
    frontier = Frontier(domains([], []))
    for _ in range(5):
        frontier.push(domains([0, 1, 1], [-1.0, -2.0, -3.0]))
    child = domains([3], [-9.0]).children(torch.tensor([4]))
    child.beta.fill_(0.5)
    frontier.push(child)
    assert len(frontier) == 17
    back = frontier.pop(frontier.choose(99, unlimited(4)))
    mine = back[back.image == 3]
    assert torch.equal(mine.alpha, child.alpha)
    assert mine.splits is not None and mine.splits.sign.tolist() == [[1.0], [-1.0]]
    assert mine.splits.neuron.tolist() == [[4], [4]] and mine.beta[:, :1].tolist() == [[0.5], [0.5]]
    assert len(frontier) == 0


def test_children_of_unequal_depths_append_their_split_after_their_own() -> None:
    shallow = domains([0], [-1.0])
    deep = domains([1], [-1.0]).children(torch.tensor([7]))[torch.tensor([1])]
    parents = Domains.cat([shallow, deep])
    children = parents.children(torch.tensor([2, 3]))
    assert children.depth.tolist() == [1, 1, 2, 2]
    assert children.neuron.tolist() == [[2, 0], [2, 0], [7, 3], [7, 3]]
    assert children.sign.tolist() == [[1, 0], [-1, 0], [-1, 1], [-1, -1]]


def test_dropping_an_image_returns_its_worst_bound() -> None:
    frontier = Frontier(domains([], []))
    frontier.push(domains([0, 0, 2], [-1.0, -3.0, -2.0]))
    assert frontier.drop(torch.tensor([0, 1])).tolist() == [-3.0, float("inf")]
    assert len(frontier) == 1
