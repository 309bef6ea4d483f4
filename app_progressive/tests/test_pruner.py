"""Facts about pruners: counts, training under masks, wrappers, released behaviour (checks 3, 7, 8, 10, 18, 19, 21)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from app_progressive import AnytimePruner, OneShotPruner, scores, threshold
from app_progressive.prunable import prunable
from app_progressive.pruner import fresh_weights
from app_progressive.schedules import density_schedule
from app_progressive.scores import some_of_each_class
from app_progressive.tests import two_ranks
from app_progressive.tests.nets import TinyNet, arrays, batch, convs, reference_batches, reference_net, small_net
from app_progressive.threshold import pruned_count
from common.tests import children

TOTAL = 6 * 27 + 8 * 54
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-2),
}


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3, amp: bool = False) -> None:
    for number in range(count):
        x, y = batch(16, number)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(net(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def dead(net: nn.Module, masks: Any) -> Tensor:
    """All weights behind the masks."""
    return torch.cat([net.get_parameter(name)[~mask] for name, mask in masks.items()])


def test_every_state_has_exactly_its_density_and_lies_within_the_last_one() -> None:  # 3
    net, previous = small_net(), None
    pruner = AnytimePruner(net, 5, 4.5)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    pruner.attach(optimizer)
    for state, density in enumerate(density_schedule(5, 4.5), 1):
        told = pruner.step([batch(seed=state)])
        assert pruner.masks.kept == TOTAL - pruned_count(density, TOTAL)
        assert told["state"] == state and told["density_target"] == density and told["density"] == pruner.density()
        assert previous is None or all((pruner.masks[name] <= mask).all() for name, mask in previous.items())
        previous = dict(pruner.masks)
        steps(net, optimizer, 1)
    weighted = sum(d * previous[name].numel() for name, d in pruner.per_layer().items()) / TOTAL
    assert weighted == pytest.approx(pruner.density())
    with pytest.raises(RuntimeError, match=r"state must be in \[1, 5\], got 6"):
        pruner.step([batch()])


def test_only_convolution_weights_are_masked_at_any_sparsity() -> None:  # 7
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    AnytimePruner(net, 1, 50).step([batch()])
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in ("conv1.weight", "conv2.weight")), name
    assert int(net.conv1.weight.count_nonzero() + net.conv2.weight.count_nonzero()) == 1


def test_one_shot_pruning_masks_once_and_harder_than_the_first_state_of_app() -> None:  # 7
    net = small_net()
    once, app = OneShotPruner(net, 4.5), AnytimePruner(small_net(), 8, 4.5)
    told, first = once.step([batch()]), app.step([batch()])
    assert told["density_target"] == 0.8**4.5 and first["density_target"] == 0.8
    assert once.masks.kept == TOTAL - pruned_count(0.8**4.5, TOTAL) < app.masks.kept
    kept, optimizer = dict(once.masks), OPTIMIZERS["sgd"](net.parameters())
    once.attach(optimizer)
    steps(net, optimizer)
    assert all(torch.equal(once.masks[name], mask) for name, mask in kept.items())
    with pytest.raises(RuntimeError):
        once.step([batch()])


def test_training_under_masks_is_the_authors() -> None:  # 8
    values, reference = arrays("scores"), arrays("sgd")
    for stored in (False, True):
        net = reference_net(values)
        pruner = AnytimePruner(net, 2, 4.5, keep_stored=stored)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-2)
        pruner.attach(optimizer)
        for number, rows in enumerate(reference["batches"]):
            if number in (0, 3):
                masks = convs(reference, f"mask{number // 3}")
                kept = {name: mask.bool() & pruner.masks[name] for name, mask in masks.items()}
                pruner.load_state_dict({"state": 1, "masks": kept, "stored": pruner.stored})
            loss = F.cross_entropy(net(values["x_u8"][rows].double() / 255), values["y"][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert loss.item() == pytest.approx(reference["losses"][number].item(), abs=1e-12)
            for name in ("conv1", "conv2"):
                weight = net.get_parameter(f"{name}.weight")
                assert torch.allclose(weight, reference[f"step{number}/{name}.effective"], rtol=0, atol=1e-12)
        # The reference holds these as they are at the end, under the name of every step.
        for name, behind in pruner.stored.items():
            wanted = reference[f"step5/{name.removesuffix('.weight')}.stored"]
            assert torch.allclose(behind, wanted, rtol=0, atol=1e-12)
        assert torch.allclose(net.fc.weight, reference["step5/fc.weight"], rtol=0, atol=1e-12)
        assert torch.allclose(net.bn1.running_mean, reference["step5/bn1.running_mean"], rtol=0, atol=1e-12)
        logits = net.eval()(values["x_u8"][:16].double() / 255)
        assert torch.allclose(logits, reference["final_logits"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_live_weights_train_bit_for_bit_as_under_torchs_masked_forward(name: str) -> None:  # 8
    net = small_net().double()
    pruner = AnytimePruner(net, 2, 4.5)
    pruner.step([(batch()[0].double(), batch()[1])])
    hooked = copy.deepcopy(net)
    for key, mask in pruner.masks.items():
        torch_prune.custom_from_mask(hooked.get_submodule(key.removesuffix(".weight")), "weight", mask)
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (net, hooked)]
    pruner.attach(optimizers[0])
    for model, optimizer in zip((net, hooked), optimizers, strict=True):
        for number in range(4):
            x, y = batch(16, number)
            optimizer.zero_grad()
            F.cross_entropy(model(x.double()), y).backward()
            optimizer.step()
    for key, mask in pruner.masks.items():
        module = hooked.get_submodule(key.removesuffix(".weight"))
        assert torch.equal(net.get_parameter(key), module.weight_orig * mask)
    assert torch.equal(net.fc.weight, hooked.fc.weight)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_masked_weights_are_exactly_zero_after_every_step_and_in_the_export(name: str, amp: bool) -> None:  # 8
    net = small_net()
    optimizer = OPTIMIZERS[name](net.parameters())
    steps(net, optimizer)  # the optimiser has a past
    pruner = AnytimePruner(net, 2, 9.5)
    detach = pruner.attach(optimizer)
    for state in (1, 2):
        pruner.step([batch(seed=state)])
        assert not dead(net, pruner.masks).any()
        for _ in range(3):
            steps(net, optimizer, 1, amp)
            assert not dead(net, pruner.masks).any()
    saved = pruner.export()
    assert sum(int(saved[key].count_nonzero()) for key in pruner.masks) == pruner.masks.kept
    small_net(1).load_state_dict(saved)  # strictly
    detach()
    steps(net, optimizer, 1)
    assert dead(net, pruner.masks).any()


def test_weights_that_may_come_back_return_with_their_stored_values() -> None:
    net = small_net()
    pruner = AnytimePruner(net, 3, 4.5, "random", update="replace", keep_stored=True)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    pruner.attach(optimizer)
    for state in (1, 2):
        before = {name: stored.clone() for name, stored in pruner.stored.items()}
        old = dict(pruner.masks)
        pruner.step(None, generator=torch.Generator().manual_seed(state))
        if state == 2:
            back = {name: pruner.masks[name] & ~mask for name, mask in old.items()}
            assert sum(int(mask.sum()) for mask in back.values()) > 0
            for name, mask in back.items():
                assert torch.equal(net.get_parameter(name)[mask], before[name][mask])
                assert (net.get_parameter(name)[mask] != 0).all()
        steps(net, optimizer)
        assert not dead(net, pruner.masks).any()


def test_what_was_loaded_stays_the_callers_own() -> None:
    net = small_net()
    pruner = AnytimePruner(net, 3, 4.5, "mag", update="replace", keep_stored=True)
    pruner.step(None)
    saved = copy.deepcopy(pruner.state_dict())
    pruner.load_state_dict(saved)
    kept = copy.deepcopy(saved)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    pruner.attach(optimizer)
    steps(net, optimizer)
    assert not any(torch.equal(pruner.stored[name], value) for name, value in kept["stored"].items())
    for part in ("masks", "stored"):
        assert all(torch.equal(saved[part][name], value) for name, value in kept[part].items())
    before = dict(pruner.masks)
    for mask in saved["masks"].values():
        mask.zero_()
    assert all(mask.any() for mask in before.values())


def test_random_scores_differ_from_state_to_state_without_a_generator() -> None:
    def masks() -> list[Tensor]:
        pruner = AnytimePruner(small_net(), 2, 1.0, "random", update="replace", keep_stored=True)
        return [(pruner.step(None), pruner.masks["conv2.weight"])[1] for _ in range(2)]

    (first, second), again = masks(), masks()
    assert not torch.equal(first, second) and torch.equal(first, again[0]) and torch.equal(second, again[1])


# The released code


def test_the_released_state_scores_fresh_weights_and_multiplies_masks() -> None:  # 9, 10
    released, values = arrays("released"), arrays("scores")
    batches = reference_batches(values)
    net = TinyNet().double()
    renamed = {
        k.removeprefix("checkpoint/").replace("_orig", ""): v
        for k, v in released.items()
        if k.startswith("checkpoint/") and not k.endswith("_mask")
    }
    net.load_state_dict(renamed)
    masks = {f"{name}.weight": released[f"checkpoint/{name}.weight_mask"] for name in ("conv1", "conv2")}
    fresh = {f"{name}.weight": released[f"fresh/{name}.weight"] for name in ("conv1", "conv2")}
    density = released["density"].item()
    # The trained batch norm and head, fresh convolutions.
    found = scores(net, batches, params=fresh, masks=masks)
    for key, wanted in convs(released, "released_score").items():
        assert torch.allclose(found[key], wanted, rtol=0, atol=1e-12)
    new = threshold(found, density, ties="threshold", update="replace")
    both = threshold(found, density, ties="threshold", prev=masks, update="intersect")
    for key in found:
        assert torch.equal(new[key], convs(released, "released_new_mask")[key].bool())
        assert torch.equal(both[key], convs(released, "released_effective_mask")[key].bool())
    assert sum(int(mask.sum()) for mask in both.values()) / TOTAL == pytest.approx(0.488, abs=5e-4)
    meant = scores(net, batches, masks=masks)
    for key, wanted in convs(released, "intended_score").items():
        assert torch.allclose(meant[key], wanted, rtol=0, atol=1e-12)
    nested = threshold(meant, density, prev=masks)  # 3: 0.694 is sparser than 0.7155 already
    for key, wanted in convs(released, "nested_mask").items():
        assert torch.equal(nested[key], wanted.bool()) and torch.equal(nested[key], masks[key].bool())


def test_fresh_weights_are_uniform_within_one_over_the_root_of_the_fan_in() -> None:
    drawn = fresh_weights({"w": torch.zeros(200, 4, 3, 3)}, torch.Generator().manual_seed(0))["w"] * 6
    assert 0.99 < drawn.abs().max() <= 1 and abs(drawn.mean()) < 0.02
    assert drawn.var() == pytest.approx(1 / 3, abs=0.02)


def test_released_pruning_gets_far_sparser_than_it_says() -> None:
    net = small_net()
    pruner = AnytimePruner(net, 8, 4.5, ties="threshold", update="intersect", score_weights="fresh")
    told = [pruner.step([batch(seed=state)]) for state in range(8)]
    assert told[0]["density"] == pytest.approx(0.8, abs=0.01)
    assert told[7]["density_target"] == pytest.approx(0.366, abs=1e-3) and told[7]["density"] < 0.1


# Any network


def test_a_vision_transformer_is_pruned_without_its_head() -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    pruner = AnytimePruner(net, 2, 4.5, "grasp", include=(nn.Linear,), exclude="head*")
    assert len(pruner.masks) == 8 and "head.weight" not in pruner.masks
    pruner.step([(torch.randn(100, 3, 32, 32), torch.arange(100) % 10)])
    assert pruner.density() == pytest.approx(0.8, abs=1e-5) and net.head.weight.all()


def test_masks_survive_moves_copies_wrappers_and_compilation() -> None:  # 21
    net = small_net()
    pruner = AnytimePruner(nn.DataParallel(net), 2, 4.5)
    assert list(pruner.masks) == ["conv1.weight", "conv2.weight"]  # the inner names
    pruner.step([batch()])
    twin, its = copy.deepcopy((net, pruner))
    optimizer = OPTIMIZERS["sgd"](twin.parameters())
    its.attach(optimizer)
    twin.to(torch.float64).to("cpu").float()
    compiled = torch.compile(twin, backend="eager")
    steps(compiled, optimizer, 2)
    assert not dead(twin, its.masks).any() and its.masks.kept == pruner.masks.kept
    assert not torch.equal(twin.conv1.weight, net.conv1.weight)
    assert list(prunable(compiled)) == ["conv1.weight", "conv2.weight"]
    small_net(1).load_state_dict(its.export())


def test_a_network_with_one_child_called_module_is_no_wrapper() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = small_net()

    assert list(prunable(Outer())) == ["module.conv1.weight", "module.conv2.weight"]
    assert list(prunable(nn.DataParallel(Outer()))) == ["module.conv1.weight", "module.conv2.weight"]


def test_layers_that_share_a_weight_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match=r"a weight of its own in each layer, got one for 0\.weight and 1\.weight"):
        AnytimePruner(net, 2, 4.5)


def test_a_closure_is_refused_where_it_would_see_stored_values() -> None:
    net = small_net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    AnytimePruner(net, 2, 4.5, keep_stored=True).attach(optimizer)
    for step in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(ValueError, match="closure must be None with keep_stored, got"):
            step()
    optimizer.step(None)


def test_an_optimizer_with_a_closure_leaves_masked_weights_at_zero() -> None:
    net, (x, y) = small_net(), batch()
    pruner = AnytimePruner(net, 2, 4.5)
    pruner.step([(x, y)])
    optimizer = torch.optim.LBFGS(net.parameters(), 0.1)
    pruner.attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    before = closure().item()
    for _ in range(3):
        optimizer.step(closure)
    assert closure().item() < before and not dead(net, pruner.masks).any()


@pytest.mark.parametrize("stored", [False, True])
def test_clipping_sees_the_gradients_of_live_weights_alone(stored: bool) -> None:
    net = small_net().double()
    pruner = AnytimePruner(net, 2, 9.5, keep_stored=stored)
    pruner.step([(batch()[0].double(), batch()[1])], state=2)
    hooked = copy.deepcopy(net)
    for key, mask in pruner.masks.items():
        torch_prune.custom_from_mask(hooked.get_submodule(key.removesuffix(".weight")), "weight", mask)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, 0.9) for model in (net, hooked)]
    pruner.attach(optimizers[0])
    for number in range(3):
        x, y = batch(16, number)
        norms = []
        for model, optimizer in zip((net, hooked), optimizers, strict=True):
            optimizer.zero_grad()
            for part in (slice(0, 8), slice(8, 16)):  # gradients accumulate
                F.cross_entropy(model(x[part].double()), y[part]).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
            optimizer.step()
        assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-12)
    for key, mask in pruner.masks.items():
        wanted = hooked.get_submodule(key.removesuffix(".weight")).weight_orig * mask
        assert torch.allclose(net.get_parameter(key), wanted, rtol=1e-12, atol=1e-15)


def test_an_optimizer_is_attached_once_and_only_if_it_trains_what_is_pruned() -> None:
    net = small_net()
    pruner = AnytimePruner(net, 2, 4.5)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    detach = pruner.attach(optimizer)
    for wrong in (optimizer, OPTIMIZERS["sgd"](net.fc.parameters()), OPTIMIZERS["sgd"](small_net().parameters())):
        with pytest.raises(ValueError, match="optimizer must be one that is not attached yet and holds a weight that"):
            pruner.attach(wrong)
    detach()
    pruner.attach(optimizer)


def test_a_pruner_goes_on_from_its_state() -> None:
    net, other = small_net(), small_net()
    pruner = AnytimePruner(net, 3, 4.5)
    pruner.step([batch()])
    again = AnytimePruner(other, 3, 4.5)
    again.load_state_dict(copy.deepcopy(pruner.state_dict()))
    assert not dead(other, pruner.masks).any()
    other.load_state_dict(net.state_dict())
    for each in (pruner, again):
        each.step([batch(seed=2)])
    assert all(torch.equal(again.masks[name], mask) for name, mask in pruner.masks.items())
    saved, before = pruner.state_dict(), (again.state, dict(again.masks))
    for wrong, message in (
        ({"masks": {"conv1.weight": torch.ones(2)}}, "masks must be those of this network"),
        ({"stored": saved["masks"]}, "stored must be those of this network and keep_stored=False"),
        ({"state": 8}, r"state must be in \[0, 3\], got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            again.load_state_dict({**saved, **wrong})
    with pytest.raises(ValueError, match="saved must be the state of a pruner, got one without masks"):
        again.load_state_dict({})
    with pytest.raises(ValueError, match="stored must be those of this network and keep_stored=True"):
        AnytimePruner(other, 3, 4.5, keep_stored=True).load_state_dict(saved)
    assert (again.state, dict(again.masks)) == before


def test_given_densities_and_streams_of_unknown_length() -> None:
    pruner = AnytimePruner(small_net(), 2, 4.5, "mag", schedule=[0.9, 0.25])
    assert [pruner.step(None)["density_target"] for _ in range(2)] == [0.9, 0.25]
    endless = AnytimePruner(small_net(), None, 2.0, "mag", growth=0.5)
    assert [endless.step(None)["delta"] for _ in range(5)] == [1, 1.5, 2, 2, 2]
    assert AnytimePruner(small_net(), 4, 4.5, schedule="cubic").target(1)[1] < 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_states": 0}, "n_states must be at least 1, got 0"),
        ({"tau": 0.0}, "tau must be a finite number, at least 1, got 0"),
        ({"tau": 0.0, "n_states": None}, "tau must be a finite number, at least 1, got 0"),
        ({"base": 1.0}, r"base must be in \(0, 1\), got 1"),
        ({"criterion": "magic"}, "criterion must be one of snip, .* got 'magic'"),
        ({"scope": "l"}, "scope must be one of global, local, got 'l'"),
        ({"ties": "x"}, "ties must be one of"),
        ({"update": "x"}, "update must be one of"),
        ({"score_weights": "x"}, "score_weights must be one of current, fresh, got 'x'"),
        ({"update": "replace"}, "update replace must have keep_stored=True"),
        ({"update": "intersect"}, "update intersect must have keep_stored=True"),
        ({"exclude": ("conv*",)}, r"exclude must leave a weight to prune, got \['conv\*'\]"),
        ({"include": (nn.Conv3d,)}, "model must have a weight to prune"),
        ({"schedule": "linear"}, "schedule must be exponential, cubic or densities, got 'linear'"),
        ({"schedule": [0.5]}, r"schedule must be 2 densities in \(0, 1\], got \[0.5\]"),
        ({"n_states": None, "growth": -1.0}, "growth must be positive, got -1"),
    ],
)
def test_impossible_pruners_are_refused(options: dict[str, Any], message: str) -> None:  # 19
    with pytest.raises(ValueError, match=message):
        AnytimePruner(**{"model": small_net(), "n_states": 2, "tau": 4.5, **options})


def test_two_ranks_find_the_masks_of_one(tmp_path: Path) -> None:  # 18
    two_ranks.main(tmp_path / "one")
    done = children.run(*children.TORCHRUN, two_ranks.__file__, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, *two = (torch.load(tmp_path / name, weights_only=True) for name in ("one0", "two0", "two1"))
    assert len(one["masks"]) == 4
    for other in two:
        for mine, its in zip(one["masks"], other["masks"], strict=True):
            assert all(torch.equal(its[name], mask) for name, mask in mine.items())
    net = small_net().train()
    weights = [net.get_parameter(name) for name in one["grasp"]]
    losses = [F.cross_entropy(net(x) / 200, y) for x, y in (some_of_each_class([batch(200, s)], 10) for s in (30, 31))]
    mean = torch.autograd.grad(sum(losses) / 2, weights, create_graph=True)
    plain = torch.autograd.grad(sum((g.detach() * g).sum() for g in mean), weights)
    signed = [weight.detach() * gradient for weight, gradient in zip(weights, plain, strict=True)]
    norm = abs(sum(float(score.sum()) for score in signed))
    for (name, score), wanted in zip(two[0]["grasp"].items(), signed, strict=True):
        assert torch.allclose(score, wanted / norm, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()) / norm)
        assert torch.equal(score, two[1]["grasp"][name]) and not torch.allclose(score, one["grasp"][name], rtol=0.01)
