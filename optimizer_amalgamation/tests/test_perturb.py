"""Facts about noise on the weights and about clipping."""

import pytest
import torch
from torch import Tensor

from optimizer_amalgamation.clip import clip_adaptive
from optimizer_amalgamation.perturb import add, cgd, fgsm, gaussian, norms, pgd, relative_gaussian, standard_normal
from optimizer_amalgamation.tests.vectors import reference

MISC = reference("misc")
W, G = {"w": MISC["ptb_w"]}, [{"w": MISC[f"ptb_g{step}"]} for step in range(3)]
ZERO = {"w": torch.zeros_like(W["w"])}


def stacked(*parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def test_one_step_of_fgsm() -> None:  # acceptance 14
    assert torch.allclose(fgsm(ZERO, G[0], 1e-3)["w"], MISC["fgsm_delta"], atol=1e-9)


def test_three_steps_of_cgd_and_of_pgd() -> None:  # acceptance 14
    clipped, ball, box = ZERO, ZERO, ZERO
    for step, g in enumerate(G):
        clipped = cgd(clipped, g, W, 0.01)
        ball, box = pgd(ball, g, 0.1, 0.05, "l2"), pgd(box, g, 0.1, 0.05, "linf")
        assert torch.allclose(clipped["w"], MISC[f"cgd_delta_step{step}"], rtol=1e-5, atol=1e-8)
    assert torch.allclose(ball["w"], MISC["pgd_l2_delta"], rtol=1e-5, atol=1e-8)
    assert torch.allclose(box["w"], MISC["pgd_inf_delta"], rtol=1e-5, atol=1e-8)


def test_a_normalised_step_has_the_papers_length_however_small_the_gradient() -> None:
    small = {"w": 1e-9 * G[0]["w"]}
    moved = cgd(ZERO, small, W, 0.01, normalize=True)["w"]
    assert moved.norm() == pytest.approx(0.01 * float(W["w"].norm()), rel=1e-5)
    assert torch.allclose(cgd(ZERO, small, W, 0.01)["w"], small["w"])


def test_a_zero_gradient_moves_nothing() -> None:
    for moved in (
        cgd(ZERO, ZERO, W, 0.01),
        cgd(ZERO, ZERO, W, 0.01, normalize=True),
        pgd(ZERO, ZERO, 0.1, 0.05, "l2"),
        fgsm(ZERO, ZERO, 1e-3),
        clip_adaptive(ZERO, W),
    ):
        assert torch.equal(moved["w"], ZERO["w"])


def test_relative_noise_has_the_released_deviation() -> None:  # acceptance 14
    noise = {"w": torch.ones_like(W["w"])}
    moved = relative_gaussian(W, noise, 1e-3)["w"] - W["w"]
    assert torch.allclose(moved, MISC["gauss_rel_std_at_0.001"], rtol=1e-3)
    rng, count = torch.Generator().manual_seed(0), 400
    drawn = torch.stack([relative_gaussian(W, standard_normal(W, rng), 1e-3)["w"] - W["w"] for _ in range(count)])
    assert drawn.std() == pytest.approx(float(MISC["gauss_rel_std_at_0.001"]), rel=0.02)


def test_no_deviation_is_no_noise() -> None:  # acceptance 14
    noise = standard_normal(W, torch.Generator().manual_seed(0))
    assert torch.equal(gaussian(W, noise, 0.0)["w"], W["w"])
    assert torch.equal(relative_gaussian(W, noise, 0.0)["w"], W["w"])
    assert torch.equal(gaussian(W, noise, 0.5)["w"], W["w"] + 0.5 * noise["w"])
    assert torch.equal(add(W, noise)["w"], W["w"] + noise["w"])


def test_relative_noise_is_differentiated_through_its_deviation() -> None:
    leaf, one = torch.full((4,), 2.0, requires_grad=True), {"w": torch.ones(4)}
    (slope,) = torch.autograd.grad(relative_gaussian({"w": leaf}, one, 0.1)["w"].sum(), leaf)
    assert torch.allclose(slope, torch.full((4,), 1.1), atol=1e-5)


@pytest.mark.parametrize(
    "form",
    [
        lambda w, g, b: pgd({"w": 0 * w["w"]}, g, 0.1, 0.05, "l2", b),
        lambda w, g, b: cgd({"w": 0 * w["w"]}, g, w, 0.01, True, b),
        lambda w, g, b: cgd({"w": 0 * w["w"]}, g, w, 0.01, False, b),
        lambda w, g, b: relative_gaussian(w, g, 0.1, b),
        lambda w, g, b: clip_adaptive(g, w, batched=b),
    ],
)
@pytest.mark.parametrize("shape", [(6, 5), (3,), ()])
def test_replicates_do_not_see_each_other(form: object, shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(1)
    weights = [{"w": 10.0**r * torch.randn(shape, generator=rng)} for r in range(3)]
    steps = [{"w": 100.0**r * torch.randn(shape, generator=rng)} for r in range(3)]
    together = form(stacked(*weights), stacked(*steps), True)["w"]  # type: ignore[operator]
    for r in range(3):
        alone = form(weights[r], steps[r], False)["w"]  # type: ignore[operator]
        assert torch.allclose(together[r], alone, rtol=1e-5, atol=1e-8)


def test_noise_of_replicates_is_that_of_their_generators() -> None:
    both = standard_normal(stacked(W, W), [torch.Generator().manual_seed(seed) for seed in (3, 4)])["w"]
    for r, seed in enumerate((3, 4)):
        assert torch.equal(both[r], standard_normal(W, torch.Generator().manual_seed(seed))["w"])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_clipping_is_the_released_one(number: int) -> None:  # acceptance 13
    p, g, wanted = (MISC[f"agc{number}_{part}"] for part in ("p", "g", "out"))
    found = clip_adaptive({"w": g}, {"w": p})["w"]
    assert torch.allclose(found, wanted, rtol=1e-6)
    limit = 0.1 * max(float(p.norm()), 1e-3)
    assert found.norm() <= limit * (1 + 1e-6)
    assert torch.allclose(found / found.norm(), g / g.norm(), atol=1e-6)


def test_clipping_leaves_small_gradients_alone_and_has_a_floor() -> None:  # acceptance 13
    g = {"w": torch.full((4,), 1e-6)}
    assert torch.equal(clip_adaptive(g, W)["w"], g["w"])
    assert clip_adaptive({"w": torch.ones(4)}, {"w": torch.zeros(4)})["w"].norm() == pytest.approx(1e-4)


def test_norms_and_a_wrong_norm() -> None:
    assert norms(torch.tensor([3.0, 4.0])) == 5
    assert norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), True).flatten().tolist() == [5, 1]
    with pytest.raises(ValueError, match="norm must be one of l2, linf, got 'l1'"):
        pgd(ZERO, G[0], 0.1, 0.05, "l1")
