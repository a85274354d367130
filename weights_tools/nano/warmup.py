"""Warm nano's vision tower and projector up: name what lies in each square of 28 x 28 pixels.

    tile -> vision_model -> unshuffle -> mlp1 -> visual token -> a linear head, thrown away afterwards -> what is there

A visual token stands for such a square. Asked directly, square by square, the tower learns letters many times faster
than through a decoder that cannot speak yet. (The family's tower comes pretrained, too.)
"""
from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from torch import nn

from minivl.tiling import choose_grid, tile
from weights_tools.nano.draw import COLOURS, SHAPES, SIZES, TILE, Scene, draw, marks

LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIDE = 4        # squares of a tile along each side
SLOTS = 4       # columns of a square that may each hold the middle of a letter
# Letters of a line: "nth letter" is the first, second, ... of its line, if it stands here. To spell a word the decoder
# then looks for its number, and need not find out what stands right of what.
LONGEST = 6
# What is asked of a square, and how many answers there are; 0 always means nothing. "square" is its own number: a
# visual token that does not say where it is leaves "what is at the top?" to the decoder (it answered 17 % right).
FIELDS = [("letter", 1 + len(LETTERS))] * SLOTS + [("nth letter", 1 + len(LETTERS))] * LONGEST + [
    ("shape", 1 + len(SHAPES)), ("size", 1 + len(SIZES)), ("column", 1 + 3), ("row", 1 + 3),
    ("colour", 1 + len(COLOURS)), ("square", 1 + SIDE * SIDE)]
WEIGHT_OF_NOTHING = 0.1     # most slots are empty
IGNORE = 255                # an answer that is not asked for
WHOLE = (0.0, 0.0, 1.0, 1.0)


def targets(scene: Scene, box: tuple = WHOLE) -> torch.Tensor:
    """Say what lies in each square: uint8[16, 16].

    Row by row letters, nth letters, shape, size, column, row, colour, own number. Letters have a row and a colour too.
    `box` (left, top, right, bottom, in parts of the picture): what one tile of several shows. It cannot know sizes and
    places, which are those of the whole picture. A thumbnail shows no small print.
    """
    found = torch.zeros(SIDE * SIDE, len(FIELDS), dtype=torch.uint8)
    found[:, -1] = torch.arange(1, SIDE * SIDE + 1)
    if box != WHOLE:
        found[:, -5:-2] = IGNORE    # size, column, row
    number = 0
    last = None
    for thing, letter, x, y in marks(scene):
        x = (x - box[0]) / (box[2] - box[0])
        y = (y - box[1]) / (box[3] - box[1])
        too_small = box == WHOLE and scene.grid != (1, 1) and thing.kind == "print"
        elsewhere = box != WHOLE and not (0 <= x < 1 and 0 <= y < 1)
        if too_small or elsewhere:
            continue
        number = number + 1 if thing is last else 0
        last = thing
        column, row = (min(SIDE - 1, max(0, int(v * SIDE))) for v in (x, y))
        square = found[row * SIDE + column]
        if letter:
            square[min(SLOTS - 1, max(0, int((x * SIDE - column) * SLOTS)))] = 1 + LETTERS.index(letter)
            square[SLOTS + number] = 1 + LETTERS.index(letter)
        else:
            square[-6] = 1 + SHAPES.index(thing.kind)
        if box == WHOLE and not letter:
            square[-5:-3] = torch.tensor([1 + SIZES.index(thing.size), 1 + thing.column], dtype=torch.uint8)
        if box == WHOLE and thing.kind != "print":      # it stands between the rows
            square[-3] = 1 + thing.row
        square[-2] = 1 + list(COLOURS).index(thing.colour)
    return found


def views(scene: Scene, rng: Random) -> list:
    """Cut what the tower is shown: [(tile, targets), ...], the one tile, or the thumbnail and one with something in."""
    tiles = tile(draw(scene), max_num=6, tile_size=TILE)
    if len(tiles) == 1:
        return [(tiles[0], targets(scene))]
    columns, rows = choose_grid(*scene.size, max_num=6, tile_size=TILE)
    boxes = [(c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r in range(rows) for c in range(columns)]
    holding = {int(y * rows) * columns + int(x * columns) for _, _, x, y in marks(scene) if 0 <= x < 1 and 0 <= y < 1}
    n = rng.choice(sorted(holding) or range(len(boxes)))
    return [(tiles[-1], targets(scene)), (tiles[n], targets(scene, boxes[n]))]


def head(width: int) -> nn.Linear:
    """Make the head: visual token -> scores of every answer to every field, side by side."""
    return nn.Linear(width, sum(n for _, n in FIELDS))


def loss_and_hits(scores: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Compare scores float[N, 16, sum] with uint8[N, 16, 16]: (mean loss, {field: share right where something is})."""
    loss = 0.0
    right = {}
    seen = {}
    for i, ((field, n), part) in enumerate(zip(FIELDS, scores.split([n for _, n in FIELDS], dim=-1))):
        weight = torch.ones(n, device=scores.device)
        weight[0] = WEIGHT_OF_NOTHING
        target = wanted[..., i].long().flatten()
        loss = loss + F.cross_entropy(part.flatten(0, -2), target, weight, ignore_index=IGNORE) / len(FIELDS)
        there = (target > 0) & (target != IGNORE)
        right[field] = right.get(field, 0) + int((part.flatten(0, -2).argmax(-1) == target)[there].sum())
        seen[field] = seen.get(field, 0) + int(there.sum())
    return loss, {field: right[field] / max(1, seen[field]) for field in right}
