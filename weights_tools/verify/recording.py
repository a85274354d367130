"""A trace on disk: what the reference computed, stage by stage, and on what.

    safetensors: the stages by their names in minivl.tracing, input_ids, pixel_values, greedy, greedy_scores
    metadata "trace": json of the facts (reference, versions, dtype, prompt, tiles, sha256 of weights and pictures, ...)

A trace holds whole stages, or, where it was shrunk for the repository, a few hundred values of each (`picks`).
"""
from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import safe_open

from minivl.files.formats import open_weights
from minivl.limits import InputError
from minivl.tracing import place
from weights_tools.files import raw_bytes, save_safetensors

SLICE = 509     # values kept of a stage in a shrunk trace: a prime, so that the picks meet every row and channel


@dataclass
class Recording:
    """A recorded run: its tensors, read when asked for, and the facts about it."""
    path: Path
    facts: dict
    names: list

    @classmethod
    def open(cls, path: str | Path) -> Recording:
        """Read the names and facts of a trace; InputError if the file is none."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path} is no file; record a trace first (--record {path})")
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                metadata = file.metadata() or {}
        except Exception as error:
            raise InputError(f"{path} is no safetensors file ({error}); a trace is written by --record") from None
        recording = cls(path, json.loads(metadata.get("trace", "{}")), names)
        if "input_ids" not in names or not recording.stages:
            raise InputError(f"{path} holds {', '.join(names[:5]) or 'nothing'}; a trace has input_ids and stages such "
                             "as llm.norm, see the names in minivl/tracing.py")
        return recording

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)

    @property
    def stages(self) -> list:
        """The names of the stages, in the order of the computation."""
        return sorted((name for name in self.names if place(name) is not None), key=place)

    @property
    def dtype(self) -> str:
        """That of the reference's computation, as a word."""
        return self.facts.get("dtype", "float32")

    def sliced(self, name: str) -> bool:
        """Tell whether only `picks` of this tensor are here."""
        return name in self.facts.get("slices", {})

    def shape(self, name: str) -> list:
        """The shape of a tensor, also where only a slice of it is here."""
        if self.sliced(name):
            return self.facts["slices"][name]
        with safe_open(self.path, "pt") as file:
            return file.get_slice(name).get_shape()


def picks(numel: int) -> torch.Tensor:
    """Choose indices int64[<= SLICE] of a flattened tensor: spread evenly, the same for everybody."""
    return torch.arange(min(SLICE, numel)) * numel // min(SLICE, numel)


def shrink(recording: Recording, path: str | Path, whole: Iterable[str] = ()) -> Path:
    """Write the trace with SLICE values of each stage: kilobytes, for a repository.

    `whole`: patterns of the names that are kept as they are.
    """
    tensors = {}
    shapes = {}
    for name in recording.names:
        tensor = recording[name]
        if any(fnmatchcase(name, p) for p in ("input_ids", "greedy*", *whole)) or tensor.numel() <= SLICE:
            tensors[name] = tensor
        else:
            shapes[name] = list(tensor.shape)
            tensors[name] = tensor.flatten()[picks(tensor.numel())].clone()
    return save_safetensors(tensors, path, {"trace": json.dumps({**recording.facts, "slices": shapes})})


def weights_digest(folder: Path) -> str:
    """Compute a sha256 over all tensors by name, as the reference does: of the numbers, not of their files."""
    total = sha256()
    tensors = open_weights(folder)
    for name in sorted(tensors):
        tensor = tensors[name].read().contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(raw_bytes(tensor))
    return total.hexdigest()
