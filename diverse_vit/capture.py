"""Capture: hooks that keep what goes into or comes out of some modules during one forward pass.

Hooks are bound methods of a Tap each, so a deep copy of the network (a moving average, say) gets taps of its own, which
nobody opens. They keep references and compute nothing: activation checkpointing may run them again.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Call = tuple[tuple[Any, ...], Mapping[str, Any]]  # positional and named arguments
Watched = Mapping[str, tuple[Literal["input", "output"], nn.Module]]


class Tap:
    """Keeps the last call of one module while it is open."""

    def __init__(self) -> None:
        self.open = False
        self.kept: Any = None
        self.saw_gradients = False

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward-pre-hook with keyword arguments."""
        if self.open:
            self.kept, self.saw_gradients = (args, kwargs), torch.is_grad_enabled()

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook."""
        if self.open:
            self.kept, self.saw_gradients = output, torch.is_grad_enabled()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tap":
        return Tap()


class Capture:
    """Hooks on the modules of `watched`, from `attach` to `detach`.

    Args:
        watched: by name: "input" or "output", and a module.
    """

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self._taps: dict[str, Tap] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether the hooks are there."""
        return len(self._handles) == len(self.watched)

    def attach(self) -> None:
        """Put the hooks in place; nothing happens where they are."""
        if self._handles:
            return
        for name, (kind, module) in self.watched.items():
            tap = self._taps[name] = Tap()
            if kind == "input":
                handle = module.register_forward_pre_hook(tap.on_input, with_kwargs=True)
            else:
                handle = module.register_forward_hook(tap.on_output)
            self._handles.append(handle)

    def detach(self) -> None:
        """Remove the hooks without a trace."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._taps = [], {}

    def run(self, model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The network's output and, by name, the watched inputs (a `Call`) and outputs; nothing is kept here.

        Raises:
            RuntimeError: if the hooks are not attached, or did not fire.
            ValueError: if a watched module ran without gradients inside a forward with them.
        """
        if not self.attached:
            raise RuntimeError("the hooks are detached: call attach() first")
        try:
            for tap in self._taps.values():
                tap.open = True
            output = model(images)
            seen = {name: tap.kept for name, tap in self._taps.items()}
            lost = torch.is_grad_enabled() and not all(tap.saw_gradients for tap in self._taps.values())
        finally:
            for tap in self._taps.values():
                tap.open, tap.kept = False, None
        if missed := [name for name, kept in seen.items() if kept is None]:
            raise RuntimeError(f"the hook on {missed[0]} did not fire: attach before the first compiled call")
        if lost:
            raise ValueError("checkpointing must not be reentrant, which loses gradients: set use_reentrant=False")
        return output, seen
