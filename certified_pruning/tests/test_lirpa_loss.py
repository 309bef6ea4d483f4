"""Training on auto_LiRPA's bounds: on a chain it is our own CROWN-IBP without loss fusion; elsewhere it is refused."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from certified_pruning import auto_lirpa, objective
from certified_pruning.auto_lirpa import bounded
from certified_pruning.certified_loss import crown_ibp_loss
from certified_pruning.ibp import input_box
from certified_pruning.lirpa_loss import lirpa_crown_ibp_loss
from certified_pruning.nrs import nrs_from_bounds
from certified_pruning.optional import MissingPackageError
from certified_pruning.tests.nets import images, mlp, small_conv, small_resnet
from certified_pruning.tests.test_regimes import ADAM, STEPS, config, quiet, tickets
from certified_pruning.train import train
from common.config import ConfigError
from common.tests.paper_checks import losses

torch.set_num_threads(1)
UNFUSED = ["--train.regime", "crown_ibp", "--train.loss_fusion", "false", *ADAM]
LIRPA = [*UNFUSED, "--train.bounds", "auto_lirpa"]


@pytest.mark.parametrize("eps_frac", [1e-30, 0.3, 1.0])
@pytest.mark.parametrize("norms", [True, False])
def test_loss_gradients_statistics_and_relu_bounds_are_our_own_without_loss_fusion(
    eps_frac: float, norms: bool
) -> None:
    """With the stability term of imp+nrs where there are norms; on convolutions or on linear layers alone."""
    ours, shape = (small_conv(4), (1, 6, 5)) if norms else (mlp([6, 9, 7, 4]), (6,))
    theirs = copy.deepcopy(ours.train())
    x = images(shape, 6, seed=2)
    y, box = torch.tensor([0, 1, 2, 3, 0, 1]), input_box(x, 0.05)
    loss, logits, bounds = crown_ibp_loss(ours, *box, x, y, eps_frac, loss_fusion=False)
    other, other_logits, relus = lirpa_crown_ibp_loss(bounded(theirs, shape), *box, x, y, eps_frac)
    torch.testing.assert_close(other_logits, logits, atol=1e-5, rtol=1e-5)
    assert [relu.bn for relu in relus] == [relu.bn for relu in bounds.relus]
    for relu, own in zip(relus, bounds.relus, strict=True):
        torch.testing.assert_close((relu.lower, relu.upper), (own.lower, own.upper), atol=1e-4, rtol=1e-4)
        assert relu.gamma is None or (own.gamma is not None and torch.equal(relu.gamma, own.gamma))
    if norms:
        loss = loss + nrs_from_bounds(bounds.relus, reduction="channel")[0]
        other = other + nrs_from_bounds(relus, reduction="channel")[0]
    torch.testing.assert_close(other, loss, atol=1e-4, rtol=1e-4)
    loss.backward()
    other.backward()
    for mine, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(their.grad, mine.grad, atol=1e-3, rtol=1e-3)
        assert mine.grad is not None and bool(mine.grad.any())
    statistics = [name for name, _ in ours.named_buffers() if "running" in name]
    for name in statistics:
        torch.testing.assert_close(theirs.get_buffer(name), ours.get_buffer(name), atol=1e-6, rtol=1e-5)
    assert bool(statistics) == norms


def test_a_residual_net_trains_on_them() -> None:
    model, x, y = small_resnet().train(), images((1, 8, 8), 8), torch.arange(8) % 5
    graph, optimizer = bounded(model, (1, 8, 8)), torch.optim.Adam(model.parameters(), 0.01)
    found = []
    for _ in range(10):
        loss, _, _ = lirpa_crown_ibp_loss(graph, *input_box(x, 0.02), x, y, 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < found[0] - 0.5


def test_a_chain_of_rounds_trains_as_on_our_own_bounds_with_masks_and_stability(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eps ramps from 0, pruning is by magnitude of what the first round trained."""
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return lirpa_crown_ibp_loss(*arguments)

    monkeypatch.setattr(objective, "lirpa_crown_ibp_loss", counted)
    options = ["--prune.method", "imp+nrs", "--train.lr", 1e-4]
    train(config(*UNFUSED, *options), tmp_path / "native", quiet)
    assert not calls
    train(config(*LIRPA, *options), tmp_path / "lirpa", quiet)
    assert len(calls) == 2 * STEPS
    assert losses(tmp_path / "lirpa") == pytest.approx(losses(tmp_path / "native"), abs=2e-3)
    for ours, theirs in zip(tickets(tmp_path / "native"), tickets(tmp_path / "lirpa"), strict=True):
        assert theirs["density"] == ours["density"]
        for name, mask in theirs["masks"].items():
            assert torch.equal(theirs["model"][name] != 0, mask)
            assert (mask ^ ours["masks"][name]).sum() <= 2  # weights that tie but for rounding


@pytest.mark.parametrize("method", ["hydra", "snip"])
def test_pruners_that_need_a_loss_take_it_from_our_own_bounds(method: str, tmp_path: Path) -> None:
    train(config(*LIRPA, "--prune.method", method, "--train.epochs", 1), tmp_path / "run", quiet)
    assert [ticket["density"] for ticket in tickets(tmp_path / "run")] == [1, 0.5]


@pytest.mark.parametrize(
    "options",
    [
        [*LIRPA, "--train.loss_fusion", "true"],
        *([*LIRPA, "--train.regime", regime] for regime in ("standard", "fgsm", "fgsm_gradalign", "fast_ibp")),
    ],
)
def test_other_regimes_and_loss_fusion_are_refused(options: list) -> None:
    with pytest.raises(ConfigError) as refused:
        config(*options)
    message = "train.bounds must be native, or else with regime crown_ibp and loss_fusion false, got 'auto_lirpa'"
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_without_the_library_training_ends_in_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "auto_LiRPA"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)
    auto_lirpa.library.cache_clear()
    try:
        with pytest.raises(MissingPackageError, match=r"^auto_LiRPA is not installed.*--no-deps auto_LiRPA==0\.3"):
            train(config(*LIRPA), tmp_path / "run", quiet)
    finally:
        auto_lirpa.library.cache_clear()
    assert not (tmp_path / "run").exists()
