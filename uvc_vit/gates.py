"""Gates around the blocks of a vision transformer: x + keep (block(x) - x), one gate a block (Sec. 3, Fig. 2)."""

from typing import Any

import torch
from torch import Tensor, nn

from uvc_vit.gate_values import gumbel, noisy_keep


class Gates(nn.Module):
    """The gates' logits, and how far each block runs in the current forward.

    In training a block runs by its noisy gate, in evaluation it runs or is skipped, whichever logit is larger; in
    warm-up every block runs by half in both.

    Args:
        blocks: number of blocks.
        tau: temperature of the noise.
        hard: noisy gates are 0 or 1 in forward.
    """

    def __init__(self, blocks: int, tau: float = 0.5, hard: bool = False) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([[-1.0, 1.0]]).repeat(blocks, 1))
        self.tau, self.hard = tau, hard
        self.free = [True] * blocks  # others always run
        self.warm_up = False
        self.generator: torch.Generator | None = None
        self.keep: Tensor | list[bool] = self.open()

    def open(self) -> list[bool]:
        """Which blocks run in evaluation."""
        runs = (self.logits[:, 1] > self.logits[:, 0]).tolist()
        return [run or not free for run, free in zip(runs, self.free, strict=True)]

    @torch.compiler.disable
    def draw(self, training: bool) -> None:
        """Set `keep` for one forward: numbers in training and warm-up, else decisions.

        Noise comes from `generator`, or from the global one of the CPU: every rank that draws alike gates alike.
        """
        if self.warm_up:
            self.keep = torch.full_like(self.logits[:, 0].detach(), 0.5)
        elif not training:
            self.keep = self.open()
        else:
            noise = gumbel(tuple(self.logits.shape), self.generator).to(self.logits)
            keep, _ = noisy_keep(self.logits, noise, self.tau)
            if self.hard:
                keep = (keep > 0.5).to(keep) + keep - keep.detach()
            self.keep = torch.where(torch.tensor(self.free, device=keep.device), keep, 1.0)


class GatedBlock(nn.Module):
    """A block with its gate.

    Args:
        block: maps (batch, tokens, dim) to the same shape.
        gates: of all blocks; not a part of this module, so that its logits are no weights of the model.
        index: of this block.
    """

    def __init__(self, block: nn.Module, gates: Gates, index: int) -> None:
        super().__init__()
        self.block = block
        self.index = index
        object.__setattr__(self, "gates", gates)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (batch, tokens, dim); further arguments are the block's."""
        keep = self.gates.keep[self.index]  # type: ignore[index,union-attr]
        if isinstance(keep, Tensor):
            return x + keep.to(x.dtype) * (self.block(x, *args, **kwargs) - x)
        return self.block(x, *args, **kwargs) if keep else x


class Attachment:
    """Gates put around a model's blocks until `remove`: one draw for each forward of the model.

    Raises RuntimeError where there are gates already.
    """

    def __init__(self, model: nn.Module, gates: Gates) -> None:
        self.blocks: nn.Sequential = model.get_submodule("blocks")  # type: ignore[assignment]
        if any(isinstance(block, GatedBlock) for block in self.blocks):
            raise RuntimeError("model has the gates of another controller in it: detach() that one first")
        for index, block in enumerate(self.blocks):
            self.blocks[index] = GatedBlock(block, gates, index)
        self.handle = model.register_forward_pre_hook(lambda module, inputs: gates.draw(module.training))

    def remove(self) -> None:
        """Leave the model as it was."""
        self.handle.remove()
        for index, gated in enumerate(self.blocks):
            self.blocks[index] = gated.block  # type: ignore[assignment]
