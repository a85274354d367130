"""Read a LoRA file, and check that it was learned on the checkpoint it is loaded beside.

    lora.safetensors:   "<released name of a linear>.lora_A" float[r, I] and ".lora_B" float[O, r]
    its metadata:       rank, alpha, base (the name of a checkpoint), vectors (sha256 of its norms and biases)

What was learned counts for one model only. Quantising divides the norms by channel and multiplies the weights, so a
LoRA of the int4 model would be wrong, without a word, beside the float one that it was made from. Norms and biases tell
the two apart, and stay as they are when int4 weights are dequantised or merged.
"""
from __future__ import annotations

import hashlib
import math
import os
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from minivl import lora
from minivl.files.formats import StoredTensor, open_safetensors, safetensors_header
from minivl.limits import InputError, clip, first_of, is_there
from minivl.model import MiniVL

FILE = "lora.safetensors"
PARTS = (".lora_A", ".lora_B")


@dataclass(frozen=True)
class Adapter:
    """A LoRA file that fits a model."""
    rank: int
    alpha: float
    tensors: dict       # "language_model.model.layers.0.self_attn.q_proj.lora_A" -> float[r, I], ...

    @property
    def linears(self) -> list[str]:
        """List the released names of the linears that it corrects."""
        return [name.removesuffix(PARTS[0]) for name in self.tensors if name.endswith(PARTS[0])]


def read_adapter(path: str | os.PathLike, model: MiniVL, weights: Mapping[str, StoredTensor]) -> Adapter:
    """Read a LoRA file, or the one called lora.safetensors of a folder, for a model (also on `meta`).

    weights: of the model's checkpoint, by `open_weights`. Raises InputError where the file is damaged, is no LoRA of
    weights_tools.lora, or is one of another model.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not is_there(path):
        raise InputError(f"there is no LoRA file {path}; make one with python -m weights_tools.lora")
    about = safetensors_header(path)[1]
    stored = open_safetensors(path)
    try:
        rank, alpha, base, vectors = int(about["rank"]), float(about["alpha"]), about["base"], about["vectors"]
    except (KeyError, ValueError):
        raise InputError(f"{path} does not say in its metadata rank, alpha, base and vectors, as a LoRA of "
                         "python -m weights_tools.lora does; merge one of PEFT's into its checkpoint with PEFT's "
                         "merge_and_unload()") from None
    if rank < 1 or not math.isfinite(alpha):
        raise InputError(f"{path} has rank {rank} and alpha {alpha}; the rank must be at least 1, alpha a finite "
                         "number: make it again")
    _check_names_and_shapes(path, model, stored, rank, clip(base))
    if vectors != vectors_digest(model, weights):
        raise InputError(f"{path} was learned on another checkpoint, {clip(base)!r}, with other norms or biases "
                         f"(sha256 {clip(vectors, 12)}, here {vectors_digest(model, weights)[:12]}); load it with that "
                         "one, also if this is its float or int4 twin")
    tensors = {name: tensor.read() for name, tensor in stored.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds {int((~tensor.isfinite()).sum())} numbers that are NaN or "
                             "infinite; train it again with a lower learning rate")
    return Adapter(rank, alpha, tensors)


def put_on(model: MiniVL, adapter: Adapter) -> None:
    """Put what was learned beside the linears of a model, before `minivl.fast.prepare` or after it."""
    lora.add(model, adapter.linears, adapter.rank, adapter.alpha)
    with torch.no_grad():
        for name, parameter in lora.learned(model).items():
            parameter.copy_(adapter.tensors[name])
            if not parameter.isfinite().all():
                raise InputError(f"{name} of the LoRA exceeds {parameter.dtype}; load with dtype='bfloat16' or "
                                 "'float32'")


def vectors_digest(model: MiniVL, weights: Mapping[str, StoredTensor]) -> str:
    """Sum up, as a sha256, the norms and biases of a decoder as they lie in its files, whatever their float dtype."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith("language_model.") and tensor.ndim == 1:
            values = array("f", weights[name].read().float().tolist())
            digest.update(f"{name} {len(values)} ".encode() + values.tobytes())
    return digest.hexdigest()


def _check_names_and_shapes(path: Path, model: MiniVL, stored: dict[str, StoredTensor], rank: int, base: str):
    """Refuse a file that does not hold an A and a B of this rank for some of the model's linears, and nothing else."""
    wanted = {}
    for name in lora.linears(model):
        linear = model.get_submodule(name)
        wanted[name + PARTS[0]] = (rank, linear.in_features)
        wanted[name + PARTS[1]] = (linear.out_features, rank)
    problems = [] if stored else ["no tensor"]
    for name, tensor in stored.items():
        stem = name[:-len(PARTS[0])]
        other = stem + PARTS[name.endswith(PARTS[0])]
        if name not in wanted:
            problems.append(f"{name} is of no linear of this decoder")
        elif other not in stored:
            problems.append(f"{name} is there without {other}")
        elif tensor.shape != wanted[name]:
            problems.append(f"{name} is {list(tensor.shape)}, with rank {rank} this model takes {list(wanted[name])}")
        elif not tensor.dtype.is_floating_point:
            problems.append(f"{name} is {tensor.dtype}, no float")
    if problems:
        raise InputError(f"{path}, learned on {base!r}, does not fit this model, {len(problems)} problems; load it "
                         "with the checkpoint it was learned on:\n  " + first_of(problems))
