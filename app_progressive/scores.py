"""What each weight is worth before a mask is chosen: SNIP, Taylor, magnitude, random, GraSP, SynFlow (spec c, Scores).

Nothing of the model changes: weights under the mask and clones of the buffers go through `functional_call`, and
training flags and random states are put back.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from app_progressive.prunable import inner, prunable
from common.masks import random_scores

CRITERIA = ("snip", "taylor", "mag", "random", "grasp", "synflow")
BLIND = ("mag", "random")  # these look at no data
TEMPERATURE, PER_CLASS = 200.0, 10  # of GraSP

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
Reduce = Callable[[list[Tensor]], None]


def scores(
    model: nn.Module,
    batches: Batches | None,
    criterion: str = "snip",
    loss_fn: Loss = F.cross_entropy,
    params: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    train_bn: bool = True,
    generator: torch.Generator | None = None,
    reduce: Reduce | None = None,
) -> dict[str, Tensor]:
    """Scores of the weights `params`; the larger, the more a weight is worth. The model is left as it is, bit for bit.

    snip: |w sum_b dL_b/d(m w)| over batches b, divided by its sum over all weights. taylor: |m w sum_b dL_b/d(m w)|.
    mag: |w|. random: uniform. grasp: w d<g1, g2>/dw, signed, over |sum| + 1e-10, with g1 (held fixed) and g2 the
    gradients of the loss of logits / 200 on 10 samples a class each. synflow: |w d(sum of outputs)/dw| of the network
    made absolute, in eval mode, on ones, in float64; over the largest where the weights' type cannot hold that.

    Args:
        model: any network; of a wrapped or compiled one the inner network, under its names.
        batches: (x, y) on the model's device; every batch counts the same, whatever its size. Not read by mag, random.
        criterion: one of the above.
        loss_fn: (logits, y) -> mean loss of a batch.
        params: parameter name -> the values to score; all convolution weights as they are if None.
        masks: name -> 0/1 of each of them, in force during the passes; none if None.
        train_bn: batch statistics, as in training (synflow: never).
        generator: of random, and of the two draws of grasp, which without one takes the first samples for both.
        reduce: averages tensors over ranks in place: gradients, before anything else is made of them, so that ranks
            with batches of their own find the scores of all batches together.

    Raises:
        ValueError: unknown criterion, no batches, fewer than 10 samples of a class for grasp, NaN or Inf in a score.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    model = inner(model)
    params = prunable(model) if params is None else params
    if not params:
        raise ValueError("params must hold a weight to score, got none")
    if masks and (lacking := sorted(params.keys() - masks.keys())):
        raise ValueError(f"masks must hold one for each weight to score, got none for {lacking[0]}")
    weights = {name: weight.detach() for name, weight in params.items()}
    live = {name: weight * masks[name] if masks else weight for name, weight in weights.items()}
    if criterion == "mag":
        found = {name: weight.abs() for name, weight in weights.items()}
    elif criterion == "random":
        found = random_scores(weights, generator or torch.Generator().manual_seed(0))
    else:
        with _undisturbed(model, training=train_bn and criterion != "synflow"):
            first, batches = _first(batches)
            if criterion == "grasp":
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                    found = _grasp(model, weights, live, batches, loss_fn, generator, reduce)
            elif criterion == "synflow":
                found = _synflow(model, live, first)
            else:
                gradients = _gradients(model, live, batches, loss_fn)
                _reduced(list(gradients.values()), reduce)
                chosen = weights if criterion == "snip" else live
                found = {name: (gradients[name] * chosen[name]).abs() for name in weights}
        if criterion == "snip":
            total = sum(float(score.sum()) for score in found.values())
            found = {name: score / total if total else score for name, score in found.items()}
    for name, score in found.items():
        if not score.isfinite().all():
            raise ValueError(f"score {name} must be finite, got NaN or Inf")
    return found


def _first(batches: Batches | None) -> tuple[tuple[Tensor, Tensor], Batches]:
    """The first batch, and all of them."""
    iterator = iter(batches if batches is not None else ())
    first = next(iterator, None)
    if first is None:
        raise ValueError("batches must hold at least one (x, y), got none")

    def whole() -> Iterator[tuple[Tensor, Tensor]]:
        yield first
        yield from iterator

    return first, whole()


@contextlib.contextmanager
def _undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode for the time being, and random states (dropout draws) put back afterwards."""
    flags = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(list(devices)), torch.enable_grad():
            model.train(training)
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def _reduced(gradients: list[Tensor], reduce: Reduce | None) -> None:
    if reduce is not None:
        reduce(gradients)


def _call(model: nn.Module, leaves: Mapping[str, Tensor], x: Tensor) -> Tensor:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return functional_call(model, {**buffers, **leaves}, (x,))  # type: ignore[no-any-return]


def _leaves(live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.clone().requires_grad_() for name, weight in live.items()}


def _gradients(model: nn.Module, live: Mapping[str, Tensor], batches: Batches, loss_fn: Loss) -> dict[str, Tensor]:
    """Sum over batches of dL_b/d(m w), zero (with a warning) for weights the loss does not depend on."""
    leaves = _leaves(live)
    sums = {name: torch.zeros_like(weight) for name, weight in live.items()}
    used: set[str] = set()
    for x, y in batches:
        loss = loss_fn(_call(model, leaves, x), y)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient
                used.add(name)
    _warn_unused(set(leaves) - used)
    return sums


def _warn_unused(names: set[str]) -> None:
    if names:
        warnings.warn(f"no gradient reaches {', '.join(sorted(names))}: scored 0", stacklevel=4)


def some_of_each_class(
    batches: Batches, classes: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """10 samples of each class, in order of class: the first, or drawn. Raises ValueError where a class has fewer."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = torch.arange(len(y)) if generator is None else torch.randperm(len(y), generator=generator)
    order = order.to(y.device)
    rows = [order[y[order] == label][:PER_CLASS] for label in range(classes)]
    for label, found in enumerate(rows):
        if len(found) < PER_CLASS:
            raise ValueError(f"batches must hold {PER_CLASS} samples of class {label} for grasp, got {len(found)}")
    return x[torch.cat(rows)], y[torch.cat(rows)]


def _grasp(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
    batches: Batches,
    loss_fn: Loss,
    generator: torch.Generator | None,
    reduce: Reduce | None,
) -> dict[str, Tensor]:
    kept = list(batches)
    leaves = _leaves(live)
    classes = _call(model, leaves, kept[0][0]).shape[1]

    def gradients(create_graph: bool) -> tuple[Tensor | None, ...]:
        x, y = some_of_each_class(kept, classes, generator)
        loss = loss_fn(_call(model, leaves, x) / TEMPERATURE, y)
        return torch.autograd.grad(loss, list(leaves.values()), create_graph=create_graph, allow_unused=True)

    still, moving = gradients(False), gradients(True)
    _reduced([gradient for gradient in still if gradient is not None], reduce)
    pairs = list(zip(still, moving, strict=True))
    _warn_unused({name for name, gradient in zip(leaves, moving, strict=True) if gradient is None})
    product = torch.stack([(g1 * g2).sum() for g1, g2 in pairs if g1 is not None and g2 is not None]).sum()
    found = torch.autograd.grad(product, list(leaves.values()), allow_unused=True, materialize_grads=True)
    _reduced(list(found), reduce)
    signed = {name: weights[name] * gradient for name, gradient in zip(leaves, found, strict=True)}
    norm = abs(sum(float(score.sum()) for score in signed.values())) + 1e-10
    return {name: score / norm for name, score in signed.items()}


def _synflow(model: nn.Module, live: Mapping[str, Tensor], first: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    buffers = dict(model.named_buffers())  # those that are not saved as well
    values = {**buffers, **{name: value.detach().abs() for name, value in model.state_dict().items()}, **live}
    values = {name: value.double() if value.is_floating_point() else value for name, value in values.items()}
    leaves = _leaves({name: values[name].abs() for name in live})
    output = _call(model, {**values, **leaves}, torch.ones_like(first[0][:1], dtype=torch.float64))
    gradients = torch.autograd.grad(output.sum(), list(leaves.values()), allow_unused=True)
    _warn_unused({name for name, gradient in zip(leaves, gradients, strict=True) if gradient is None})
    found = {
        name: torch.zeros_like(weight) if gradient is None else (weight * gradient).abs().detach()
        for (name, weight), gradient in zip(leaves.items(), gradients, strict=True)
    }
    largest = max(score.max().item() for score in found.values())
    limit = min(torch.finfo(weight.dtype).max for weight in live.values())
    return {name: (score / largest if largest > limit else score).to(live[name]) for name, score in found.items()}
