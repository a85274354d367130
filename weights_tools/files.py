"""Write files whole or not at all, and weights: safetensors or pickled .bin, in one file or in shards with an index.

    names, shapes, dtypes -> plan of shards -> one shard at a time in memory -> a hidden folder -> moved into place

Every tool writes through here. What is not finished lies in a folder .incomplete-* beside its place, locked by the
process that fills it; the next one to write there clears away what a killed process has left.
The safetensors files carry a sha256 digest of each tensor's dtype, shape and bytes, which minivl.load checks. Files of
older versions carry one of the bytes alone, released ones none; the hub knows a digest of each file. No numpy: tensors
are written from their addresses.
"""
from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm import tqdm

from minivl.files.find import SMALL_FILES
from minivl.files.formats import DIGESTS, DTYPES, digest_of
from minivl.limits import InputError, in_words, is_there, reading

try:
    import fcntl
except ImportError:         # Windows: nothing is locked there, so nothing is cleared away
    fcntl = None

STEM = {"safetensors": "model", "bin": "pytorch_model"}     # format, which is the suffix too -> name before the suffix
WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
UNFINISHED = ".incomplete-"
STORED_AS = {dtype: name for name, dtype in DTYPES.items()}


# ---- any file -------------------------------------------------------------------------------------------------------

@contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its place at `path` when the block ends, whole; if it fails, nothing changes.

    A device or a pipe is written to as it is. Raises an OSError that names the path and says what is left there.
    """
    path = Path(path)
    there = os.path.exists(path)
    left = "what was there before is left as it was" if there else "nothing is left there"
    # A program's own output, /dev/stdout, may lead to a file, which must stay the one that is open.
    if there and not os.path.isfile(path) or str(path.parent) in ("/dev", "/dev/fd"):
        with told(path, "what was written there is not whole"), open(path, "wb") as file:
            yield file
        return
    with unfinished(path.parent, left) as new, told(path, left):
        with open(new / path.name, "wb") as file:
            yield file
        os.replace(new / path.name, path)


def write_text(path: str | Path, text: str):
    """Write a text as UTF-8, with its own line ends on any system, whole or not at all."""
    with new_file(path) as file:
        file.write(text.encode("utf-8"))


def save_torch(data, path: str | Path):
    """Write what torch.save writes, whole or not at all."""
    with new_file(path) as file:
        _torch_save(data, file)


@contextmanager
def told(path: str | Path, left: str) -> Iterator[None]:
    """Say of an error of the operating system inside which path could not be written, why, and what is left."""
    try:
        yield
    except OSError as error:
        raise in_words(error, f"{path} cannot be written", left) from None


@contextmanager
def unfinished(folder: Path, left: str) -> Iterator[Path]:
    """Make a hidden folder inside `folder` for what is not finished; it goes when the block ends.

    Clears away those of processes that were killed. While its owner lives, such a folder is locked. `left`: see `told`.
    """
    with told(folder, left):
        for old in dead(folder):
            shutil.rmtree(old, ignore_errors=True)
        new, lock = _claim(folder)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def clear(folder: Path):
    """Clear away what killed processes have left in a folder, where perhaps nothing is written any more.

    A list of moved weights stays as long as some are not in place, see `check_free_of_weights`.
    """
    for old in dead(folder):
        shutil.rmtree(old, ignore_errors=True)
    for listed in dead(folder, ".json"):
        if all((folder / mark[0]).exists() and _mark(folder / mark[0]) == mark for mark in _marks(listed)):
            listed.unlink(missing_ok=True)


def dead(folder: Path, suffix: str = "") -> list[Path]:
    """List the unfinished folders inside `folder`, or with `suffix` .json their lists, whose owner is gone."""
    found = []
    for path in sorted(folder.iterdir()) if fcntl else []:
        if re.fullmatch(rf"{re.escape(UNFINISHED)}\w{{8}}{re.escape(suffix)}", path.name):
            with contextlib.suppress(OSError):      # not ours to open, or gone meanwhile
                lock = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                if _locked(lock):
                    found.append(path)
                os.close(lock)
    return found


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a folder, if it is not there, and hold it: raises InputError where another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if lock is not None and not _locked(lock, or_without=True):
            raise InputError(f"another process works in {folder}; wait for it, or choose another place")
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def held_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read and write, if it is not there a new one, and hold it: as `held`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b") as file:
        if fcntl and not _locked(file.fileno(), or_without=True):
            raise InputError(f"another process works on {path}; wait for it, or choose another place")
        yield file


def _claim(folder: Path) -> tuple[Path, int | None]:
    """Make and lock an unfinished folder: its path, and the open lock."""
    while True:
        new = folder / f"{UNFINISHED}{secrets.token_hex(4)}"
        new.mkdir()
        if not fcntl:
            return new, None
        with contextlib.suppress(FileNotFoundError):        # before it is locked it looks dead to others
            lock = os.open(new, os.O_RDONLY)
            if _locked(lock, or_without=True) and new.exists():
                return new, lock
            os.close(lock)


def _locked(file: int, or_without: bool = False) -> bool:
    """Lock an open file for this process; False where another one has it. `or_without`: where a disk has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return or_without


# ---- weights --------------------------------------------------------------------------------------------------------

def save_safetensors(tensors: dict[str, torch.Tensor], path: str | Path,
                     metadata: dict[str, str] | None = None) -> Path:
    """Write one .safetensors file, whole or not at all. Equal tensors and metadata give equal files, byte by byte."""
    path = Path(path)
    tensors = {name: _plain(name, tensor) for name, tensor in tensors.items()}
    with new_file(path) as file:
        _write_safetensors(tensors, file, metadata)
    return path


def save_checkpoint(tensors: dict[str, torch.Tensor], folder: str | Path, *,
                    make: Callable[[str], torch.Tensor] | None = None, format: str = "safetensors",
                    shard_bytes: int = 2 * 10**9, overwrite: bool = False, metadata: dict[str, str] | None = None,
                    small: dict[str, bytes] | None = None) -> list[Path]:
    """Write weights, e.g. `model.state_dict()`, as the weight files of `folder`; return their paths.

    `make(name) -> Tensor`: for more tensors than memory holds. `tensors` then only says names, shapes and dtypes (on
    the `meta` device, say) and about one shard is in memory at a time. `shard_bytes`: most bytes of tensors in a file.
    Weights already in the folder are refused, or with `overwrite` replaced once the new ones are complete; what a
    killed run has put there is nobody's. `metadata`: into the header of each safetensors file. `small`: {name: content}
    of the files beside the weights, config.json say: new ones never stand beside old weights.
    """
    if format not in STEM:
        raise InputError(f"format {format!r} is not one of {', '.join(STEM)}")
    folder = Path(folder)
    check_free_of_weights(folder, overwrite)
    shards = plan_shards({name: tensor.nbytes for name, tensor in tensors.items()}, shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors.values())
    kept = "the weights there before are left as they were" if weight_files(folder) else "no weights are left there"
    stem = STEM[format]
    names = ([f"{stem}-{k:05d}-of-{len(shards):05d}.{format}" for k in range(1, len(shards) + 1)]
             if len(shards) > 1 else [f"{stem}.{format}"])
    index = {"metadata": {"total_size": total},
             "weight_map": {name: file for file, shard in zip(names, shards) for name in shard}}
    small = small or {}
    with _made(folder), unfinished(folder, kept) as new, \
            tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {folder.name}", disable=None) as bar:
        free = shutil.disk_usage(folder).free
        if total > free:
            raise InputError(f"the weights take {total / 1e9:.3f} GB, {folder} has {free / 1e9:.3f} GB free; free some "
                             "space or choose another disk")
        for file, shard in zip(names, shards):
            part = {}
            for name in shard:
                part[name] = _plain(name, make(name) if make else tensors[name])
                if (part[name].shape, part[name].dtype) != (tensors[name].shape, tensors[name].dtype):
                    raise ValueError(f"make({name!r}) gave {part[name].dtype} {list(part[name].shape)}, announced was "
                                     f"{tensors[name].dtype} {list(tensors[name].shape)}")
                bar.update(part[name].nbytes)
            with told(folder, kept), open(new / file, "wb") as to:
                if format == "safetensors":
                    _write_safetensors(part, to, metadata)
                else:
                    _write_bin(part, to)
        if len(shards) > 1:
            names.append(f"{stem}.{format}.index.json")
        with told(folder, kept):
            for name, content in small.items():
                (new / name).write_bytes(content)
            if len(shards) > 1:
                (new / names[-1]).write_bytes(json.dumps(index, indent=2, sort_keys=True).encode("utf-8") + b"\n")
        with told(folder, "the new files are not all in place: run again, which replaces them"):
            _move_into_place(new, folder, list(small), names)
    return [folder / file for file in names]


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder that may be there already. If the block fails, what was made here and is empty goes again."""
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    with told(folder, "nothing is changed there"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):      # something lies there
            for one in new:
                one.rmdir()
        raise


def plan_shards(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """Cut the names, in their order, into shards of at most `shard_bytes`; only a tensor alone may be larger.

    Sizes 3 3 2 5 1 and 6 bytes a shard: 3 3 | 2 | 5 1.
    """
    if shard_bytes < 1:
        raise InputError(f"a shard of {shard_bytes} bytes holds no tensor; the released files have at most 2000000000")
    shards = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def weight_files(folder: str | Path) -> list[Path]:
    """List the weight files of a folder, of either format, shards and indexes included."""
    folder = Path(folder)
    return sorted(p for p in folder.iterdir() if WEIGHT_FILE.fullmatch(p.name)) if folder.is_dir() else []


def check_free_of_weights(folder: str | Path, overwrite: bool):
    """Refuse a folder with weights that must not be overwritten: all but those that a killed run has left."""
    folder = Path(folder)
    with reading(folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; give a folder")
        found = [] if overwrite else weight_files(folder)
        if found:
            left = [mark for listed in dead(folder, ".json") for mark in _marks(listed)]
            found = [file for file in found if _mark(file) not in left]
    if found:
        raise InputError(f"{folder} already holds weights ({found[0].name}, {len(found)} files); choose another folder "
                         "or pass overwrite (--overwrite)")


def check_apart(folder: str | Path, out: str | Path):
    """Refuse to write a changed copy of a checkpoint into its own folder, or below it."""
    source = Path(folder).resolve()
    if source in (Path(out).resolve(), *Path(out).resolve().parents):
        raise InputError(f"{out} lies in {folder}, whose files it is made from; choose a folder elsewhere")


def small_files(folder: str | Path) -> dict[str, bytes]:
    """Read what lies beside a checkpoint's weights and belongs to it: config.json, the tokenizer's files and the like.

    name -> content, of those that are there; no code. The name of a chat template is that of transformers.
    """
    folder = Path(folder)
    names = (*SMALL_FILES, "preprocessor_config.json", "special_tokens_map.json", "chat_template.jinja")
    with reading(folder):
        return {name: (folder / name).read_bytes() for name in names if is_there(folder / name)}


def raw_bytes(tensor: torch.Tensor):
    """View the memory of a contiguous CPU tensor as a bytes-like object: no copy. Valid while the tensor lives."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else b""


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Make a tensor contiguous, on the CPU, without a gradient; the same memory where it is so already."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in DTYPES.values():
        raise InputError(f"{name} ({tensor.dtype}, {tensor.layout}, on {tensor.device}) cannot be stored; it must be a "
                         "dense tensor with values, of a dtype that minivl reads")
    return tensor.detach().cpu().contiguous()


def _write_safetensors(tensors: dict[str, torch.Tensor], file: BinaryIO, metadata: dict[str, str] | None):
    """Write plain tensors in the safetensors format, as its library does, but the metadata in a fixed order.

    Layout: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps. Numbers of the
    most bytes come first and the header is padded to 8, so that each tensor lies at a multiple of its numbers' size.
    Source: huggingface/safetensors README.md, "Format".
    """
    digests = {name: digest_of(STORED_AS[t.dtype], t.shape, raw_bytes(t)) for name, t in sorted(tensors.items())}
    about = {**(metadata or {}), "format": "pt", DIGESTS: json.dumps(digests)}
    if "__metadata__" in tensors or not all(isinstance(value, str) for value in about.values()):
        raise InputError("in a safetensors file no tensor can be called __metadata__, and metadata are strings")
    header = {"__metadata__": dict(sorted(about.items()))}
    end = 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        header[name] = {"dtype": STORED_AS[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        file.write(raw_bytes(tensor))


def _write_bin(tensors: dict[str, torch.Tensor], file: BinaryIO):
    """Write pytorch_model.bin. torch.save stores whole storages: a view of a larger or shared one becomes its own."""
    used = set()
    own = {}
    for name, tensor in tensors.items():
        shared = tensor.data_ptr() in used or tensor.untyped_storage().nbytes() != tensor.nbytes
        own[name] = tensor.clone() if shared else tensor
        used.add(own[name].data_ptr())
    _torch_save(own, file)


def _torch_save(data, file: BinaryIO):
    """Call torch.save. Where the disk refuses, it raises an error of its own about positions; raise the disk's."""
    try:
        torch.save(data, file)
    except RuntimeError as error:
        cause = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


# ---- into place -----------------------------------------------------------------------------------------------------

def _move_into_place(new: Path, folder: Path, small: list[str], weights: list[str]):
    """Move a checkpoint's files out of the unfinished folder. Killed at any point, it leaves no mixture that loads.

    Old weights go first, the index before its shards; then come the files beside them; then the new weights, the index
    first: shards alone are read when all are there, with an index never before.
    A list beside the unfinished folder says which weights are new; it goes when nothing is left to do.
    """
    left = dead(folder, ".json")
    listed = new.with_suffix(".json")
    with open(listed, "w", encoding="utf-8") as file:
        if fcntl:
            _locked(file.fileno())
        json.dump([_mark(new / name) for name in weights], file)
        file.flush()
        for old in sorted(weight_files(folder), key=lambda file: not file.name.endswith(".index.json")):
            old.unlink()                                    # a stale shard or second format would be read some day
        for name in (*small, *reversed(weights)):
            os.replace(new / name, folder / name)
        for old in left:
            old.unlink(missing_ok=True)
        new.rmdir()
    listed.unlink()


def _mark(file: Path) -> list:
    """Tell a file from another one of its name, also after a move: by size and time."""
    about = file.stat()
    return [file.name, about.st_size, about.st_mtime_ns]


def _marks(listed: Path) -> list[list]:
    """Read a list of moved weights: what `_mark` says of each."""
    try:
        return json.loads(listed.read_text(encoding="utf-8"))
    except (OSError, ValueError):       # killed in the midst of writing it: nothing was moved
        return []


if __name__ == "__main__":
    sys.exit("weights_tools.files has no command; import save_checkpoint from it")
