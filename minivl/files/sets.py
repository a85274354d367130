"""Tell which files of a folder hold its weights, by their names and indexes, and whether they are of one model.

Four forms: model.safetensors or pytorch_model.bin in one file, or in shards, with an index or without.
"""
from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from minivl.config import LFS, read_json
from minivl.files.find import STEMS, shard_of
from minivl.limits import InputError, clip, first_of, is_there, reading


@dataclass(frozen=True)
class WeightSet:
    """The files that hold one model. A folder can hold several: the files of an older save, or of another format."""
    name: str                       # of the file that stands for it
    files: list[str]
    weight_map: dict | None         # tensor name -> file, by the index; None: there is no index


def sets_of(folder: Path, suffix: str) -> list[WeightSet]:
    """List the sets of one format: the single file, then the index with its shards, or shards without an index."""
    single = f"{STEMS[suffix]}.{suffix}"
    index = f"{single}.index.json"
    shards = {name: shard for name in _names(folder) if (shard := shard_of(name, suffix))}
    sets = []
    if is_there(folder / index):
        weight_map = _weight_map(folder / index)
        files = sorted(set(weight_map.values()))
        sets.append(WeightSet(index, files, weight_map))
        strange = [name for name in shards if name not in files]
        if strange:
            raise InputError(f"{folder} holds {strange[0]} ({len(strange)} files) that {index} does not name: they are "
                             f"of another model or save; delete them, or {index} and the {len(files)} files it names")
    elif shards:
        counts = sorted({n for _, n in shards.values()})
        if len(counts) > 1:
            raise InputError(f"{folder} holds shards of several models, of {' and of '.join(map(str, counts))} files, "
                             f"and no {index}; delete those that you do not mean")
        if len(shards) != counts[0] or {k for k, _ in shards.values()} != {*range(1, counts[0] + 1)}:
            raise InputError(f"{folder} holds {len(shards)} of {counts[0]} shards ({first_of(list(shards), ', ', 3)}) "
                             f"and no {index}; download it again, or delete them if you mean other weights")
        sets.append(WeightSet(next(iter(shards)), list(shards), None))
    if is_there(folder / single) and not (sets and single in sets[0].files):
        sets.insert(0, WeightSet(single, [single], None))
    return sets


def _names(folder: Path) -> list[str]:
    with reading(folder):
        return sorted(os.listdir(folder))


def _weight_map(index: Path) -> dict[str, str]:
    """Read the index of a sharded checkpoint: tensor name -> file name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index.name} in {index.parent} has no weight_map of tensor names to file names; download it "
                         "again")
    weight_map = {name: file.removeprefix("./") for name, file in weight_map.items()}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file.startswith("."):
            raise InputError(f"{index.name} points outside its folder: {clip(file)!r}; do not use this checkpoint")
        if len(file) > 200:
            raise InputError(f"{index.name} in {index.parent} names a file {clip(file)!r}, longer than any file system "
                             "takes; download it again")
    return weight_map


def named(one: WeightSet) -> str:
    """Name the files of a set, so that they can be deleted."""
    others = [file for file in one.files if file != one.name]
    return one.name + (f" and the shards {first_of(others, ', ', 2)}" if others else "")


def is_here(path: Path) -> bool:
    """Tell whether a file is there: a git-lfs pointer only stands for one."""
    # An index can name anything; the system raises for a name of more than 255 bytes.
    return len(path.name) <= 200 and is_there(path) and not is_pointer(path)


def is_pointer(path: Path) -> bool:
    """Tell whether a file is the small text that git keeps in place of a large file."""
    with reading(path), open(path, "rb") as f:
        return f.read(len(LFS)) == LFS.encode()
