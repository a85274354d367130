"""Make a float checkpoint from an AWQ int4 one: python -m weights_tools.dequantize FOLDER OUT

    words, zero points, scales of one linear -> W = (q - z) * s -> its .weight, one tensor after the other -> save

For all that cannot read AWQ. It computes what the AWQ checkpoint computes, not what the one that was quantised did:
what rounding took is gone, and smoothing stays folded into norms and weights, where nothing has to undo it.

float16 and bfloat16 round each weight once; float32 rounds none, as q - z has 5 bits and s has 11. Quantised again with
the same group and rounding (method rtn), a group gets the same integers if it uses both 0 and 15: its numbers, and,
rounded with zero in the range, its zero point among them. For then the weights reach over 15 steps again, and only the
scale may differ, in its last bit. Any other group may get a finer step:
    with-zero     0.3 to 0.5 % of random groups: the scale is rounded up, and the last step of the 15 may stay unused
    lmdeploy      groups whose weights have one sign, and 1 in 10,000 of the others
bfloat16 has less to give: with it, scales under 2e-6 are exceptions too.
"""
from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from minivl import options
from minivl.awq import dequantize as weight_of
from minivl.config import Config, read_json
from minivl.files.find import find
from minivl.files.formats import StoredTensor, open_weights
from minivl.files.load import WithoutNormal, check_weights
from minivl.limits import InputError
from minivl.model import MiniVL
from weights_tools import run
from weights_tools.files import check_apart, check_free_of_weights, save_checkpoint, small_files
from weights_tools.synthesize import json_text

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def dequantize(source, out, dtype: str = "float16", overwrite: bool = False) -> Path:
    """Write the float checkpoint of an AWQ one, a tensor at a time, and return its folder.

    source: folder, hub id or short name. dtype: of all tensors of the new one. Raises InputError.
    """
    out = Path(out)
    folder = find(source)
    check_apart(folder, out)
    check_free_of_weights(out, overwrite)
    data, tensors = float_checkpoint(folder, dtype)
    announced = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    small = {**small_files(folder), "config.json": json_text(data).encode("utf-8")}
    save_checkpoint(announced, out, make=lambda name: tensors[name].read(), overwrite=overwrite, small=small)
    return out


def float_checkpoint(folder: Path, dtype: str) -> tuple[dict, dict[str, StoredTensor]]:
    """Open an AWQ checkpoint as if it were a float one: its config.json, and name -> tensor, computed when it is read.

    Refuses a float checkpoint, and tensors that do not fit config.json.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    config = Config.load(folder)
    if config.quantization_config is None:
        raise InputError(f"{folder} is a float checkpoint, it has no quantization_config; there is nothing to "
                         "dequantize, use it as it is")
    stored = open_weights(folder)
    with torch.device("meta"), WithoutNormal():
        int4 = MiniVL(config)
        wanted = MiniVL(replace(config, quantization_config=None)).state_dict()
    check_weights(int4, stored, folder)
    tensors = {}
    for name, like in wanted.items():
        read = partial(_read, stored, name, DTYPES[dtype])
        tensors[name] = StoredTensor(folder, tuple(like.shape), DTYPES[dtype], read)
    return float_config(read_json(folder / "config.json"), dtype), tensors


def float_config(data: dict, dtype: str) -> dict:
    """Make config.json of the float checkpoint from that of the AWQ one: both parsed."""
    data = _without_quantization(data)
    for part in (data, data["llm_config"], data["vision_config"]):
        part.pop("dtype", None)     # transformers 5's name, which would win
        part["torch_dtype"] = dtype
    data["llm_config"]["use_cache"] = True      # calibration had switched it off; a program that heeds it would crawl
    return data


def _without_quantization(value):
    """Leave out every block about quantization, wherever in the file it stands (minivl.config finds it anywhere)."""
    if isinstance(value, list):
        return [_without_quantization(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_quantization(one) for key, one in value.items()
            if key != "quantization_config" and not (isinstance(one, dict) and "quant_method" in one)}


def _read(stored: dict[str, StoredTensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    """Read a tensor of the float model, or compute it from the parts of an int4 linear. Refuses what does not fit."""
    if name in stored:
        tensor = stored[name].read().to(dtype)
    else:
        parts = (stored[name.removesuffix("weight") + part].read() for part in ("qweight", "qzeros", "scales"))
        tensor = weight_of(*parts, dtype).t().contiguous()      # [I, O] -> [O, I], as nn.Linear has it
    low, high = map(float, torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{name} would hold NaN or infinity ({low}..{high}) in {str(dtype).removeprefix('torch.')}; "
                         "choose another --dtype, bfloat16 or float32, or download the checkpoint again")
    return tensor


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.dequantize", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("checkpoint", metavar="FOLDER",
                        help="an AWQ checkpoint: folder, hub id or short name such as 4b-mpo-awq")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the new weights (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the weights that OUT already holds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    out = dequantize(args.checkpoint, args.out, args.dtype, args.overwrite)
    size = sum(p.stat().st_size for p in out.iterdir() if p.is_file())
    print(f"{out}: float checkpoint in {args.dtype}, {size / 1e9:.3f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
