"""A pair as the model reads it: prompt and tiles once, two answers -> log-probabilities of both.

    question, picture, chosen, rejected -> ids of both conversations, tiles of the picture -> padded on the right
    -> visual tokens, used for both -> sums of log p over chosen and rejected answers

B pairs, T tokens, N tiles, R tile side. The rows of a batch are the B chosen conversations, then the B rejected ones.
Source: InternVL internvl_chat/internvl/train/internvl_chat_mpo.py:384-709, trainer_dpo.py:33-170, dataset.py:711-810
@2410d1d.
"""
from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from minivl import Picture
from minivl.chat.requests import open_tiles
from minivl.config import Config
from minivl.limits import InputError
from minivl.preprocess import most_tiles
from minivl.prompt import CONTEXT, IMAGE, render
from minivl.tiling import normalise, to_pixels
from minivl.tokenizer import Tokenizer
from weights_tools.mpo.mmpr import Dataset, pictures
from weights_tools.train.objective import IGNORE, answer_logits, supervised


@dataclass(frozen=True)
class Located:
    """A row of MMPR, and what its file says of it."""
    row: dict
    root: Path                  # folder of its pictures
    max_num: int | None         # most tiles of its pictures together, if its dataset says so
    where: str                  # file and line


class Pairs(Sequence):
    """The pairs of some datasets, one dataset after the other, each in the order of the original (`Dataset.order`)."""

    def __init__(self, datasets: Sequence[Dataset]):
        self.datasets = list(datasets)
        for one in self.datasets:
            if one.data_augment:
                raise InputError(f"data_augment of {one.name!r} is true: the original would change its pictures at "
                                 "random, which is not done here; set it to false in meta.json")
        self.rows = [one.rows() for one in self.datasets]
        self.numbers = array("Q")       # of the dataset of each pair
        self.places = array("Q")        # of its row there
        for number, (one, rows) in enumerate(zip(self.datasets, self.rows)):
            order = one.order(len(rows))
            self.places.extend(order)
            self.numbers.extend([number] * len(order))
        if not self.places:
            raise InputError("repeat_time leaves no pair of any dataset; raise it in meta.json")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Located:
        one, rows, place = self.datasets[self.numbers[i]], self.rows[self.numbers[i]], self.places[i]
        return Located(rows[place], one.root, one.max_dynamic_patch, f"{rows.path}, line {rows.lines[place]}")


@dataclass(frozen=True)
class Pair:
    """A pair as ids and tiles."""
    chosen: list[int]       # the whole conversation
    rejected: list[int]
    begin: int              # tokens before the answers
    tiles: list             # of all its pictures, in order


@dataclass(frozen=True)
class Batch:
    """B pairs, padded on the right."""
    ids: torch.Tensor       # int64[2B, T]
    labels: torch.Tensor    # int64[2B, T]: the ids of an answer and its <|im_end|>, IGNORE elsewhere
    pixels: torch.Tensor    # uint8[N, R, R, 3], each pair's tiles once

    def to(self, device) -> Batch:
        """Move it."""
        return Batch(self.ids.to(device), self.labels.to(device), self.pixels.to(device))


def encoded(pair: Located, config: Config, tokenizer: Tokenizer, *, max_num: int | None = None,
            most: int | None = None) -> Pair:
    """Read a row of MMPR: ids of both conversations, and tiles. Raises InputError that names file and line.

    max_num: most tiles of a picture where row and dataset do not say (default: the checkpoint's); several pictures
    share them. most: tokens of a conversation. The original cuts a longer one on the right, perhaps the whole answer.
    """
    try:
        images = pictures(pair.row)
        most_num = pair.row.get("max_num") or pair.max_num or max_num or most_tiles(config)
        tiles = [open_tiles(Picture(pair.root / image, max(1, most_num // len(images))), config) for image in images]
        asked = _asked(pair.row, [len(one) for one in tiles], config)
        begin = len(tokenizer.begin + tokenizer.encode(asked))
        chosen, rejected = (tokenizer.begin + tokenizer.encode(f"{asked}{pair.row[name]}<|im_end|>\n")
                            for name in ("chosen", "rejected"))
        flat = [tile for one in tiles for tile in one]
        _check(chosen, rejected, begin, len(flat), config, tokenizer, most)
        return Pair(chosen, rejected, begin, flat)
    except InputError as error:
        raise InputError(f"{pair.where}: {error}") from None


def _asked(row: dict, tiles: list[int], config: Config) -> str:
    """Write the conversation up to the answer. Marks <image> beyond the pictures stay text, as in the original."""
    question = row["question"]
    if isinstance(row.get("image"), str) and tiles and IMAGE not in question:
        question = f"{IMAGE}\n{question}"
    content = []
    for i, text in enumerate(question.split(IMAGE, len(tiles))):
        content += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": text}]
    return render([{"role": "user", "content": content}], tiles, config.system_message,
                  tokens_per_tile=config.num_image_token, plain=True)


def _check(chosen: list[int], rejected: list[int], begin: int, tiles: int, config: Config, tokenizer: Tokenizer,
           most: int | None):
    context = tokenizer.id(CONTEXT)
    wanted = tiles * config.num_image_token
    positions = config.llm_config.max_position_embeddings
    most = positions if most is None else min(most, positions)
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        if ids.count(context) != wanted:
            raise InputError(f"question or {name} answer spell {CONTEXT}, which stands for a visual token; remove it")
        if len(ids) > most:
            raise InputError(f"the conversation with the {name} answer has {len(ids)} tokens, {begin} before the "
                             f"answer; {most} have room: leave the pair out, or give it fewer tiles")


def collate(pairs: Sequence[Pair], side: int) -> Batch:
    """Pad pairs to one length; side: of a tile, in pixels, R."""
    rows = [(pair.chosen, pair.begin) for pair in pairs] + [(pair.rejected, pair.begin) for pair in pairs]
    T = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (T - len(row)) for row, _ in rows])
    # Not learned: the prompt, and the newline after <|im_end|>. By position, not by the header's ids: with an answer
    # that begins with a newline the header ends in another token.
    labels = torch.tensor([[IGNORE] * begin + row[begin:-1] + [IGNORE] * (T - len(row) + 1) for row, begin in rows])
    return Batch(ids, labels, pixels_of([tile for pair in pairs for tile in pair.tiles], side))


def pixels_of(tiles: list, side: int) -> torch.Tensor:
    """Stack tiles, perhaps none: uint8[N, R, R, 3]."""
    return to_pixels(tiles) if tiles else torch.empty(0, side, side, 3, dtype=torch.uint8)


def pair_logps(model, batch: Batch, forward: Callable = answer_logits) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up the answers' log-probabilities, with one forward: float32[2, B] and their tokens int64[2, B].

    First those of the chosen answers, then of the rejected ones: what `loss.sequence_logps` gives of two forwards.
    forward: `answer_logits`, or what stands in for it.
    """
    logits, tokens = forward(model, batch.ids, batch.labels, normalise(batch.pixels), 2)    # (n, V), (n)
    logps = -F.cross_entropy(logits, tokens, reduction="none")
    counts = supervised(batch.labels).sum(1)                                                # (2B)
    sums = torch.stack([of_row.sum() for of_row in logps.split(counts.tolist())])           # (2B)
    return sums.view(2, -1), counts.view(2, -1)
