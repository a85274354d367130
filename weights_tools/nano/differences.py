"""A drill for pairs and frames: each visual token of the last picture says, halfway through the decoder, what stood there in the first.

    hidden states after layer 2, at the last picture's tokens -> a linear head, thrown away afterwards -> then, and whether it changed

"What changed?" is answered at its first word: all places of two pictures must have been compared by then. From answers alone the
decoder did not learn this search (33 % right), although asked for one place it said what changed there (96 %). Asked square by
square, it learns to look at the same square of the picture before.
"""
from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from weights_tools.nano.draw import COLOURS, SHAPES
from weights_tools.nano.warmup import IGNORE, SIDE

FIELDS = [("shape then", 1 + len(SHAPES)), ("colour then", 1 + len(COLOURS)), ("changed", 2)]     # 0: nothing, no
PLACE = (0, 1, 1, 2)        # the row (column) of the 3x3 layout whose things a row (column) of squares shows
LAYER = 1                   # of four; the other two find the token that says "changed"
GROWN = 0.08                # a change of size that counts, in cells


def inside(scene) -> dict:
    """(row, column) -> the thing there, for things that stand in a place."""
    return {(t.row, t.column): t for t in scene.shapes if t.row in (0, 1, 2) and t.column in (0, 1, 2)}


def targets(example) -> torch.Tensor:
    """uint8[16, 3]: for each square of the last picture, shape and colour there in the first, and whether either or the size
    is another now. All IGNORE where there are not several pictures."""
    found = torch.full((SIDE * SIDE, len(FIELDS)), IGNORE, dtype=torch.uint8)
    if len(example.pictures) < 2:
        return found
    then, now = inside(example.pictures[0]), inside(example.pictures[-1])
    for i in range(SIDE * SIDE):
        old, new = (things.get((PLACE[i // SIDE], PLACE[i % SIDE])) for things in (then, now))
        same = old is new or (old is not None and new is not None and (old.kind, old.colour) == (new.kind, new.colour)
                              and abs(old.radius - new.radius) < GROWN)
        found[i] = torch.tensor([1 + SHAPES.index(old.kind) if old else 0, 1 + list(COLOURS).index(old.colour) if old else 0,
                                 int(not same)], dtype=torch.uint8)
    return found


def head(width: int) -> nn.Linear:
    """Hidden state -> scores of every answer to every field, side by side."""
    return nn.Linear(width, sum(n for _, n in FIELDS))


@contextmanager
def halfway(model, on: bool = True):
    """A list that receives the decoder's hidden states float[B, T, D] after LAYER; empty if not `on`."""
    states, layer = [], model.language_model.model.layers[LAYER]
    hook = layer.register_forward_hook(lambda module, inputs, output: states.append(output)) if on else None
    try:
        yield states
    finally:
        if hook:
            hook.remove()


def last_picture(hidden, ids, context: int):
    """float[B, T, D] -> float[B, 16, D]: the states at the last 16 visual tokens of each row; any where there are none."""
    order = (ids == context).long() * torch.arange(1, ids.shape[1] + 1, device=ids.device)      # (B, T)
    at = order.topk(SIDE * SIDE, dim=1).values.sort(dim=1).values.sub(1).clamp(min=0)           # (B, 16)
    return hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))


def loss_and_hits(scores, wanted) -> tuple:
    """float[B, 16, sum], uint8[B, 16, 3] -> mean loss (0 without pairs), {field: share right}."""
    loss, hits = scores.sum() * 0.0, {}
    asked = wanted[..., 0].flatten() != IGNORE
    if not bool(asked.any()):
        return loss, hits
    for i, ((field, n), part) in enumerate(zip(FIELDS, scores.split([n for _, n in FIELDS], dim=-1))):
        part, target = part.flatten(0, -2)[asked], wanted[..., i].flatten()[asked].long()
        loss = loss + F.cross_entropy(part.float(), target) / len(FIELDS)
        hits[field] = float((part.argmax(-1) == target).float().mean())
    return loss, hits
