"""Make an AWQ int4 checkpoint from a float one: python -m weights_tools.quantize FOLDER OUT

    prompts -> what each linear is given -> smooth -> cut -> round to 4 bits -> pack, one decoder layer after the other

A checkpoint of any size: one layer is in memory at a time. Stopped at any moment, the same command goes on and ends
with the same files. Every method but rtn must see what the layers are given: show it pictures with questions and
answers (--pictures), a text (--text), both, or the statistics of an earlier run or of LMDeploy (--stats).
"""
from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import chain
from pathlib import Path

from minivl import options
from minivl.config import Config
from minivl.files.find import find
from minivl.files.load import opened
from minivl.limits import InputError
from minivl.tokenizer import Tokenizer
from weights_tools import run
from weights_tools.dequantize import DTYPES
from weights_tools.quantize import prompts
from weights_tools.quantize.inputs import read_statistics
from weights_tools.quantize.job import quantize_folder
from weights_tools.quantize.layer import METHODS, Recipe
from weights_tools.quantize.rounding import GROUP

SHOWN = ("pictures", "text", "samples", "length", "max_num")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and refuse what would have no effect."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.quantize", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("checkpoint", metavar="FOLDER",
                        help="a float checkpoint: folder, hub id or short name such as 4b-mpo")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--method", choices=METHODS, default="smooth",
                        help="; ".join(f"{name}: {what}" for name, what in METHODS.items()) + " (default %(default)s)")
    parser.add_argument("--clip", action="store_true",
                        help="cut the largest weights of a group where smaller steps for the others are worth more")
    parser.add_argument("--alpha", type=float, default=0.5,
                        help="strength of smoothing with the method smooth, 0..1 (default %(default)s)")
    parser.add_argument("--group-size", type=int, default=GROUP, metavar="N", help="default %(default)s, as released")
    parser.add_argument("--dtype", choices=DTYPES, default="float32",
                        help="of the arithmetic while calibrating, and with the method lmdeploy also of smoothing and "
                             "rounding (default %(default)s); with bfloat16 scales and norms are stored so too, for "
                             "weights that exceed float16")
    add_shown(parser)
    parser.add_argument("--stats", metavar="FILE", help="what --save-stats wrote, or LMDeploy's inputs_stats.pth")
    parser.add_argument("--save-stats", metavar="FILE.safetensors", help="keep what was seen of the inputs")
    parser.add_argument("--overwrite", action="store_true", help="replace the weights that OUT already holds")
    args = parser.parse_args(argv)
    _check(args, options.given(parser, argv))
    return args


def add_shown(parser: argparse.ArgumentParser):
    """Add the options that say what a model is shown, see `shown`."""
    parser.add_argument("--pictures", metavar="FILE.jsonl",
                        help='rows such as {"image": "a.jpg", "question": "...", "answer": "..."}, as MMPR has them')
    parser.add_argument("--text", metavar="FILE.txt", help="a text")
    parser.add_argument("--samples", type=int, default=32, metavar="N",
                        help="most rows of the pictures, and most pieces of the text (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, metavar="N",
                        help="tokens of a piece of the text (default %(default)s)")
    parser.add_argument("--max-num", type=int, metavar="N",
                        help="most tiles of a picture (default: the checkpoint's own)")


def check_shown(args: argparse.Namespace, given: dict[str, str]):
    """Refuse numbers that cannot be, and an option that would have no effect."""
    if args.text is None:
        options.refuse(given, ("length",), "without --text")
    if args.samples < 1 or args.length < 2:
        raise InputError(f"--samples {args.samples} must be 1 or more, --length {args.length} 2 or more")


def _check(args: argparse.Namespace, given: dict[str, str]):
    if args.method != "smooth":
        options.refuse(given, ("alpha",), f"with --method {args.method}, which takes no other one")
    if args.method == "rtn" and not args.clip and args.save_stats is None:
        options.refuse(given, (*SHOWN, "stats"), "with --method rtn, which looks at no inputs")
    if args.stats is not None:
        options.refuse(given, (*SHOWN, "save_stats"), "with --stats, in place of which they stand")
        if args.method == "awq" or args.clip:
            which = "--clip" if args.clip else "--method awq"
            raise InputError(f"--stats holds the largest and mean inputs, but {which} must see inputs; give --pictures "
                             "or --text")
    check_shown(args, given)
    if not 0 <= args.alpha <= 1:
        raise InputError(f"--alpha {args.alpha} must be in 0..1")
    if args.save_stats is not None and not args.save_stats.endswith(".safetensors"):
        raise InputError(f"--save-stats {args.save_stats} must end with .safetensors, which it will be")


def shown(args: argparse.Namespace, folder: Path, seed: str = "calibration"):
    """Find what a model is shown: (a function that gives the prompts or None, by what they are known).

    seed: of nano's drawings, where nothing else is given.
    """
    config = Config.load(folder)
    parts = []
    if args.pictures is not None:
        parts.append(partial(prompts.from_rows, args.pictures, most=args.samples, max_num=args.max_num, config=config))
    if args.text is not None:
        parts.append(partial(prompts.from_text, args.text, most=args.samples, length=args.length))
    if not parts and prompts.is_nano(folder):
        parts.append(partial(prompts.from_nano, 2 * args.samples, config=config, seed=seed))
    if not parts:
        return None, ""
    tokenizer = Tokenizer.load(folder)
    known = f"{args.samples} {args.length} {args.max_num} {prompts.digest(args.pictures, args.text)}"
    return lambda: chain.from_iterable(part(tokenizer=tokenizer) for part in parts), known


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    folder = find(args.checkpoint)
    recipe = Recipe(args.method, args.group_size, args.alpha, args.clip, DTYPES[args.dtype])
    statistics = None
    calibrate = None
    known = ""
    if args.stats is not None:
        statistics = read_statistics(args.stats, opened(folder)[0].language_model.layers)
        known = prompts.digest(args.stats)
    elif recipe.needs_inputs or args.save_stats is not None:
        calibrate, known = shown(args, folder)
        if calibrate is None:
            raise InputError(f"the method {args.method} must see what the layers are given; give --pictures "
                             "FILE.jsonl, --text FILE.txt or --stats FILE, or take --method rtn")
    quantize_folder(folder, args.out, recipe, prompts=calibrate, calibrated_on=known, statistics=statistics,
                    save_stats=args.save_stats, overwrite=args.overwrite)
    size = sum(p.stat().st_size for p in Path(args.out).iterdir() if p.is_file())
    print(f"{args.out}: int4, {recipe}, {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
