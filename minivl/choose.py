"""Which released model can this machine hold? The family with its memory, as `python -m minivl models` prints it.

Nothing is downloaded or asked of the hub. Bytes are computed from the shapes of the tensors, not measured.
"""
from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from minivl.config import Config
from minivl.family import SIZES, TOWERS, VARIANTS
from minivl.files.find import cached
from minivl.files.formats import choose_set
from minivl.files.load import KEPT, KEPT_HALF, WithoutNormal
from minivl.files.sets import is_here
from minivl.limits import InputError
from minivl.memory import free_memory
from minivl.model import MiniVL

LAYERS = {"vision_config": "vision_model.encoder.layers.0.", "llm_config": "language_model.model.layers.0."}
LEGEND = """\
params    in 10^9; of an -awq as many, most of them in 4 bits
download  GB; in memory, float16 or bfloat16 take as much
float32   GB in memory, what a CPU computes in by default; int4 stays int4
cpu       yes: this machine's free memory holds it in float32; half: only with
          --dtype float16 or bfloat16; no: neither
here      in the hub's cache: yes, part of it, or no

Computed from the tensors' shapes; a picture and its answer take 1 or 2 GB more
if it has many tiles. Use a name as in: python -m minivl chat -m 4b-mpo-awq"""
GPU = """

gpu       yes: its free memory holds it in float16 or bfloat16, its default;
          --precision fast needs the int4 words of an -awq twice"""
AWQ = {"quant_method": "awq"}       # the rest of the block is as released by default


@dataclass(frozen=True)
class Weights:
    """The sums over the tensors of one size, plain or in int4."""
    parameters: int     # numbers of the plain model
    tensors: int
    half: int           # bytes, in the files and in memory with float16 or bfloat16
    float32: int        # bytes in memory of a pipeline on the CPU
    largest: int        # bytes of the largest tensor there: loading holds one more


def weights(size: str, awq: bool = False) -> Weights:
    """Sum up the tensors of a released model. All layers of a part are alike, so that one of each is built, on `meta`.

    Raises InputError for a size that is not of the family.
    """
    if size not in SIZES:
        raise InputError(f"size {size!r} is not one of {', '.join(SIZES)}")
    tower, decoder = SIZES[size]
    parts = {"vision_config": TOWERS[tower], "llm_config": decoder}
    one = {part: {**config, "num_hidden_layers": 1} for part, config in parts.items()}
    config = {"template": "internvl2_5", "ps_version": "v2", **one}

    def tensors(config):
        with torch.device("meta"), WithoutNormal():
            for name, tensor in MiniVL(Config.from_json(config)).state_dict().items():
                times = [parts[part]["num_hidden_layers"] for part, layer in LAYERS.items() if name.startswith(layer)]
                yield name, tensor, *(times or [1])

    # In float32 int4 keeps its words and scales and, in a pipeline, embeddings and head in half precision: see load.
    kept = KEPT + KEPT_HALF if awq else KEPT
    plain = list(tensors(config))
    stored = list(tensors({**config, "quantization_config": AWQ})) if awq else plain

    def size_of(name, tensor, each):
        if not tensor.is_floating_point():
            return tensor.nbytes
        return tensor.numel() * (2 if name.endswith(kept) else each)

    return Weights(parameters=sum(n * t.numel() for _, t, n in plain), tensors=sum(n for *_, n in stored),
                   half=sum(n * size_of(name, t, 2) for name, t, n in stored),
                   float32=sum(n * size_of(name, t, 4) for name, t, n in stored),
                   largest=max(size_of(name, t, 4) for name, t, _ in stored))


def fits(weights: Weights, free: int | None) -> str | None:
    """Say in which dtype so many free bytes hold a model while it is loaded: "float32", "half" or "no"; None: unknown.

    The room of the largest tensor, which loading needs beside the others, is later that of pictures and prompts.
    """
    if free is None:
        return None
    if weights.float32 + weights.largest <= free:
        return "float32"
    return "half" if weights.half + weights.largest // 2 <= free else "no"


def downloaded(hub_id: str) -> str:
    """Look for a model in the hub's cache: "whole", "partial" or "no"."""
    from huggingface_hub import constants
    # Most are not there, and the client's own search costs a second of imports.
    if not (Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}").is_dir():
        return "no"
    folder = cached(hub_id, None)
    if folder is None:
        return "no"
    try:
        whole = is_here(folder / "config.json") and all(is_here(folder / file) for file in choose_set(folder).files)
    except InputError:          # shards that are missing, or an index that is
        whole = False
    return "whole" if whole else "partial"


def family() -> dict:
    """List the released models, and what of them this machine holds: free bytes, then one dict for each."""
    free = free_memory()
    gpu = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    sums = {(one.size, one.awq): weights(one.size, one.awq) for one in VARIANTS.values() if not one.mpo}
    rows = []
    for one in VARIANTS.values():
        size = sums[one.size, one.awq]
        tower, decoder = SIZES[one.size]
        rows.append({"name": one.name, "hub_id": one.hub_id, "decoder": decoder["_name_or_path"],
                     "tower": f"OpenGVLab/InternViT-{tower}-448px-V2_5", "parameters": size.parameters,
                     "download_bytes": size.half, "float32_bytes": size.float32, "half_bytes": size.half,
                     "fits_cpu": fits(size, free), "fits_gpu": fits(size, gpu), "downloaded": downloaded(one.hub_id)})
    return {"free_bytes": free, "free_gpu_bytes": gpu, "models": rows}


def as_text(found: dict) -> str:
    """Write what `family` found as a table of at most 80 columns."""
    gpu = found["free_gpu_bytes"]
    head = ["name", "decoder", "ViT", "params", "download", "float32", "cpu", *(["gpu"] if gpu else []), "here"]
    words = {"float32": "yes", "whole": "yes", "partial": "part", None: "?"}
    rows = []
    for row in found["models"]:
        values = [row["fits_cpu"], *([{"half": "yes"}.get(row["fits_gpu"], row["fits_gpu"])] if gpu else []),
                  row["downloaded"]]
        rows.append([row["name"], re.sub(r".*/|-(Instruct|chat)$", "", row["decoder"]), row["tower"].split("-")[1],
                     f"{row['parameters'] / 1e9:.2f}", f"{row['download_bytes'] / 1e9:.2f}",
                     f"{row['float32_bytes'] / 1e9:.2f}", *(words.get(value, value) for value in values)])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    table = ["  ".join(f"{cell:{'>' if i in (3, 4, 5) else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
             for row in [head, *rows]]
    free = found["free_bytes"]
    free = "unknown" if free is None else f"{free / 1e9:.1f} GB"
    there = f"on the GPU {gpu / 1e9:.1f} GB" if gpu else "no GPU"
    return "\n".join([f"Free memory: {free}; {there}.", "", *table, "", LEGEND + (GPU if gpu else "")])


def models(as_json: bool) -> int:
    """Print the family; the exit code."""
    found = family()
    print(json.dumps(found, indent=1) if as_json else as_text(found))
    return 0
