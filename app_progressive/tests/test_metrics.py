"""Facts about metrics, costs and warm starts (acceptance checks 13, 14, 15)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from app_progressive import AnytimeMetrics, generalization_gap
from app_progressive.cost import forward_macs, layer_macs
from app_progressive.metrics import first_best
from app_progressive.models import build_model
from app_progressive.tests.nets import arrays, facts, small_net
from app_progressive.warmstart import shrink_and_perturb_
from common.data import ImageSet
from common.experiment import accuracy


def test_cumulative_and_relative_errors_are_the_authors() -> None:  # 14
    known = facts("metrics")
    metrics = AnytimeMetrics(known["n_test"])
    for errors in known["errors_per_state"]:
        metrics.update(errors)
    assert metrics.cer == known["CER"] == 33_551
    assert metrics.are == pytest.approx(known["ARE"], rel=1e-12) and metrics.are[0] == pytest.approx(-0.14)
    assert metrics.mean_acc == pytest.approx(100 - 33_551 / 800)


def test_changes_are_divided_by_the_true_number_of_test_examples() -> None:  # 14
    metrics = AnytimeMetrics(3450)
    metrics.update(345)
    metrics.update(0)
    assert metrics.are == [pytest.approx(-0.1)] and metrics.accuracies == [pytest.approx(90), 100]


def test_accuracy_counts_examples_and_not_batches() -> None:  # 14
    values, known = arrays("metrics"), facts("metrics")

    class Replay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits, self.place = nn.Parameter(values["logits"]), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.place += len(x)
            return self.logits[self.place - len(x) : self.place]

    data = ImageSet(torch.zeros(203, 1, 1, 1, dtype=torch.uint8), values["labels"], 10)
    found = accuracy(Replay(), data, batch_size=known["batch"])
    assert found == pytest.approx(known["top1_avg"], rel=1e-12)
    assert round(203 * (1 - found / 100)) == known["misclassified"]


def test_the_gap_is_training_minus_validation() -> None:  # 15
    assert generalization_gap(90, 70) == 20


def test_the_first_of_the_best_epochs_is_kept() -> None:  # 13
    assert first_best([50, 60, 60, 55]) == 1 and first_best([0, 0]) == 0


def test_impossible_errors_are_refused() -> None:  # 19
    with pytest.raises(ValueError, match="n_test must be at least 1, got 0"):
        AnytimeMetrics(0)
    metrics = AnytimeMetrics(10)
    for errors in (-1, 11):
        with pytest.raises(ValueError, match=rf"errors must be in \[0, 10\], got {errors}"):
            metrics.update(errors)
    with pytest.raises(ValueError, match="errors must hold at least one state"):
        _ = metrics.mean_acc


def test_multiply_adds_of_the_networks_dense_and_masked() -> None:
    macs = layer_macs(build_model("resnet20s", 3, 10), torch.zeros(1, 3, 32, 32))
    assert forward_macs(macs) == 40_551_040 and len(macs) == 20
    tiny = layer_macs(small_net(), torch.zeros(1, 3, 8, 8))
    assert tiny == {"conv1.weight": 64 * 162, "conv2.weight": 16 * 432, "fc.weight": 80}
    assert forward_macs(tiny, {"conv1.weight": 0.5}) == 32 * 162 + 16 * 432 + 80


def test_counting_leaves_the_network_as_it_was() -> None:
    net = small_net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    layer_macs(net, torch.ones(1, 3, 8, 8))
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net.conv1._forward_hooks


def test_shrinking_and_perturbing_mixes_all_parameters_and_no_buffers() -> None:
    net, fresh = small_net(0), small_net(1)
    net.bn1.running_mean.fill_(3)
    old = {name: value.detach().clone() for name, value in net.named_parameters()}
    shrink_and_perturb_(net, fresh)
    for name, value in net.named_parameters():
        assert torch.allclose(value, 0.6 * old[name] + 0.1 * fresh.get_parameter(name), atol=1e-7)
    assert (net.bn1.running_mean == 3).all()
