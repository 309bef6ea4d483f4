"""Facts about the sparse moving average: the authors' vectors, a case by hand, what a grown weight starts from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common.masks import Masks
from sparse_gan.sparse_ema import SparseEMA, masked_average, sparse_average

REFERENCE = np.load(Path(__file__).parent / "reference" / "reference.npz")
FORMS = {"sema": sparse_average, "masked_ema": masked_average}


@pytest.mark.parametrize("name", FORMS)
def test_one_step_is_the_authors(name: str) -> None:
    average, weight, mask = (torch.from_numpy(REFERENCE[f"{name}_{key}"]) for key in ("ema", "weight", "mask"))
    theirs = torch.from_numpy(REFERENCE[f"{name}_new_ema"])
    assert torch.allclose(FORMS[name](average, weight, mask, 0.9), theirs, rtol=0, atol=1e-6)


def test_one_step_by_hand() -> None:
    average, weight, mask = torch.tensor([1.0, 0, 2]), torch.tensor([0.0, 3, 4]), torch.tensor([False, True, True])
    assert sparse_average(average, weight, mask, 0.9).tolist() == pytest.approx([0, 3, 2.2])
    assert masked_average(average, weight, mask, 0.9).tolist() == pytest.approx([0, 0.3, 2.2])


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))


def test_floats_are_averaged_and_the_batch_counter_is_copied() -> None:
    net = model()
    average = SparseEMA(net, Masks(), 0.75)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net(torch.randn(8, 2, 5, 5) + 3)
    with torch.no_grad():
        net[0].bias += 1
    average.update()
    for key, value in average.module.state_dict().items():
        if key == "1.num_batches_tracked":
            assert value == 1
        else:
            assert torch.allclose(value, 0.75 * before[key] + 0.25 * net.state_dict()[key])
    assert not torch.equal(before["1.running_mean"], average.module[1].running_mean)
    assert not average.module.training and not any(p.requires_grad for p in average.module.parameters())


def test_before_its_start_it_is_a_copy() -> None:
    net = model()
    average = SparseEMA(net, Masks(), 0.9, start=3)
    for step in range(1, 4):
        with torch.no_grad():
            net[0].weight += 1
        average.update()
        assert torch.equal(average.module[0].weight, net[0].weight) == (step < 3)


@pytest.mark.parametrize(("kind", "expected"), [("sparse", 5.0), ("masked", 0.5)])
def test_a_grown_weight_is_followed_from_its_first_value_only_by_the_sparse_form(kind: str, expected: float) -> None:
    net, masks = model(), Masks({"0.weight": torch.zeros(4, 2, 3, 3)})
    average = SparseEMA(net, masks, 0.9, kind=kind)  # type: ignore[arg-type]
    new = torch.zeros(4, 2, 3, 3, dtype=torch.bool)
    new[0, 0, 0, 0] = True
    masks["0.weight"] = new
    average.update()  # grown from zero
    assert average.module[0].weight[0, 0, 0, 0] == 0
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = 5
    average.update()
    assert average.module[0].weight[0, 0, 0, 0] == pytest.approx(expected)
    assert int((average.module[0].weight != 0).sum()) == 1


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        SparseEMA(model(), Masks(), 1.0)
    with pytest.raises(ValueError, match="start must be at least 0, got -1"):
        SparseEMA(model(), Masks(), 0.9, start=-1)
    with pytest.raises(ValueError, match="kind must be sparse or masked, got 'magic'"):
        SparseEMA(model(), Masks(), 0.9, kind="magic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask 0.weight must be \(4, 2, 3, 3\)"):
        SparseEMA(model(), Masks({"0.weight": torch.ones(3)}), 0.9)
