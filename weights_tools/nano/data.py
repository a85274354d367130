"""Nano's examples as tensors: pictures drawn and tiled, conversations as ids, labels on the answers only.

    example -> tiles, ids -> labels -> micro-batches, padded on the right
"""
from __future__ import annotations

import random

import torch
from torch.utils.data import Dataset

from minivl.prompt import encode
from minivl.tiling import tile, to_pixels
from minivl.tokenizer import Tokenizer
from weights_tools.nano import differences, recipe, warmup, world
from weights_tools.nano.draw import TILE, Style, draw
from weights_tools.train.objective import ids_and_labels

MICRO = 8               # conversations through the model at once: memory, and less padding
TOKENS_PER_TILE = 16


def tiles_of(example: world.Example, **how) -> list:
    """Cut each picture: [[tile, ...], ...]. `how`: other arguments of minivl.tiling.tile."""
    return [tile(draw(scene), tile_size=TILE, **{"max_num": example.max_num, **how}) for scene in example.pictures]


def pixels(tiles: list) -> torch.Tensor:
    """Stack tiles, perhaps none: uint8[N, R, R, 3], a fourth of the bytes of pixel_values to send between processes."""
    return to_pixels(tiles) if tiles else torch.empty(0, TILE, TILE, 3, dtype=torch.uint8)


def ids_of(example: world.Example, tiles: list, tokenizer: Tokenizer) -> list:
    """Write the whole conversation as token ids."""
    return encode(tokenizer, example.messages(), [len(t) for t in tiles], tokens_per_tile=TOKENS_PER_TILE)


def collate(rows: list, tiles: list, tokenizer: Tokenizer) -> tuple:
    """Pad conversations and stack their tiles: ids, labels int64[B, T] and pixels uint8[N, R, R, 3]."""
    ids, labels = ids_and_labels(rows, tokenizer)
    return ids, labels, pixels([t for pictures in tiles for picture in pictures for t in picture])


class Batches(Dataset):
    """The batches of a stage; number i is always the same.

    Each is a list of micro-batches: (ids, labels, pixels), conversations of similar length together;
    (ids, labels, targets, pixels) with the task "differences"; (targets, pixels) with "squares".
    """

    def __init__(self, stage: recipe.Stage, seed, tokenizer: Tokenizer):
        self.stage = stage
        self.seed = f"{seed} {stage.name}"
        self.tokenizer = tokenizer

    def __len__(self):
        return self.stage.steps

    def __getitem__(self, i):
        style = Style(world.TRAINED, wide=self.stage.wide)
        size = self.stage.batch
        examples = [world.example(self.seed, i * size + n, self.stage.mix, style) for n in range(size)]
        if self.stage.task == "squares":
            rng = random.Random(f"{self.seed} {i}")
            views = [view for e in examples for scene in e.pictures for view in warmup.views(scene, rng)]
            tiles, targets = zip(*views)
            return [(torch.stack(targets), pixels(tiles))]
        tiles = [tiles_of(e) for e in examples]
        found = [(ids_of(e, t, self.tokenizer), t, e) for e, t in zip(examples, tiles)]
        found.sort(key=lambda row: len(row[0]))
        batches = []
        for n in range(0, size, MICRO):
            rows, tiles, examples = zip(*found[n:n + MICRO])
            ids, labels, x = collate(rows, tiles, self.tokenizer)
            extra = []
            if self.stage.task == "differences":
                extra = [torch.stack([differences.targets(e) for e in examples])]
            batches.append((ids, labels, *extra, x))
        return batches
