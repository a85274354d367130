"""Write tensors as a released checkpoint does: safetensors or pickled .bin, in one file or in shards with an index.

    names, shapes, dtypes -> plan of shards -> one shard at a time in memory -> a hidden folder -> moved into place

The safetensors files carry a sha256 digest of each tensor, which minivl.load checks (released files carry none; the hub
knows a digest of each file). No numpy: the safetensors library is given addresses.
"""
from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import TensorSpec, serialize_file
from tqdm import tqdm

from minivl.files.formats import DTYPES
from minivl.limits import InputError

STEM = {"safetensors": "model", "bin": "pytorch_model"}     # format, which is the suffix too -> name before the suffix
WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def save_safetensors(tensors: dict[str, torch.Tensor], path: str | Path,
                     metadata: dict[str, str] | None = None) -> Path:
    """Write one .safetensors file, whole or not at all: under a temporary name, then moved over `path`.

    Equal tensors give equal digests, not always equal files: the library writes the metadata in any order.
    """
    path = Path(path)
    # Both dicts hold the tensors until the file is written: a TensorSpec is an address and keeps nothing alive.
    tensors = {name: _plain(name, tensor) for name, tensor in tensors.items()}
    digests = {name: hashlib.sha256(raw_bytes(tensor)).hexdigest() for name, tensor in tensors.items()}
    specs = {name: TensorSpec(dtype=str(t.dtype).removeprefix("torch."), shape=list(t.shape), data_ptr=t.data_ptr(),
                              data_len=t.nbytes) for name, t in tensors.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode       # that of any new file; the library's own is readable by nobody else
        serialize_file(specs, partial, metadata={**(metadata or {}), "format": "pt", "sha256": json.dumps(digests)})
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def save_checkpoint(tensors: dict[str, torch.Tensor], folder: str | Path, *,
                    make: Callable[[str], torch.Tensor] | None = None, format: str = "safetensors",
                    shard_bytes: int = 2 * 10**9, overwrite: bool = False,
                    metadata: dict[str, str] | None = None) -> list[Path]:
    """Write weights, e.g. `model.state_dict()`, as the weight files of `folder`; return their paths.

    `make(name) -> Tensor`: for more tensors than memory holds. `tensors` then only says names, shapes and dtypes (on
    the `meta` device, say) and about one shard is in memory at a time. `shard_bytes`: most bytes of tensors in a file.
    Weights already in the folder are refused, or with `overwrite` replaced once the new ones are complete.
    `metadata`: into the header of each safetensors file.
    """
    if format not in STEM:
        raise InputError(f"format {format!r} is not one of {', '.join(STEM)}")
    folder = Path(folder)
    check_free_of_weights(folder, overwrite)
    shards = plan_shards({name: tensor.nbytes for name, tensor in tensors.items()}, shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors.values())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise InputError(f"the weights take {total / 1e9:.3f} GB, {folder} has {free / 1e9:.3f} GB free; free some "
                         "space or choose another disk")
    stem = STEM[format]
    names = ([f"{stem}-{k:05d}-of-{len(shards):05d}.{format}" for k in range(1, len(shards) + 1)]
             if len(shards) > 1 else [f"{stem}.{format}"])
    index = {"metadata": {"total_size": total},
             "weight_map": {name: file for file, shard in zip(names, shards) for name in shard}}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incomplete-") as new, \
            tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {folder.name}", disable=None) as bar:
        for file, shard in zip(names, shards):
            part = {}
            for name in shard:
                part[name] = _plain(name, make(name) if make else tensors[name])
                if (part[name].shape, part[name].dtype) != (tensors[name].shape, tensors[name].dtype):
                    raise ValueError(f"make({name!r}) gave {part[name].dtype} {list(part[name].shape)}, announced was "
                                     f"{tensors[name].dtype} {list(tensors[name].shape)}")
                bar.update(part[name].nbytes)
            if format == "safetensors":
                save_safetensors(part, Path(new) / file, metadata)
            else:
                _save_bin(part, Path(new) / file)
        if len(shards) > 1:
            names.append(f"{stem}.{format}.index.json")     # last: without it the shards are no checkpoint
            (Path(new) / names[-1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for old in sorted(weight_files(folder), key=lambda file: not file.name.endswith(".index.json")):
            old.unlink()                                    # a stale shard or second format would be read some day
        for file in names:
            os.replace(Path(new) / file, folder / file)
    return [folder / file for file in names]


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
    """Refuse a folder with weights that must not be overwritten."""
    found = [] if overwrite else weight_files(folder)
    if found:
        raise InputError(f"{folder} already holds weights ({found[0].name}, {len(found)} files); choose another folder "
                         "or pass overwrite (--overwrite)")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise InputError(f"{folder} is a file; give a folder")


def raw_bytes(tensor: torch.Tensor):
    """View the memory of a contiguous CPU tensor as a bytes-like object: no copy. Valid while the tensor lives."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else b""


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Make a tensor contiguous, on the CPU, without a gradient; the same memory where it is so already."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in DTYPES.values():
        raise InputError(f"{name} ({tensor.dtype}, {tensor.layout}, on {tensor.device}) cannot be stored; it must be a "
                         "dense tensor with values, of a dtype that minivl reads")
    return tensor.detach().cpu().contiguous()


def _save_bin(tensors: dict[str, torch.Tensor], path: Path):
    """Write pytorch_model.bin. torch.save stores whole storages: a view of a larger or shared one becomes its own."""
    used = set()
    own = {}
    for name, tensor in tensors.items():
        shared = tensor.data_ptr() in used or tensor.untyped_storage().nbytes() != tensor.nbytes
        own[name] = tensor.clone() if shared else tensor
        used.add(own[name].data_ptr())
    torch.save(own, path)


if __name__ == "__main__":
    sys.exit("weights_tools.files has no command; import save_checkpoint from it")
