"""Pixel unshuffle: 2x2 neighbouring patches become one token with 4 times the channels.

N tiles, P patches of a tile (side x side, without CLS), C vision width, L = P/4 tokens.
Source: InternVL modeling_internvl_chat.py:257 @2410d1d, there called pixel_shuffle (ps_version v2).
"""
import torch
from torch import nn


def pixel_unshuffle(x: torch.Tensor) -> torch.Tensor:
    """Join each 2x2 square of patches into one token: float[N, side, side, C] -> float[N, side/2, side/2, 4C].

    Channel order is (dy, dx, c), c fastest: patches 1 2 / 3 4 of a 2x2 square become the one token 1 2 3 4.
    Not F.pixel_unshuffle, which orders (c, dy, dx): `mlp1` was trained on ours.
    """
    N, height, width, C = x.shape
    if height % 2 or width % 2:
        raise ValueError(f"pixel unshuffle needs even sides, got {height}x{width}; a 448 px tile gives 32x32 patches")
    x = x.view(N, height // 2, 2, width // 2, 2, C)         # (N, y, dy, x, dx, C)
    x = x.permute(0, 1, 3, 2, 4, 5)                         # (N, y, x, dy, dx, C)
    return x.reshape(N, height // 2, width // 2, 4 * C)


class PixelUnshuffle(nn.Module):
    """float[N, P, C] -> float[N, L, 4C]: patches in rows of `side`, tokens row by row. Holds no weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        N, P, C = x.shape
        side = round(P ** 0.5)
        if side * side != P:
            raise ValueError(f"{P} patches do not form a square; drop the CLS token first (expected e.g. 1024 = 32x32)")
        return pixel_unshuffle(x.reshape(N, side, side, C)).flatten(1, 2)          # (N, L, 4C)
