"""Facts about the barrier and the Trojan score (acceptance checks 1, 6, 7, 18)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from backdoor_lth.barrier import error_barrier, fine_tuned, interpolated, rise, trojan_score
from backdoor_lth.pruning import global_magnitude, masked
from backdoor_lth.tests.nets import TinyNet, reference, state_of
from common.masks import Masks
from common.runs import NonFiniteError

ARRAYS = reference("lmc")
PRUNED, TUNED = state_of(ARRAYS, "pruned__"), state_of(ARRAYS, "tuned__")
BATCHES = list(zip(ARRAYS["X"].split(16), ARRAYS["Y"].split(16), strict=True))


HUGE = {name: torch.full_like(PRUNED[name], 1e200) for name in ("bn2.weight", "fc.weight")}


def tiny() -> nn.Module:
    return TinyNet().double()


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("aliased", [False, True])
def test_the_barrier_is_the_authors(aliased: bool, compacted: bool) -> None:
    found = error_barrier(tiny(), PRUNED, TUNED, BATCHES, aliased=aliased, compacted=compacted)
    prefix = "aliased_" if aliased else ""
    alphas, accuracy, loss = ARRAYS[f"{prefix}alpha_acc_loss"].T
    torch.testing.assert_close(torch.tensor(found.alphas).double(), alphas, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found.loss).double(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(1 - torch.tensor(found.error).double(), accuracy, rtol=0, atol=1e-6)
    assert found.score_error == pytest.approx(float(ARRAYS[f"{prefix}S_acc"]), abs=1e-9)
    assert found.score_loss == pytest.approx(float(ARRAYS[f"{prefix}S_loss"]), rel=1e-9)


@pytest.mark.parametrize("compacted", [False, True])
def test_one_module_under_two_names_is_measured_like_any_other(compacted: bool) -> None:
    class Tied(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.also = self.fc

    states = [{**state, **{f"also.{n}": state[f"fc.{n}"] for n in ("weight", "bias")}} for state in (PRUNED, TUNED)]
    found = error_barrier(Tied().double(), *states, BATCHES, compacted=compacted)
    plain = error_barrier(tiny(), PRUNED, TUNED, BATCHES)
    assert found.error == plain.error and found.loss == pytest.approx(plain.loss)


def test_the_score_of_a_state_with_itself_is_exactly_zero() -> None:
    found = error_barrier(tiny(), TUNED, TUNED, BATCHES)
    assert found.score_error == 0 and len(set(found.error)) == 1 and len(set(found.loss)) == 1


def test_the_score_does_not_depend_on_the_order_of_its_ends_and_lies_in_0_to_1() -> None:
    one, other = (error_barrier(tiny(), *ends, BATCHES) for ends in ((PRUNED, TUNED), (TUNED, PRUNED)))
    assert one.error == other.error[::-1] and one.score_error == other.score_error and 0 <= one.score_error <= 1
    assert rise([0.2, 0.3, 0.5, 0.3, 0.4]) == pytest.approx(0.2)  # .5 - .3


def test_the_ends_are_the_states_themselves_and_the_model_is_left_alone() -> None:
    net = tiny().train()
    before = copy.deepcopy(net.state_dict())
    found = error_barrier(net, PRUNED, TUNED, BATCHES, points=5)
    assert found.alphas == [0, 0.25, 0.5, 0.75, 1] and net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for state, index in ((TUNED, 0), (PRUNED, -1)):
        net.load_state_dict(state)
        wrong = (net.eval()(ARRAYS["X"]).argmax(1) != ARRAYS["Y"]).double().mean().item()
        assert found.error[index] == wrong


def test_every_modules_mode_comes_back_after_an_error_too() -> None:
    net = tiny().train()
    net.bn1.eval()  # type: ignore[operator, union-attr]
    error_barrier(net, PRUNED, TUNED, BATCHES, points=2)
    with pytest.raises(RuntimeError):
        error_barrier(net, PRUNED, TUNED, [(torch.zeros(2, 4, 8, 8).double(), torch.zeros(2).long())])
    assert [name for name, module in net.named_modules() if not module.training] == ["bn1"]


def test_statistics_are_interpolated_and_counters_are_not() -> None:
    there = interpolated(PRUNED, {**TUNED, "bn1.num_batches_tracked": torch.tensor(9)}, 0.3)
    for name in ("bn1.running_mean", "bn2.running_var", "bn1.weight", "fc.bias"):
        torch.testing.assert_close(there[name], 0.3 * PRUNED[name] + 0.7 * TUNED[name])
    assert there["bn1.num_batches_tracked"].dtype == torch.int64 and there["bn1.num_batches_tracked"] == 0


def training(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(ARRAYS["X"][index : index + 16], ARRAYS["Y"][index : index + 16]) for index in range(count)]


def test_fine_tuning_is_momentum_sgd_in_train_mode_under_the_mask() -> None:
    net = tiny()
    net.load_state_dict(PRUNED)
    masks = global_magnitude(net, None, 0.5)
    ticket = masked(net.state_dict(), masks)
    tuned = fine_tuned(net, ticket, masks, training(3), lr=0.01)
    plain = copy.deepcopy(net)
    plain.load_state_dict(ticket)
    optimizer = torch.optim.SGD(plain.train().parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for x, y in training(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        for name, mask in masks.items():
            plain.get_parameter(name).grad *= mask
        optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(tuned[name], value, rtol=1e-12, atol=0)
    assert tuned["bn1.num_batches_tracked"] == 3


def test_a_score_may_be_asked_for_where_gradients_are_off() -> None:
    model = tiny()
    model.load_state_dict(PRUNED)
    masks = Masks({name: value != 0 for name, value in PRUNED.items() if value.dim() == 4})
    with torch.no_grad():
        found = trojan_score(model, masks, BATCHES, BATCHES)
    assert found == trojan_score(model, masks, BATCHES, BATCHES)


def test_no_fine_tuning_scores_zero() -> None:
    net = tiny()
    net.load_state_dict(PRUNED)
    masks = global_magnitude(net, None, 0.5)
    assert trojan_score(net, masks, [], BATCHES).score_error == 0
    found = trojan_score(net, masks, training(10), BATCHES, lr=0.05)
    ticket = masked(net.state_dict(), masks)
    assert found == error_barrier(net, ticket, fine_tuned(net, ticket, masks, training(10), lr=0.05), BATCHES)
    assert len(set(found.loss)) == 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": 1}, "points must be at least 2, got 1"),
        ({"batches": []}, "batches must hold images, got none or an empty one"),
        ({"batches": [(torch.zeros(0, 3, 8, 8), torch.zeros(0))]}, "batches must hold images, got none or an empty"),
        ({"state_b": {}}, "state_b must have exactly the model's entries, got or lacks bn1.bias"),
        ({"state_a": {**PRUNED, "fc.bias": torch.ones(2)}}, r"state_a fc.bias must be \(5,\), got \(2,\)"),
    ],
)
def test_barriers_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {"model": tiny(), "state_a": PRUNED, "state_b": TUNED, "batches": BATCHES, **change}
    with pytest.raises(ValueError, match=message):
        error_barrier(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.bias": torch.full((5,), torch.nan).double()}, "weights at alpha 0 must be finite, got NaN or Inf"),
        (HUGE, "logits at alpha 0 must be finite, got NaN or Inf"),
    ],
)
def test_a_barrier_of_what_is_not_finite_is_refused(
    change: dict[str, Tensor], message: str, compacted: bool, recwarn: pytest.WarningsRecorder
) -> None:
    with pytest.raises(NonFiniteError, match=message):
        error_barrier(tiny(), PRUNED, {**TUNED, **change}, BATCHES, compacted=compacted)
    if change is HUGE:
        with pytest.raises(NonFiniteError, match=r"logits at alpha 0\.5 must be finite"):
            error_barrier(tiny(), {**PRUNED, **change}, TUNED, BATCHES, points=3, compacted=compacted)
    assert not recwarn.list


def test_a_pruned_models_state_without_its_masks_is_refused() -> None:
    net = tiny()
    masks = Masks({"conv9.weight": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"mask conv9.weight must name a parameter"):
        fine_tuned(net, net.state_dict(), masks, training(1))
    l1_unstructured(net.conv1, "weight", 0.5)  # type: ignore[arg-type]
    whole = net.state_dict()
    bare = {name: value for name, value in whole.items() if not name.endswith("_mask")}
    with pytest.raises(
        ValueError, match=r"state_b must have exactly the model's entries, got or lacks conv1.weight_mask"
    ):
        error_barrier(net, whole, bare, BATCHES)
