"""Read weight files: every file is checked to be whole, then each tensor is mapped into memory when it is asked for.

Reads model.safetensors, sharded safetensors, and the pickled pytorch_model*.bin of the AWQ repositories (pickles.py).
"""
from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minivl.config import renamed
from minivl.files.find import EXPECTED, STEMS, other_weights
from minivl.files.pickles import MAX_NAME, a_shape, read_places
from minivl.files.sets import WeightSet, is_here, is_pointer, named, sets_of
from minivl.limits import InputError, first_of, is_there, reading

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER = 16_000_000     # bytes; the released ones stay below 1 MB, and Python's JSON needs 25 times as much memory
DIGESTS = "sha256 of dtype, shape and bytes"        # key of a file's metadata: a digest of each tensor, see digest_of
OLD_DIGESTS = "sha256"                              # the same in older files: a digest of the bytes alone
OLD_FORMAT = bytes.fromhex("8a0a6cfc9c46f9206aa85019")      # the number with which torch's format before 1.6 begins

@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight file: known by its header, read (memory-mapped, not copied) on demand."""
    file: Path
    shape: tuple
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Count the bytes of its numbers in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_weights(folder: str | os.PathLike) -> dict[str, StoredTensor]:
    """Open all weights of a folder: name -> StoredTensor. Every file is checked to be whole first.

    Several sets of files that hold the same model are read as one, safetensors and the single file first, which is the
    order of transformers; of different ones it would be a guess which is meant, so they are refused.
    """
    return _open_set(Path(folder), choose_set(folder))


def choose_set(folder: str | os.PathLike) -> WeightSet:
    """Find the weight files of a folder, by their names, the indexes, and, of several sets, their headers."""
    folder = Path(folder)
    sets = [one for suffix in STEMS for one in sets_of(folder, suffix)]
    # An index without its files is left by tools that save or download only the other form. It holds no model.
    whole = [one for one in sets if any(is_here(folder / file) for file in one.files)]
    if not sets:
        with reading(folder):
            other = other_weights(sorted(os.listdir(folder)))
        raise InputError(f"{folder} has no weights; expected {EXPECTED}"
                         + (f"; {other}" if other else ". Is the download complete?"))
    if not whole:
        return sets[0]
    for other in whole[1:]:
        difference = _difference(folder, whole[0], other)
        if difference:
            raise InputError(f"{folder} holds two models, {whole[0].name} and {other.name}: {difference}; delete what "
                             f"you do not mean, either {named(whole[0])}, or {named(other)}")
    stale = f"{whole[0].name}.index.json"
    if any(one.name == stale and one not in whole for one in sets):     # transformers leaves it when it saves one file
        warnings.warn(f"{folder} holds {stale}, but none of the files that it names; {whole[0].name} is read. If you "
                      "mean that, delete the index", stacklevel=4)
    return whole[0]


def _open_set(folder: Path, one: WeightSet, verify: bool = True) -> dict[str, StoredTensor]:
    """Open the files of a set. `verify`: check the sums of the tensors too, where the files carry any."""
    open_file = _open_pickle if ".bin" in one.name else open_safetensors
    for file in one.files:
        if len(file) > 200 or not is_there(folder / file):
            raise InputError(f"{folder} lacks the shard {file} that {one.name} names; "
                             f"{len(file) <= 200 and renamed(folder / file) or 'download it again'}")
    tensors = {}
    for file in one.files:
        with reading(folder / file):
            opened = open_file(folder / file, verify)
        for name, tensor in opened.items():
            if name in tensors:
                raise InputError(f"{name} is in {tensors[name].file.name} and in {file}; the shards do not belong "
                                 "together, download them again")
            if one.weight_map is not None and one.weight_map.get(name) != file:
                raise InputError(f"{file} holds {name}, which {one.name} places in "
                                 f"{one.weight_map.get(name, 'no file')}; the shards do not belong together")
            tensors[name] = tensor
    lost = [f"{name} (in {file})" for name, file in (one.weight_map or {}).items() if name not in tensors]
    if lost:
        raise InputError(f"{one.name} names {len(lost)} tensors that the shards lack: {first_of(lost, ', ')}; download "
                         "them again")
    return tensors


def _difference(folder: Path, one: WeightSet, other: WeightSet) -> str | None:
    """Say where two sets differ, None if they hold the same model: names, shapes, dtypes, and a look at each tensor.

    The look is at 4096 bytes at its begin, middle and end: what was trained further or merged differs in many tensors.
    """
    try:
        a, b = (_open_set(folder, either, verify=False) for either in (one, other))
    except InputError as problem:
        return f"they cannot be compared ({problem})"
    if a.keys() != b.keys():
        return f"{min(a.keys() ^ b.keys())} is only in one of them"
    for name, left in a.items():
        right = b[name]
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            return f"{name} is {left.dtype} {list(left.shape)}, and {right.dtype} {list(right.shape)} in the other"
        left, right = (tensor.read().flatten().view(torch.uint8) for tensor in (left, right))
        for start in (0, len(left) // 2, max(len(left) - 4096, 0)):
            if not torch.equal(left[start:start + 4096], right[start:start + 4096]):
                return f"{name} has other values"
    return None


def _refuse_stand_in(path: Path):
    """Refuse a text that lies where the weights should be."""
    if is_pointer(path):
        raise InputError(f"{path.name} in {path.parent} is a git-lfs pointer, a text of {path.stat().st_size} bytes in "
                         "place of the weights; run `git lfs pull` in that folder, or download it again with python -m "
                         "weights_tools.download")
    with open(path, "rb") as f:
        start = f.read(64).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        raise InputError(f"{path.name} in {path.parent} is a web page, not the weights; download it again with "
                         "python -m weights_tools.download")


def safetensors_header(path: str | os.PathLike, size: int | None = None,
                       data: bytes | None = None) -> tuple[dict, dict, int]:
    """Read and check the header of a safetensors file: ({name: (dtype, shape, begin, end)}, metadata, first data byte).

    Layout: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps. `size` and `data`:
    for a remote file, its total size and its first bytes.
    """
    path = Path(path)
    bad = f"{path.name} is not a whole safetensors file: "
    with reading(path):
        size = path.stat().st_size if size is None else size
        if data is None:
            _refuse_stand_in(path)
            with open(path, "rb") as f:
                data = f.read(8)
                length = int.from_bytes(data, "little")
                data += f.read(length) if length <= min(MAX_HEADER, size) else b""
    length = int.from_bytes(data[:8], "little")
    if size < 8 or length > MAX_HEADER or 8 + length > size:
        raise InputError(f"{bad}its first 8 bytes announce a header of {length} bytes, the file has {size}; "
                         "download it again")
    try:
        header = json.loads(data[8:8 + length].decode(), object_pairs_hook=_without_repetition,
                            parse_constant=_no_number)
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(name, **entry) for name, entry in header.items()}
        whole = all(isinstance(text, str) for text in metadata.values())
    except (ValueError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise InputError(f"{bad}its header is corrupt; download it again")
    _check_layout(path.name, entries, 8 + length, size)
    return entries, metadata, 8 + length


def _entry(name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[str, tuple, int, int]:
    """Check the types of a tensor's entry; raises ValueError or TypeError where they are not those of the format."""
    begin, end = data_offsets
    numbers = [*shape, begin, end]
    if not (isinstance(dtype, str) and isinstance(shape, list) and all(type(n) is int for n in numbers)):
        raise TypeError
    if min(numbers) < 0 or max(numbers) >= 2**63 or not a_shape(shape) or len(name.encode()) > MAX_NAME:
        raise ValueError
    return dtype, tuple(shape), begin, end


def _no_number(name: str):
    """Refuse NaN and Infinity, which Python reads though JSON has none."""
    raise ValueError(name)


def _check_layout(file: str, entries: dict, start: int, size: int):
    """Refuse a header whose tensors do not fill the file from byte `start` to its end, each right after the last."""
    bad = f"{file} is not a whole safetensors file: "
    end = 0
    last = "the header"
    for name, (dtype, shape, begin, stop) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if dtype not in DTYPES:
            raise InputError(f"{file}: {name} has dtype {dtype[:20]}; known are {', '.join(DTYPES)}")
        bytes_needed = math.prod(shape) * DTYPES[dtype].itemsize
        if begin != end or stop - begin != bytes_needed:
            raise InputError(f"{bad}{name} ({dtype} {list(shape)}, {bytes_needed} bytes) is said to lie at "
                             f"{begin}..{stop}, but {last} ends at {end}; the header was altered or damaged, "
                             "download it again")
        if start + stop > size:
            raise InputError(f"{bad}it ends at byte {size}, inside {name}, which needs bytes up to "
                             f"{start + stop}; the file was cut short, download it again")
        end = stop
        last = name
    if start + end != size:
        raise InputError(f"{bad}{size - start - end} bytes follow its last tensor {last}; the file was padded or "
                         "is another one, download it again")


def _without_repetition(pairs: list) -> dict:
    """Refuse a JSON object that names something twice: it could mean another tensor to the next reader."""
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError
    return dict(pairs)


def open_safetensors(path: Path, verify: bool = True) -> dict[str, StoredTensor]:
    """Open one safetensors file: name -> StoredTensor. `verify`: check the sums of its tensors, if it has any."""
    entries, metadata, start = safetensors_header(path)
    if verify:
        _verify_sha256(path, entries, metadata, start)
    try:
        safe_open(path, framework="pt")
    except (SafetensorError, OSError):
        raise InputError(f"{path.name} is refused by the safetensors library; download it again") from None

    return {name: _stored(path, start + begin, shape, None, DTYPES[dtype])
            for name, (dtype, shape, begin, _) in entries.items()}


def digest_of(dtype: str, shape: Sequence[int], data) -> str:
    """Compute the digest of a tensor: sha256 of its dtype, named as in the header, its shape, and its bytes."""
    digest = hashlib.sha256(f"{dtype} {list(shape)} ".encode())
    digest.update(data)
    return digest.hexdigest()


def _verify_sha256(path: Path, entries: dict, metadata: dict, start: int):
    """Check each tensor's digest. Files of weights_tools carry them; released ones do not (the hub has the file's).

    Older files carry OLD_DIGESTS, of the bytes alone: there, another dtype of the same size goes unseen.
    """
    kind = next((kind for kind in (DIGESTS, OLD_DIGESTS) if kind in metadata), None)
    if kind is None:
        return
    try:
        digests = dict(json.loads(metadata[kind]))
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{path.name}: its list of sha256 digests is corrupt; make or download it again") from None
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
        def digest(entry):
            with view[start + entry[2]:start + entry[3]] as part:
                return digest_of(*entry[:2], part) if kind == DIGESTS else hashlib.sha256(part).hexdigest()

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, found in zip(entries, pool.map(digest, entries.values())):
                if found != digests.get(name):
                    raise InputError(f"{path.name}: {name} does not match its sha256 digest; the file was altered or "
                                     "damaged, make or download it again")


def _open_pickle(path: Path, verify: bool) -> dict[str, StoredTensor]:
    """Open pytorch_model.bin, see pickles.py."""
    _refuse_stand_in(path)
    with open(path, "rb") as f:
        old = OLD_FORMAT in f.read(40)
    if old:
        raise InputError(f"{path.name} in {path.parent} is in the old format of torch.save (before torch 1.6, or "
                         "_use_new_zipfile_serialization=False), without checksums, which cannot be mapped; convert "
                         f"it once: python -c \"import torch; f = {str(path)!r}; torch.save(torch.load(f, "
                         "weights_only=True), f)\"")
    return {name: _stored(path, *place) for name, place in read_places(path, verify).items()}


def _stored(path: Path, at: int, shape: tuple, stride: tuple | None, dtype: torch.dtype) -> StoredTensor:
    return StoredTensor(path, shape, dtype, partial(_map, path, at, shape, stride, dtype))


def _map(path: Path, at: int, shape: tuple, stride: tuple | None, dtype: torch.dtype) -> torch.Tensor:
    """Map a tensor that lies at byte `at` of a file. Only the pages that are looked at come into memory.

    `stride` None: row by row. A pickle can hold a transposed view of its record: its tensor comes as a copy.
    """
    if not math.prod(shape):       # empty: it lies nowhere
        return torch.empty(shape, dtype=dtype)
    numbers = math.prod(shape) if stride is None else 1 + sum((n - 1) * step for n, step in zip(shape, stride))
    end = at + numbers * dtype.itemsize
    try:
        storage = torch.UntypedStorage.from_file(str(path), False, end)[at:end]
    except RuntimeError as error:       # torch's own, around what the operating system says
        raise InputError(f"{path} cannot be read any more ({str(error).splitlines()[0]}); load it again") from None
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, *([] if stride is None else [stride])).contiguous()
