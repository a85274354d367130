"""Add what LoRA learned to the weights: python -m weights_tools.merge FOLDER LORA OUT

    W + alpha / r B A of each linear that LORA corrects, one tensor at a time -> a float checkpoint without LoRA

OUT is float, also where FOLDER is int4: python -m weights_tools.quantize makes it int4 again. Give it a smaller
--group-size than FOLDER has. With the same one most weights are rounded back to where they were, as what was learned is
less than half a step of int4: of nano's 73 new answers in 100, group 128 left 19 and group 64 left 70. Count right
answers once more, by python -m weights_tools.rows.
Source: arXiv:2106.09685 section 4.1.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from minivl import options
from minivl.awq import dequantize
from minivl.config import Config, read_json
from minivl.files.adapters import Adapter, read_adapter
from minivl.files.find import SMALL_FILES, find
from minivl.files.formats import StoredTensor, open_weights
from minivl.files.load import WithoutNormal, check_weights
from minivl.limits import InputError, is_there, reading
from minivl.model import MiniVL
from weights_tools import run
from weights_tools.files import check_free_of_weights, save_checkpoint
from weights_tools.synthesize import json_text

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def merge(folder: str | Path, path: str | Path, out: str | Path, dtype: torch.dtype | None = None,
          overwrite: bool = False) -> Path:
    """Write the checkpoint of `folder` with the LoRA of `path` added to it into `out`; returns that.

    dtype: of all float weights; default that of the folder's token embeddings, which AWQ leaves float.
    """
    folder = Path(folder)
    out = Path(out)
    if out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents:
        raise InputError(f"{out} lies inside {folder}, which is read; choose another folder")
    check_free_of_weights(out, overwrite)
    config = Config.load(folder)
    with torch.device("meta"), WithoutNormal():
        model = MiniVL(config)
    stored = open_weights(folder)
    check_weights(model, stored, folder)
    adapter = read_adapter(path, model, stored)
    embeddings = next(name for name, p in model.named_parameters() if p is model.language_model.embeddings.weight)
    dtype = dtype or stored[embeddings].dtype
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in float_shapes(model).items()}
    save_checkpoint(tensors, out, make=lambda name: merged(name, stored, adapter, dtype), overwrite=overwrite,
                    small=small_files(folder, dtype))
    return out


def float_shapes(model: MiniVL) -> dict[str, tuple]:
    """List the tensors of a model, in their order, as they would be with float linears: name -> shape."""
    shapes = {}
    for name, tensor in model.state_dict().items():
        stem, _, part = name.rpartition(".")
        if part == "qweight":
            shapes[f"{stem}.weight"] = (8 * tensor.shape[1], tensor.shape[0])
        elif part not in ("qzeros", "scales"):
            shapes[name] = tuple(tensor.shape)
    return shapes


def merged(name: str, stored: dict[str, StoredTensor], adapter: Adapter, dtype: torch.dtype) -> torch.Tensor:
    """Make one tensor of the merged checkpoint: computed in float32, rounded once."""
    stem = name.removesuffix(".weight")
    if f"{stem}.qweight" in stored:
        parts = (stored[f"{stem}.{part}"].read() for part in ("qweight", "qzeros", "scales"))
        tensor = dequantize(*parts).T                                       # (O, I)
    else:
        tensor = stored[name].read().float()
    if name.endswith(".weight") and stem in adapter.linears:
        A, B = (adapter.tensors[f"{stem}.{part}"].float() for part in ("lora_A", "lora_B"))
        tensor = tensor + adapter.alpha / adapter.rank * (B @ A)            # (O, I)
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        raise InputError(f"{name} exceeds {dtype} with what was learned, or is NaN; merge with --dtype float32")
    return tensor


def small_files(folder: Path, dtype: torch.dtype) -> dict[str, bytes]:
    """Collect the files beside the weights, config.json without int4 and with the new dtype."""
    config = read_json(folder / "config.json")
    for part in (config, config["llm_config"], config["vision_config"]):
        part.pop("quantization_config", None)
        part.pop("dtype", None)         # transformers 5's name, which would win
        part["torch_dtype"] = str(dtype).removeprefix("torch.")
    with reading(folder):
        found = {name: (folder / name).read_bytes() for name in (*SMALL_FILES, "preprocessor_config.json")
                 if is_there(folder / name)}
    return {**found, "config.json": json_text(config).encode("utf-8")}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.merge", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("checkpoint", metavar="FOLDER", help="the checkpoint that LORA was learned on")
    parser.add_argument("lora", metavar="LORA", help="what python -m weights_tools.lora wrote: folder or file")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged weights (default: of FOLDER's float ones)")
    parser.add_argument("--overwrite", action="store_true", help="replace the weights that OUT already holds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    merge(find(args.checkpoint), args.lora, args.out, DTYPES.get(args.dtype), args.overwrite)
    size = sum(p.stat().st_size for p in Path(args.out).iterdir() if p.is_file())
    print(f"{args.out}: float, with {args.lora} added, {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
