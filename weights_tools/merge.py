"""Add what LoRA learned to the weights: python -m weights_tools.merge FOLDER LORA OUT

    W + alpha / r B A of each linear that LORA corrects, one tensor at a time -> a float checkpoint without LoRA

OUT is float, also where FOLDER is int4: python -m weights_tools.quantize makes it int4 again. But weights that lie on
the steps of int4 already are rounded back to where they were, as what was learned is less than half a step: of nano's
86 new answers in 100, group 128 left 2 and group 64 left 49. Learned on the float model, merged and made int4
afterwards, 86 stay. Count right answers once more, by python -m weights_tools.rows.
Source: arXiv:2106.09685 section 4.1.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from minivl import options
from minivl.config import read_json
from minivl.files.adapters import Adapter, read_adapter
from minivl.files.find import find
from minivl.files.formats import StoredTensor
from minivl.files.load import opened
from minivl.limits import InputError
from weights_tools import run
from weights_tools.dequantize import DTYPES, float_checkpoint, float_config
from weights_tools.files import check_apart, check_free_of_weights, save_checkpoint, small_files
from weights_tools.synthesize import json_text


def merge(folder: str | Path, path: str | Path, out: str | Path, dtype: str | None = None,
          overwrite: bool = False) -> Path:
    """Write the checkpoint of `folder` with the LoRA of `path` added to it into `out`; returns that.

    dtype: of all float weights; default that of the folder's token embeddings, which AWQ leaves float.
    """
    folder = Path(folder)
    out = Path(out)
    check_apart(folder, out)
    check_free_of_weights(out, overwrite)
    model, stored = opened(folder)
    adapter = read_adapter(path, model, stored)
    embeddings = next(name for name, p in model.named_parameters() if p is model.language_model.embeddings.weight)
    dtype = dtype or str(stored[embeddings].dtype).removeprefix("torch.")
    data = read_json(folder / "config.json")
    if model.config.quantization_config:
        data, stored = float_checkpoint(folder, "float32")
    names = list(model.state_dict()) if not model.config.quantization_config else list(stored)
    tensors = {name: torch.empty(stored[name].shape, dtype=DTYPES[dtype], device="meta") for name in names}
    save_checkpoint(tensors, out, make=lambda name: merged(name, stored[name], adapter, DTYPES[dtype]),
                    overwrite=overwrite, small={**small_files(folder), "config.json": json_text(
                        float_config(data, dtype)).encode("utf-8")})
    return out


def merged(name: str, tensor: StoredTensor, adapter: Adapter, dtype: torch.dtype) -> torch.Tensor:
    """Make one tensor of the merged checkpoint: computed in float32, rounded once."""
    tensor = tensor.read().float()
    stem = name.removesuffix(".weight")
    if name.endswith(".weight") and stem in adapter.linears:
        A, B = (adapter.tensors[f"{stem}.{part}"].float() for part in ("lora_A", "lora_B"))
        tensor = tensor + adapter.alpha / adapter.rank * (B @ A)            # (O, I)
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        raise InputError(f"{name} exceeds {dtype} with what was learned, or is NaN; merge with --dtype float32")
    return tensor


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
    merge(find(args.checkpoint), args.lora, args.out, args.dtype, args.overwrite)
    size = sum(p.stat().st_size for p in Path(args.out).iterdir() if p.is_file())
    print(f"{args.out}: float, with {args.lora} added, {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
