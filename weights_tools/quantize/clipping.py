"""Clipping: the largest weights of a group are cut off where smaller steps for the others are worth more.

O outputs, I inputs of a linear, g group size.
Source: AWQ arXiv:2306.00978, section 5; mit-han-lab/llm-awq awq/quantize/auto_clip.py @460d6d45.
"""
from __future__ import annotations

import torch

from weights_tools.quantize.rounding import GROUP, nearest

SHARES = tuple(1 - i / 20 for i in range(10))       # of a group's largest weight; 1 cuts nothing
# Errors of q and k meet in a product and a softmax, which an error of either alone does not foresee: left as they are,
# as in the paper's code. InternLM2's wqkv holds both.
UNCUT = ("q_proj", "k_proj", "wqkv")
ROWS = 256              # outputs at a time: the least memory at the same speed


def clip(weight: torch.Tensor, gram: torch.Tensor, group_size: int = GROUP) -> torch.Tensor:
    """Cut the weights of each group at the share of its largest that leaves the least error: float32[O, I], same shape.

    gram float32[I/g, g, g]: the sum of x x^T over all inputs x of a group. The error of a group of one output, with d
    what rounding changes there, is then d^T gram d: the square of what the group adds wrongly, over all tokens.
    """
    return torch.cat([_clip_rows(rows, gram, group_size) for rows in weight.split(ROWS)])


def _clip_rows(weight, gram, group_size):
    w = weight.unflatten(-1, (-1, group_size))                                          # (O, I/g, g)
    largest = w.abs().amax(-1, keepdim=True)                                            # (O, I/g, 1)
    best = w
    least = None
    for share in SHARES:
        cut = torch.minimum(torch.maximum(w, -share * largest), share * largest)
        off = nearest(cut.flatten(-2), group_size).view(w.shape) - w                    # (O, I/g, g)
        off = off.transpose(0, 1)                                                       # (I/g, O, g)
        error = ((off @ gram) * off).sum(-1).T[..., None]                               # (O, I/g, 1)
        if least is None:
            least = error
            continue
        best = torch.where(error < least, cut, best)
        least = torch.minimum(least, error)
    return best.flatten(-2)
