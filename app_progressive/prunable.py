"""Which weights of a network are pruned, by the names of the network inside its wrappers."""

import fnmatch
from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from common.masks import prunable_weights


def inner(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":  # by name: importing its type loads the compiler
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def prunable(
    model: nn.Module, include: tuple[type[nn.Module], ...] = (nn.Conv2d,), exclude: str | Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Weights of the modules of these kinds, by name, but for names that fit a glob of `exclude` ("head*", or several).

    Never biases or norms. A vision transformer: include=(nn.Linear,), exclude=("head*",). ValueError if none is left,
    or two of these modules share one.
    """
    found = prunable_weights(inner(model), include)
    exclude = (exclude,) if isinstance(exclude, str) else exclude
    kept = {n: p for n, p in found.items() if not any(fnmatch.fnmatchcase(n, pattern) for pattern in exclude)}
    if not kept:
        raise ValueError(f"exclude must leave a weight to prune, got {list(exclude)}")
    first: dict[nn.Parameter, str] = {}
    for name, weight in kept.items():
        if first.setdefault(weight, name) != name:
            raise ValueError(
                f"model must have a weight of its own in each layer, got one for {first[weight]} and {name}"
            )
    return kept
