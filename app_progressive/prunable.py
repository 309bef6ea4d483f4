"""Which weights of a network are pruned, by the names of the network inside its wrappers."""

import fnmatch
from collections.abc import Sequence

from torch import nn

from common.masks import prunable_weights


def inner(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        for wrapper in ("_orig_mod", "module"):
            if isinstance(found := getattr(model, wrapper, None), nn.Module) and len(list(model.children())) == 1:
                model = found
                break
        else:
            return model


def prunable(
    model: nn.Module, include: tuple[type[nn.Module], ...] = (nn.Conv2d,), exclude: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Weights of the modules of these kinds, by name, but for names that fit a glob of `exclude` ("head*").

    Never biases or norms. A vision transformer: include=(nn.Linear,), exclude=("head*",). ValueError if none is left.
    """
    found = prunable_weights(inner(model), include)
    kept = {n: p for n, p in found.items() if not any(fnmatch.fnmatchcase(n, pattern) for pattern in exclude)}
    if not kept:
        raise ValueError(f"exclude must leave a weight to prune, got {list(exclude)}")
    return kept
