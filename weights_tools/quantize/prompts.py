"""What a checkpoint is calibrated on: pictures with questions and answers, a text, or both.

Each prompt is what the decoder reads of it: (token ids, tiles of its pictures in order).
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from minivl.chat.requests import Picture, read_request
from minivl.config import Config
from minivl.files.find import SHIPPED
from minivl.limits import InputError, is_there, reading
from minivl.tokenizer import Tokenizer

LEAST = 128             # tokens that say anything about the inputs


def from_rows(path: str | os.PathLike, config: Config, tokenizer: Tokenizer, most: int | None = None,
              max_num: int | None = None) -> Iterator[tuple[list[int], list]]:
    """Yield prompts from JSON lines as MMPR has them: {"image": a path or several or none, "question", "answer"}.

    Paths are read from the folder of the file on. In place of "answer" stands "chosen" in MMPR. `most`: no more rows
    than so many; max_num: no more tiles of a picture. What is wrong with a row is told with its line.
    """
    path = Path(path)
    lines = enumerate(_text_of(path).splitlines(), start=1)
    rows = [(number, line) for number, line in lines if line.strip()][:most]
    if not rows:
        raise InputError(f"{path} holds no rows; it must hold a line of JSON for each question")
    for number, line in rows:
        try:
            yield read_request(_conversation(json.loads(line), path.parent, max_num), config, tokenizer)
        except (ValueError, InputError) as error:
            raise InputError(f"{path}, line {number}: {error}; calibration needs whole rows, correct it or take it "
                             "out") from None


def _conversation(row, folder: Path, max_num: int | None) -> list[dict]:
    """Write a row as messages: question, its answer, and one more turn, which nobody answers."""
    if not isinstance(row, dict):
        raise ValueError("a row must be an object with image, question and answer")
    images = row.get("image") or []
    images = [images] if isinstance(images, str) else images
    answer = row.get("answer", row.get("chosen"))
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images) or not all(
            isinstance(text, str) for text in (row.get("question"), answer)):
        raise ValueError("image must be a path or a list of paths, question and answer (or chosen) must be texts")
    pictures = [{"type": "image_data", "image_data": {"data": Picture(str(folder / image), max_num)}}
                for image in images]
    return [{"role": "user", "content": [{"type": "text", "text": row["question"]}, *pictures]},
            {"role": "assistant", "content": answer}, {"role": "user", "content": "Thank you!"}]


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
