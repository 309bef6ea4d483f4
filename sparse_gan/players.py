"""One of the two networks of a GAN in training: its optimiser, its masks and what moves them."""

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common import distributed
from common.masks import Masks
from sparse_gan.dynamic_sparsity import DynamicSparsity
from sparse_gan.masked_adam import MaskedAdam

Dynamic = Callable[[nn.Module, torch.optim.Optimizer, Masks], DynamicSparsity]


class Player:
    """A network, Adam over its parameters, and masks that both obey.

    Args:
        module: masked at once, in place.
        masks: empty for a dense network.
        lr, betas: of Adam.
        dynamic: makes what moves the masks; None: they stay.
        dense_moments: torch's Adam with moments of all weights; `dynamic` must then mask.
        was_dense: an earlier phase trained all weights.
    """

    def __init__(
        self,
        module: nn.Module,
        masks: Masks,
        lr: float,
        betas: tuple[float, float],
        dynamic: Dynamic | None = None,
        dense_moments: bool = False,
        was_dense: bool = False,
    ) -> None:
        self.module, self.masks, self._lr = module, masks, lr
        self.optimizer: torch.optim.Optimizer
        if dense_moments:
            self.optimizer = torch.optim.Adam(module.parameters(), lr, betas, fused=True)
        else:
            self.optimizer = MaskedAdam(module, masks, lr, betas)
        self.dynamic = dynamic(module, self.optimizer, masks) if dynamic else None
        self._ever = Masks({name: torch.ones_like(m) if was_dense else m.clone() for name, m in masks.items()})

    def descend(self, loss: Tensor, lr_factor: float = 1.0) -> None:
        """Back-propagate `loss` and take one step; the topology moves where it is due."""
        self.optimizer.zero_grad()
        loss.backward()
        distributed.synchronize(self.module)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * lr_factor
        self.optimizer.step()
        if self.dynamic is not None and self.dynamic.step():
            self.require_equal_masks()

    def go_on_under(self, masks: Masks) -> None:
        """Take other masks: what is new among them starts from zero."""
        assert isinstance(self.optimizer, MaskedAdam)
        for name, mask in masks.items():
            self.optimizer.set_mask(self.module.get_parameter(name), mask, mask & self.masks[name])
            self._ever[name] |= mask
        self.masks.update(masks)
        self.require_equal_masks()

    @property
    def explored(self) -> float:
        """Share of maskable weights that have ever been active."""
        if self.dynamic is not None:
            return self.dynamic.explored_fraction()
        return self._ever.density if self._ever else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Everything of this player, as plain data."""
        return {
            "module": self.module.state_dict(),
            "masks": self.masks.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "dynamic": self.dynamic.state_dict() if self.dynamic else None,
            "ever": self._ever.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set back to a `state_dict` of a player made alike."""
        self.module.load_state_dict(state["module"])
        for masks, saved in ((self.masks, state["masks"]), (self._ever, state["ever"])):
            masks.update({name: mask.to(masks[name].device) for name, mask in saved.items()})
        self.optimizer.load_state_dict(state["optimizer"])
        if self.dynamic is not None:
            self.dynamic.load_state_dict(state["dynamic"])

    def require_equal_masks(self) -> None:
        """Raise where the masks differ between the ranks of a data-parallel run."""
        if distributed.world_size() == 1:
            return
        mine = float(sum(zlib.crc32(mask.cpu().numpy().tobytes()) for mask in self.masks.values()))
        if distributed.any_rank(distributed.mean(mine) != mine):
            raise RuntimeError("masks must be equal on all ranks, got different ones")
