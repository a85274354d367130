"""Were these integers made from that model? python -m weights_tools.quantize.rederive PARENT RELEASED

    parent's weights + inputs_stats.pth -> smoothed and rounded as LMDeploy does -> compared, number by number

A checkpoint made by `lmdeploy lite auto_awq` carries the statistics that it was made by. With them and the float parent
its integers can be computed again. A graphics card rounds here and there otherwise than a processor, so a few numbers
may be one step off: each is looked at, whether the exact value lies so near the middle of two steps that rounding to
half precision explains it. Exit code 1 where something is left to explain.
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minivl import awq, options
from minivl.files.find import find
from minivl.limits import InputError, first_of, is_there
from weights_tools import run
from weights_tools.files import write_text
from weights_tools.quantize.inputs import Inputs, read_statistics
from weights_tools.quantize.layer import PARTS, Recipe, quantize_layer
from weights_tools.quantize.smoothing import smooth_layer
from weights_tools.quantize.stream import Stream

STATISTICS = "inputs_stats.pth"
# What half precision may have moved a weight by, in steps of 15: smoothing, the step and the quotient each round once,
# the factor twice, by 2^-11 of what they are.
ROUNDED = 15 * 5 * 2.0**-11


@dataclass
class Compared:
    """One tensor: how many of its numbers are as derived, and of the others what is known."""
    name: str
    numbers: int
    equal: int
    explained: int = 0      # of the others: within what half precision rounds
    farthest: float = 0.0   # of the others, in steps, or for norms, biases and scales as a share of the value

    @property
    def unexplained(self) -> int:
        """Count the numbers that nothing explains."""
        return self.numbers - self.equal - self.explained


def rederive(parent: Path, released: Path, statistics: str | Path | None = None) -> list[Compared]:
    """Derive the decoder of an AWQ checkpoint from its float parent again, and compare each tensor.

    statistics: see `inputs.read_statistics`; None: inputs_stats.pth in the released folder. Raises InputError.
    """
    ours = Stream(parent)
    theirs = Stream(released)
    config = theirs.model.config.quantization_config
    if config is None or ours.model.config.quantization_config is not None:
        raise InputError(f"{parent} must be the float parent and {released} the AWQ checkpoint made from it; give them "
                         "in this order")
    if _shape(ours) != _shape(theirs):
        raise InputError(f"{parent} has {len(ours.layers)} layers, the first {_shape(ours)[0]}, {released} has "
                         f"{len(theirs.layers)}, the first {_shape(theirs)[0]}; it was made from another model")
    statistics = statistics or released / STATISTICS
    if not is_there(Path(statistics)):
        raise InputError(f"{released} holds no {STATISTICS}, with which it was made; download it too, or give --stats")
    seen = read_statistics(statistics, ours.layers)
    scales = next(t.dtype for name, t in theirs.stored.items() if name.endswith(".scales"))
    recipe = Recipe("lmdeploy", config.group_size, dtype=scales)
    found = []
    for i in tqdm(range(len(ours.layers)), desc="deriving", unit="layer", disable=None):
        found += _layer(ours, theirs, i, recipe, {name: Inputs(absmax=one["absmax"]) for name, one in seen[i].items()})
    return found


def _shape(stream: Stream) -> list[tuple]:
    return [tuple((name, linear.in_features, linear.out_features) for name, linear in layer.linears.items())
            for layer in stream.layers]


def _layer(ours: Stream, theirs: Stream, i: int, recipe: Recipe, seen: dict[str, Inputs]) -> list[Compared]:
    layer = ours.layers[i]
    where = f"{ours.names[layer]}."
    tensors = {name: ours.stored[where + name].read() for name in layer.state_dict()}
    made, _ = quantize_layer(tensors, list(layer.linears), layer.FEEDS, recipe, seen, where)
    exact = {name: t.to(recipe.stored).double() for name, t in tensors.items()}
    smooth_layer(exact, {name: one.absmax for name, one in seen.items()}, layer.FEEDS, recipe.group_size)
    found = []
    for name in layer.linears:
        want = {part: theirs.stored[f"{where}{name}.{part}"].read() for part in PARTS}
        got = {part: made.pop(f"{name}.{part}") for part in PARTS}
        found.append(_numbers(where + name, exact[f"{name}.weight"], got, want))
        found.append(_values(f"{where}{name}.scales", got["scales"], want["scales"]))
    found += [_values(where + name, tensor, theirs.stored[where + name].read()) for name, tensor in made.items()]
    return found


def _numbers(name: str, weight: torch.Tensor, got: dict, want: dict) -> Compared:
    """Compare the numbers 0..15 of a linear, zero points included; weight float64[O, I] is what was to be rounded."""
    q = awq.unpack(want["qweight"])                                                     # (I, O)
    z = awq.unpack(want["qzeros"])                                                      # (I/g, O)
    mine = awq.unpack(got["qweight"])
    zeros = awq.unpack(got["qzeros"])
    g = len(q) // len(z)
    steps = weight.T / want["scales"].double().repeat_interleave(g, 0)                  # (I, O)
    off = (q - (steps + z.repeat_interleave(g, 0)).clamp(0, 15)).abs()[q != mine]
    # A zero point is rounded from the smallest weight of its group.
    low = weight.T.unflatten(0, (-1, g)).amin(1) / want["scales"].double()              # (I/g, O)
    off_zero = (z + low.clamp(-15, 0)).abs()[z != zeros]
    off = torch.cat([off, off_zero])
    return Compared(name, q.numel() + z.numel(), int((q == mine).sum() + (z == zeros).sum()),
                    int((off <= 0.5 + ROUNDED).sum()), float(off.max()) if len(off) else 0.0)


def _values(name: str, got: torch.Tensor, want: torch.Tensor) -> Compared:
    """Compare what is stored in half precision: norms, biases, scales. A few last bits may differ."""
    other = got != want.to(got.dtype)
    share = ((got.double() - want.double()).abs() / want.double().abs().clamp(min=1e-6))[other]
    few = 5 * torch.finfo(got.dtype).eps
    return Compared(name, got.numel(), int((~other).sum()), int((share <= few).sum()),
                    float(share.max()) if len(share) else 0.0)


def told(found: list[Compared]) -> str:
    """Say in a few lines what was found."""
    groups = {"numbers 0..15": [one for one in found if not one.name.endswith((".scales", ".weight", ".bias"))],
              "scales": [one for one in found if one.name.endswith(".scales")],
              "norms and biases": [one for one in found if one.name.endswith((".weight", ".bias"))]}
    lines = []
    for kind, members in groups.items():
        total = sum(one.numbers for one in members)
        equal = sum(one.equal for one in members)
        explained = sum(one.explained for one in members)
        lines.append(f"{kind}: {100 * equal / max(1, total):.4f} % of {total:,} equal"
                     + (f"; of the {total - equal:,} others {explained:,} are explained by half precision"
                        if equal < total else ""))
    bad = sorted((one for one in found if one.unexplained), key=lambda one: -one.unexplained)
    if bad:
        named = [f"{one.name}: {one.unexplained:,} of {one.numbers:,}, the farthest off by {one.farthest:.3g}"
                 for one in bad]
        lines.append(f"not explained, in {len(bad)} tensors:\n  {first_of(named)}")
    return "\n".join(lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.quantize.rederive", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("parent", metavar="PARENT", help="the float checkpoint: folder, hub id or short name")
    parser.add_argument("released", metavar="RELEASED", help="the AWQ checkpoint that was made from it")
    parser.add_argument("--stats", metavar="FILE", help=f"in place of {STATISTICS} in the folder RELEASED")
    parser.add_argument("--json", metavar="FILE", help="write what was found of each tensor")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    found = rederive(find(args.parent), find(args.released), args.stats)
    if args.json is not None:
        write_text(args.json, json.dumps([{**asdict(one), "unexplained": one.unexplained} for one in found], indent=1)
                   + "\n")
    print(told(found))
    return int(any(one.unexplained for one in found))


if __name__ == "__main__":
    sys.exit(run(main))
