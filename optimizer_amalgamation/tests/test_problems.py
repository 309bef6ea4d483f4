"""Facts about the optimizees: sizes, losses and gradients, batched copies, private gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.config import ConfigError
from common.data import ImageSet, Splits
from common.runs import generator
from optimizer_amalgamation.models import MODULES, RECIPES, NASCell, ResNet, chain
from optimizer_amalgamation.networks import image_problem, network_problem
from optimizer_amalgamation.private import per_sample_gradients, private_gradients
from optimizer_amalgamation.problems import (
    Problem,
    batch_losses,
    curvature,
    gradients,
    quadratic,
    rastrigin,
    sample_losses,
    validation_losses,
)
from optimizer_amalgamation.tests.plain import REFERENCE, doubled, plain_loss, tiny


def splits(side: int, channels: int = 1, count: int = 20) -> Splits:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, side, side), generator=rng, dtype=torch.uint8)
    data = ImageSet(images, torch.arange(count) % 10, 10)
    return Splits(data, data.subset(torch.arange(0)), data.subset(torch.arange(7)))


@pytest.mark.parametrize(
    ("name", "side", "channels", "size"),
    [
        ("train", 28, 1, 18_122),
        ("train", 32, 3, 21_290),
        ("mlp", 28, 1, 15_910),
        ("wider", 28, 1, 61_834),
        ("wider", 32, 3, 68_170),
        ("deeper", 28, 1, 75_242),
        ("tiny14", 14, 1, 666),
        ("small14", 14, 1, 1_898),
        ("resnet", 32, 3, 370_506),
    ],
)
def test_networks_have_the_papers_sizes(name: str, side: int, channels: int, size: int) -> None:
    assert image_problem(name, splits(side, channels), 4).size == size


def test_the_train_network_is_the_released_one() -> None:
    with np.load(REFERENCE / "conv_train.npz") as archive:
        raw = {key: torch.from_numpy(archive[key]) for key in archive.files}
    tensors = {key.removeprefix("param_"): value for key, value in raw.items() if key.startswith("param")}
    grads = {key.removeprefix("grad_"): value for key, value in raw.items() if key.startswith("grad")}
    assert len(tensors) == len(grads) == 6

    def ours(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        flat = []
        for value in parts.values():
            if value.ndim == 4:  # HWIO
                value = value.permute(3, 2, 0, 1)
            elif value.ndim == 2:  # rows H, W, C
                value = value.view(4, 4, 32, 10).permute(3, 2, 0, 1)
            flat.append(value.flatten())
        return torch.cat(flat)[None]

    x, y = raw["x"].permute(0, 3, 1, 2), raw["y"].long()
    problem = network_problem("train", chain(RECIPES["train"], 1, 28, 10), x, y, batch_size=len(x))
    losses, found = gradients(problem, ours(tensors), problem.batch(torch.arange(len(x))[None]))
    assert float(losses) == pytest.approx(float(raw["loss"]), rel=1e-5)
    wanted = ours(grads)
    assert float((found - wanted).norm()) < 1e-5 * float(wanted.norm())


@pytest.mark.parametrize("name", [*RECIPES, *MODULES])
def test_copies_at_once_are_the_module_alone(name: str) -> None:
    side = 14 if name.endswith("14") else 32 if name == "resnet" else 28
    channels = 3 if name == "resnet" else 1
    problem = image_problem(name, splits(side, channels), 4)
    copies = 1 if name == "resnet" else 2
    params = torch.stack([problem.init(generator(number)) for number in range(copies)])
    rows = torch.stack([problem.draw(1, generator(9, number))[0] for number in range(copies)])
    losses, grads = gradients(problem, params, problem.batch(rows))
    module = (MODULES[name](channels, 10) if name in MODULES else chain(RECIPES[name], channels, side, 10)).train()
    for number in range(copies):
        nn.utils.vector_to_parameters(params[number].clone(), module.parameters())
        module.zero_grad()
        loss = F.cross_entropy(module(problem.inputs[rows[number]]), problem.labels[rows[number]])
        loss.backward()
        wanted = nn.utils.parameters_to_vector([p.grad for p in module.parameters()])
        assert float(losses[number]) == pytest.approx(loss.item(), rel=1e-5)
        assert float((grads[number] - wanted).norm()) < 1e-4 * float(wanted.norm()) + 1e-7


def test_curvature_is_the_hessian() -> None:
    problem = doubled(tiny())
    params = torch.stack([problem.init(generator(number)) for number in range(2)]).double()
    rows = torch.stack([problem.draw(1, generator(number))[0] for number in range(2)])
    vectors = torch.randn(2, problem.size, dtype=torch.float64, generator=generator(5))
    found = curvature(problem, params, problem.batch(rows), vectors)
    for number in range(2):
        batch = rows[number]
        hessian = torch.autograd.functional.hessian(
            lambda p, batch=batch: plain_loss(problem, p, batch), params[number]
        )
        assert float((found[number] - hessian @ vectors[number]).norm()) < 1e-12 * float(hessian.norm()) * 10


def test_fresh_parameters_are_glorots() -> None:
    problem = image_problem("train", splits(28), 4)
    parts = problem.init(generator(0)).split(problem.sizes)
    for shape, part in zip(problem.shapes, parts, strict=True):
        if len(shape) == 1:
            assert not part.any()
        else:
            bound = (6 / ((shape[0] + shape[1]) * math.prod(shape[2:]))) ** 0.5
            assert 0.9 * bound < float(part.abs().max()) <= bound
            assert float(part.std()) == pytest.approx(bound / 3**0.5, rel=0.15)
    assert not torch.equal(problem.init(generator(0)), problem.init(generator(1)))


def test_minibatches_are_drawn_without_repetition_then_from_fresh_permutations() -> None:
    problem = tiny(batch_size=8, samples=40)
    rows = problem.draw(5, generator(0))
    assert rows.shape == (5, 8) and rows.flatten().sort().values.tolist() == list(range(40))
    longer = problem.draw(12, generator(0)).flatten()
    assert longer[:40].sort().values.tolist() == longer[40:80].sort().values.tolist() == list(range(40))
    assert longer[:40].tolist() != longer[40:80].tolist()


def test_losses_of_many_minibatches_are_those_one_by_one() -> None:
    problem = doubled(tiny())
    params = torch.stack([problem.init(generator(number)) for number in range(3)]).double()
    rows = torch.stack([problem.draw(7, generator(number)) for number in range(3)], 1)
    wanted = torch.stack([problem.losses(params, problem.batch(some)) for some in rows])
    assert (batch_losses(problem, params, rows) - wanted).abs().max() < 1e-14


def test_the_validation_loss_is_over_all_held_out_samples() -> None:
    problem = doubled(tiny())
    params = torch.stack([problem.init(generator(number)) for number in range(2)]).double()
    every = torch.arange(len(problem.inputs))
    wanted = [float(plain_loss(problem, one, every)) for one in params]
    assert validation_losses(problem, params).tolist() == pytest.approx(wanted, rel=1e-6)


def test_batch_norm_validates_with_running_statistics_and_runs_one_copy() -> None:
    problem = image_problem("resnet", splits(8, 3), 4)
    params = problem.init(generator(0))[None]
    before = validation_losses(problem, params)
    gradients(problem, params, problem.batch(torch.arange(4)[None]))
    assert float(validation_losses(problem, params)) != float(before)
    problem.init(generator(0))
    assert torch.equal(validation_losses(problem, params), before)
    with pytest.raises(ValueError, match="one copy at a time, got 2"):
        problem.losses(params.repeat(2, 1), problem.batch(torch.arange(8).view(2, 4)))


def test_private_gradients_without_clipping_and_noise_are_the_gradients() -> None:
    problem = doubled(tiny())
    params = torch.stack([problem.init(generator(number)) for number in range(2)]).double()
    batch = problem.batch(torch.stack([problem.draw(1, generator(number))[0] for number in range(2)]))
    losses, wanted = gradients(problem, params, batch)
    found = private_gradients(problem, params, batch, generator(0), clip=1e9, noise=0.0)
    assert (found[0] - losses).abs().max() < 1e-12 and (found[1] - wanted).abs().max() < 1e-12


def test_private_gradients_are_clipped_by_sample_and_noisy() -> None:
    problem = tiny()
    params = 5 * problem.init(generator(0))[None]
    batch = problem.batch(problem.draw(1, generator(0)))
    norms = per_sample_gradients(problem, params, batch)[0].norm(dim=2)
    clipped = per_sample_gradients(problem, params, batch, 1.0)[0].norm(dim=2)
    assert float(norms.max()) > 1 and float(clipped.max()) <= 1 + 1e-5
    assert torch.allclose(clipped, norms.clamp(max=1), rtol=1e-4)
    plain = private_gradients(problem, params, batch, generator(1), noise=0.0)[1]
    noisy = torch.stack([private_gradients(problem, params, batch, generator(2, i))[1] - plain for i in range(200)])
    assert float(noisy.std()) == pytest.approx(1.1 / problem.batch_size, rel=0.05)


def test_functions_without_data_are_what_they_say() -> None:
    for make in (quadratic, rastrigin):
        problem = make(3, generator(4))
        assert not problem.init(generator(0)).any() and problem.size == 3
        nothing = problem.batch(torch.zeros(1, 1, dtype=torch.int64))
        rng = generator(4)
        a, b = torch.randn(3, 3, generator=rng), torch.randn(3, generator=rng)
        x = torch.tensor([[0.1, -0.2, 0.3]])
        squares = (a @ x[0] - b).square().sum()
        if make is quadratic:
            wanted = 0.5 * squares
        else:
            c = torch.randn(3, generator=rng)
            wanted = squares - 10 * (c * torch.cos(2 * math.pi * x[0])).sum() + 30
        assert float(problem.losses(x, nothing)) == pytest.approx(float(wanted), rel=1e-6)


def test_a_mean_at_the_border_is_over_the_pixels_that_are_there() -> None:
    cell, images = NASCell(filters=1), torch.zeros(1, 1, 4, 4)
    for p in cell.parameters():
        nn.init.zeros_(p)
    nn.init.ones_(cell.convs[1].bias)  # type: ignore[arg-type]  # b is 1 everywhere, all else of d but its mean 0
    nn.init.ones_(cell.head.weight)
    assert cell(images).tolist() == [[1.0] * 10]
    nn.init.zeros_(cell.convs[1].bias)  # type: ignore[arg-type]
    with torch.no_grad():
        cell.convs[0].weight[0, 0, 1, 1] = cell.convs[1].weight[0, 0, 1, 1] = 1.0  # type: ignore[index]
    images[0, 0, 3] = 1.0
    images[0, 0, 0, 3] = 1.0
    means = 0.25 + 0.5 + 4 * 0.5 + 4 * 1.0  # of the corner: beside it and itself; the last row but one; the last
    assert cell(images)[0, 0].item() == pytest.approx((5 + means) / 16)


def test_other_networks_have_the_papers_form() -> None:
    assert sum(isinstance(layer, nn.Conv2d) for layer in ResNet().modules()) == 1 + 24 + 2
    assert NASCell()(torch.rand(2, 1, 14, 14)).shape == (2, 10)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(36), nn.Linear(36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(x.flatten(1)))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (
            nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(72, 3)),
            (1, 6, 6),
        ),
        (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,)),
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)), (1, 6, 6)),
        (nn.Sequential(nn.Flatten(2), nn.Linear(36, 3), nn.Flatten()), (1, 6, 6)),
        (Doubled(), (1, 6, 6)),
    ],
)
def test_any_module_is_an_optimizee(module: nn.Module, shape: tuple[int, ...]) -> None:
    inputs, labels = torch.randn(4, *shape, generator=generator(0)), torch.tensor([0, 1, 2, 0])
    problem = network_problem("own", module, inputs, labels, batch_size=4)
    params = torch.stack([problem.init(generator(1, copy)) for copy in range(2)])
    losses, grads = gradients(problem, params, problem.batch(torch.arange(4).repeat(2, 1)))
    for row, loss, grad in zip(params, losses, grads, strict=True):
        nn.utils.vector_to_parameters(row, module.parameters())
        wanted = F.cross_entropy(module(inputs), labels)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        own = torch.autograd.grad(wanted, list(module.parameters()))
        assert torch.allclose(grad, nn.utils.parameters_to_vector(own), atol=1e-6) and bool(own[0].any())


def test_problems_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"problem.name must be one of train, .*got 'lenet'"):
        image_problem("lenet", splits(28))
    with pytest.raises(ConfigError, match=r"problem.name must be a network for images of side 14"):
        image_problem("deeper", splits(14), 4)
    with pytest.raises(ConfigError, match=r"problem.batch_size must be in \[1, 20\], the images, got 21"):
        image_problem("train", splits(28), 21)


def chain_case(
    layers: list[nn.Module], side: int = 9
) -> tuple[Problem, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """A problem in double precision, two copies' parameters, saturated and not, and minibatches with equal pixels."""
    rng = generator(1)
    images = torch.rand(12, 2, side, side, generator=rng, dtype=torch.float64)
    images[:, :, :4] = 0  # equal patches: the pool's window then has several largest
    problem = network_problem("chain", nn.Sequential(*layers), images, torch.arange(12) % 4, batch_size=5)
    params = torch.stack([scale * problem.init(generator(number)) for number, scale in ((0, 1.0), (1, 4.0))]).double()
    params += 0.1 * torch.rand(params.shape, generator=rng, dtype=torch.float64)
    return problem, params, problem.batch(torch.stack([problem.draw(1, generator(9, n))[0] for n in range(2)]))


CHAINS: dict[str, Callable[[], list[nn.Module]]] = {
    "relu before the pool, odd side": lambda: [
        nn.Conv2d(2, 3, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(27, 4),
    ],
    "pool alone, then strides": lambda: [
        *(nn.Conv2d(2, 3, 2), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(16, 4))
    ],
    "mean over positions": lambda: [
        *(nn.Conv2d(2, 3, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5), nn.ReLU()),
        nn.Linear(5, 4),
    ],
    "sigmoid units": lambda: [
        nn.Flatten(),
        nn.Linear(162, 5),
        nn.Sigmoid(),
        nn.Linear(5, 3),
        nn.Sigmoid(),
        nn.Linear(3, 4),
    ],
    "linear layers": lambda: [nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3, 2), nn.Flatten(), nn.Linear(18, 4)],
}


@pytest.mark.parametrize("name", CHAINS)
def test_derivatives_of_a_chain_are_those_of_autograd(name: str) -> None:
    problem, params, batch = chain_case(CHAINS[name]())
    plain = replace(problem, chain=None)
    vectors = torch.randn(params.shape, generator=generator(5), dtype=torch.float64)
    assert problem.chain is not None
    for found, wanted in zip(gradients(problem, params, batch), gradients(plain, params, batch), strict=True):
        assert float((found - wanted).norm()) < 1e-12 * float(wanted.norm())
    found, wanted = (curvature(one, params, batch, vectors) for one in (problem, plain))
    assert float((found - wanted).norm()) < 1e-12 * float(wanted.norm())
    losses = sample_losses(problem, params, batch)
    assert (losses - problem.sample_losses(params, batch)).abs().max() < 1e-13


def test_a_saturated_sigmoid_has_a_curvature() -> None:
    problem, params, batch = chain_case(CHAINS["sigmoid units"]())
    found = curvature(problem, 1e4 * params, batch, torch.ones_like(params))
    assert bool(found.isfinite().all())


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(243, 4)],
        [nn.Conv2d(2, 3, 3, dilation=2), nn.Flatten(), nn.Linear(75, 4)],
        [nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(196, 4)],
        [nn.Conv2d(2, 3, 3, bias=False), nn.Flatten(), nn.Linear(147, 4)],
        [nn.Conv2d(2, 3, 3), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(27, 4)],
        [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Sigmoid(), nn.Flatten(), nn.Linear(147, 4)],
        [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(147, 4)],
        [nn.Conv2d(2, 60, 3), nn.Conv2d(60, 2, 3), nn.Flatten(), nn.Linear(50, 4)],
    ],
)
def test_other_modules_are_left_to_autograd_and_right(layers: list[nn.Module]) -> None:
    problem, params, batch = chain_case(layers)
    assert problem.chain is None
    for number in range(2):
        module = nn.Sequential(*layers).double()
        nn.utils.vector_to_parameters(params[number], module.parameters())
        wanted = F.cross_entropy(module(batch[0][number]), batch[1][number])
        assert float(problem.losses(params, batch)[number]) == pytest.approx(wanted.item(), rel=1e-12)
