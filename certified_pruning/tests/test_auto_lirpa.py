"""auto_LiRPA 0.3, adapted: sound on graphs that are no chains, trainable, repaired where it silently fails."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from certified_pruning import auto_lirpa
from certified_pruning.auto_lirpa import METHODS, bounded, crown_ibp_margins, lirpa_margins
from certified_pruning.chain import ChainNet
from certified_pruning.errors import UnsupportedLayerError
from certified_pruning.ibp import input_box, margin_spec
from certified_pruning.optional import MissingPackageError
from certified_pruning.tests.nets import images, mlp, points, small_resnet

torch.set_num_threads(1)
installed = pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto_LiRPA is not installed")


class Case:
    def __init__(self, model: nn.Module, shape: tuple[int, ...], eps: float, n: int = 4) -> None:
        self.model, self.x = model, images(shape, n, seed=2)
        self.box = input_box(self.x, eps)
        with torch.no_grad():
            logits = model(self.x)
        self.y, self.classes = logits.argmax(1), logits.shape[1]
        self.C, _ = margin_spec(self.y, self.classes)


@pytest.fixture(scope="module")
def resnet() -> Case:
    return Case(small_resnet(), (1, 8, 8), 0.1)


@installed
def test_importing_the_file_changes_nothing_and_its_first_use_no_warning_filter_and_no_logger() -> None:
    code = (
        "import sys, torch, warnings, logging, certified_pruning.auto_lirpa as a; root = logging.getLogger();"
        "assert 'auto_LiRPA' not in sys.modules and 'numpy.lib.arraysetops' not in sys.modules;"
        "assert not hasattr(torch._C.Node, '__getitem__');"
        "before = list(warnings.filters), root.handlers[:], root.level;"
        "first = a.library(); assert first is a.library() and first.__version__ == '0.3';"
        "assert before == (list(warnings.filters), root.handlers[:], root.level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr


def test_a_missing_library_is_one_line_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "auto_LiRPA"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)
    auto_lirpa.library.cache_clear()
    try:
        with pytest.raises(MissingPackageError, match=r"^auto_LiRPA is not installed.*--no-deps auto_LiRPA==0\.3"):
            bounded(mlp([2, 2]), (2,))
    finally:
        auto_lirpa.library.cache_clear()


@installed
def test_alpha_crown_as_released_equals_crown_and_repaired_it_improves() -> None:
    """The README's sentence; as released it works on a torch whose clamp has a gradient at its bounds (2.9)."""
    bound = torch.ones((), requires_grad=True)
    bound.clamp(0, 1).backward()
    works = bool(bound.grad)
    case = Case(mlp([8, 20, 15, 6], 3), (8,), 0.12)
    graph = bounded(case.model, (8,))
    crown = lirpa_margins(graph, *case.box, case.C, "crown")
    released = lirpa_margins(graph, *case.box, case.C, "alpha-crown", 50, repaired=False)
    repaired = lirpa_margins(graph, *case.box, case.C, "alpha-crown", 50)
    assert torch.equal(released, crown) != works
    assert bool((repaired >= crown).all()) and (repaired - crown).max() > 0.005


@installed
def test_alpha_crown_takes_the_steps_of_the_call_else_those_of_the_graph() -> None:
    case = Case(mlp([8, 20, 15, 6], 3), (8,), 0.12)
    graph = bounded(case.model, (8,), steps=0)
    crown = lirpa_margins(graph, *case.box, case.C, "crown")
    assert torch.equal(lirpa_margins(graph, *case.box, case.C, "alpha-crown"), crown)
    assert not torch.equal(lirpa_margins(graph, *case.box, case.C, "alpha-crown", 20), crown)


@installed
def test_a_residual_net_that_our_engine_refuses_is_bounded(resnet: Case) -> None:
    with pytest.raises(UnsupportedLayerError, match="Residual"):
        ChainNet.from_module(resnet.model, (1, 8, 8))
    margins = [lirpa_margins(resnet.model, *resnet.box, resnet.C, method, steps=30) for method in METHODS]
    by_ibp, by_crown_ibp, by_crown, by_alpha = (lb.mean() for lb in margins)
    assert by_ibp < by_crown_ibp < by_crown < by_alpha


@installed
@pytest.mark.parametrize("method", METHODS)
def test_margins_at_random_points_of_the_box_are_above_the_bound_on_a_residual_net(resnet: Case, method: str) -> None:
    lb = lirpa_margins(resnet.model, *resnet.box, resnet.C, method, steps=20)
    inside = points(*resnet.box, 1000)
    with torch.no_grad():
        logits = resnet.model(inside.view(-1, 1, 8, 8)).view(*inside.shape[:2], -1)
    margins = torch.einsum("bso,bpo->bps", resnet.C, logits)
    assert bool((margins >= lb[:, None] - 1e-5).all())


@installed
@pytest.mark.parametrize("method", METHODS)
def test_on_a_box_of_one_point_every_bound_is_the_margin(resnet: Case, method: str) -> None:
    lb = lirpa_margins(resnet.model, resnet.x, resnet.x, resnet.C, method, steps=2)
    with torch.no_grad():
        margins = (resnet.C @ resnet.model(resnet.x)[:, :, None]).squeeze(2)
    torch.testing.assert_close(lb, margins, atol=1e-4, rtol=0)


@installed
def test_a_layer_with_nearly_all_neurons_unstable_keeps_its_shape() -> None:
    """T3: a union over the batch of more than 90 % and less than all unstable neurons breaks the library's default."""
    model = mlp([4, 40, 3], 0)
    model[0].bias.data = -model[0].weight.data.sum(1) / 2  # pre-activations symmetric about 0 on [0, 1]^4
    model[0].bias.data[0] = 100.0
    case = Case(model, (4,), 0.5, n=3)
    x_lb, x_ub = torch.zeros(3, 4), torch.ones(3, 4)
    lb = lirpa_margins(model, x_lb, x_ub, case.C, "alpha-crown", steps=3)
    assert bool((lb >= lirpa_margins(model, x_lb, x_ub, case.C, "crown")).all())


@installed
def test_bounding_leaves_weights_statistics_and_modes_alone_and_shares_them(resnet: Case) -> None:
    model = copy.deepcopy(resnet.model).train()
    model[2].norm.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    graph = bounded(model, (1, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert set(map(id, graph.parameters())) == set(map(id, model.parameters()))
    graph(resnet.x)
    assert not torch.equal(model[3].norm.running_mean, before["3.norm.running_mean"])


@installed
@pytest.mark.parametrize("method", METHODS)
def test_bounds_leave_no_gradient_and_keep_which_weights_are_trained(resnet: Case, method: str) -> None:
    model = copy.deepcopy(resnet.model)
    model[0].bias.requires_grad_(False)
    lb = lirpa_margins(model, *resnet.box, resnet.C, method, steps=2)
    assert not lb.requires_grad
    assert all(p.grad is None and p.requires_grad == (p is not model[0].bias) for p in model.parameters())


@installed
def test_only_the_clean_forward_updates_running_statistics(resnet: Case) -> None:
    model = copy.deepcopy(resnet.model).train()
    graph = bounded(model, (1, 8, 8))
    graph(resnet.x)
    before = copy.deepcopy(dict(model.named_buffers()))
    crown_ibp_margins(graph, *resnet.box, resnet.C, 0.5).sum().backward()
    statistics = [name for name in before if "running" in name]
    assert statistics and all(torch.equal(dict(model.named_buffers())[name], before[name]) for name in statistics)


@installed
def test_a_step_of_crown_ibp_training_raises_the_bounds_of_a_residual_net(resnet: Case) -> None:
    model = copy.deepcopy(resnet.model)
    graph = bounded(model, (1, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    lb = crown_ibp_margins(graph, *resnet.box, resnet.C, 0.5)
    (-lb.mean()).backward()
    optimizer.step()
    assert crown_ibp_margins(graph, *resnet.box, resnet.C, 0.5).mean() > lb.mean() + 1e-3


@installed
def test_wrong_arguments_are_named(resnet: Case) -> None:
    graph = bounded(resnet.model, (1, 8, 8))
    lower, upper = resnet.box
    with pytest.raises(ValueError, match=r"method must be one of ibp, crown-ibp, crown, alpha-crown, got 'deeppoly'"):
        lirpa_margins(graph, lower, upper, resnet.C, "deeppoly")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"C must have shape \(4, S, 5\), got \(4, 4, 4\)"):
        lirpa_margins(graph, lower, upper, resnet.C[:, :, :4])
    with pytest.raises(ValueError, match="x_lb must be <= x_ub"):
        lirpa_margins(graph, upper + 1, lower, resnet.C)
    with pytest.raises(ValueError, match=r"eps_frac must be in \[0, 1\], got 1.5"):
        crown_ibp_margins(graph, lower, upper, resnet.C, 1.5)
    with pytest.raises(ValueError, match="steps must be >= 0, got -1"):
        lirpa_margins(graph, lower, upper, resnet.C, steps=-1)
    with pytest.raises(ValueError, match="model must be in eval mode"):
        lirpa_margins(small_resnet().train(), lower, upper, resnet.C)
    with pytest.raises(ValueError, match="pre must have bounds of 5 ReLU layers, got 0"):
        lirpa_margins(graph, lower, upper, resnet.C, pre=[])


@installed
def test_a_graph_the_library_cannot_parse_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(1).values

    with pytest.raises(ValueError, match=r"^model must be a graph that auto_LiRPA 0\.3 can parse, got [^\n]+$"):
        bounded(nn.Sequential(nn.Linear(3, 3), Sorted()), (3,))
