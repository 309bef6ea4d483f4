"""T tickets of one architecture as one network (spec h.5): T times the channels, convolutions in T times the groups.

Per-channel batch norm is per-ticket batch norm, SGD and PGD work on entries alone, and the loss is the sum of the
tickets' mean losses, so every ticket trains as it would alone, up to the rounding of the convolutions. It pays where
batches are too small to fill the machine.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from common.masks import Masks
from double_win_lth.models import Normalize, head_name
from double_win_lth.tickets import Prunable, conv_weights, require_all_masked

MIXING = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
"""layers whose output of one channel depends on others, though they may have no parameters"""


class TicketBatch(nn.Module):
    """Networks of one architecture, side by side.

    Args:
        tickets: at least one; copied.

    Raises:
        ValueError: none, or tensors of other names or shapes. TypeError: a layer that cannot be grouped.
    """

    def __init__(self, tickets: Sequence[nn.Module]) -> None:
        super().__init__()
        if not tickets:
            raise ValueError("tickets must be at least one network, got none")
        _require_one_architecture(tickets)
        self.tickets = len(tickets)
        self.net = copy.deepcopy(tickets[0])
        for name, module in list(self.net.named_modules()):
            if next(module.children(), None) is not None:
                own = next((entry for entry, _ in _own_tensors(module)), "")
                if own:
                    raise TypeError(f"tickets can be grouped of layers alone, got a module with its own {own}")
            else:
                self.net.set_submodule(name, _side_by_side([ticket.get_submodule(name) for ticket in tickets]))
        self.train(tickets[0].training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), or (N, T, C, H, W) with images of each ticket's own -> logits (T, N, classes)."""
        if x.ndim == 4:
            x = x.unsqueeze(1).expand(-1, self.tickets, -1, -1, -1)
        return self.net(x.flatten(1, 2))

    def masks(self, masks: Sequence[Mapping[str, Tensor]]) -> Masks:
        """One ticket's masks each -> masks over the parameters of this network.

        Raises:
            ValueError: another number of masks, unequal names, or a name or shape that no parameter of a ticket has.
        """
        if len(masks) != self.tickets:
            raise ValueError(f"masks must be {self.tickets} as the tickets, got {len(masks)}")
        own, parameters, found = self.ticket_state(0), dict(self.net.named_parameters()), Masks()
        for name in dict.fromkeys(name for mask in masks for name in mask):
            if name not in parameters:
                raise ValueError(f"mask {name} must name a parameter of the tickets, got none of that name")
            for index, mask in enumerate(masks):
                shape = tuple(mask[name].shape) if name in mask else None
                if shape != tuple(own[name].shape):
                    got = shape or "none"
                    raise ValueError(f"mask {name} of ticket {index} must be {tuple(own[name].shape)}, got {got}")
            each = [mask[name] for mask in masks]
            found[f"net.{name}"] = torch.stack(each) if _is_head(self.net, name) else torch.cat(each)
        return found

    def ticket_state(self, index: int) -> dict[str, Tensor]:
        """The state dict of ticket `index`, as a network of its own has it."""
        state = {}
        for name, value in self.net.state_dict().items():
            alone = value if value.ndim == 0 else value.chunk(self.tickets)[index]
            state[name] = (alone[0] if _is_head(self.net, name) else alone).clone()
        return state


def stack_tickets(
    model: nn.Module,
    masks: Sequence[Mapping[str, Tensor]],
    heads: Sequence[nn.Linear] | None = None,
    prunable: Prunable = conv_weights,
) -> TicketBatch:
    """Tickets of `model` under T masks as one `TicketBatch`.

    Args:
        model: the pre-trained network; not changed.
        masks: one a ticket, over exactly the prunable weights.
        heads: a Linear for each ticket in place of the model's, with as many inputs, all of one shape; None keeps that.
        prunable: the weights that tickets mask, by name.

    Raises:
        ValueError: another number of heads, heads or masks that do not fit. TypeError: a layer that cannot be grouped.
    """
    if heads is not None and len(heads) != len(masks):
        raise ValueError(f"heads must be {len(masks)} as the masks, got {len(heads)}")
    tickets = []
    for index, mask in enumerate(masks):
        ticket = copy.deepcopy(model)
        require_all_masked(mask, prunable(ticket))
        Masks(mask).apply_(ticket)
        if heads is not None:
            inputs = ticket.get_submodule(head_name(ticket)).in_features
            if heads[index].in_features != inputs:
                raise ValueError(f"heads must have {inputs} inputs as the model's, got {heads[index].in_features}")
            ticket.set_submodule(head_name(ticket), heads[index])
        tickets.append(ticket)
    return TicketBatch(tickets)


class GroupedLinear(nn.Module):
    """The heads of T tickets: (N, T * features) -> (T, N, classes); weight (T, classes, features), bias or none."""

    bias: nn.Parameter | None

    def __init__(self, heads: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([head.weight.detach() for head in heads]))
        biases = [head.bias.detach() for head in heads if head.bias is not None]
        self.register_parameter("bias", nn.Parameter(torch.stack(biases)) if biases else None)

    def forward(self, x: Tensor) -> Tensor:
        tickets = len(self.weight)
        per_ticket = x.view(len(x), tickets, -1).transpose(0, 1)
        if self.bias is None:
            return torch.bmm(per_ticket, self.weight.transpose(1, 2))
        return torch.baddbmm(self.bias.unsqueeze(1), per_ticket, self.weight.transpose(1, 2))


def _require_one_architecture(tickets: Sequence[nn.Module]) -> None:
    shapes = [{name: tuple(value.shape) for name, value in ticket.state_dict().items()} for ticket in tickets]
    for index, own in enumerate(shapes):
        for name in (*shapes[0], *own):
            first, other = (each.get(name, "none") for each in (shapes[0], own))
            if first != other:
                raise ValueError(f"tickets must be of one architecture, got {name} {first} in 0, {other} in {index}")
    heads = sum(isinstance(module, nn.Linear) for module in tickets[0].modules())
    if heads > 1:
        raise TypeError(f"tickets can be grouped with one Linear layer, the head, got {heads}")


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _is_head(net: nn.Module, name: str) -> bool:
    return isinstance(net.get_submodule(name.rpartition(".")[0]), GroupedLinear)


def _side_by_side(modules: Sequence[nn.Module]) -> nn.Module:
    """One layer that does what T equal layers do, each on its share of the channels."""
    first, tickets = modules[0], len(modules)
    if isinstance(first, nn.Linear):
        return GroupedLinear(modules)  # type: ignore[arg-type]
    if isinstance(first, nn.Conv2d | nn.BatchNorm2d | Normalize):
        grouped = copy.deepcopy(first)
        for size in ("in_channels", "out_channels", "groups", "num_features"):
            if hasattr(first, size):
                setattr(grouped, size, tickets * getattr(first, size))
        for name, parameter in first.named_parameters():
            parts = [module.get_parameter(name).detach() for module in modules]
            setattr(grouped, name, nn.Parameter(torch.cat(parts), requires_grad=parameter.requires_grad))
        for name, buffer in first.named_buffers():
            if buffer.ndim:
                setattr(grouped, name, torch.cat([module.get_buffer(name) for module in modules]))
        return grouped
    mixes = isinstance(first, MIXING)
    if mixes or next(first.parameters(), None) is not None or next(first.buffers(), None) is not None:
        raise TypeError(f"tickets can be grouped of Conv2d, BatchNorm2d and Linear layers, got {type(first).__name__}")
    return copy.deepcopy(first)
