"""Branch and bound over all images and targets at once (beta-CROWN, Wang et al. 2021; spec c.8.7 to c.8.10)."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

from certified_pruning import leaf_lp
from certified_pruning.frontier import Domains, Frontier
from certified_pruning.problem import Problem
from certified_pruning.verdicts import ImageVerdict, Status, VerifyConfig

Witness = Callable[[int, Tensor], Tensor | None]
"""Raw float64 image for point x (n,) of image i if it is a true counterexample, else None."""


def branch_and_bound(
    problem: Problem,
    roots: Domains,
    verdicts: list[ImageVerdict],
    witness: Witness,
    done: Callable[[], None],
) -> None:
    """Split ReLUs until every domain of an image is bounded above 0, a counterexample turns up, or its budget ends.

    Nodes and seconds are counted per image over all its targets, which enter one at a time, the hardest first.

    Args:
        roots: bounded, undecided domains, at least one for each undecided image.
        verdicts: of the images of `problem`; filled in. `lb` must hold the bound over targets already proven.
        done: called after every round (progress).
    """
    config, device = problem.config, roots.image.device
    queue: dict[int, list[int]] = {}  # open images, with the targets that wait
    for row in roots.lb.argsort(stable=True).tolist():
        queue.setdefault(int(roots.image[row]), []).append(row)
    frontier = Frontier(roots)
    by_lp = set()  # images with a domain that only its LP decided

    def close(image: int, status: Status, stage: str, found: Tensor | None = None) -> None:
        v = verdicts[image]
        v.status, v.stage, v.witness = status, stage, found
        left = [float(frontier.drop(torch.tensor([image], device=device))[0])]
        v.lb = min(v.lb, *left, *(float(roots.lb[row]) for row in queue.pop(image)))

    def admit(domains: Domains) -> None:
        leaf = domains.depth == problem.n_unstable[domains.image]
        frontier.push(domains[~leaf])
        for row in leaf.nonzero().squeeze(1).tolist():
            image = int(domains.image[row])
            if image not in queue:
                continue
            lb, found = _leaf(problem, domains[torch.tensor([row], device=device)], witness)
            verdicts[image].lb = min(verdicts[image].lb, lb if lb > 0 else float(domains.lb[row]))
            if found is not None:
                close(image, "falsified", "lp", found)
            elif not lb > 0:
                close(image, "unknown", "lp")
            by_lp.add(image)

    def next_targets() -> None:
        # A target that is decided at once (no unstable neuron at all) lets the next one in.
        while idle := [i for i in sorted(queue) if not frontier.holds(i)]:
            for image in idle:
                if queue[image]:
                    admit(roots[torch.tensor([queue[image].pop(0)], device=device)])
                else:
                    close(image, "verified", "lp" if image in by_lp else "bab")

    next_targets()
    while queue:
        started = perf_counter()
        limit = _budget(config, verdicts, list(queue))
        for image in [i for i in queue if limit[i] == 0]:
            close(image, "unknown", "bab")
        slots = frontier.choose(config.max_rows, torch.tensor(limit, device=device))
        if not len(slots):
            break
        parents = frontier.pop(slots)
        children = parents.children(problem.choose(parents))
        children, corners = problem.bound(children, config.bab_steps, config.lr_alpha, config.lr_beta)
        counts = torch.bincount(children.image, minlength=len(verdicts)).tolist()
        dropped = children.lb > 0
        worst = _worst(children, dropped, len(verdicts))
        for image in queue:
            verdicts[image].nodes += counts[image]
            verdicts[image].lb = min(verdicts[image].lb, worst[image])
        opened, corners = children[~dropped], corners[~dropped]
        for row in problem.counterexamples(opened.image, corners):
            image = int(opened.image[row])
            found = witness(image, corners[row])
            if found is not None:
                verdicts[image].lb = min(verdicts[image].lb, float(opened.lb[opened.image == image].min()))
                close(image, "falsified", "bab", found)
        alive = torch.tensor([i in queue for i in opened.image.tolist()], dtype=torch.bool, device=device)
        admit(opened[alive])
        next_targets()
        seconds = perf_counter() - started
        for image, count in enumerate(counts):
            verdicts[image].seconds += seconds * count / len(children)
        done()


def _budget(config: VerifyConfig, verdicts: list[ImageVerdict], images: list[int]) -> list[int]:
    """How many domains of each image may still be split (two nodes each); 0 for an image out of time."""
    limit = [0] * len(verdicts)
    for i in images:
        late = config.timeout_s is not None and verdicts[i].seconds >= config.timeout_s
        nodes = 1 << 40 if config.max_nodes is None else config.max_nodes - verdicts[i].nodes
        limit[i] = 0 if late else max(0, nodes // 2)
    return limit


def _worst(d: Domains, which: Tensor, n_images: int) -> list[float]:
    worst = d.lb.new_full((n_images,), float("inf"))
    return worst.scatter_reduce(0, d.image[which], d.lb[which], "amin").tolist()


def _leaf(problem: Problem, d: Domains, witness: Witness) -> tuple[float, Tensor | None]:
    """Proven lower bound of a leaf, or a counterexample in it."""
    if problem.config.leaf_lp and leaf_lp.available():
        leaf = problem.solve_leaf(d)
        found = None if leaf.lb > 0 or leaf.x is None else witness(int(d.image[0]), leaf.x.to(problem.x_lb))
        return leaf.lb, found
    tried, x = problem.bound(d, 500, problem.config.lr_alpha, problem.config.lr_beta)
    return float(tried.lb[0]), witness(int(d.image[0]), x[0])
