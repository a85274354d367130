"""What a checkpoint is calibrated on: pictures with questions and answers, a text, or both.

Each prompt is what the decoder reads of it: (token ids, tiles of its pictures in order).
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from minivl.chat.requests import read_request
from minivl.config import Config
from minivl.files.find import SHIPPED
from minivl.limits import InputError, is_there, reading
from minivl.tokenizer import Tokenizer
from weights_tools.rows import encoded, read_rows

LEAST = 128             # tokens that say anything about the inputs


def from_rows(path: str | os.PathLike, config: Config, tokenizer: Tokenizer, most: int | None = None,
              max_num: int | None = None) -> Iterator[tuple[list[int], list]]:
    """Yield prompts from JSON lines of pictures, questions and answers, see `weights_tools.rows`.

    `most`: no more rows than so many; max_num: no more tiles of a picture, where a row does not say so itself.
    """
    for row in read_rows(path)[:most]:
        yield encoded(row if row.max_num else replace(row, max_num=max_num), config, tokenizer)


def from_text(path: str | os.PathLike, tokenizer: Tokenizer, most: int | None = None,
              length: int = 512) -> Iterator[tuple[list[int], list]]:
    """Yield pieces of a text of `length` tokens each, the last perhaps shorter; at most `most`."""
    ids = tokenizer.encode(_text_of(Path(path)), plain=True)
    for start in range(0, len(ids), length)[:most]:
        yield ids[start:start + length], []


def _text_of(path: Path) -> str:
    try:
        with reading(path):
            return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text in UTF-8 (byte {error.start}); save it as UTF-8") from None


def from_nano(n: int, config: Config, tokenizer: Tokenizer,
              seed: str = "calibration") -> Iterator[tuple[list[int], list]]:
    """Yield conversations of nano's world: at hand, endless, and what nano was trained on. Another seed, others."""
    from weights_tools.nano.evaluate import conversations
    for conversation in conversations(n, seed):
        yield read_request(conversation, config, tokenizer)


def is_nano(folder: Path) -> bool:
    """Tell whether a checkpoint has nano's vocabulary: trained on nano's world, or on."""
    theirs = folder / "vocab.json"
    with reading(folder):
        return is_there(theirs) and theirs.read_bytes() == (SHIPPED["nano"] / "vocab.json").read_bytes()


def digest(*paths: str | os.PathLike | None) -> str:
    """Compute the sha256 of some files' contents, one after the other."""
    sha256 = hashlib.sha256()
    for path in paths:
        if path is not None:
            with reading(path):
                sha256.update(Path(path).read_bytes() + b"\0")
    return sha256.hexdigest()


def counted(prompts: Iterable[tuple[list[int], list]]) -> Iterator[tuple[list[int], list]]:
    """Pass prompts on, and raise InputError at the end if they were none, or too short together."""
    tokens = 0
    for ids, tiles in prompts:
        tokens += len(ids)
        yield ids, tiles
    if tokens < LEAST:
        raise InputError(f"the prompts have {tokens} tokens together, which say nothing about the inputs of a layer; "
                         f"give at least {LEAST}")
