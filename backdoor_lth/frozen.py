"""A network held still while it is measured or attacked."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain

from torch import Tensor, nn
from torch.func import functional_call


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients of the weights; modes and flags come back afterwards, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def stateless(model: nn.Module, state: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The model with another complete state, as a function of its inputs; what has two names is taken by the first."""
    own = {name for name, _ in chain(model.named_parameters(), model.named_buffers())}
    return partial(functional_call, model, {name: value for name, value in state.items() if name in own})
