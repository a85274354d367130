"""Make an AWQ int4 checkpoint from a float one: python -m weights_tools.quantize FOLDER OUT

    run some prompts, note the largest input of every channel -> smooth -> round to 4 bits -> pack -> save

Smoothing is the idea of AWQ: a channel with large inputs matters more, so its weights are made larger before rounding and
what comes before it (a norm, or up_proj) smaller by the same factor. The product stays, the rounding error moves to where
it matters less. Nothing is left to undo at run time.
Source: LMDeploy v0.6.4 lite/quantization/awq.py:130-353, lite/apis/auto_awq.py; AWQ arXiv:2306.00978.
"""
from __future__ import annotations

import argparse
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minivl import Pipeline, load
from minivl.awq import pack
from minivl.files.find import SMALL_FILES, find
from minivl.config import read_json
from minivl.sampling import GenerationConfig
from minivl.limits import InputError
from minivl.tokenizer import Tokenizer
from weights_tools import run
from weights_tools.files import check_free_of_weights, save_checkpoint
from weights_tools.synthesize import json_text, quantization_block

GROUP = 128             # in features that share a scale and a zero point
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
           "mlp.down_proj")
# Who feeds whom: the factors taken from the first are given to the others. v_proj -> o_proj is no pair: with shared kv
# heads one output of v_proj meets several inputs of o_proj.
PAIRS = (("input_layernorm", LINEARS[0:3]), ("post_attention_layernorm", LINEARS[4:6]), ("mlp.up_proj", LINEARS[6:7]))


def quantize_linear(weight, group_size: int = GROUP) -> tuple:
    """float[O, I] -> qweight int32[I, O/8], qzeros int32[I/g, O/8], scales [I/g, O] in the dtype of the weight.

    Per group of inputs: s = (max - min) / 15, z = -min / s, q = w / s + z, rounded half to even, clamped to 0..15.
    """
    O, I = weight.shape
    if I % group_size or O % 8:
        raise InputError(f"a linear {I} -> {O} cannot be packed: group size {group_size} must divide {I} and 8 must divide "
                         f"{O}")
    w = weight.view(O, I // group_size, group_size)                                     # (O, I/g, g)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)                      # (O, I/g, 1)
    scale = (high - low).clamp(min=1e-5) / 15
    zero = (-torch.round(low / scale)).clamp(0, 15)
    q = (torch.round(w / scale) + zero).clamp(0, 15)                                    # (O, I/g, g)
    columns = q.view(O, I).t().to(torch.uint8)                                          # (I, O)
    return pack(columns), pack(zero[..., 0].t().to(torch.uint8)), scale[..., 0].t().contiguous()


def smoothing(act_absmax, weights, group_size: int = GROUP, alpha: float = 0.5, norm=None):
    """Factor of each input channel, [I]: large where inputs are large and weights are small within their group.

    act_absmax [I]; weights: the linears that read these channels, each [O, I]; norm: weight of the norm before, [I].
    """
    w = torch.cat(list(weights))
    share = w.view(-1, group_size).abs()
    share = share / share.amax(1, keepdim=True).clamp(min=1e-4)                         # of the largest in its group
    size = share.view(w.shape).mean(0)                                                  # (I)
    factor = (act_absmax.to(w.dtype).pow(alpha) / size.pow(1 - alpha).clamp(min=1e-4)).clamp(min=1e-4)
    dead = norm == 0 if norm is not None else torch.zeros_like(factor, dtype=torch.bool)    # nothing to move there
    # LMDeploy's rounding in half precision, found by comparing bits: float32 here, but not after a norm.
    wide = factor if norm is not None else factor.float()
    factor = (wide / (wide[~dead].max() * wide[~dead].min()).sqrt()).to(w.dtype)
    return torch.where(dead, torch.ones_like(factor), factor)


def smooth_layer(tensors: dict, act_absmax: dict, group_size: int = GROUP, alpha: float = 0.5):
    """In place, on one decoder layer's tensors by their names inside the layer ("mlp.up_proj.weight", ...).

    act_absmax: "mlp.down_proj" -> largest |input| of each of its channels. What the layer computes does not change.
    """
    for before, readers in PAIRS:
        weights = [tensors[f"{name}.weight"] for name in readers]
        is_norm = before.endswith("layernorm")
        factor = smoothing(act_absmax[readers[0]], weights, group_size, alpha, tensors[f"{before}.weight"] if is_norm else None)
        tensors[f"{before}.weight"].div_(factor if is_norm else factor[:, None])
        for w in weights:
            w.mul_(factor)


@contextmanager
def watch_inputs(model):
    """Yields {"model.layers.0.mlp.down_proj": largest |input| per channel, float32[I]}, filled while the model runs."""
    seen, handles = {}, []

    def hook(name):
        def note(module, args):
            largest = args[0].detach().abs().flatten(0, -2).amax(0).float()
            seen[name] = largest if name not in seen else torch.maximum(seen[name], largest)
        return note

    for name, module in model.language_model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            handles.append(module.register_forward_pre_hook(hook(name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def calibration(model, tokenizer, examples: int = 64, seed="calibration") -> dict:
    """act_absmax of every decoder linear on pictures and questions of nano's world, answers included."""
    from weights_tools.nano import draw, evaluate, world
    pipe = Pipeline(model, tokenizer)
    with watch_inputs(model) as seen, torch.no_grad():
        for i in tqdm(range(examples), desc="calibrating", unit="prompt", disable=None):
            example = world.example(seed, i)
            whole = replace(example, turns=(*example.turns, world.Turn("Thank you!", "", "talk")))
            answers = [turn.answer for turn in example.turns]
            pipe(evaluate.prompt(whole, [draw.draw(s) for s in example.pictures], answers), GenerationConfig(max_new_tokens=1))
    return seen


def quantize(model, act_absmax: dict | None, group_size: int = GROUP, alpha: float = 0.5) -> dict:
    """A float model's tensors with every decoder linear in int4, the rest float16. act_absmax None: no smoothing."""
    tensors = {name: tensor.detach().clone().half() for name, tensor in model.state_dict().items()}
    layers = len(model.language_model.model.layers)
    for i in tqdm(range(layers), desc="quantising", unit="layer", disable=None):
        inside = f"language_model.model.layers.{i}."
        layer = {name.removeprefix(inside): t.float() for name, t in tensors.items() if name.startswith(inside)}
        if act_absmax is not None:
            smooth_layer(layer, {name: act_absmax[f"model.layers.{i}.{name}"] for name in LINEARS}, group_size, alpha)
        for name, tensor in layer.items():
            tensors[inside + name] = tensor.half()
        for name in LINEARS:
            weight = tensors.pop(f"{inside}{name}.weight")
            for part, value in zip(("qweight", "qzeros", "scales"), quantize_linear(weight.float(), group_size)):
                tensors[f"{inside}{name}.{part}"] = value.half() if part == "scales" else value
    return tensors


def save_quantized(source, out, tensors: dict, group_size: int = GROUP, overwrite: bool = False,
                   metadata: dict | None = None) -> Path:
    """The tensors with config.json and tokenizer of the float checkpoint `source`."""
    source, out = Path(source), Path(out)
    save_checkpoint(tensors, out, overwrite=overwrite, metadata=metadata)
    config = read_json(source / "config.json")
    config["llm_config"]["quantization_config"] = quantization_block(group_size)
    config["torch_dtype"] = config["llm_config"]["torch_dtype"] = config["vision_config"]["torch_dtype"] = "float16"
    for name in (*SMALL_FILES, "preprocessor_config.json"):
        if name != "config.json" and (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    (out / "config.json").write_text(json_text(config), encoding="utf-8")
    return out


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights_tools.quantize", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="FOLDER", help="a float checkpoint: folder or hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--plain", action="store_true", help="round to nearest, no smoothing")
    parser.add_argument("--examples", type=int, default=64, metavar="N", help="prompts to calibrate on (default %(default)s)")
    parser.add_argument("--alpha", type=float, default=0.5, help="strength of smoothing, 0..1 (default %(default)s)")
    parser.add_argument("--group-size", type=int, default=GROUP, metavar="N", help="default %(default)s, as released")
    parser.add_argument("--overwrite", action="store_true", help="replace the weights that OUT already holds")
    args = parser.parse_args(argv)
    if not 0 <= args.alpha <= 1 or args.examples < 1:
        raise InputError(f"alpha {args.alpha} must be in 0..1 and examples {args.examples} at least 1")
    check_free_of_weights(args.out, args.overwrite)
    folder = find(args.checkpoint)
    model = load(folder, dtype="float32")
    if model.config.quantization_config:
        raise InputError(f"{folder} is quantised already; give the float checkpoint it was made from")
    act_absmax = None if args.plain else calibration(model, Tokenizer.load(folder), args.examples)
    tensors = quantize(model, act_absmax, args.group_size, args.alpha)
    save_quantized(folder, args.out, tensors, args.group_size, args.overwrite)
    size = sum(p.stat().st_size for p in Path(args.out).iterdir() if p.is_file())
    print(f"{args.out}: int4 of group {args.group_size}, {'round to nearest' if args.plain else f'smoothed, alpha {args.alpha}'}"
          f", {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
