"""Facts about one training step, learning rates, data-limited schemes, accuracy, and images of another side."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from common.config import ConfigError
from common.data import DataConfig, ImageSet, load
from common.masks import Masks, keep_top
from common.tests import children
from double_win_lth.accuracy import CLEAN, accuracies
from double_win_lth.grouped import TicketBatch
from double_win_lth.recipes import SgdConfig
from double_win_lth.regimes import Regime
from double_win_lth.schemes import take
from double_win_lth.tests import nets, two_ranks
from double_win_lth.tickets import TicketBook, conv_weights
from double_win_lth.training import adversarial_batches, sgd_step
from double_win_lth.views import centre_crop, random_resized_crop


def test_three_adversarial_steps_under_a_mask_are_those_of_the_released_code() -> None:
    arrays = nets.reference("train_steps")
    state = nets.part(arrays, "before")
    pgd = nets.reference("pgd")
    net = nets.reference_net({**pgd, **{f"before/{name}": value for name, value in state.items()}}, "before")
    masks = Masks({name: mask.bool() for name, mask in nets.part(arrays, "mask").items()})
    lr, momentum, decay = arrays["hyper_lr_mom_wd"].tolist()
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum, weight_decay=decay)
    masks.attach(net, optimizer)
    steps = int(arrays["k"])
    regime = Regime("adv", 8 / 255, 2 / 255, steps)
    right = []
    for x, y, start in zip(arrays["xs"], arrays["ys"], arrays["deltas0"], strict=True):
        _, accuracy = sgd_step(net, optimizer, (x, y, start), regime, lr)
        right.append(accuracy)
        assert all((net.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())
    for name, value in nets.part(arrays, "after").items():
        assert torch.allclose(net.state_dict()[name].double(), value.double(), atol=1e-10), name
    assert net.get_buffer("bn1.num_batches_tracked") == 3 * (steps + 1)
    assert sum(right) / 3 == pytest.approx(arrays["train_accuracy"].item(), abs=1e-4)

    net.eval()
    x, y = arrays["xs"].flatten(0, 1), arrays["ys"].flatten()
    start = arrays["eval_deltas0"].view_as(x)
    attacked = Regime("pgd", 8 / 255, 2 / 255, 20).perturb(net, x, y, start=start)
    for images, name in ((x, "eval_SA"), (attacked, "eval_RA")):
        assert 100 * (net(images).argmax(1) == y).double().mean().item() == pytest.approx(arrays[name].item(), abs=1e-4)


def test_masking_in_place_trains_survivors_bit_for_bit_as_the_hooks_of_torch_do() -> None:
    ours, theirs = (nets.small_net().double() for _ in range(2))
    masks = keep_top({name: weight.abs() for name, weight in conv_weights(ours).items()}, 80)
    for index in (0, 3):
        prune.custom_from_mask(theirs[index], "weight", masks[f"{index}.weight"])
    optimizers = [torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=5e-3) for net in (ours, theirs)]
    masks.attach(ours, optimizers[0])
    regime = Regime("adv", 0.1, 0.04, 2)
    for step in range(50):
        x, y = nets.small_batch(seed=step)
        start = (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(step)) - 1) * 0.1
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            sgd_step(net, optimizer, (x.double(), y, start.double()), regime, 0.05)
        assert all((ours.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())
    for index in (0, 3):
        kept = masks[f"{index}.weight"]
        assert torch.equal(ours[index].weight[kept], theirs[index].weight_orig[kept])
    assert torch.equal(ours[7].weight, theirs[7].weight)


def test_an_attack_with_batch_norm_in_eval_mode_leaves_the_statistics_to_the_step() -> None:
    x, y = nets.small_batch()
    counts = {}
    for mode in ("train", "eval"):
        net = nets.small_net()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        sgd_step(net, optimizer, (x, y, None), Regime("adv", 0.1, 0.04, 3, False), 0.1, attack_bn=mode)
        counts[mode] = int(net[1].num_batches_tracked)
    assert counts == {"train": 4, "eval": 1}


# Recipes


def test_learning_rates_are_those_of_the_released_scripts() -> None:
    rates = nets.constants()["lr"]
    recipes = {
        "adv_cifar": SgdConfig(epochs=100, lr=0.1, schedule="milestones", milestones=[50, 75]),
        "adv_svhn": SgdConfig(epochs=80, lr=0.01, schedule="cosine"),
        "std_script": SgdConfig(epochs=150, lr=1e-3, schedule="milestones", milestones=[50, 100]),
    }
    for name, recipe in recipes.items():
        found = [recipe.learning_rate(7 * epoch + 3, 7) for epoch in range(recipe.epochs)]
        assert found == pytest.approx(rates[name], abs=1e-12)
    warm = SgdConfig(epochs=10, lr=0.1, warmup=3)
    for epoch, step, lr in nets.constants()["warmup_lr_w3_lr0.1_steps100"]:
        assert warm.learning_rate(100 * epoch + step - 1, 100) == pytest.approx(lr, abs=1e-12)


def test_a_triangle_rises_over_a_fifth_and_falls_to_its_end() -> None:
    recipe = SgdConfig(steps=10, lr=1.0, schedule="triangle")
    assert [recipe.learning_rate(step, 3) for step in range(10)] == pytest.approx(
        [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    assert (recipe.total(3), SgdConfig(epochs=4).total(3)) == (10, 12)


# Schemes


def images(labels: Tensor, classes: int) -> ImageSet:
    """Tiny images that carry their own number."""
    numbers = torch.arange(len(labels)) % 256
    return ImageSet(numbers.to(torch.uint8).view(-1, 1, 1, 1), labels, classes)


@pytest.mark.parametrize(("total", "name"), [(50_000, "cifar"), (73_257, "svhn")])
def test_the_first_images_are_as_many_as_in_the_released_code(total: int, name: str) -> None:
    labels = torch.randint(10, (total,), generator=torch.Generator().manual_seed(0))
    for fraction in (1.0, 0.1, 0.01):
        train, val = take(images(labels, 10), fraction, val=5000, subset="first")
        assert len(train) == nets.constants()["subset_sizes"][f"{name}_{fraction}"] and len(val) == 5000
        assert torch.equal(train.labels, labels[: len(train)]) and torch.equal(val.labels, labels[-5000:])


def test_stratified_parts_nest_hold_every_class_and_depend_on_the_draw_alone() -> None:
    labels = torch.arange(2000) // 400  # sorted by class
    data = images(labels, 5)
    sets = {}
    for fraction in (1.0, 0.1, 0.01):
        train, val = take(data, fraction, val=200, keys=(3, 7))
        assert train.labels.bincount().tolist() == [int(360 * fraction)] * 5 or fraction == 0.01
        assert len(train.labels.unique()) == 5 and val.labels.bincount().tolist() == [40] * 5
        sets[fraction] = train, val
    assert [len(train) for train, _ in sets.values()] == [1800, 180, 18]
    keyed = [{(int(i), int(y)) for i, y in zip(t.images.flatten(), t.labels, strict=True)} for t, _ in sets.values()]
    assert keyed[2] <= keyed[1] <= keyed[0]
    assert torch.equal(sets[0.01][1].images, sets[1.0][1].images)
    again, other = (take(data, 0.01, val=200, keys=keys)[0] for keys in ((3, 7), (3, 8)))
    assert torch.equal(again.images, sets[0.01][0].images) and not torch.equal(other.images, again.images)
    assert torch.equal(take(data, 0.01, val=200, keys=(3, 8))[1].images, sets[0.01][1].images)


def test_schemes_that_leave_too_little_are_refused() -> None:
    data = images(torch.arange(2000) // 400, 5)
    with pytest.raises(ConfigError, match=r"transfer\.subset must be stratified where the data set is sorted by class"):
        take(data, 0.01, subset="first")
    with pytest.raises(ConfigError, match=r"transfer\.fraction must be enough for one image of each of the 5 classes"):
        take(data, 0.002)
    with pytest.raises(ConfigError, match=r"transfer\.val must be below the 2000 target images, got 2000"):
        take(data, 1.0, val=2000)


# Batches and accuracy


def digits(count: int = 40) -> ImageSet:
    test = load(DataConfig(val=0.0)).test
    return test.subset(torch.arange(0, 1000, 1000 // count))


def test_batches_and_starts_depend_on_seed_and_step_alone() -> None:
    regime, data = Regime.fast(0.1), digits()
    config = DataConfig(crop_padding=2)

    def stream(step: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        return next(adversarial_batches(data, 8, config, regime, size=0, seed=seed, step=step))

    first = adversarial_batches(data, 8, config, regime, size=0, seed=1, step=0)
    for step in range(7):
        for ours, again in zip(next(first), stream(step), strict=True):
            assert torch.equal(ours, again)
    assert stream(0)[2].abs().max() <= 0.1 and not torch.equal(stream(0)[2], stream(0, 2)[2])
    assert next(adversarial_batches(data, 8, config, Regime.std(), size=0, seed=1, step=0))[2] is None


def digit_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


def test_accuracy_under_no_attack_is_accuracy_and_batches_do_not_matter() -> None:
    net, data = digit_net(), digits()
    labels = net(data.images.float() / 255).argmax(1)
    right = labels.clone()
    right[:10] = (right[:10] + 1) % 10
    data = ImageSet(data.images, right, 10)
    assert accuracies(net, data) == [75.0]
    assert accuracies(net, data, Regime("pgd", 0.0, 0.1, 3)) == [75.0]
    attack = Regime("pgd", 0.1, 0.025, 5)
    robust = accuracies(net, data, attack, seed=4)
    assert robust == accuracies(net, data, attack, seed=4, batch_size=7) and 0 <= robust[0] < 75
    assert accuracies(net, data, attack, seed=4, worst=True)[0] <= robust[0]


def test_an_accuracy_of_logits_that_are_not_finite_is_an_error() -> None:
    net = digit_net()
    net[3].bias.data[2] = torch.nan
    with pytest.raises(FloatingPointError, match="logits must be finite, got 40 of 400 that are not"):
        accuracies(net, digits())


def test_every_image_has_its_own_start_whatever_the_batch() -> None:
    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = digit_net(), []

        def forward(self, x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                self.seen.append(x)
            return self.net(x)

    judged = []
    for batch_size in (7, 40):
        net = Watch()
        accuracies(net, digits(), Regime("pgd", 0.1, 1e-9, 1), seed=4, batch_size=batch_size)
        judged.append(torch.cat(net.seen))
    assert torch.equal(*judged) and len({tuple(each.flatten().tolist()) for each in judged[0]}) == 40
    moved = judged[0] - digits().images.float() / 255
    assert 0.09 < moved.max() <= 0.1001 and not torch.equal(moved[:7] > 0, moved[7:14] > 0)


def test_accuracies_of_grouped_tickets_are_those_of_each() -> None:
    networks, data = [digit_net(seed) for seed in range(3)], digits()
    data = ImageSet(data.images, networks[0](data.images.float() / 255).argmax(1), 10)
    for attack in (CLEAN, Regime("pgd", 0.02, 0.01, 3)):
        together = accuracies(TicketBatch(networks), data, attack)
        assert together == [accuracies(net, data, attack)[0] for net in networks] and len(set(together)) > 1


def test_images_of_another_side_are_cut_and_resized() -> None:
    x = torch.linspace(0, 1, 32).expand(5, 3, 32, 32)
    assert centre_crop(x, 0) is x and random_resized_crop(x, 0, torch.Generator()) is x
    centre = centre_crop(x, 28)
    assert torch.allclose(centre, x[:, :, 2:30, 2:30], atol=1e-6)  # 28 * 256 / 224 = 32: nothing but a crop
    assert centre_crop(x, 56).shape == (5, 3, 56, 56)
    crops = random_resized_crop(x, 16, torch.Generator().manual_seed(0))
    assert crops.shape == (5, 3, 16, 16) and crops.min() >= 0 and crops.max() <= 1
    assert torch.equal(crops, random_resized_crop(x, 16, torch.Generator().manual_seed(0)))
    steps = crops[:, 0, 8].diff(dim=1)
    widths = steps.median(1).values * 31 * 16 / 32  # part of the image's width that a crop shows
    assert (steps >= -1e-6).all() and widths.min() > 0.2 and widths.max() <= 1.001
    assert len({round(width, 4) for width in widths.tolist()}) == 5


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_processes_find_the_tickets_of_one(ranks: int, tmp_path: Path) -> None:
    two_ranks.main(tmp_path / "one")
    several = children.run(*children.TORCHRUN[:-1], f"--nproc_per_node={ranks}", two_ranks.__file__, tmp_path / "rank")
    assert several.returncode == 0, several.stderr
    books = [TicketBook.load(tmp_path / name) for name in ("one0", *(f"rank{number}" for number in range(ranks)))]
    assert books[0].levels == 3
    for book in books[1:]:
        assert all(torch.equal(book.survived[name], value) for name, value in books[0].survived.items())


def test_the_attack_leaves_a_copy_of_the_network_as_it_is() -> None:
    net = nets.small_net()
    twin = copy.deepcopy(net)
    x, y = nets.small_batch()
    Regime.adv(0.1).perturb(net.eval(), x, y)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in net.state_dict().items())
