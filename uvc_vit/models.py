"""T2T-ViT-14 and -19, which timm has not: its VisionTransformer with tokens-to-token patch embedding.

Known to timm as t2t_vit_14 and t2t_vit_19 once this file is imported.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.runs import CheckpointError

SIZES = {14: {"embed_dim": 384, "depth": 14, "num_heads": 6}, 19: {"embed_dim": 448, "depth": 19, "num_heads": 7}}
UNFOLDS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride, padding
WIDTH, FEATURES = 64, 32
THEIRS = "tokens_to_token."  # before the patch embedding's names in the authors' checkpoints


class Performer(nn.Module):
    """One block of linear attention, with positive random features for softmax's kernel.

    Args:
        dim: channels of an incoming token; outgoing ones have 64.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(WIDTH)
        self.kqv = nn.Linear(dim, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1))
        self.drop = nn.Dropout(0.1)
        features = nn.init.orthogonal_(torch.empty(FEATURES, WIDTH)) * math.sqrt(FEATURES)
        self.w = nn.Parameter(features, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to (batch, tokens, 64); time and memory linear in the tokens."""
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        k, q = self.features(k), self.features(q)
        norm = q @ k.sum(1)[..., None] + 1e-8
        x = v + self.drop(self.proj(q @ (k.transpose(1, 2) @ v) / norm))
        return x + self.mlp(self.norm2(x))

    def features(self, u: Tensor) -> Tensor:
        """exp(W u - |u|^2 / 2) / sqrt(32), (batch, tokens, 32)."""
        return torch.exp(u @ self.w.T - u.square().sum(-1, keepdim=True) / 2) / math.sqrt(FEATURES)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one image; sums over tokens, norms and activations are not counted."""
        linear = self.kqv.weight.numel() + 3 * WIDTH * WIDTH  # kqv, proj, two layers of the MLP
        kernel = 2 * WIDTH * FEATURES + 2 * FEATURES * WIDTH + FEATURES  # W k, W q; k'v, q(k'v); q sum(k)
        return tokens * (linear + kernel)


class TokensToToken(nn.Module):
    """Patches by three overlapping unfoldings with linear attention in between: stride 16 in all.

    Args:
        img_size: side of the images.
        in_chans: their channels.
        embed_dim: of a token.
    """

    def __init__(self, img_size: int = 224, in_chans: int = 3, embed_dim: int = 384, **unused: Any) -> None:
        super().__init__()
        self.in_chans, self.patch_size = in_chans, (16, 16)
        self.grid_size = (img_size // 16, img_size // 16)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.attention1 = Performer(in_chans * UNFOLDS[0][0] ** 2)
        self.attention2 = Performer(WIDTH * UNFOLDS[1][0] ** 2)
        self.project = nn.Linear(WIDTH * UNFOLDS[2][0] ** 2, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, height width / 256, embed_dim)."""
        for unfold, attention in zip(UNFOLDS, (self.attention1, self.attention2), strict=False):
            size = [_unfolded(side, unfold) for side in x.shape[-2:]]
            x = attention(_tokens(x, unfold)).transpose(1, 2).unflatten(-1, size)
        return self.project(_tokens(x, UNFOLDS[2]))

    def macs(self, input_size: tuple[int, int]) -> int:
        """Multiply-adds for one image of (height, width)."""
        total, sides = 0, input_size
        for unfold, attention in zip(UNFOLDS, (self.attention1, self.attention2), strict=False):
            sides = (_unfolded(sides[0], unfold), _unfolded(sides[1], unfold))
            total += attention.macs(sides[0] * sides[1])
        return total + math.prod(_unfolded(side, UNFOLDS[2]) for side in sides) * self.project.weight.numel()


def t2t_vit(layers: Literal[14, 19], **options: Any) -> VisionTransformer:
    """T2T-ViT with a fixed sinusoid position table, weights random.

    Args:
        layers: 14 (384 channels, 6 heads) or 19 (448 channels, 7 heads).
        options: of timm's VisionTransformer, such as img_size and num_classes.
    """
    sizes: dict[str, Any] = {"patch_size": 16, "mlp_ratio": 3.0, "qkv_bias": False, **SIZES[layers]}
    norm = partial(nn.LayerNorm, eps=1e-5)
    model = VisionTransformer(embed_layer=TokensToToken, norm_layer=norm, **(sizes | options))
    table = sinusoids(model.patch_embed.num_patches + 1, model.embed_dim)
    model.pos_embed = nn.Parameter(table[None], requires_grad=False)
    return model


@register_model
def t2t_vit_14(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """`t2t_vit` of 14 layers. Raises RuntimeError on `pretrained`: its weights are the user's, see `t2t_weights`."""
    return _registered(14, pretrained, options)


@register_model
def t2t_vit_19(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """`t2t_vit` of 19 layers, likewise."""
    return _registered(19, pretrained, options)


def _registered(layers: Literal[14, 19], pretrained: bool, options: dict[str, Any]) -> VisionTransformer:
    if pretrained:
        raise RuntimeError("no weights to download; give the T2T authors' file as model.weights")
    ours = {key: value for key, value in options.items() if key not in ("pretrained_cfg", "pretrained_cfg_overlay")}
    return t2t_vit(layers, **{key: value for key, value in ours.items() if key != "cache_dir"})


def t2t_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of the T2T authors, under our names. Raises CheckpointError where it is none."""
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
        state = tree.get("state_dict_ema") or tree.get("state_dict") or tree
        return {
            f"patch_embed.{key.removeprefix(THEIRS)}" if key.startswith(THEIRS) else key: state[key] for key in state
        }
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:  # what a damaged or forged file may raise has no common class
        raise CheckpointError(f"{path}: not a checkpoint of the T2T authors") from error


def sinusoids(positions: int, dim: int) -> Tensor:
    """sin (even channels) and cos (odd ones) of position / 10000^(2 (channel // 2) / dim); (positions, dim)."""
    channel = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(positions)[:, None] / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def _unfolded(side: int, unfold: tuple[int, int, int]) -> int:
    kernel, stride, padding = unfold
    return (side + 2 * padding - kernel) // stride + 1


def _tokens(x: Tensor, unfold: tuple[int, int, int]) -> Tensor:
    kernel, stride, padding = unfold
    return F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2)
