"""A transformer block for the networks of the study that are to show what attention does alone."""

from timm.models.vision_transformer import Block
from torch import Tensor


class NoSkipBlock(Block):
    """timm's block without the skip connection around attention: nothing but attention carries tokens on."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: (batch, tokens, dim)."""
        x = self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
