"""MMPR's files: JSON lines of pairs or of sampled answers, and the meta.json that says which files are learned from.

    meta.json    {name: {root, annotation, data_augment, repeat_time, length, max_dynamic_patch?}}
    annotation   a file .jsonl of {image?, question, chosen, rejected, answer_gt?, chosen_meta?, rejected_meta?}
                 and, not MMPR's, max_num: the most tiles of this row's pictures together

Every row is checked when a file is opened, and its pictures looked for, so that no training stops at row 2,000,000.
What is wrong is told with file and line. Rows stay in the file: MMPR v1.1 has three million.
Source: InternVL internvl_chat/internvl/train/internvl_chat_mpo.py:291-303, 384-761 @2410d1d.
"""
from __future__ import annotations

import json
import os
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minivl.config import read_json
from minivl.limits import InputError, clip, is_there, reading
from minivl.prompt import IMAGE
from weights_tools.files import new_file, write_text
from weights_tools.mpo.prompts import known_version
from weights_tools.mpo.shuffle import shuffle

MOST_REPEATS = 1000     # more would be a mistake, and a list of row numbers that no memory holds

# ---- rows -----------------------------------------------------------------------------------------------------------

def pictures(row: dict) -> list[str]:
    """List a row's pictures: "image" is a path, a list of paths, "" or not there."""
    image = row.get("image") or []
    return [image] if isinstance(image, str) else image


def check(row: dict, root: Path | None = None):
    """Raise InputError where nothing can be learned from a pair. root: the folder its pictures must be in."""
    _check_texts(row, ("question", "chosen", "rejected"))
    if not row["chosen"].strip():
        raise InputError("the chosen answer is empty; take the pair out")
    if row["chosen"] == row["rejected"]:
        raise InputError("the chosen and the rejected answer are the same, nothing is preferred; take the pair out")
    tiles = row.get("max_num")
    if tiles is not None and (type(tiles) is not int or tiles < 1):
        raise InputError(f"max_num is {clip(tiles)}; it must be a whole number, 1 or more")
    _check_pictures(row, root)


def check_answer(row: dict):
    """Raise InputError where a row is no sampled answer: see weights_tools.mpo.pairs.judge."""
    _check_texts(row, ("question", "response"))
    _check_pictures(row)
    known_version(row.get("prompt_version", "en"))
    _check_known(row)


def check_question(row: dict, root: Path | None = None):
    """Raise InputError where a row is no question with a known answer: see weights_tools.mpo.sample."""
    _check_texts(row, ("question",))
    if not row["question"].replace(IMAGE, "").strip():
        raise InputError("the question is empty; write one, or take the row out")
    _check_known(row)
    _check_pictures(row, root)


def check_chosen(row: dict, root: Path | None = None):
    """Raise InputError where a row is no question with a chosen answer: see weights_tools.mpo.dropout."""
    _check_texts(row, ("question", "chosen"))
    for name in ("question", "chosen"):
        if not row[name].replace(IMAGE, "").strip():
            raise InputError(f"{name} is empty; write it, or take the row out")
    _check_pictures(row, root)


def _check_known(row: dict):
    answer = row.get("answer")
    if not isinstance(answer, (str, int, float)):
        raise InputError("answer, the known one, must be a text or a number")
    if isinstance(answer, str) and not answer.strip():
        raise InputError("answer, the known one, is empty; write it, or take the row out")


def _check_texts(row: dict, names: tuple[str, ...]):
    lacks = [name for name in names if name not in row]
    if lacks:
        raise InputError(f"the row has no {', '.join(lacks)}; it needs {', '.join(names)}")
    for name in names:
        if not isinstance(row[name], str):
            raise InputError(f"{name} is a {type(row[name]).__name__}; it must be a text")


def _check_pictures(row: dict, root: Path | None = None):
    found = pictures(row)
    if not isinstance(found, list) or not all(isinstance(image, str) and image for image in found):
        raise InputError("image must be a path or a list of paths")
    # The original learns from another row, drawn at random, in its place.
    marks = row["question"].count(IMAGE)
    if isinstance(row.get("image"), list) and marks < len(found):
        raise InputError(f"the question has {marks} {IMAGE} for {len(found)} pictures; in a list each needs one")
    for image in found if root is not None else []:
        if not is_there(root / image):
            raise InputError(f"there is no picture {clip(root / image)}; check image, and the folder it is in")


class Rows(Sequence):
    """The rows of a file of JSON lines, read when they are asked for. `check(row)` raises InputError for a wrong one.

    Raises InputError that names file and line for what is not there, no JSON, no object, or does not pass.
    """

    def __init__(self, path: str | os.PathLike, check=check):
        self.path = Path(path)
        self.starts = array("Q")        # byte each row begins at
        self.lines = array("Q")         # its line, counted from 1
        if not is_there(self.path):
            raise InputError(f"there is no file {clip(self.path)}; check the path")
        start = 0
        with reading(self.path), open(self.path, "rb") as file, tqdm(
                total=self.path.stat().st_size, desc=self.path.name, unit="B", unit_scale=True, disable=None) as bar:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._checked(line, number, check)
                    self.starts.append(start)
                    self.lines.append(number)
                start += len(line)
                bar.update(len(line))
        if not self.starts:
            raise InputError(f"{self.path} holds no rows; it must hold a line of JSON for each")

    def _checked(self, line: bytes, number: int, check):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise self.wrong(number, "not JSON; each line must hold one object, in UTF-8") from None
        if not isinstance(row, dict):
            raise self.wrong(number, f"a {type(row).__name__}, not an object {{...}}")
        try:
            check(row)
        except InputError as error:
            raise self.wrong(number, str(error)) from None

    def wrong(self, number: int, what: str) -> InputError:
        """Return the error of a line."""
        return InputError(f"{self.path}, line {number}: {what}")

    def place(self, i: int) -> str:
        """Say where row i stands: file and line."""
        return f"{self.path}, line {self.lines[i]}"

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict:
        with reading(self.path), open(self.path, "rb") as file:
            file.seek(self.starts[i])
            return json.loads(file.readline())

    def __iter__(self) -> Iterator[dict]:
        with reading(self.path), open(self.path, "rb") as file:
            for line in file:
                if line.strip():
                    yield json.loads(line)


def write_rows(path: str | os.PathLike, rows: Iterable[dict], check=check) -> int:
    """Write rows as JSON lines, whole or not at all; return their number. `check` as in Rows."""
    if Path(path).suffix != ".jsonl":
        raise InputError(f"{path} must end in .jsonl, else it cannot stand in a meta.json")
    written = 0
    with new_file(path) as file:
        for row in rows:
            try:
                check(row)
            except InputError as error:
                raise InputError(f"row {written + 1} of what was to be written to {path}: {error}") from None
            file.write(json.dumps(row).encode() + b"\n")
            written += 1
    return written


# ---- meta.json ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Dataset:
    """One file of pairs as meta.json names it; `number` is its place there."""
    name: str
    number: int
    root: Path                              # folder of the pictures
    annotation: Path
    repeat_time: float = 1
    data_augment: bool = False
    max_dynamic_patch: int | None = None    # most tiles of a picture; None: as everywhere

    def rows(self) -> Rows:
        """Open the file."""
        return Rows(self.annotation, lambda row: check(row, self.root))

    def order(self, rows: int) -> list[int]:
        """Return the rows, of so many, in the order in which the original learns from them.

        repeat_time below 1 takes that share of them, above 1 takes each int(repeat_time) times; then they are shuffled
        as numpy does, exactly. Which rows make up a share is drawn from the dataset's number here; the original draws
        it from whatever random numbers came before.
        """
        chosen = list(range(rows))
        if self.repeat_time < 1:
            chosen = random.Random(self.number).sample(chosen, int(rows * self.repeat_time))
        elif self.repeat_time > 1:
            chosen *= int(self.repeat_time)
        shuffle(chosen, self.number)
        return chosen


def read_meta(path: str | os.PathLike) -> list[Dataset]:
    """Read a meta.json. Raises InputError that names the file and the dataset.

    Paths in it begin at the working folder, as in the original, or where there is nothing, at the file's folder, or
    the folder above: MMPR's own name the folder that they are in. `length` is not read.
    """
    path = Path(path)
    datasets = []
    for number, (name, entry) in enumerate(read_json(path).items()):
        try:
            datasets.append(_dataset(name, number, entry, path.parent))
        except InputError as error:
            raise InputError(f"{path}, {clip(name)!r}: {error}") from None
    if not datasets:
        raise InputError(f"{path} names no dataset; it must hold {{name: {{root, annotation, repeat_time}}}}")
    return datasets


def read_datasets(path: str | os.PathLike, root: str | os.PathLike | None = None) -> list[Dataset]:
    """Read a meta.json, or take one file of pairs, .jsonl, as a dataset; root: of its pictures, if not beside it."""
    path = Path(path)
    if path.name.endswith("jsonl"):
        return [Dataset(path.name, 0, path.parent if root is None else Path(root), path)]
    if root is not None:
        raise InputError(f"--root has no effect beside {path}: a meta.json says itself where the pictures are")
    return read_meta(path)


def _dataset(name: str, number: int, entry: object, folder: Path) -> Dataset:
    if not isinstance(entry, dict):
        raise InputError(f"it is a {type(entry).__name__}, not an object; is this a meta.json?")
    lacks = [key for key in ("root", "annotation", "repeat_time") if key not in entry]
    if lacks:
        raise InputError(f"it has no {', '.join(lacks)}; each dataset needs root, annotation and repeat_time")
    repeat = entry["repeat_time"]
    augment = entry.get("data_augment", False)
    tiles = entry.get("max_dynamic_patch")
    if not all(isinstance(entry[key], str) for key in ("root", "annotation")):
        raise InputError("root and annotation must be paths")
    if not entry["annotation"].endswith("jsonl"):
        raise InputError(f"annotation is {clip(entry['annotation'])}; it must end in jsonl")
    if isinstance(repeat, bool) or not isinstance(repeat, (int, float)) or not 0 <= repeat <= MOST_REPEATS:
        raise InputError(f"repeat_time is {clip(repeat)}; it must be a number in 0..{MOST_REPEATS}")
    if not isinstance(augment, bool):
        raise InputError(f"data_augment is {clip(augment)}; it must be true or false")
    if tiles is not None and (type(tiles) is not int or tiles < 1):
        raise InputError(f"max_dynamic_patch is {clip(tiles)}; it must be a whole number, 1 or more")
    return Dataset(name, number, _found(entry["root"], folder), _found(entry["annotation"], folder), repeat, augment,
                   tiles)


def _found(name: str, folder: Path) -> Path:
    places = [Path(name), folder / name, folder.parent / name]
    return next((place for place in places if place.exists()), places[0])


def write_meta(path: str | os.PathLike, datasets: Sequence[Dataset]):
    """Write a meta.json, whole or not at all. length: how many rows are learned from, which MMPR's files state too."""
    entries = {}
    for one in datasets:
        rows = len(one.rows())
        entries[one.name] = {
            "root": str(one.root), "annotation": str(one.annotation), "data_augment": one.data_augment,
            "repeat_time": one.repeat_time, "length": rows,
            **({} if one.max_dynamic_patch is None else {"max_dynamic_patch": one.max_dynamic_patch})}
    if len(entries) < len(datasets):
        raise InputError(f"{len(datasets)} datasets have {len(entries)} names; give each its own")
    write_text(path, json.dumps(entries, indent=1) + "\n")
