"""Facts about masks: exact counts, layer-wise densities, and training in which a masked weight never moves."""

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from common.masks import (
    ELEMENTWISE,
    Masks,
    erk_densities,
    keep_top,
    keep_top_per_layer,
    prunable_weights,
    random_scores,
    saliency_scores,
)
from common.runs import generator

Optimiser = Callable[[Iterator[nn.Parameter]], optim.Optimizer]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bit-for-bit comparisons need the same number of threads throughout."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_net(seed: int = 0) -> nn.Sequential:
    """Two weight matrices and no bias: what Muon takes too."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))


def conv_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3))


def striped(weight: Tensor) -> Tensor:
    """Prunes every third diagonal: no unit loses all inputs or outputs, so every kept weight has a gradient."""
    outputs, inputs = torch.arange(len(weight))[:, None], torch.arange(weight[0].numel())
    return ((outputs + inputs) % 3 != 0).view_as(weight)


def striped_masks(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> Masks:
    return Masks({name: striped(weight) for name, weight in prunable_weights(model, kinds).items()})


def train_small(
    model: nn.Module, optimizer: optim.Optimizer, steps: int, after: Callable[[], None] = lambda: None
) -> None:
    """`steps` steps of regression on random numbers; `after` is called after each."""
    draws = generator(2)
    for _ in range(steps):
        inputs, targets = torch.randn(16, 6, generator=draws), torch.randn(16, 3, generator=draws)

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        after()


def entries(model: nn.Module, optimizer: optim.Optimizer, parts: Masks) -> Iterator[Tensor]:
    """The part where `parts` is True of each weight, its gradient and its state, in this order."""
    for name, parameter in model.named_parameters():
        for tensor in (parameter, parameter.grad, *optimizer.state.get(parameter, {}).values()):
            if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                yield tensor.detach()[parts[name]]


def masked_entries(model: nn.Module, optimizer: optim.Optimizer, masks: Masks) -> Iterator[Tensor]:
    return entries(model, optimizer, Masks({name: ~mask for name, mask in masks.items()}))


# Which weights


def test_convolutions_are_prunable_by_parameter_name_in_module_order() -> None:
    model = conv_net()
    assert list(prunable_weights(model)) == ["0.weight", "3.weight"]
    assert prunable_weights(model)["3.weight"] is model[3].weight


def test_the_kinds_given_are_prunable_and_never_biases_or_norms() -> None:
    assert list(prunable_weights(conv_net(), (nn.Conv2d, nn.Linear))) == ["0.weight", "3.weight", "6.weight"]


def test_a_layer_on_its_own_has_its_weight() -> None:
    layer = nn.Conv2d(1, 1, 1)
    assert prunable_weights(layer) == {"weight": layer.weight}


def test_a_model_with_nothing_to_prune_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model must have a weight to prune in \['Conv2d'\], got none$"):
        prunable_weights(small_net())


# Masks as data


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64, torch.uint8])
def test_zeros_and_ones_of_any_type_are_taken_as_bool(dtype: torch.dtype) -> None:
    mask = Masks({"w": torch.tensor([1, 0, 1]).to(dtype)})["w"]
    assert mask.dtype == torch.bool
    assert mask.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([0, 2]), "mask w must hold only 0 and 1, got values in [0, 2]"),
        (torch.tensor([1.0, 0.5]), "mask w must hold only 0 and 1, got values in [0.5, 1.0]"),
        (torch.tensor([1, -1]), "mask w must hold only 0 and 1, got values in [-1, 1]"),
        (torch.tensor([math.nan, 1.0]), "mask w must hold only 0 and 1, got values in [nan, nan]"),
        ([0, 1], "mask w must be a tensor, got list"),
        (np.zeros(2), "mask w must be a tensor, got ndarray"),
        (None, "mask w must be a tensor, got NoneType"),
    ],
)
def test_a_value_that_is_no_mask_is_refused_however_it_is_set(value: Any, message: str) -> None:
    masks = Masks()

    def by_item() -> None:
        masks["w"] = value

    for way in (
        by_item,
        lambda: masks.update(w=value),
        lambda: masks.setdefault("w", value),
        lambda: Masks({"w": value}),
    ):
        with pytest.raises(ValueError) as error:
            way()
        assert str(error.value) == message
    assert "w" not in masks


def test_sparsity_counts_all_masks_together() -> None:
    masks = Masks({"a": torch.tensor([1, 0, 0, 0, 0, 0]), "b": torch.tensor([[0], [1]])})
    assert (masks.kept, masks.total, masks.density, masks.sparsity) == (2, 8, 0.25, 0.75)


def test_masks_of_ones_keep_everything() -> None:
    masks = Masks.ones_like({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    assert {name: (mask.shape, mask.dtype) for name, mask in masks.items()} == {
        "a": ((2, 3), torch.bool),
        "b": ((4,), torch.bool),
    }
    assert masks.kept == masks.total == 10


def test_masks_come_back_equal_from_a_checkpoint_of_plain_data(tmp_path: Path) -> None:
    masks = striped_masks(small_net())
    torch.save(masks.state_dict(), tmp_path / "masks.pt")
    loaded = Masks(torch.load(tmp_path / "masks.pt", weights_only=True))
    assert list(loaded) == list(masks)
    assert all(loaded[name].dtype == torch.bool and torch.equal(loaded[name], masks[name]) for name in masks)


def test_apply_zeroes_what_is_masked_and_nothing_else() -> None:
    model = nn.Linear(2, 2)
    model.load_state_dict({"weight": torch.tensor([[1.0, -2.0], [3.0, 4.0]]), "bias": torch.tensor([5.0, 6.0])})
    Masks({"weight": torch.tensor([[1, 0], [0, 1]])}).apply_(model)
    assert model.weight.tolist() == [[1, 0], [0, 4]]
    assert model.bias.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("3.weight", (3, 8), "mask 3.weight must name a parameter of the model, got none of that name"),
        ("2.weight", (8, 3), "mask 2.weight must be (3, 8), got (8, 3)"),
        ("2.weight", (1,), "mask 2.weight must be (3, 8), got (1,)"),
    ],
)
def test_masks_that_do_not_fit_the_model_are_refused_and_change_nothing(
    name: str, shape: tuple[int, ...], message: str
) -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    masks = Masks({"0.weight": torch.zeros(8, 6), name: torch.zeros(shape)})
    for use in (lambda: masks.apply_(model), lambda: masks.attach(model, optim.SGD(model.parameters()))):
        with pytest.raises(ValueError) as error:
            use()
        assert str(error.value) == message
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# Scores to masks


def plain_keep_top(scores: dict[str, Tensor], keep: int, within: dict[str, Tensor] | None) -> dict[str, list[bool]]:
    """Sort all candidates by (score, position) and keep the last `keep`."""
    entries = [(name, index) for name, score in scores.items() for index in range(score.numel())]
    if within is not None:
        entries = [(name, index) for name, index in entries if within[name].flatten()[index]]
    ranked = sorted(entries, key=lambda entry: float(scores[entry[0]].flatten()[entry[1]]))  # stable: ties by position
    kept = set(ranked[len(ranked) - keep :])
    return {name: [(name, index) in kept for index in range(score.numel())] for name, score in scores.items()}


@settings(max_examples=300, deadline=None)
@given(st.data(), st.lists(st.integers(1, 7), min_size=1, max_size=4), st.booleans())
def test_keep_top_equals_sorting(draw: st.DataObject, sizes: list[int], nested: bool) -> None:
    value = st.sampled_from([-math.inf, -1.0, 0.0, -0.0, 0.5, 1.0, math.inf])
    names = "dbca"
    scores = {
        n: torch.tensor(draw.draw(st.lists(value, min_size=s, max_size=s))) for n, s in zip(names, sizes, strict=False)
    }
    within = None
    if nested:
        bits = {n: draw.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))) for n, s in scores.items()}
        within = {name: torch.tensor(bit) for name, bit in bits.items()}
    candidates = sum(int(mask.sum()) for mask in within.values()) if within else sum(sizes)
    keep = draw.draw(st.integers(0, candidates))
    masks = keep_top(scores, keep, within)
    assert masks.kept == keep
    assert {name: mask.tolist() for name, mask in masks.items()} == plain_keep_top(scores, keep, within)


def test_among_equal_scores_the_earlier_tensor_and_then_the_lower_index_is_pruned_first() -> None:
    scores = {"b": torch.ones(2), "a": torch.ones(1, 2)}
    kept = [{name: mask.flatten().tolist() for name, mask in keep_top(scores, keep).items()} for keep in (3, 2, 1)]
    assert kept == [
        {"b": [False, True], "a": [True, True]},
        {"b": [False, False], "a": [True, True]},
        {"b": [False, False], "a": [False, True]},
    ]


def test_counts_are_exact_where_all_of_many_scores_are_equal() -> None:
    scores = {"a": torch.full((300, 100), 0.1), "b": torch.full((7,), 0.1)}
    assert [keep_top(scores, keep).kept for keep in (0, 1, 12_345, 30_006, 30_007)] == [0, 1, 12_345, 30_006, 30_007]


def test_one_threshold_holds_for_all_tensors() -> None:
    masks = keep_top({"a": torch.tensor([[0.1, 0.2], [0.3, 0.4]]), "b": torch.tensor([0.25, 0.35])}, 3)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [[False, False], [True, True]],
        "b": [False, True],
    }


def test_masks_within_masks_are_nested() -> None:
    scores = random_scores({"a": torch.zeros(20, 5), "b": torch.zeros(50)}, generator(0))
    wide = keep_top(scores, 60)
    narrow = keep_top({name: -score for name, score in scores.items()}, 30, within=wide)
    assert narrow.kept == 30
    assert not any((narrow[name] & ~wide[name]).any() for name in scores)


def test_nan_is_refused_by_the_name_of_its_tensor() -> None:
    scores = {"a": torch.zeros(2), "b": torch.tensor([math.nan, 1.0, math.nan])}
    with pytest.raises(ValueError, match=r"^score b must not hold NaN, got 2$"):
        keep_top(scores, 1)


@pytest.mark.parametrize("keep", [-1, 4])
def test_a_count_beyond_the_candidates_is_refused(keep: int) -> None:
    with pytest.raises(ValueError, match=rf"^keep must be in \[0, 3\], got {keep}$"):
        keep_top({"a": torch.zeros(4)}, keep, within={"a": torch.tensor([True, True, False, True])})


def test_every_layer_keeps_its_own_count() -> None:
    scores = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([9.0, 8.0, 8.0, 8.0])}
    masks = keep_top_per_layer(scores, {"a": 1, "b": 2})
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [False, False, True],
        "b": [True, False, False, True],
    }


def test_every_layer_keeps_its_count_within_masks() -> None:
    within = {"a": torch.tensor([True, True, False]), "b": torch.tensor([False, True])}
    masks = keep_top_per_layer({"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.ones(2)}, {"a": 1, "b": 1}, within)
    assert {name: mask.tolist() for name, mask in masks.items()} == {"a": [False, True, False], "b": [False, True]}


def test_a_score_that_carries_gradients_is_only_read() -> None:
    score = torch.tensor([1.0, 2.0], requires_grad=True)
    mask = keep_top({"a": score}, 1)["a"]
    assert mask.tolist() == [False, True]
    assert not mask.requires_grad


# Scores


def test_random_scores_are_the_generators_uniform_numbers_in_order() -> None:
    weights = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    found = random_scores(weights, generator(5))
    again = generator(5)
    assert torch.equal(found["a"], torch.rand(2, 3, generator=again))
    assert torch.equal(found["b"], torch.rand(4, generator=again))


def test_saliency_is_the_gradient_with_respect_to_the_mask() -> None:
    model = conv_net().double()
    inputs, targets = torch.randn(5, 1, 8, 8, dtype=torch.double), torch.tensor([0, 1, 2, 0, 1])
    weights = prunable_weights(model, (nn.Conv2d, nn.Linear))
    gradients = torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), list(weights.values()))
    masks = {name: torch.ones_like(weight, requires_grad=True) for name, weight in weights.items()}
    masked = {name: weights[name] * mask for name, mask in masks.items()}
    loss = nn.functional.cross_entropy(torch.func.functional_call(model, masked, inputs), targets)
    by_mask = torch.autograd.grad(loss, list(masks.values()))
    for score, gradient in zip(saliency_scores(weights, gradients).values(), by_mask, strict=True):
        torch.testing.assert_close(score, gradient.abs(), rtol=1e-12, atol=0)
        assert not score.requires_grad


def test_saliency_of_two_weights_by_hand() -> None:
    scores = saliency_scores({"w": torch.tensor([2.0, -3.0])}, [torch.tensor([-0.5, -1.0])])
    assert scores["w"].tolist() == [1.0, 3.0]


def test_saliency_needs_a_gradient_for_every_weight() -> None:
    with pytest.raises(ValueError):
        saliency_scores({"a": torch.ones(1), "b": torch.ones(1)}, [torch.ones(1)])


# ERK

ERK_CASES = json.loads((Path(__file__).parent / "reference" / "erk.json").read_text())["erk"]


@pytest.mark.parametrize("case", ERK_CASES)
def test_erk_densities_equal_the_reference_vectors(case: dict[str, Any]) -> None:
    shapes = {str(index): tuple(shape) for index, shape in enumerate(case["shapes"])}
    found = erk_densities(shapes, case["density"])
    np.testing.assert_allclose(list(found.values()), case["layer_densities"], rtol=0, atol=1e-6)


def test_erk_densities_of_three_layers_by_hand() -> None:
    # At 0.1 of 39,232 weights: the last layer (raw 76/640) would pass 1 and is dense; 3,283.2 weights are left over
    # raw * size = 73 + 134, so eps = 15.861, times 73/1728 and 134/36864.
    found = erk_densities({"a": (64, 3, 3, 3), "b": (64, 64, 3, 3), "c": (10, 64, 1, 1)}, 0.1)
    assert list(found) == ["a", "b", "c"]
    assert found["a"] == pytest.approx(0.1 * 39_232 * 73 / 207 / 1728 - 640 * 73 / 207 / 1728, rel=1e-12)
    assert found["a"] == pytest.approx(0.67003, abs=5e-5)
    assert found["b"] == pytest.approx(0.05765, abs=5e-5)
    assert found["c"] == 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 64), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6),
    st.floats(0.001, 1),
)
def test_erk_densities_are_in_range_and_average_to_the_density(shapes: list[tuple[int, ...]], density: float) -> None:
    named = {str(index): shape for index, shape in enumerate(shapes)}
    found = erk_densities(named, density)
    sizes = {name: math.prod(shape) for name, shape in named.items()}
    assert all(0 < value <= 1 for value in found.values())
    kept = sum(found[name] * size for name, size in sizes.items())
    assert kept == pytest.approx(density * sum(sizes.values()), rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 64), min_size=2, max_size=4).map(tuple), min_size=2, max_size=6),
    st.floats(0.001, 0.999),
)
def test_erk_densities_of_layers_below_1_are_proportional_to_sum_over_product(
    shapes: list[tuple[int, ...]], density: float
) -> None:
    named = {str(index): shape for index, shape in enumerate(shapes)}
    found = erk_densities(named, density)
    eps = [found[name] * math.prod(shape) / sum(shape) for name, shape in named.items() if found[name] < 1]
    assert eps == pytest.approx([max(eps, default=0)] * len(eps), rel=1e-9)
    full = [sum(shape) / math.prod(shape) for name, shape in named.items() if found[name] == 1]
    assert all(raw * max(eps, default=math.inf) >= 1 - 1e-9 for raw in full)


def test_density_1_keeps_every_layer_dense() -> None:
    assert erk_densities({"a": (3, 4), "b": (5, 6, 3, 3)}, 1) == pytest.approx({"a": 1, "b": 1}, rel=1e-12)
    assert erk_densities({"a": (6, 2, 8, 1)}, 1) == {"a": 1}  # where rounding puts eps * raw above 1


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan])
def test_an_impossible_density_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=rf"^density must be in \(0, 1\], got {density}$"):
        erk_densities({"a": (3, 4)}, density)


# Masked training


class MeanDescent(optim.Optimizer):
    """Moves every entry by the mean gradient too: an optimiser that mixes entries."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        loss = closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad + parameter.grad.mean(), 0.5)
                parameter.sub_(average, alpha=0.1)
        return loss


class DecayingSGD(optim.SGD):
    """A subclass may do anything: here it adds a constant."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(0.01)
        return loss


OPTIMISERS: dict[str, Optimiser] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD dampened": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.01, maximize=True),
    "SGD fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "SGD foreach": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=True),
    "Adam": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.01),
    "Adam amsgrad": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.01, amsgrad=True),
    "Adam fused": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.01, fused=True),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW foreach": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.01),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.01, weight_decay=0.01, initial_accumulator_value=0.1),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01, weight_decay=0.01),
    "NAdam decoupled": lambda p: optim.NAdam(p, lr=0.01, weight_decay=0.01, decoupled_weight_decay=True),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01, weight_decay=0.01),
    "RAdam decoupled": lambda p: optim.RAdam(p, lr=0.01, weight_decay=0.01, decoupled_weight_decay=True),
    "Muon": lambda p: optim.Muon(p, lr=0.02, weight_decay=0.1),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.05, weight_decay=0.01),
    "LBFGS": lambda p: optim.LBFGS(p, lr=0.1, max_iter=3),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01, weight_decay=0.01),
    "Rprop": lambda p: optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: optim.ASGD(p, lr=0.01, weight_decay=0.01),
    "mean descent": MeanDescent,
    "subclass of SGD": lambda p: DecayingSGD(p, lr=0.1),
}


def test_every_optimiser_trusted_to_be_elementwise_is_tested() -> None:
    tested = {type(build(small_net().parameters())) for build in OPTIMISERS.values()}
    assert set(ELEMENTWISE) <= tested


@pytest.mark.parametrize("name", OPTIMISERS)
def test_masked_weights_gradients_and_state_stay_exactly_zero(name: str) -> None:
    model = small_net()
    masks, optimizer = striped_masks(model), OPTIMISERS[name](model.parameters())
    masks.attach(model, optimizer)
    start = copy.deepcopy(model)

    def check() -> None:
        assert not any(part.any() for part in masked_entries(model, optimizer, masks))  # NaN is nonzero too

    train_small(model, optimizer, 50, check)
    for parameter, before in zip(model.named_parameters(), start.parameters(), strict=True):
        kept = masks[parameter[0]]
        assert (parameter[1] != before)[kept].all()  # training went on


@pytest.mark.parametrize("name", ["SGD nesterov", "Adam", "RMSprop", "Adagrad", "Muon", "mean descent"])
def test_attaching_to_an_optimiser_in_mid_training_zeroes_the_masked_state(name: str) -> None:
    model = small_net()
    masks, optimizer = striped_masks(model), OPTIMISERS[name](model.parameters())
    train_small(model, optimizer, 3)
    assert all(part.all() for part in masked_entries(model, optimizer, masks))
    live = list(entries(model, optimizer, masks))
    masks.attach(model, optimizer)
    assert not any(part.any() for part in masked_entries(model, optimizer, masks))
    assert all(torch.equal(a, b) for a, b in zip(entries(model, optimizer, masks), live, strict=True))
    train_small(model, optimizer, 5)
    assert not any(part.any() for part in masked_entries(model, optimizer, masks))


@pytest.mark.parametrize("name", ["SGD nesterov", "AdamW", "Muon", "mean descent"])
def test_after_detaching_every_weight_trains_again(name: str) -> None:
    model = small_net()
    masks, optimizer = striped_masks(model), OPTIMISERS[name](model.parameters())
    detach = masks.attach(model, optimizer)
    train_small(model, optimizer, 3)
    weights = copy.deepcopy(model.state_dict())
    detach()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    train_small(model, optimizer, 1)
    assert all(part.all() for part in masked_entries(model, optimizer, masks))


def test_attaching_leaves_parameters_buffers_and_state_dict_keys_as_they_are() -> None:
    model = conv_net()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    striped_masks(model, (nn.Conv2d,)).attach(model, optim.SGD(model.parameters()))
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_masked_weights_stay_zero_in_bfloat16() -> None:
    model = small_net().bfloat16()
    masks = striped_masks(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    masks.attach(model, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(2, 6, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()
    assert not any(part.any() for part in masked_entries(model, optimizer, masks))


def conv_steps(model: nn.Module, optimizer: optim.Optimizer, clip: float) -> Iterator[Tensor]:
    """The loss after each of 25 steps that accumulate two backwards and clip."""
    draws = generator(3)
    for _ in range(25):
        optimizer.zero_grad()
        for _ in range(2):
            images, labels = torch.randn(6, 1, 8, 8, generator=draws), torch.randint(0, 3, (6,), generator=draws)
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        yield loss.detach()


@pytest.mark.parametrize(
    "build",
    [
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, foreach=True),
        lambda p: optim.Adam(p, lr=0.01, weight_decay=5e-4),
        lambda p: optim.AdamW(p, lr=0.01),
    ],
)
@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_survivors_train_bit_for_bit_as_under_the_weight_times_mask_parametrisation(
    build: Optimiser, clip: float
) -> None:
    ours, plain = conv_net(), conv_net()
    masks = striped_masks(ours, (nn.Conv2d, nn.Linear))
    for name, mask in masks.items():
        torch.nn.utils.prune.custom_from_mask(plain.get_submodule(name.removesuffix(".weight")), "weight", mask)
    originals = dict(plain.named_parameters())
    for name in dict(ours.named_parameters()):  # into our order, or the norm that clips would be summed in another
        module, _, leaf = name.rpartition(".")
        own, leaf = plain.get_submodule(module)._parameters, f"{leaf}_orig" if name in masks else leaf
        own[leaf] = own.pop(leaf)
    optimizer = build(ours.parameters())
    masks.attach(ours, optimizer)
    runs = zip(conv_steps(ours, optimizer, clip), conv_steps(plain, build(plain.parameters()), clip), strict=True)
    for our_loss, plain_loss in runs:
        assert torch.equal(our_loss, plain_loss)
        for name, parameter in ours.named_parameters():
            expected = originals[f"{name}_orig"] * masks[name] if name in masks else originals[name]
            assert torch.equal(parameter, expected)


def test_clipping_sees_the_live_gradients_only() -> None:
    model = small_net()
    masks = striped_masks(model)
    masks.attach(model, optim.SGD(model.parameters()))
    twin = copy.deepcopy(model)  # same weights, no hooks
    inputs = torch.randn(16, 6, generator=generator(4))
    model(inputs).square().sum().backward()
    gradients = torch.autograd.grad(twin(inputs).square().sum(), list(twin.parameters()))
    live = torch.cat([g[masks[n]] for (n, _), g in zip(twin.named_parameters(), gradients, strict=True)])
    everything = torch.cat([g.flatten() for g in gradients])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.testing.assert_close(norm, live.norm(), rtol=1e-6, atol=0)
    assert everything.norm() > 1.05 * norm
    clipped = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]
    torch.testing.assert_close(clipped.norm(), torch.tensor(1.0))


def test_gradients_that_are_differentiated_again_are_masked_too() -> None:
    model = small_net()
    masks, optimizer = striped_masks(model), optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.attach(model, optimizer)
    inputs = torch.randn(4, 6, generator=generator(4), requires_grad=True)
    (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
    slope.square().sum().backward()
    optimizer.step()
    assert not any(part.any() for part in masked_entries(model, optimizer, masks))
    assert all(parameter.grad.any() for parameter in model.parameters())  # type: ignore[union-attr]


def test_parameters_without_a_mask_train_as_ever() -> None:
    ours, plain = conv_net(), conv_net()
    optimizer = optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    Masks.ones_like(prunable_weights(ours)).attach(ours, optimizer)
    runs = zip(
        conv_steps(ours, optimizer, 1e9),
        conv_steps(plain, optim.SGD(plain.parameters(), lr=0.1, momentum=0.9), 1e9),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in itertools.islice(runs, 5))
