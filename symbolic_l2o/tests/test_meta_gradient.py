"""Facts about the meta-gradient: equal to the released first-order one and to autograd through the unroll."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from symbolic_l2o.inner import begin, run_window
from symbolic_l2o.meta_gradient import ForwardMode, meta_gradient, suffix_sums
from symbolic_l2o.presets import lambda_rule, presets
from symbolic_l2o.problems import Problem
from symbolic_l2o.teachers import LSTMTeacher
from symbolic_l2o.tests.vectors import FixtureProblem, load_teacher, reference, relative, tiny_problem
from symbolic_l2o.tuning import TunedRule

Learner = LSTMTeacher | TunedRule


def plain(learner: Learner, problem: Problem, windows: int, unroll: int, eta: float = 0.01) -> list[list[Tensor]]:
    """The oracle: autograd through the unrolled optimizee, gradients and features held constant."""
    parameters = list(learner.parameters())
    path, found, steps = begin(learner, problem, torch.Generator().manual_seed(0)), [], 0
    for _ in range(windows):
        x, state, total = path.x.detach(), [t.detach() for t in path.state], 0
        for _ in range(unroll):
            batch = problem.batch(7, steps, 0)
            total = total + problem.loss(x, batch)
            (g,) = torch.autograd.grad(problem.loss(leaf := x.detach().requires_grad_(), batch), leaf)
            out, state = learner.step(learner.features(g, path.moments), state)
            x, steps = x + eta * out, steps + 1
        total = total + problem.loss(x, problem.batch(7, steps, 1))
        found.append(list(torch.autograd.grad(total, parameters)))
        path.x, path.state = x, state
    return found


def ours(learner: Learner, problem: Problem, windows: int, unroll: int, **options: object) -> list[list[Tensor]]:
    path, found = begin(learner, problem, torch.Generator().manual_seed(0)), []
    for _ in range(windows):
        seen = run_window(learner, problem, path, unroll, (7,))
        parameters = list(learner.parameters())
        found.append(
            meta_gradient(learner.step, parameters, seen.gradients, seen.features, seen.start, **options)  # type: ignore[arg-type]
        )
    return found


def flat(found: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in found])


def double(problem: Problem) -> Problem:
    problem.module.double()
    problem.images = problem.images.double()
    return problem


def learners() -> dict[str, Learner]:
    torch.manual_seed(1)
    return {"rp_s": LSTMTeacher("rp_s"), "dm": LSTMTeacher("dm"), "pole": TunedRule(presets("rp_pole_mnist5k"))}


@pytest.mark.parametrize("stale", [False, True])
def test_the_window_of_the_released_code_is_reproduced(stale: bool) -> None:  # acceptance 7
    arrays = reference("meta_grad")
    teacher = load_teacher("rp_s", arrays, "net.")
    problem = FixtureProblem(arrays)
    path = begin(teacher, problem, torch.Generator())
    seen = run_window(teacher, problem, path, 6, (), stale_tail=stale)
    assert torch.allclose(seen.losses[:6], arrays["losses"], atol=1e-6)
    names = ("mat_0.weight", "mat_0.bias", "final_mat.weight", "final_mat.bias")
    assert torch.allclose(path.x, torch.cat([arrays[f"final.layers.{name}"].flatten() for name in names]), atol=1e-6)
    found = meta_gradient(
        teacher.step,
        list(teacher.parameters()),
        seen.gradients,
        seen.features,
        seen.start,
        stale_tail=seen.stale_tail,
    )
    wanted = load_teacher("rp_s", arrays, "released_grad." if stale else "corrected_grad.")
    for gradient, its in zip(found, wanted.parameters(), strict=True):
        assert relative(gradient, its.detach()) < 1e-5


@pytest.mark.parametrize("mode", ["suffix", "forward"])
def test_the_lambda_rule_of_the_released_code_is_reproduced(mode: str) -> None:  # acceptance 22
    arrays = reference("june_rule")
    rule = lambda_rule(float(arrays["coeff"]), sign=1)
    learner = TunedRule(rule, "raw")
    learner.features.eps = 1e-12
    problem = FixtureProblem(arrays)
    path = begin(learner, problem, torch.Generator())
    seen = run_window(learner, problem, path, 6, (), stale_tail=True)
    assert torch.allclose(seen.losses[:6], arrays["losses"], atol=1e-6)
    if mode == "suffix":
        (found,) = meta_gradient(
            learner.step, [learner.theta], seen.gradients, seen.features, seen.start, stale_tail=seen.stale_tail
        )
    else:
        forward = ForwardMode(learner.step_at, learner.theta, path.x, learner.init_state(path.x))
        for number, (g, z) in enumerate(zip(seen.gradients, seen.features, strict=False)):
            forward.see(g)
            if number == 5:
                forward.see(seen.stale_tail)  # type: ignore[arg-type]
            forward.step(z)
        found = forward.total
    assert relative(found, arrays["released_grad"]) < 1e-5


@pytest.mark.parametrize("kind", ["rp_s", "dm", "pole"])
def test_it_equals_autograd_through_the_unroll_in_single_and_double_precision(kind: str) -> None:  # acceptance 7, 11
    learner = learners()[kind]
    for one, wanted in zip(ours(learner, tiny_problem(), 3, 7), plain(learner, tiny_problem(), 3, 7), strict=True):
        assert relative(flat(one), flat(wanted)) < 1e-5
    learner.double()
    problem = double(tiny_problem())
    for one, wanted in zip(ours(learner, problem, 3, 7), plain(learner, problem, 3, 7), strict=True):
        assert relative(flat(one), flat(wanted)) < 1e-10


def test_the_template_gradient_is_the_derived_one() -> None:
    arrays = reference("template")
    W, gamma, scale = arrays["W"], arrays["gamma"], float(arrays["scale"])
    weights = W.clone().requires_grad_()

    def update(z: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        history = torch.cat([z[:, :, None], state[0]], 2)  # (P, F, 4)
        phi = gamma[:, None] * torch.tanh(history / gamma[:, None])
        return -(phi * weights.T).sum((1, 2)), [history[:, :, :-1]]

    start = [torch.zeros(9, 2, 3, dtype=torch.float64)]
    (found,) = meta_gradient(update, [weights], arrays["loss_grads"], arrays["features"], start, eta=scale)
    assert torch.allclose(found, arrays["dW"], atol=1e-12)


def test_the_example_worked_out_by_hand() -> None:  # acceptance 7
    weights = torch.ones(2, requires_grad=True)
    phi = torch.tensor([0.5, 0.25])
    gradients = torch.tensor([[9.0], [2.0], [-1.0]])

    def update(z: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return -(weights[0] * z[:, 0] + weights[1] * state[0]), [z[:, 0]]

    (found,) = meta_gradient(update, [weights], gradients, phi.view(2, 1, 1), [torch.zeros(1)])
    assert torch.allclose(found, torch.tensor([-0.0025, 0.005]))


def test_chunks_of_coordinates_change_nothing() -> None:  # acceptance 8
    learner = learners()["rp_s"]
    (whole,), (parts,) = (ours(learner, tiny_problem(), 1, 5, chunk=chunk) for chunk in (0, 9))
    assert relative(flat(parts), flat(whole)) < 1e-6


def test_subsampled_coordinates_are_right_on_average() -> None:  # acceptance 8
    learner, problem = learners()["rp_s"], tiny_problem()
    path = begin(learner, problem, torch.Generator().manual_seed(0))
    seen = run_window(learner, problem, path, 4, (7,))
    arguments = (learner.step, list(learner.parameters()), seen.gradients, seen.features, seen.start)
    exact, rng = flat(meta_gradient(*arguments)), torch.Generator().manual_seed(3)
    draws = []
    for _ in range(200):
        draws.append(flat(meta_gradient(*arguments, coords=torch.randperm(problem.size, generator=rng)[:10])))
    found = torch.stack(draws)
    error = found.std(0) / 200**0.5
    assert float(((found.mean(0) - exact).abs() / error.clamp(min=1e-12) < 3).float().mean()) > 0.98
    assert relative(found.mean(0), exact) < 0.2


def test_no_graph_of_the_optimizee_is_left_behind() -> None:  # acceptance 9
    learner, problem = learners()["rp_s"], tiny_problem()
    path = begin(learner, problem, torch.Generator().manual_seed(0))
    seen = run_window(learner, problem, path, 4, (7,))
    tensors = [seen.gradients, seen.features, seen.losses, path.x, *path.state, *path.moments.values()]
    assert not any(tensor.requires_grad for tensor in tensors)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        meta_gradient(learner.step, list(learner.parameters()), seen.gradients, seen.features, seen.start)
    assert saved and not any(len(shape) and shape[0] == problem.batch_size for shape in saved)


def test_the_optimizees_curvature_has_no_part_in_it() -> None:  # acceptance 10
    learner = learners()["rp_s"]
    target = torch.linspace(-1, 1, 5)

    class Flat(Problem):
        """Gradient x - target; with `bent` the same gradient by a linear function at every point."""

        bent = False

        def loss(self, x: Tensor, batch: object) -> Tensor:
            if self.bent:
                return (x * (x.detach() - target)).sum()
            return 0.5 * ((x - target) ** 2).sum()

    net = nn.Linear(4, 1)
    found = []
    for bent in (False, True):
        problem = Flat(net, torch.zeros(4, 4), torch.zeros(4).long(), init=0.3, batch_size=2)
        problem.bent = bent
        found.append(flat(ours(learner, problem, 1, 5)[0]))
    assert torch.equal(*found)


def test_forward_mode_equals_the_suffix_sums_window_by_window() -> None:
    learner, problem = learners()["pole"], tiny_problem()
    wanted = ours(learner, problem, 3, 6)
    path = begin(learner, problem, torch.Generator().manual_seed(0))
    forward = ForwardMode(learner.step_at, learner.theta, path.x, path.state)  # type: ignore[union-attr]
    for window in range(3):
        for step in range(6):
            _, g = problem.gradient(path.x, problem.batch(7, 6 * window + step, 0))
            forward.see(g)
            path.x = path.x + 0.01 * forward.step(learner.features(g, path.moments))
        forward.see(problem.gradient(path.x, problem.batch(7, 6 * window + 6, 1))[1])
        assert relative(forward.total, wanted[window][0]) < 1e-5
        forward.restart(learner.theta, path.x)  # type: ignore[union-attr]


def test_a_step_of_forward_mode_leaves_no_cycles_that_would_keep_its_tensors() -> None:
    learner = learners()["pole"]
    forward = ForwardMode(learner.step_at, learner.theta, torch.zeros(9), learner.init_state(torch.zeros(9)))  # type: ignore[union-attr]
    forward.step(torch.ones(9, 2))
    gc.collect()
    gc.disable()
    try:
        forward.step(torch.ones(9, 2))
        left = gc.collect()
    finally:
        gc.enable()
    assert left == 0


def test_forward_mode_keeps_no_more_for_a_longer_window() -> None:
    learner = learners()["pole"]
    forward = ForwardMode(learner.step_at, learner.theta, torch.zeros(9), learner.init_state(torch.zeros(9)))  # type: ignore[union-attr]
    sizes = []
    for _ in range(4):
        forward.see(torch.ones(9))
        forward.step(torch.randn(9, 2))
        sizes.append(sum(t.numel() for t in (forward.sensitivity, forward.total, *forward.tangents, *forward.state)))
    assert len(set(sizes)) == 1 and not forward.sensitivity.requires_grad


def test_suffix_sums_are_the_gradients_still_to_come() -> None:
    gradients = torch.tensor([[5.0], [1.0], [2.0], [4.0]])
    assert suffix_sums(gradients).flatten().tolist() == [7, 6, 4]
    assert suffix_sums(gradients, torch.tensor([10.0])).flatten().tolist() == [13, 12, 0]


@pytest.mark.parametrize("counts", [(3, 3), (1, 0), (5, 3)])
def test_gradients_that_do_not_fit_the_features_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="gradients must be one more than features"):
        meta_gradient(lambda z, s: (z, s), [], torch.zeros(counts[0], 2), torch.zeros(counts[1], 2, 1), [])
