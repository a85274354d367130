"""A long work that makes lines of JSON: stopped anywhere, the same command goes on and ends with the same bytes.

    .begun-OUT.jsonl    beside OUT.jsonl: what was asked for, then a line for each row that is made
    OUT.jsonl           appears whole, then the other one goes
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from minivl.limits import InputError, clip, is_there, reading
from weights_tools.files import held_file, new_file, small_files, told, weight_files


def write_begun(out: Path, job: dict, make: Callable[[int], Iterable[dict]], *, group: int = 1,
                keep: Callable[[dict], bool] = lambda row: True) -> tuple[int, int]:
    """Write the rows that `make(first)` gives, from number `first` on, to OUT; go on where an earlier call stopped.

    job: {option: value} of all that decides the rows; an unfinished work with another one is refused. group: so many
    rows are made at once, none of them without the others. keep(row): whether it comes into OUT. Returns the
    numbers of rows made and kept.
    """
    if out.suffix != ".jsonl":
        raise InputError(f"{out} must end in .jsonl, by which other commands know it")
    begun = out.with_name(f".begun-{out.name}")
    if is_there(out) and not is_there(begun):
        raise InputError(f"{out} is there already, whole; choose another file, or delete it to make it anew")
    made = None
    try:
        with told(out, f"what is made so far stays in {begun}, the same command goes on"), held_file(begun) as file:
            made = _go_on(file, begun, job, group)
            for row in make(made):
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                made += 1
            kept = _finish(file, out, keep)
    except (InputError, KeyboardInterrupt):
        if made == 0:       # nothing is lost
            begun.unlink(missing_ok=True)
        raise
    begun.unlink()
    return made, kept


def _go_on(file: BinaryIO, begun: Path, job: dict, group: int) -> int:
    """Cut what a killed run has left half done, so that the next line can be written; return how many are there."""
    wanted = json.dumps(job).encode() + b"\n"
    header = file.readline()
    end = len(header)
    number, rows, whole = 0, 0, end
    for number, line in enumerate(file, start=1):
        end += len(line)
        if number % group == 0 and line.endswith(b"\n"):
            rows, whole = number, end
    if not rows:
        file.seek(0)
        file.write(wanted)
        whole = len(wanted)
    elif header != wanted:
        raise InputError(f"{begun} holds {rows} rows of another work: {difference(_job_of(header), job)}; repeat that "
                         "command, choose another file, or delete this one")
    file.truncate(whole)
    file.seek(whole)
    return rows


def _job_of(header: bytes) -> dict:
    try:
        return json.loads(header)
    except ValueError:
        return {}


def difference(there: dict, job: dict) -> str:
    """Say in what two works differ, for a message."""
    names = [name for name in {**there, **job} if there.get(name) != job.get(name)]
    return ", ".join(f"{name} {clip(there.get(name), 60)} there and {clip(job.get(name), 60)} here" for name in names)


def _finish(file: BinaryIO, out: Path, keep: Callable[[dict], bool]) -> int:
    """Copy the rows to their place; return their number."""
    file.seek(0)
    file.readline()
    kept = 0
    with new_file(out) as to:
        for line in file:
            if keep(json.loads(line)):
                to.write(line)
                kept += 1
    return kept


# ---- what a work is known by ----------------------------------------------------------------------------------------

def digest_of_file(path: Path) -> str:
    """Compute the first 16 digits of the sha256 of a file."""
    with reading(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def digest_of_checkpoint(folder: Path) -> str:
    """Compute 16 digits from the names, sizes and times of the weight files of a checkpoint, and the files beside."""
    digest = hashlib.sha256()
    with reading(folder):
        for file in weight_files(folder):
            about = file.stat()
            digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    for name, content in sorted(small_files(folder).items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
