"""Read conversations for fine-tuning, and count right answers: python -m weights_tools.rows FOLDER DATA

DATA is a JSONL file, one conversation a line (broken here to be read), in either form:

    {"image": "a.png", "question": "What is it?", "answer": "A star."}
    {"image": ["a.png", "b.png"], "conversations": [
        {"from": "human", "value": "<image> <image> What changed?"}, {"from": "gpt", "value": "Nothing."}]}

In place of "answer" may stand MMPR's "chosen". Paths of pictures count from DATA's folder. "image" may be missing, and
of one picture so may the mark <image>. Two more keys may be there: "task", a word to count by, and "max_num", the most
tiles of each picture.

An answer is right if every token is the most probable one after the right tokens before it: then, and only then, greedy
generation writes exactly this answer. Of a conversation the last answer counts.
Source of the forms: MMPR on the hub; InternVL's docs on fine-tuning data and internvl/train/dataset.py @2410d1d.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minivl import Picture, load, options
from minivl.chat.requests import open_tiles
from minivl.config import Config
from minivl.files.find import find
from minivl.limits import InputError, reading
from minivl.model import MiniVL
from minivl.prompt import IMAGE, encode
from minivl.tiling import normalise, to_pixels
from minivl.tokenizer import Tokenizer
from weights_tools import run
from weights_tools.train.objective import answer_logits, ids_and_labels, supervised

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TOKENS = 4096           # through the model at once, padding counted; one longer conversation goes alone


@dataclass(frozen=True)
class Row:
    """A conversation and its pictures."""
    images: tuple       # of Path
    messages: tuple     # of (role, text); the last is an answer
    task: str = "all"
    max_num: int | None = None


# ---- from a file ----------------------------------------------------------------------------------------------------

def read_rows(path: str | os.PathLike) -> list[Row]:
    """Read a JSONL file. Raises InputError that names the first line that is no conversation, or lacks a picture."""
    path = Path(path)
    with reading(path):
        lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(_row(json.loads(line), path.parent))
        except (InputError, ValueError, RecursionError) as error:
            why = str(error) if isinstance(error, InputError) else "it is no JSON in UTF-8"
            raise InputError(f"{path}, line {number}: {why}; correct that line or leave it out") from None
    if not rows:
        raise InputError(f"{path} holds no conversation; write one a line, see python -m weights_tools.rows --help")
    return rows


def _row(row, folder: Path) -> Row:
    if not isinstance(row, dict):
        raise InputError("it is no JSON object")
    images = row.get("image") or []
    images = images if isinstance(images, list) else [images]
    if not all(isinstance(image, str) for image in images):
        raise InputError('"image" is neither a path nor a list of paths')
    images = tuple(folder / image for image in images)
    missing = [str(image) for image in images if not image.is_file()]
    if missing:
        raise InputError(f"the picture {missing[0]} is not there")
    messages = _messages(row)
    if len(images) == 1 and not any(IMAGE in text for role, text in messages if role == "user"):
        first = next(i for i, (role, _) in enumerate(messages) if role == "user")
        messages[first] = ("user", f"{IMAGE}\n{messages[first][1]}")
    marks = sum(text.count(IMAGE) for role, text in messages if role == "user")
    if marks != len(images):
        raise InputError(f"the user's texts have {marks} marks {IMAGE} for {len(images)} pictures")
    task = row.get("task", "all")
    max_num = row.get("max_num")
    if not isinstance(task, str) or not (max_num is None or type(max_num) is int and max_num > 0):
        raise InputError('"task" must be a word and "max_num" a whole number, 1 or more')
    return Row(images, tuple(messages), task, max_num)


def _messages(row: dict) -> list[tuple[str, str]]:
    """Bring both forms into one: [(role, text), ...]."""
    if "conversations" in row:
        turns = row["conversations"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise InputError('"conversations" is no list of {"from": ..., "value": ...}')
        messages = [(SPEAKERS.get(turn.get("from")) if isinstance(turn.get("from"), str) else None, turn.get("value"))
                    for turn in turns]
    else:
        messages = [("user", row.get("question")), ("assistant", row.get("answer", row.get("chosen")))]
    if not all(role and isinstance(text, str) and text.strip() for role, text in messages):
        raise InputError('it lacks a text; give "question" and "answer", or "conversations" of human and gpt')
    roles = [role for role, _ in messages]
    asked = roles[roles[:1] == ["system"]:]
    if not asked or asked != ["user", "assistant"] * (len(asked) // 2):
        raise InputError(f"question and answer do not take turns: {', '.join(roles[:6])}")
    return messages


# ---- for the model --------------------------------------------------------------------------------------------------

def encoded(row: Row, config: Config, tokenizer: Tokenizer) -> tuple[list[int], list]:
    """Write a conversation as ids, and cut its pictures: [tile, ...] of all, in order."""
    tiles = [open_tiles(Picture(image, row.max_num), config) for image in row.images]
    messages = [{"role": role, "content": text} for role, text in row.messages]
    system = None if row.messages[0][0] == "system" else config.system_message
    ids = encode(tokenizer, messages, [len(t) for t in tiles], system, tokens_per_tile=config.num_image_token)
    positions = config.llm_config.max_position_embeddings
    if len(ids) > positions:
        raise InputError(f"the conversation {row.messages[-2][1][:60]!r} about {len(row.images)} pictures has "
                         f"{len(ids)} tokens, the model has {positions} positions; shorten it or lower max_num")
    return ids, [tile for picture in tiles for tile in picture]


def micro_batches(rows: list[Row], model: MiniVL, tokenizer: Tokenizer) -> list[tuple]:
    """Make [(ids, labels, pixels, places in `rows`), ...]: those of like length together, at most TOKENS at once."""
    R = model.config.force_image_size
    found = [(*encoded(row, model.config, tokenizer), place) for place, row in enumerate(rows)]
    found.sort(key=lambda row: len(row[0]))
    groups = [[]]
    for row in found:
        if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > TOKENS:
            groups.append([])
        groups[-1].append(row)
    batches = []
    for group in groups:
        ids, tiles, places = zip(*group)
        flat = [tile for one in tiles for tile in one]
        pixels = to_pixels(flat) if flat else torch.empty(0, R, R, 3, dtype=torch.uint8)
        batches.append((*ids_and_labels(list(ids), tokenizer), pixels, places))
    return batches


@torch.no_grad()
def count_right(model: MiniVL, tokenizer: Tokenizer, rows: list[Row]) -> dict[str, list[int]]:
    """Count the conversations whose last answer is exactly right: task -> [right, all of them]."""
    counts = defaultdict(lambda: [0, 0])
    with tqdm(total=len(rows), desc="checking", unit="row", disable=None) as bar:
        for start in range(0, len(rows), 64):
            part = rows[start:start + 64]
            for ids, labels, pixels, places in micro_batches(part, model, tokenizer):
                logits, wanted = answer_logits(model, *(t.to(model.device) for t in (ids, labels)),
                                               normalise(pixels.to(model.device)))
                hits = torch.zeros(labels[:, 1:].shape, dtype=torch.bool)
                hits[supervised(labels)] = (logits.argmax(-1) == wanted).cpu()
                for place, row, marks in zip(places, hits.tolist(), supervised(labels).tolist()):
                    end = max(i for i, mark in enumerate(marks) if mark) + 1
                    begin = next((i + 1 for i in range(end - 1, -1, -1) if not marks[i]), 0)
                    counts[part[place].task][0] += all(row[begin:end])
                    counts[part[place].task][1] += 1
                bar.update(len(places))
    return dict(sorted(counts.items()))


def table(columns: dict[str, dict[str, list[int]]]) -> str:
    """Write Markdown: task, how many were asked, the share right in each column, all tasks in the last line."""
    counts = next(iter(columns.values()))
    lines = [f"| task | asked | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for task, (_, n) in counts.items():
        lines.append(f"| {task} | {n} | " + " | ".join(f"{100 * found[task][0] / n:.1f}" for found in columns.values())
                     + " |")
    if len(counts) > 1:
        sums = {name: [sum(column) for column in zip(*found.values())] for name, found in columns.items()}
        n = next(iter(sums.values()))[1]
        lines.append(f"| all | {n} | " + " | ".join(f"{100 * right / n:.1f}" for right, _ in sums.values()) + " |")
    return "\n".join(lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.rows", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("checkpoint", metavar="FOLDER", help="a checkpoint: folder, hub id or short name")
    parser.add_argument("data", metavar="DATA", help="a JSONL file")
    parser.add_argument("--lora", metavar="FILE", help="what python -m weights_tools.lora learned on the checkpoint")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    rows = read_rows(args.data)
    folder = find(args.checkpoint)
    model = load(folder, device=args.device, precision="exact", lora=args.lora)
    print(table({"right, %": count_right(model, Tokenizer.load(folder), rows)}))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
