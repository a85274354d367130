"""Make an AWQ int4 checkpoint from a float one: python -m weights_tools.quantize FOLDER OUT

    run some prompts, note the largest input of every channel -> smooth -> round to 4 bits -> pack -> save

Smoothing is the idea of AWQ: a channel with large inputs matters more, so its weights are made larger before rounding
and what comes before it (a norm, or up_proj) smaller by the same factor. The product stays, the rounding error moves to
where it matters less. Nothing is left to undo at run time.

Rounding gives a group of weights sixteen values at equal steps, one of them zero. LMDeploy lays them from the smallest
weight to the largest. Where all weights have one sign zero lies outside, the zero point (0..15) cannot say so, and the
group is lost (mit-han-lab/llm-awq#193). So the range is widened to hold zero here; `--method lmdeploy` keeps LMDeploy's
own, bit by bit, and warns of what it hurts.
Source: LMDeploy v0.6.4 lite/quantization/awq.py:130-353, lite/apis/auto_awq.py; AWQ arXiv:2306.00978.
"""
from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from minivl import Pipeline, load, options
from minivl.awq import dequantize, pack
from minivl.config import read_json
from minivl.files.find import SMALL_FILES, find
from minivl.limits import InputError, first_of, is_there, reading
from minivl.model import MiniVL
from minivl.sampling import GenerationConfig
from minivl.tokenizer import Tokenizer
from weights_tools import run
from weights_tools.files import check_free_of_weights, save_checkpoint
from weights_tools.synthesize import json_text, quantization_block

GROUP = 128             # in features that share a scale and a zero point
METHODS = ("with-zero", "lmdeploy")     # how a group's sixteen values are chosen
SMALLEST = 2.0**-24     # of float16's steps; float16 weights are multiples of it
HALF_A_STEP = 0.52      # and what float16 takes of the scale: 2^-11 of 15 steps, twice where it computes too


def grid(w: torch.Tensor, method: str = METHODS[0]) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the values (q - zero) * scale, q = 0..15, of each group: float[..., g] -> scale, zero, both [..., 1].

    with-zero: from min(w, 0) to max(w, 0). The scale is float16, rounded up, so that no weight is off by more than
    half a step. lmdeploy: from min w to max w, in w's dtype; the zero point is clamped to 0..15.
    """
    low = w.amin(-1, keepdim=True)                                                      # (..., 1)
    high = w.amax(-1, keepdim=True)
    if method == "lmdeploy":
        scale = (high - low).clamp(min=1e-5) / 15
        return scale, (-torch.round(low / scale)).clamp(0, 15)
    if method != "with-zero":
        raise InputError(f"method {method!r} is not one of {', '.join(METHODS)}")
    step = (high.clamp(min=0).float() - low.clamp(max=0).float()).clamp(min=SMALLEST) / 15
    near = step.half()
    # Positive float16 numbers are ordered as their bits are: one more is the next larger number.
    scale = (near.view(torch.int16) + (near.float() < step)).view(torch.float16)
    return scale, -torch.round(low.clamp(max=0).float() / scale.float())


def quantize_linear(weight: torch.Tensor, group_size: int = GROUP, method: str = METHODS[0]) -> tuple:
    """Round to int4: float[O, I] -> qweight int32[I, O/8], qzeros int32[I/g, O/8], scales [I/g, O].

    Each group of inputs has the values that `grid` chooses: q = w / s + z, rounded half to even, clamped to 0..15.
    The scales are float16; with the method lmdeploy they have the weight's dtype, and so has the arithmetic.
    """
    O, I = weight.shape
    _check_size("a linear", I, O, group_size)
    if not weight.isfinite().all():
        raise InputError(f"{int((~weight.isfinite()).sum())} of {weight.numel()} weights are NaN or infinite; they "
                         "cannot be rounded")
    w = weight.view(O, I // group_size, group_size)                                     # (O, I/g, g)
    scale, zero = grid(w, method)                                                       # (O, I/g, 1)
    if not scale.half().isfinite().all():
        raise InputError(f"weights from {float(weight.min()):.4g} to {float(weight.max()):.4g} span too much for "
                         "scales in float16, whose largest number is 65504; scale the weights down")
    if method != "lmdeploy":
        w = w.float()
    q = (torch.round(w / scale) + zero).clamp(0, 15)                                    # (O, I/g, g)
    columns = q.view(O, I).t().to(torch.uint8)                                          # (I, O)
    return pack(columns), pack(zero[..., 0].t().to(torch.uint8)), scale[..., 0].t().contiguous()


def steps_off(weight: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Compute the largest error of each group, [O, I/g], in steps of its range with zero in it; a half can be had.

    Where the stored step is larger, because float16 or the method has no smaller one, it is in stored steps.
    """
    w = weight.float().view(len(weight), len(scales), -1)                               # (O, I/g, g)
    rounded = dequantize(qweight, qzeros, scales).T.view(w.shape)
    step = (w.amax(-1).clamp(min=0) - w.amin(-1).clamp(max=0)) / 15                     # (O, I/g)
    return (rounded - w).abs().amax(-1) / torch.maximum(step, scales.T.float())


def check_sizes(model: MiniVL, group_size: int):
    """Refuse a model with a linear that cannot be packed: before the work, which may take hours."""
    linears = {name: module for layer in model.language_model.layers for name, module in layer.linears.items()}
    common = math.gcd(*(module.in_features for module in linears.values()))
    for name, module in linears.items():
        _check_size(name, module.in_features, module.out_features, group_size, f"; {common} divides all of this model")


def _check_size(name, I, O, group_size, hint=""):
    if group_size < 1 or I % group_size or O % 8:
        raise InputError(f"{name}, {I} -> {O}, cannot be packed: group size {group_size} must be at least 1 and divide "
                         f"{I}{hint}; 8 must divide {O}")


def smoothing(act_absmax: torch.Tensor, weights, group_size: int = GROUP, alpha: float = 0.5,
              norm: torch.Tensor | None = None) -> torch.Tensor:
    """Return the factor of each input channel, [I]: large where inputs are large and weights small within their group.

    act_absmax [I]; weights: the linears that read these channels, each [O, I]; norm: weight of the norm before, [I].
    """
    w = torch.cat(list(weights))
    share = w.view(-1, group_size).abs()
    share = share / share.amax(1, keepdim=True).clamp(min=1e-4)                         # of the largest in its group
    size = share.view(w.shape).mean(0)                                                  # (I)
    factor = (act_absmax.to(w.dtype).pow(alpha) / size.pow(1 - alpha).clamp(min=1e-4)).clamp(min=1e-4)
    # A norm weight of zero: nothing to move there.
    dead = norm == 0 if norm is not None else torch.zeros_like(factor, dtype=torch.bool)
    # LMDeploy's rounding in half precision, found by comparing bits: float32 here, but not after a norm.
    wide = factor if norm is not None else factor.float()
    factor = (wide / (wide[~dead].max() * wide[~dead].min()).sqrt()).to(w.dtype)
    return torch.where(dead, torch.ones_like(factor), factor)


def smooth_layer(tensors: dict, act_absmax: dict, feeds, group_size: int = GROUP, alpha: float = 0.5):
    """Smooth one decoder layer in place, given its tensors by their names inside it ("mlp.up_proj.weight", ...).

    act_absmax: "mlp.down_proj" -> largest |input| of each of its channels, [I]. feeds: the layer's FEEDS, (before,
    readers) where `before` is a norm or a linear. What the layer computes does not change.
    """
    for before, readers in feeds:
        weights = [tensors[f"{name}.weight"] for name in readers]
        source = tensors[f"{before}.weight"]
        is_norm = source.ndim == 1
        factor = smoothing(act_absmax[readers[0]], weights, group_size, alpha, source if is_norm else None)
        source.div_(factor if is_norm else factor[:, None])
        for w in weights:
            w.mul_(factor)


@contextmanager
def watch_inputs(model: MiniVL):
    """Yield for each decoder layer {"mlp.down_proj": largest |input| per channel, float32[I]}, filled while it runs."""
    seen = [{} for _ in model.language_model.layers]
    handles = []

    def hook(largest, name):
        def note(module, args):
            now = args[0].detach().abs().flatten(0, -2).amax(0).float()
            largest[name] = torch.maximum(largest[name], now) if name in largest else now
        return note

    for layer, largest in zip(model.language_model.layers, seen):
        for name, module in layer.linears.items():
            handles.append(module.register_forward_pre_hook(hook(largest, name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def calibration(model: MiniVL, tokenizer: Tokenizer, prompts: Iterable) -> list[dict]:
    """Return what `watch_inputs` saw while the model read some prompts: a dictionary for each decoder layer.

    prompts: each as a `minivl.Pipeline` takes one, in any form, e.g. a list of messages with pictures. They are read,
    not answered: write right answers into the conversation, and end it with one more message of the user's.
    """
    pipe = Pipeline(model, tokenizer)
    with watch_inputs(model) as seen, torch.no_grad():
        for prompt in prompts:
            pipe(prompt, GenerationConfig(max_new_tokens=1))
    if not all(seen):
        raise InputError("there are no prompts to calibrate on; give at least one, or act_absmax=None to quantize()")
    return seen


def quantize(model: MiniVL, act_absmax: list[dict] | None, group_size: int = GROUP, alpha: float = 0.5,
             method: str = METHODS[0]) -> dict:
    """Return a float model's tensors with every decoder linear in int4, the rest float16.

    act_absmax: of each layer, from `calibration`; None: round to nearest, without smoothing. method: see `grid`. Groups
    that rounding puts off by more than half a step are counted in a warning.
    """
    check_sizes(model, group_size)
    tensors = {name: _half(name, tensor.detach()) for name, tensor in model.state_dict().items()}
    names = {module: name for name, module in model.named_modules()}
    layers = model.language_model.layers
    off = {}
    for i, module in enumerate(tqdm(layers, desc="quantising", unit="layer", disable=None)):
        inside = f"{names[module]}."
        layer = {name.removeprefix(inside): t.float() for name, t in tensors.items() if name.startswith(inside)}
        if act_absmax is not None:
            smooth_layer(layer, act_absmax[i], module.FEEDS, group_size, alpha)
        for name, tensor in layer.items():
            tensors[inside + name] = _half(inside + name, tensor)
        for name in module.linears:
            weight = tensors.pop(f"{inside}{name}.weight").float()
            qweight, qzeros, scales = quantize_linear(weight, group_size, method)
            parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales.half()}
            off[inside + name] = steps_off(weight, **parts)
            tensors.update({f"{inside}{name}.{part}": value for part, value in parts.items()})
    _warn_of_hurt(off, method)
    return tensors


def _half(name, tensor):
    half = tensor.to(torch.float16, copy=True)
    if not half.isfinite().all():
        raise InputError(f"{name} holds {int((~half.isfinite()).sum())} numbers that are NaN, infinite or over "
                         "float16's largest, 65504; give a checkpoint that float16 can hold")
    return half


def _warn_of_hurt(off: dict[str, torch.Tensor], method: str):
    """Say which groups are off by more than half a step; off: name -> what `steps_off` gives."""
    hurt = {name: int((steps > HALF_A_STEP).sum()) for name, steps in off.items() if steps.max() > HALF_A_STEP}
    if not hurt:
        return
    worst = max(off, key=lambda name: float(off[name].max()))
    tensors = first_of([f"{name} {hurt[name]}" for name in sorted(hurt, key=hurt.get, reverse=True)], ", ", 3)
    warnings.warn(f"the method {method} puts {sum(hurt.values())} of {sum(map(torch.numel, off.values()))} groups of "
                  f"weights off by more than half a step, in {len(hurt)} tensors ({tensors}), the worst by "
                  f"{float(off[worst].max()):.1f} steps, in {worst}; use the method {METHODS[0]}, which does not",
                  stacklevel=3)


def save_quantized(source, out, tensors: dict, group_size: int = GROUP, overwrite: bool = False,
                   metadata: dict | None = None) -> Path:
    """Save the tensors with config.json and tokenizer of the float checkpoint `source`; return the folder."""
    source = Path(source)
    out = Path(out)
    config = read_json(source / "config.json")
    config["llm_config"]["quantization_config"] = quantization_block(group_size)
    for part in (config, config["llm_config"], config["vision_config"]):
        part.pop("dtype", None)     # transformers 5's name, which would win
        part["torch_dtype"] = "float16"
    with reading(source):
        small = {name: (source / name).read_bytes() for name in (*SMALL_FILES, "preprocessor_config.json")
                 if is_there(source / name)}
    save_checkpoint(tensors, out, overwrite=overwrite, metadata=metadata,
                    small={**small, "config.json": json_text(config).encode("utf-8")})
    return out


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and refuse what would have no effect."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.quantize", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("checkpoint", metavar="FOLDER",
                        help="a float checkpoint: folder, hub id or short name such as 4b-mpo")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--plain", action="store_true", help="round to nearest, no smoothing")
    parser.add_argument("--examples", type=int, default=64, metavar="N",
                        help="prompts of nano's world to calibrate on (default %(default)s)")
    parser.add_argument("--alpha", type=float, default=0.5, help="strength of smoothing, 0..1 (default %(default)s)")
    parser.add_argument("--group-size", type=int, default=GROUP, metavar="N", help="default %(default)s, as released")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0],
                        help="with-zero: the range of each group of weights is widened to hold zero (default); "
                             "lmdeploy: it is not, which loses groups of one sign")
    parser.add_argument("--overwrite", action="store_true", help="replace the weights that OUT already holds")
    args = parser.parse_args(argv)
    if args.plain:
        options.refuse(options.given(parser, argv), ("examples", "alpha"), "with --plain, which does not smooth")
    if not 0 <= args.alpha <= 1 or args.examples < 1:
        raise InputError(f"alpha {args.alpha} must be in 0..1 and examples {args.examples} at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    check_free_of_weights(args.out, args.overwrite)
    folder = find(args.checkpoint)
    model = load(folder, dtype="float32")
    if model.config.quantization_config:
        raise InputError(f"{folder} is quantised already; give the float checkpoint it was made from")
    check_sizes(model, args.group_size)
    act_absmax = None
    if not args.plain:
        # Nano's world, because it is at hand and endless; `calibration` itself takes examples of any kind.
        from weights_tools.nano.evaluate import conversations
        prompts = tqdm(conversations(args.examples), "calibrating", args.examples, unit="prompt", disable=None)
        act_absmax = calibration(model, Tokenizer.load(folder), prompts)
    tensors = quantize(model, act_absmax, args.group_size, args.alpha, args.method)
    save_quantized(folder, args.out, tensors, args.group_size, args.overwrite)
    size = sum(p.stat().st_size for p in Path(args.out).iterdir() if p.is_file())
    how = "round to nearest" if args.plain else f"smoothed, alpha {args.alpha}"
    print(f"{args.out}: int4 of group {args.group_size}, {how}, method {args.method}, {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
