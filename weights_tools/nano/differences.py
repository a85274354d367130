"""Drill pairs and frames: each visual token of the last picture says, halfway through, what stood there in the first.

    hidden states after layer 2, at the last picture's tokens -> a linear head, thrown away afterwards
        -> what was there then, and whether it changed

"What changed?" is answered at its first word: all places of two pictures must have been compared by then. From answers
alone the decoder did not learn this search (33 % right), although asked for one place it said what changed there
(96 %). Asked square by square, it learns to look at the same square of the picture before.
"""
from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from minivl.model import MiniVL
from weights_tools.nano.draw import COLOURS, SHAPES, Scene
from weights_tools.nano.warmup import IGNORE, SIDE
from weights_tools.nano.world import Example

FIELDS = [("shape then", 1 + len(SHAPES)), ("colour then", 1 + len(COLOURS)), ("changed", 2)]     # 0: nothing, no
PLACE = (0, 1, 1, 2)        # the row (column) of the 3x3 layout whose things a row (column) of squares shows
LAYER = 1                   # of four; the other two find the token that says "changed"
GROWN = 0.08                # a change of size that counts, in cells


def inside(scene: Scene) -> dict:
    """Find the things that stand in a place: (row, column) -> thing."""
    return {(t.row, t.column): t for t in scene.shapes if t.row in (0, 1, 2) and t.column in (0, 1, 2)}


def targets(example: Example) -> torch.Tensor:
    """Say of each square of the last picture what was there in the first: uint8[16, 3], shape, colour, changed.

    Changed: shape, colour or size is another now. All IGNORE where there are not several pictures.
    """
    found = torch.full((SIDE * SIDE, len(FIELDS)), IGNORE, dtype=torch.uint8)
    if len(example.pictures) < 2:
        return found
    then = inside(example.pictures[0])
    now = inside(example.pictures[-1])
    for i in range(SIDE * SIDE):
        old, new = (things.get((PLACE[i // SIDE], PLACE[i % SIDE])) for things in (then, now))
        same = old is new or (old is not None and new is not None and (old.kind, old.colour) == (new.kind, new.colour)
                              and abs(old.radius - new.radius) < GROWN)
        kind = 1 + SHAPES.index(old.kind) if old else 0
        colour = 1 + list(COLOURS).index(old.colour) if old else 0
        found[i] = torch.tensor([kind, colour, int(not same)], dtype=torch.uint8)
    return found


def head(width: int) -> nn.Linear:
    """Make the head: hidden state -> scores of every answer to every field, side by side."""
    return nn.Linear(width, sum(n for _, n in FIELDS))


@contextmanager
def halfway(model: MiniVL, on: bool = True):
    """Yield a list that receives the decoder's hidden states float[B, T, D] after LAYER; empty if not `on`."""
    states = []
    layer = model.language_model.layers[LAYER]
    hook = layer.register_forward_hook(lambda module, inputs, output: states.append(output)) if on else None
    try:
        yield states
    finally:
        if hook:
            hook.remove()


def last_picture(hidden: torch.Tensor, ids: torch.Tensor, context: int) -> torch.Tensor:
    """Take the states at each row's last 16 visual tokens (any, if it has none): float[B, T, D] -> float[B, 16, D]."""
    order = (ids == context).long() * torch.arange(1, ids.shape[1] + 1, device=ids.device)      # (B, T)
    at = order.topk(SIDE * SIDE, dim=1).values.sort(dim=1).values.sub(1).clamp(min=0)           # (B, 16)
    return hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))


def loss_and_hits(scores: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Compare scores float[B, 16, sum] with uint8[B, 16, 3]: (mean loss, 0 without pairs; {field: share right})."""
    loss = scores.sum() * 0.0
    hits = {}
    asked = wanted[..., 0].flatten() != IGNORE
    if not bool(asked.any()):
        return loss, hits
    for i, ((field, _), part) in enumerate(zip(FIELDS, scores.split([n for _, n in FIELDS], dim=-1))):
        part = part.flatten(0, -2)[asked]
        target = wanted[..., i].flatten()[asked].long()
        loss = loss + F.cross_entropy(part.float(), target) / len(FIELDS)
        hits[field] = float((part.argmax(-1) == target).float().mean())
    return loss, hits
