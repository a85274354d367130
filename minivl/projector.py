"""The projector `mlp1`: from the vision tower's language to the decoder's.

N tiles, L visual tokens per tile, C vision width, D language width.
Source: InternVL modeling_internvl_chat.py:89-94 @2410d1d.
"""
from torch import nn


def projector(vision_width: int, language_width: int) -> nn.Sequential:
    """Build the module float[N, L, 4C] -> float[N, L, D].

    Index 2 holds no weights, so the released names are mlp1.0, .1, .3.
    """
    return nn.Sequential(
        nn.LayerNorm(4 * vision_width, eps=1e-5),       # torch's default eps, not the tower's 1e-6
        nn.Linear(4 * vision_width, language_width),    # (N, L, D)
        nn.GELU(),                                      # exact (erf), not the tanh approximation
        nn.Linear(language_width, language_width),
    )
