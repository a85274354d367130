"""The reference's log-probabilities of all pairs, computed once before the training and kept.

    OUT/reference.safetensors   logps float32[P, 2]: of each pair the chosen and the rejected answer; NaN: not yet
                                metadata "of": sha256 of what they are of, so that they cannot be taken for others

P pairs. Interrupted, the same call goes on and ends with the same file.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from minivl.files.formats import open_safetensors, open_weights, safetensors_header
from minivl.limits import InputError, is_there, reading
from weights_tools.files import save_safetensors, small_files
from weights_tools.mpo import distributed
from weights_tools.mpo.batch import Pairs
from weights_tools.mpo.mmpr import pictures

FILE = "reference.safetensors"
BLOCK = 2**20       # bytes read at once


def reference_logps(folder: Path, of: str, pairs: Pairs, logps: Callable[[range], torch.Tensor], micro: int,
                    save_every: int = 200) -> torch.Tensor:
    """Read or compute them: float32[P, 2].

    of: a sha256. logps(places) -> float32[2, n] of n neighbouring pairs, at most `micro`. save_every: calls of it from
    one writing of the file to the next. Several processes share the work.
    """
    found = _read(folder / FILE, of, len(pairs))
    done = int(found[:, 0].isfinite().sum())
    rank, ranks = distributed.world()
    save = lambda: rank or save_safetensors({"logps": found}, folder / FILE, {"of": of})
    with tqdm(total=len(pairs), initial=done, desc="reference", unit="pair", disable=True if rank else None) as bar:
        for call, start in enumerate(range(done, len(pairs), micro * ranks), start=1):
            begins = range(start, min(start + micro * ranks, len(pairs)), micro)
            chunks = [range(begin, min(begin + micro, len(pairs))) for begin in begins]
            # Each process computes, also if there is nothing left for it: the parts of a model wait for each other.
            mine = chunks[min(rank, len(chunks) - 1)]
            values = logps(mine).T.float().cpu()
            for places, part in zip(chunks, distributed.gathered(values, micro)):
                _check(part[:len(places)], pairs, places)
                found[places.start:places.stop] = part[:len(places)]
                bar.update(len(places))
            if call % save_every == 0:
                save()
    if done < len(pairs):
        save()
    return found


def _read(path: Path, of: str, pairs: int) -> torch.Tensor:
    if not is_there(path):
        return torch.full((pairs, 2), torch.nan)
    stored = open_safetensors(path)
    if safetensors_header(path)[1].get("of") != of or "logps" not in stored or stored["logps"].shape != (pairs, 2):
        raise InputError(f"{path} holds log-probabilities of other pairs, or by another model, than the {pairs} pairs "
                         "that are to be learned from; delete it to compute them anew, or choose another folder")
    return stored["logps"].read().clone()


def _check(values: torch.Tensor, pairs: Pairs, places: range):
    for place, row in zip(places, values):
        if not row.isfinite().all():
            raise InputError(f"{pairs[place].where}: the reference gives the answers log-probabilities of "
                             f"{row.tolist()}; check the checkpoint with python -m weights_tools.inspect")


# ---- of what they are -----------------------------------------------------------------------------------------------

def sha256_of_pairs(pairs: Pairs) -> str:
    """Sum up pairs: the datasets, their files byte by byte, the names and sizes of their pictures."""
    digest = hashlib.sha256()
    for one, rows in zip(pairs.datasets, pairs.rows):
        digest.update(json.dumps([one.number, one.repeat_time, one.max_dynamic_patch]).encode())
        _add(digest, rows.path)
        for row in rows:
            for image in pictures(row):
                with reading(one.root / image):
                    digest.update(f"{(one.root / image).stat().st_size} ".encode())
    return digest.hexdigest()


def sha256_of_checkpoint(folder: str | Path) -> str:
    """Sum up a checkpoint: its weights byte by byte, and what lies beside them. A gigabyte takes about a second."""
    digest = hashlib.sha256()
    for name, content in sorted(small_files(folder).items()):
        digest.update(f"{name} {len(content)} ".encode() + content)
    for file in sorted({tensor.file for tensor in open_weights(folder).values()}):
        _add(digest, file)
    return digest.hexdigest()


def _add(digest, path: Path):
    with reading(path), open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
