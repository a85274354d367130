"""Ask a model the questions of a file: rows -> prompts -> answers, written as they come; a killed run goes on.

    OUT/answers/DATASET.SETTING.jsonl           what decides the answers, then a line for each row; in order when whole
    OUT/answers/DATASET.SETTING.seconds.jsonl   how long each took; beside them, as it is never the same twice
    OUT/answers/DATASET.SETTING.part-1.jsonl    of a second process, while the first one lacks answers

Rows are taken in chunks, a chunk's prompts sorted by length and asked in batches. Who asks a chunk, and when, changes
nothing about its batches: several processes, or a run that was killed, give the answers of one that was not.
Source of the setting (greedy, 4,096 tokens, pictures doubled for MMMU): VLMEvalKit @00e0cf87 vlm/internvl_chat.py.
"""
from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from tqdm import tqdm

from minivl import GenerationConfig, InputError, Picture, Pipeline
from minivl.chat import answers as chat
from minivl.chat.requests import Turn
from minivl.limits import Limits, clip, is_there, reading
from minivl.preprocess import grid_for
from weights_tools.evaluate import prompts
from weights_tools.evaluate.benchmarks import Answer, Broken, Row
from weights_tools.files import held_file, new_file, told
from weights_tools.mpo.begun import difference
from weights_tools.mpo.several import BATCHES, read, write_batch

SETTINGS = ("default", "cot")       # as VLMEvalKit without and with USE_COT=1


@dataclass(frozen=True)
class How:
    """What decides how a file of questions is asked."""
    dataset: str                    # its name
    setting: str = "default"        # or "cot"
    mpo: bool = False               # whether VLMEvalKit would know the model as one of MPO
    limit_tiles: int | None = None  # at most so many of a picture, where VLMEvalKit takes more
    batch: int = 8                  # answers written together
    max_new_tokens: int = 4096


# ---- asking ---------------------------------------------------------------------------------------------------------

def ask(pipe: Pipeline, rows: Iterable[Row | Broken], how: How, *, done: Collection[int] = (),
        share: tuple[int, int] = (0, 1)) -> Iterator[Answer]:
    """Answer each row, in an order of its own; a row that cannot be asked has an answer that says why.

    done: lines of rows that need no answer. share (k, n): of all chunks every n-th from k on.
    """
    rows = iter(rows)
    number = 0
    while chunk := list(islice(rows, BATCHES * how.batch)):
        if number % share[1] == share[0] and any(row.line not in done for row in chunk):
            for answer in _chunk(pipe, chunk, how, done):
                if answer.line not in done:
                    yield answer
        number += 1


def chunks(rows: int, how: How) -> int:
    """Compute how many chunks so many rows are asked in."""
    return -(-rows // (BATCHES * how.batch))


def _chunk(pipe: Pipeline, chunk: list[Row | Broken], how: How, done: Collection[int]) -> Iterator[Answer]:
    """Answer the rows of a chunk, those with prompts of like length together."""
    start = time.perf_counter()
    asked = []
    for row in chunk:
        answer, turn = _read(pipe, row, how)
        if turn is None:
            yield answer
        else:
            asked.append((answer, turn))
    each = (time.perf_counter() - start) / len(chunk)
    asked.sort(key=lambda one: len(one[1].ids))
    for first in range(0, len(asked), how.batch):
        batch = asked[first:first + how.batch]
        if any(answer.line not in done for answer, _ in batch):
            start = time.perf_counter()
            written = _written(pipe, batch, how)
            seconds = each + (time.perf_counter() - start) / len(batch)
            yield from (replace(answer, seconds=seconds) for answer in written)


def _read(pipe: Pipeline, row: Row | Broken, how: How) -> tuple[Answer, Turn | None]:
    """Make a row's prompt: (the answer so far, what is asked); nothing is asked where the row is at fault."""
    answer = Answer(row.index, "", None, None, (), 0, 0.0, None, line=row.line)
    if isinstance(row, Broken):
        return replace(answer, refused=row.why), None
    try:
        pictures = row.pictures()
        if pictures and prompts.upscaled(how.dataset):
            pictures[0] = doubled(pictures[0])
        text, most = prompts.build(row.fields, how.dataset, images=len(pictures), mpo_prompt=how.mpo,
                                   cot=how.setting == "cot")
        answer = replace(answer, question=text)
        most = min(most, how.limit_tiles or most)
        turn = pipe.turn((text, [Picture(picture, most) for picture in pictures]),
                         GenerationConfig(max_new_tokens=how.max_new_tokens))
        tiles = tuple(grid_for(pipe.model.config, *picture.size, most)[2] for picture in pictures)
        return replace(answer, tiles=tiles), turn
    except InputError as error:
        return replace(answer, refused=str(error)), None


def doubled(picture: Image.Image) -> Image.Image:
    """Make a picture twice as wide and high, as VLMEvalKit does with the first one of MMMU. Refused before it is made.
    """
    if 4 * picture.width * picture.height > Limits().picture_pixels:
        raise InputError(f"its first picture is {picture.width}x{picture.height}; MMMU's is doubled in size, to more "
                         f"than the limit of {Limits().picture_pixels} pixels; make it smaller")
    return picture.resize((2 * picture.width, 2 * picture.height), Image.BILINEAR)


def _written(pipe: Pipeline, batch: list[tuple[Answer, Turn]], how: How) -> list[Answer]:
    """Write the answers of a batch. If the model cannot finish it, each alone, and those that it cannot are refused."""
    writing = [chat.Answer(turn, pipe.tokenizer, pipe.stop_ids, 0) for _, turn in batch]
    why = None
    try:
        with tqdm(disable=True) as bar:
            write_batch(pipe, writing, [read(pipe.model, turn) for _, turn in batch], bar)
    except InputError as error:
        why = str(error)            # not the error itself, whose traceback holds the batch's memory
    if why is None:
        return [_said(answer, written, how) for (answer, _), written in zip(batch, writing)]
    if len(batch) > 1:
        return [answer for one in batch for answer in _written(pipe, [one], how)]
    return [replace(batch[0][0], refused=why)]


def _said(answer: Answer, written: chat.Answer, how: How) -> Answer:
    mpo = prompts.uses_mpo(how.dataset, how.mpo, how.setting == "cot")
    prediction = prompts.after(written.text, how.dataset, mpo)
    return replace(answer, prediction=prediction, said=written.text if written.text != prediction else None,
                   tokens=len(written.token_ids), finish_reason=written.finish_reason)


# ---- into a file ----------------------------------------------------------------------------------------------------

def place(out: Path, dataset: str, setting: str) -> Path:
    """Name the file of answers."""
    return Path(out) / "answers" / f"{dataset}.{setting}.jsonl"


def load(path: Path) -> tuple[dict, dict[int, Answer]]:
    """Read a file of answers: (what decides them, {line of the row: answer}). A last line that is half there is none.

    Raises InputError where a line is damaged.
    """
    times = _beside(path)
    seconds = dict(_parsed(times, _time, "which says how long each took") if times.exists() else ())
    header = next(iter(_parsed(path, lambda one: one, "to ask anew", last=1)), {})
    if not isinstance(header, dict):
        raise InputError(f"{path} does not begin with what decides its answers; delete it to ask anew")
    answers = _parsed(path, lambda one: _answer(one, seconds), "to ask anew", first=2)
    return header, {answer.line: answer for answer in answers}


def _parsed(path: Path, make: Callable[[dict], object], delete: str, first: int = 1,
            last: int | None = None) -> list:
    """Read the whole lines `first` to `last` of a file. Raises InputError, with its number, where one is damaged.
    """
    with reading(path):
        lines = path.read_bytes().split(b"\n")[:-1]
    found = []
    for number, line in enumerate(lines[first - 1:last], start=first):
        try:
            found.append(make(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{path}, line {number}, is damaged ({clip(error)}); take it out, or delete the file, "
                             f"{delete}") from None
    return found


def _answer(one: dict, seconds: dict[int, float]) -> Answer:
    """Make an answer of its line. Raises what `_parsed` knows for a damaged one."""
    answer = Answer(**{**one, "tiles": tuple(one["tiles"])}, seconds=seconds.get(one["line"], 0.0))
    texts = (answer.prediction, answer.said, answer.finish_reason, answer.refused)
    if not all(isinstance(number, int) for number in (answer.line, answer.tokens, *answer.tiles)) or not all(
            text is None or isinstance(text, str) for text in texts):
        raise TypeError("a value of another kind")
    return answer


def _time(one: dict) -> tuple[int, float]:
    return one["line"], float(one["seconds"])


def known(path: Path, job: dict) -> dict[int, Answer]:
    """Collect the answers that all processes have written so far; those of another job are refused."""
    found = {}
    for file in (*_parts(path), path):      # the whole one last: it is in place before a part is deleted
        try:
            there, some = load(file) if is_there(file) else ({}, {})
        except InputError:
            if file != path and not file.exists():      # deleted meanwhile
                continue
            raise
        if some and there != job:
            raise InputError(f"{file} holds {len(some)} answers of another work: {difference(there, job)}; repeat that "
                             "command, choose another folder, or delete this file")
        found.update(some)
    return found


def write(path: Path, job: dict, make: Callable[[Collection[int]], Iterable[Answer]], share: int = 0,
          wrote: Callable[[], None] = lambda: None):
    """Write the answers that `make(lines that have one)` gives to the file of a share; call `wrote` after each."""
    mine = path if share == 0 else _part(path, share)
    done = known(path, job)
    left = f"what is answered so far stays in {path.parent}, the same command goes on"
    with told(mine, left), held_file(mine) as file, held_file(_beside(mine)) as times:
        _go_on(times)
        if _go_on(file) < 2:                # no answers, perhaps below another job
            file.seek(0)
            file.truncate()
            file.write(json.dumps(job).encode() + b"\n")
        for answer in make(done.keys()):
            line = asdict(answer)
            seconds = {"line": answer.line, "seconds": round(line.pop("seconds"), 3)}
            for to, what in ((times, seconds), (file, line)):       # an answer is there only with its seconds
                to.write(json.dumps(what).encode() + b"\n")
                to.flush()
            wrote()


def put_in_order(path: Path, job: dict, lines: Iterable[int], same: Path | None = None) -> list[Answer]:
    """Make one file of all parts, in the order of the rows; return its answers.

    same: a file whose answers are taken instead, as the questions are the same.
    """
    found = known(path, job) if same is None else load(same)[1]
    answers = [found[line] for line in lines]
    seconds, texts = b"", json.dumps(job).encode() + b"\n"
    for answer in answers:
        line = asdict(answer)
        seconds += json.dumps({"line": answer.line, "seconds": line.pop("seconds")}).encode() + b"\n"
        texts += json.dumps(line).encode() + b"\n"
    for file, content in ((_beside(path), seconds), (path, texts)):
        if not is_there(file) or file.read_bytes() != content:
            with new_file(file) as to:
                to.write(content)
    for part in _parts(path):
        part.unlink(missing_ok=True)
        _beside(part).unlink(missing_ok=True)
    return answers


def count(path: Path) -> int:
    """Count the lines of answers that all processes have written so far."""
    total = 0
    for file in (path, *_parts(path)):
        with reading(file):
            total += max(0, file.read_bytes().count(b"\n") - 1) if file.exists() else 0
    return total


def _go_on(file: BinaryIO) -> int:
    """Cut a line that a killed run has left half written, and go to the end; return the lines that are there."""
    content = file.read()
    whole = content.rfind(b"\n") + 1
    file.truncate(whole)
    file.seek(whole)
    return content.count(b"\n")


def _part(path: Path, share: int) -> Path:
    return path.with_name(f"{path.stem}.part-{share}.jsonl")


def _parts(path: Path) -> list[Path]:
    return sorted(file for file in path.parent.glob(f"{path.stem}.part-*.jsonl") if file.stem.split("-")[-1].isdigit())


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}.seconds.jsonl")
