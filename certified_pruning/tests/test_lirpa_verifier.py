"""Incomplete verification of any graph: never wrong, on a chain never against the complete verifier."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from certified_pruning.attack import pgd_attack
from certified_pruning.ibp import input_box
from certified_pruning.lirpa_verifier import LirpaVerifier
from certified_pruning.tests.nets import images, odd_net, small_conv, small_resnet
from certified_pruning.verdicts import VerifyConfig, VerifyReport
from certified_pruning.verifier import CompleteVerifier

torch.set_num_threads(1)
NORM = ((0.45,), (0.8,))
SHAPE = (1, 8, 8)


def statuses(report: VerifyReport) -> list[str]:
    return [verdict.status for verdict in report.images]


def labelled(model: nn.Module, shape: tuple[int, ...], n: int) -> tuple[Tensor, Tensor]:
    """Images and their classes under NORM, but for a wrong label of the first."""
    x = images(shape, n, seed=3)
    with torch.no_grad():
        y = model((x - NORM[0][0]) / NORM[1][0]).argmax(1)
    y[0] = (y[0] + 1) % 4
    return x, y


def test_verdicts_on_a_residual_net_are_of_every_kind_and_none_is_wrong() -> None:
    eps, model = 0.1, small_resnet()
    x, y = labelled(model, SHAPE, 30)
    config = VerifyConfig(pgd_restarts=1, pgd_steps=5, root_steps=10, max_images=13)
    told: list[float] = []
    report = LirpaVerifier(model, SHAPE, eps, 5, config, normalize=NORM).verify(x, y, told.append)
    found = statuses(report)
    assert {"verified", "falsified", "unknown", "misclassified"} == set(found) and found.count("misclassified") == 1
    assert {v.stage for v in report.images} == {"alpha", "pgd", "clean"}
    assert told == sorted(told) and told[-1] == 1 and len(told) == 3
    exact = small_resnet().double()
    for verdict, image, label in zip(report.images, x.double(), y, strict=True):
        assert (verdict.witness is not None) == (verdict.status == "falsified")
        assert (verdict.lb > 0) == (verdict.status == "verified")
        if verdict.witness is not None:
            lb, ub = input_box(image[None], eps)
            assert bool((verdict.witness >= lb[0]).all()) and bool((verdict.witness <= ub[0]).all())
            assert exact((verdict.witness[None] - NORM[0][0]) / NORM[1][0]).argmax() != label
    keep = torch.tensor([status == "verified" for status in found])
    box = input_box(x[keep], eps, *NORM)
    attack = pgd_attack(model, (x[keep] - NORM[0][0]) / NORM[1][0], y[keep], *box, eps / 3, steps=100, restarts=5)
    assert bool((attack.margin > 0).all())


@pytest.mark.parametrize("seed", [2, 4])
def test_on_a_chain_it_never_contradicts_the_complete_verifier(seed: int) -> None:
    model, shape = small_conv(seed), (1, 6, 5)
    x, y = labelled(model, shape, 20)
    options = {"pgd_steps": 5, "pgd_restarts": 1, "root_steps": 10}
    verifiers = (
        LirpaVerifier(model, shape, 0.05, 4, VerifyConfig(**options), normalize=NORM),
        CompleteVerifier(model, shape, 0.05, 4, VerifyConfig(max_nodes=None, **options), normalize=NORM),
    )
    theirs, ours = (statuses(verifier.verify(x, y)) for verifier in verifiers)
    assert all(a in (b, "unknown") for a, b in zip(theirs, ours, strict=True))
    assert theirs.count("verified") >= 3 and "unknown" not in ours


def test_without_steps_crown_decides_and_at_eps_zero_intervals_do() -> None:
    model = small_resnet()
    x, y = labelled(model, SHAPE, 12)
    crown = LirpaVerifier(model, SHAPE, 0.05, 5, VerifyConfig(root_steps=0), normalize=NORM).verify(x, y)
    assert "crown" in {v.stage for v in crown.images} and "alpha" not in {v.stage for v in crown.images}
    point = LirpaVerifier(model, SHAPE, 0.0, 5, normalize=NORM).verify(x, y)
    assert [v.stage for v in point.images] == ["clean"] + 11 * ["ibp"]


def test_a_layer_that_the_library_parses_and_cannot_bound_is_one_line() -> None:
    """Its patches of a convolution know no batch norm right on the input."""
    verifier = LirpaVerifier(odd_net(), (2, 9, 7), 0.1, 4, VerifyConfig(pgd_restarts=0))
    with pytest.raises(ValueError, match=r"^model must have layers that auto_LiRPA 0\.3 bounds by CROWN, got [^\n]+$"):
        verifier.verify(images((2, 9, 7), 4), torch.arange(4))


def test_the_users_model_is_left_as_it_was_and_no_images_give_an_empty_report() -> None:
    model = small_resnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    verifier = LirpaVerifier(model, SHAPE, 0.05, 5)
    verifier.verify(images(SHAPE, 2), torch.tensor([0, 1]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert verifier.verify(torch.zeros(0, *SHAPE), torch.zeros(0).long()).images == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"eps": -0.1}, "eps must be finite and >= 0, got -0.1"),
        ({"n_classes": 4}, "n_classes must be the 5 outputs of the model, got 4"),
        ({"model": small_resnet().train()}, "model must be in eval mode"),
    ],
)
def test_bad_construction_is_refused(change: dict, text: str) -> None:
    arguments = {"model": small_resnet(), "input_shape": SHAPE, "eps": 0.1, "n_classes": 5} | change
    with pytest.raises(ValueError, match=text):
        LirpaVerifier(**arguments)


def test_bad_images_and_labels_are_refused() -> None:
    verifier, good = LirpaVerifier(small_resnet(), SHAPE, 0.1, 5), torch.zeros(2, *SHAPE)
    for x, y, text in (
        (good[..., 1:], torch.zeros(2).long(), r"x must be a batch of \(1, 8, 8\) with a label each"),
        (good, torch.zeros(3).long(), "with a label each"),
        (good + 200, torch.zeros(2).long(), r"raw must be in \[0, 1\]"),
        (good, torch.tensor([0, 5]), r"y must be in \[0, 5\)"),
    ):
        with pytest.raises(ValueError, match=text):
            verifier.verify(x, y)
