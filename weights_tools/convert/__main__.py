"""Change a checkpoint's layout: python -m weights_tools.convert FOLDER OUT

    original (InternVLChatModel)  <->  transformers' own (InternVLForConditionalGeneration, -hf on the hub)

The names of the tensors say which of the two FOLDER has; OUT gets the other, with the config.json, tokenizer and
processor files that it needs: AutoModelForImageTextToText, AutoTokenizer and AutoProcessor read an -hf folder, minivl
and LMDeploy the original one. The numbers stay as they are, bit for bit: q, k and v are cut apart or put together,
everything else only gets another name. A tensor at a time is in memory, and the file that is being written.

int4 words cannot be cut so: --dequantize makes float weights of them on the way. The original's own code (*.py, for
trust_remote_code) is not written; copy it from the release if something needs it.
"""
from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import torch

from minivl import options
from minivl.config import Config, read_json
from minivl.files.find import find
from minivl.files.formats import StoredTensor, open_weights
from minivl.files.load import HEADS, WithoutNormal, check_weights
from minivl.limits import InputError, first_of, is_there
from minivl.model import MiniVL
from weights_tools import run
from weights_tools.convert.configs import hf_config, original_config
from weights_tools.convert.names import as_on_the_hub, cut, hf_names, join
from weights_tools.convert.processor import hf_files, original_files
from weights_tools.dequantize import DTYPES, float_checkpoint
from weights_tools.files import check_apart, check_free_of_weights, save_checkpoint
from weights_tools.synthesize import json_text


def convert(source, out, dequantize: str | None = None, overwrite: bool = False) -> Path:
    """Write a checkpoint in the other layout, a tensor at a time, and return its folder.

    source: folder, hub id or short name. dequantize: dtype of the weights made of an AWQ checkpoint. Raises InputError.
    """
    out = Path(out)
    folder = find(source)
    check_apart(folder, out)
    check_free_of_weights(out, overwrite)
    stored = open_weights(folder)
    if is_hf(stored, folder):
        if dequantize:
            raise InputError(f"{folder} has the -hf layout, whose weights are float; leave --dequantize out")
        config, tensors, small = from_hf(folder, stored)
    else:
        config, tensors, small = to_hf(folder, stored, dequantize)
    announced = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    save_checkpoint(announced, out, make=lambda name: tensors[name].read(), overwrite=overwrite,
                    small={**small, "config.json": json_text(config).encode("utf-8")})
    return out


def is_hf(names, folder: Path) -> bool:
    """Tell by the names of the tensors which layout they have."""
    found = {layout for layout, part in ((True, "vision_tower."), (False, "vision_model.")) if any(
        part in name for name in names)}
    if len(found) != 1:
        raise InputError(f"the weights in {folder} have {'both' if found else 'neither'} the names of the original "
                         f"layout (vision_model.) {'and' if found else 'nor'} of -hf (vision_tower.), the first is "
                         f"{min(names, default='missing')}; give the checkpoint of a whole InternVL2.5")
    return found == {True}


def to_hf(folder: Path, stored: dict[str, StoredTensor], dequantize: str | None) -> tuple:
    """Make config, name -> tensor, and name -> content of the small files, of the -hf layout."""
    config, data = Config.load(folder), read_json(folder / "config.json")
    if config.quantization_config and not dequantize:
        raise InputError(f"{folder} is an AWQ checkpoint, whose int4 words no -hf layout has; add --dequantize float16 "
                         "for float weights made of them")
    if dequantize:
        data, stored = float_checkpoint(folder, dequantize)
        config = Config.from_json(data)
    model = empty_model(config)
    check_weights(model, stored, folder)
    image_token_id, small = hf_files(folder, config)
    tensors = {}
    for name, like in model.state_dict().items():
        shapes = [part.shape for part in _parts(like, name, config)]
        for i, (hf_name, shape) in enumerate(zip(hf_names(name), shapes)):
            tensors[hf_name] = StoredTensor(folder, tuple(shape), stored[name].dtype,
                                            partial(_part, stored[name], name, config, i))
    dtype = _dtype_name(next(stored[head] for head in HEADS if head in stored))
    return hf_config(config, data, image_token_id, dtype), tensors, small


def _parts(tensor: torch.Tensor, name: str, config: Config) -> list[torch.Tensor]:
    return cut(tensor, name, config.llm_config) if len(hf_names(name)) > 1 else [tensor]


def _part(stored: StoredTensor, name: str, config: Config, i: int) -> torch.Tensor:
    return _parts(stored.read(), name, config)[i]


def from_hf(folder: Path, stored: dict[str, StoredTensor]) -> tuple:
    """Make the same as `to_hf`, of the original layout."""
    named = {as_on_the_hub(name): tensor for name, tensor in stored.items()}
    if len(named) < len(stored):
        raise InputError(f"{folder} holds tensors under both names of transformers, with and without model. in front; "
                         "save the model again")
    stored = named
    head = stored.get("language_model.lm_head.weight")
    data = original_config(read_json(folder / "config.json"), _image_processor(folder),
                           _dtype_name(head) if head else "bfloat16")
    config = Config.from_json(data)
    wanted = empty_model(config).state_dict()
    _check_hf({hf_name: part for name, like in wanted.items()
               for hf_name, part in zip(hf_names(name), _parts(like, name, config))}, stored, folder)
    tensors = {}
    for name, like in wanted.items():
        parts = [stored[hf_name] for hf_name in hf_names(name)]
        tensors[name] = StoredTensor(folder, tuple(like.shape), parts[0].dtype, partial(_joined, parts, name, config))
    return data, tensors, original_files(folder, config)


def _joined(parts: list[StoredTensor], name: str, config: Config) -> torch.Tensor:
    tensors = [part.read() for part in parts]
    return join(tensors, name, config.llm_config) if len(parts) > 1 else tensors[0]


def _check_hf(wanted: dict[str, torch.Tensor], found: dict[str, StoredTensor], folder: Path):
    """Refuse tensors that are not those of config.json, all in one error, by their names in the -hf layout."""
    problems = [f"missing: {name} {list(wanted[name].shape)}" for name in wanted if name not in found]
    problems += [f"unexpected: {name} {list(found[name].shape)}" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        if tuple(wanted[name].shape) != found[name].shape:
            problems.append(f"shape: {name} is {list(found[name].shape)} in the file, {list(wanted[name].shape)} by "
                            "config.json")
        elif found[name].dtype not in DTYPES.values():
            problems.append(f"dtype: {name} is {found[name].dtype}, not one of {', '.join(DTYPES)}")
    if problems:
        raise InputError(f"the weights in {folder} do not fit its config.json, {len(problems)} problems:\n  "
                         + first_of(sorted(problems)))


def empty_model(config: Config) -> MiniVL:
    """Build the model that a config describes, without values: its names and shapes."""
    with torch.device("meta"), WithoutNormal():
        return MiniVL(config)


def _image_processor(folder: Path) -> dict:
    """Read what an -hf folder says of its image processor: in a file of its own, or inside another."""
    if is_there(folder / "preprocessor_config.json"):
        return read_json(folder / "preprocessor_config.json")
    inside = read_json(folder / "processor_config.json") if is_there(folder / "processor_config.json") else {}
    return inside["image_processor"] if isinstance(inside.get("image_processor"), dict) else {}


def _dtype_name(tensor: StoredTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.convert", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("checkpoint", metavar="FOLDER", help="of either layout: folder, hub id or short name")
    parser.add_argument("out", metavar="OUT", help="folder to write, in the other layout")
    parser.add_argument("--dequantize", choices=DTYPES, metavar="DTYPE",
                        help=f"of an AWQ checkpoint: make float weights of this dtype, {', '.join(DTYPES)}")
    parser.add_argument("--overwrite", action="store_true", help="replace the weights that OUT already holds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    out = convert(args.checkpoint, args.out, args.dequantize, args.overwrite)
    tensors = open_weights(out)
    layout = "-hf" if is_hf(tensors, out) else "original"
    size = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
    print(f"{out}: {layout} layout, {len(tensors)} tensors, {size / 1e9:.3f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
