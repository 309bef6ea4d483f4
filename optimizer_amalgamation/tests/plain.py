"""The plain forms that the efficient ones are checked against, and small problems to check them on."""

import math
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimizer_amalgamation.networks import network_problem
from optimizer_amalgamation.problems import Problem
from optimizer_amalgamation.rule import Weights
from optimizer_amalgamation.unroll import EPSILON, Path

REFERENCE = File(__file__).parent / "reference"


def mlp_problem(x: Tensor, y: Tensor, sizes: tuple[int, int, int], batch_size: int) -> Problem:
    """in - sigmoid - out."""
    layers = [nn.Flatten(), nn.Linear(sizes[0], sizes[1]), nn.Sigmoid(), nn.Linear(sizes[1], sizes[2])]
    return network_problem("mlp", nn.Sequential(*layers), x, y, batch_size=batch_size)


def tiny(batch_size: int = 6, dtype: torch.dtype = torch.float32, samples: int = 40) -> Problem:
    """A convolutional network on random 8x8 images."""
    rng = torch.Generator().manual_seed(7)
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten()]
    inputs = torch.rand(samples, 1, 8, 8, generator=rng).to(dtype)
    labels = torch.randint(4, (samples,), generator=rng)
    return network_problem("tiny", nn.Sequential(*layers, nn.Linear(16, 4)), inputs, labels, batch_size=batch_size)


def fixture(name: str) -> dict[str, Any]:
    """A reference unroll: problem, parameters, scales, rows, and everything that was found, kernels transposed."""
    with np.load(REFERENCE / f"{name}.npz") as archive:
        raw = {key: torch.from_numpy(archive[key]) for key in archive.files}
    sizes = (*raw["param0"].shape, raw["param2"].shape[1])
    count, size = int(raw["unroll"]), len(raw["y"]) // int(raw["unroll"])
    found: dict[str, Any] = {"raw": raw, "rows": torch.arange(count * size).view(count, 1, size)}
    found["problem"] = mlp_problem(raw["x"], raw["y"].long(), sizes, size)  # type: ignore[arg-type]
    for key in ("param", "scale"):
        found[key] = flat(raw, key)
    found["weights"] = {k[2:]: v[None] for k, v in raw.items() if k.startswith("w_")}
    return found


def flat(raw: dict[str, Tensor], prefix: str) -> Tensor:
    """(1, n) of four tensors in Keras's layout."""
    return torch.cat([raw[f"{prefix}{index}"].t().flatten() for index in range(4)])[None]


def plain_loss(problem: Problem, params: Tensor, rows: Tensor) -> Tensor:
    """Loss of one copy (n,) on one minibatch (B,), by the module's layers in their plain form."""
    x, parts = problem.inputs[rows], iter(params.split(problem.sizes))
    shapes = iter(problem.shapes)

    def take() -> Tensor:
        return next(parts).view(next(shapes))

    module = problem.set_training.__self__  # type: ignore[attr-defined]
    for layer in module:
        if isinstance(layer, nn.Linear):
            x = F.linear(x, take(), take())
        elif isinstance(layer, nn.Conv2d):
            x = F.conv2d(x, take(), take(), layer.stride)
        else:
            x = layer(x)
    return F.cross_entropy(x, problem.labels[rows])


def plain_unroll(
    problem: Problem,
    policy: Any,
    weights: Weights,
    path: Path,
    rows: Tensor,
    scale: Tensor,
    teachers: Any = (),
    reduce: str = "max",
    imitation_weight: float = 0.0,
    detach: bool = False,
) -> tuple[Tensor, Tensor, Weights, Path]:
    """One replicate by autograd through the whole unroll: meta, imitation, gradient of the weights, path."""
    leaves = {name: value[0].detach().clone().requires_grad_() for name, value in weights.items()}
    state = {name: value[0] for name, value in path.state.items()}
    p, s = path.params[0].clone().requires_grad_(), scale[0]
    first, count = p.detach(), len(rows)
    taught = [one[0] / s for one in path.taught]
    taught_states = [{k: v[0] for k, v in one.items()} for one in path.teacher_states]
    meta, imitation = p.new_zeros(()), p.new_zeros(())
    for number in range(count):
        batch = rows[number, 0]
        loss = plain_loss(problem, p * s, batch)
        (g,) = torch.autograd.grad(loss, p, create_graph=True)
        update, state = policy(leaves, state, g.detach() if detach else g, number)
        p = p - update
        meta = meta + ((loss + EPSILON).log() - (plain_loss(problem, first * s, batch) + EPSILON).log()) / count
        logs = []
        for index, teacher in enumerate(teachers):
            own = taught[index].detach().requires_grad_()
            (g,) = torch.autograd.grad(plain_loss(problem, own * s, batch), own)
            moved, taught_states[index] = teacher.step(taught_states[index], g / s)
            taught[index] = (own - moved / s).detach()
            distance = 0.5 * (p - taught[index]).square().sum()
            logs.append((distance + EPSILON).log() - math.log(p.numel()))
        if logs:
            imitation = imitation + (max(logs) if reduce == "max" else sum(logs) / len(logs)) / count
    total = meta + imitation_weight * imitation
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    grads = {
        name: (torch.zeros_like(leaf) if g is None else g)[None]
        for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }
    end = Path(
        p.detach()[None],
        {k: v.detach()[None] for k, v in state.items()},
        tuple((one * s)[None] for one in taught),
        tuple({k: v[None] for k, v in one.items()} for one in taught_states),
    )
    return meta.detach(), imitation.detach(), grads, end


def doubled(tree: Any) -> Any:
    """The same in float64."""
    if isinstance(tree, Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: doubled(value) for key, value in tree.items()}
    if isinstance(tree, Path):
        return Path(*(doubled(value) for value in (tree.params, tree.state, tree.taught, tree.teacher_states)))
    if isinstance(tree, tuple):
        return tuple(doubled(value) for value in tree)
    if isinstance(tree, Problem):
        return replace(tree, inputs=tree.inputs.double(), held_out=(tree.held_out[0].double(), tree.held_out[1]))
    return tree
