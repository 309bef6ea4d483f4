"""What folding leaves of a network: the computation of its kept channels, (n, kept, height, width) at every node."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Run = Callable[..., Tensor]


class Compacted(nn.Module):
    """The computation that is left: eval only. `widths` are the channels computed at each node, by its name."""

    def __init__(self, program: list[tuple[str, Run, list[str]]], widths: dict[str, int], like: Tensor) -> None:
        super().__init__()
        self.register_buffer("anchor", like.new_zeros(()), persistent=False)
        self.program, self.widths = program, widths
        self.training = False

    def train(self, mode: bool = True) -> "Compacted":
        """Only `eval()` is allowed. Raises RuntimeError."""
        if mode:
            raise RuntimeError("a compacted network must stay in eval mode: its batch norm is folded")
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the network it was made of."""
        values = {"input": x}
        for name, run, arguments in self.program:
            values[name] = run(*(values[argument] for argument in arguments))
        return values["output"]


def layer(module: nn.Module, bias: Tensor, kept: Tensor, inputs: Tensor) -> Run:
    """A convolution or linear layer from kept inputs to kept outputs, constants of the dead inputs in its bias."""
    assert isinstance(module.weight, Tensor)
    weight, bias = module.weight[kept][:, inputs].contiguous(), bias[:, kept].contiguous()
    if isinstance(module, nn.Linear):
        return lambda x: F.linear(x, weight, bias[0])
    assert isinstance(module, nn.Conv2d)
    stride, padding, dilation = module.stride, module.padding, module.dilation
    if bool((bias == bias[..., :1, :1]).all()):
        flat = bias[0, :, 0, 0].contiguous()
        return lambda x: F.conv2d(x, weight, flat, stride, padding, dilation)
    return lambda x: F.conv2d(x, weight, None, stride, padding, dilation) + bias


def total(bias: Tensor, kept: Tensor, inputs: list[Tensor]) -> Run:
    """A sum of one or two terms that may have different kept channels; constants of the dead ones included."""
    bias = bias[:, kept].contiguous()
    places = [torch.searchsorted(kept, each) for each in inputs]
    whole = [len(each) == len(kept) for each in inputs]
    plain = not bias.any()

    def run(*terms: Tensor) -> Tensor:
        if all(whole):
            found = terms[0] + terms[1] if len(terms) == 2 else terms[0]
            return found if plain else found + bias
        found = bias.expand(len(terms[0]), *bias.shape[1:])
        for term, place in zip(terms, places, strict=True):
            found = found.index_add(1, place, term)
        return found

    return run
