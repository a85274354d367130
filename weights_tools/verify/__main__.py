"""Does minivl compute what the original computes? python -m weights_tools.verify CHECKPOINT PICTURE -p PROMPT

    the original, in its own environment -> trace;   minivl on the same input -> where they first differ

Exit code 0: agrees; 1: differs; 2: could not run.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from minivl import MiniVL, Tokenizer, load_image, options
from minivl.config import Config
from minivl.files.find import SHIPPED, find
from minivl.limits import InputError, Limits
from minivl.terminal import check_text
from minivl.tracing import kind, stages
from weights_tools import run
from weights_tools.files import told, unfinished, write_text
from weights_tools.verify import compare, inputs, report
from weights_tools.verify.recording import Recording, shrink

ROOT = Path(__file__).resolve().parents[2]
# Traces of the shipped models, recorded from transformers and committed, and what they were asked.
NANO = Path(__file__).with_name("nano")
NANO_PICTURE = SHIPPED["nano"].parent / "samples" / "small-print.png"
NANO_PROMPT = "What does the small print say?"
QUESTION = "describe this image"
TOKENS = 8          # of the answer, unless more or fewer are asked for
# What each way of working uses of the other options; whatever else is given is refused. Without any: all of them.
USED = {
    "record": ("checkpoint", "pictures", "prompt", "stages", "layers", "max_tiles", "max_new_tokens", "dtype", "local",
               "trust_remote_code", "python", "resident"),
    "trace": ("checkpoint", "pictures", "stages", "layers", "dtype", "local", "tolerance", "json", "html"),
    "shrink": (),
    "nano": ("stages", "layers", "tolerance", "json"),
    "record_nano": ("python", "resident"),
    "inputs": ("checkpoint", "pictures", "prompt", "max_tiles"),
}
WHY = {
    "record": ", which compares nothing",
    "trace": ", which records nothing: the trace has its own",
    "nano": ", which compares two shipped models with shrunk float32 traces; for one of them give its name, a picture "
            "and --trace",
}


# ---- running the reference ------------------------------------------------------------------------------------------

def reference_python(given: str | None = None) -> Path:
    """Find the interpreter of the environment with transformers."""
    python = Path(given or os.environ.get("MINIVL_REFERENCE") or ROOT / ".reference" / "bin" / "python")
    if not python.exists():
        raise InputError(f"there is no reference environment ({python} does not exist); build it with "
                         "`make reference`, name its python with --python, or compare with a recorded trace (--trace "
                         "FILE)")
    return python


def record(checkpoint: str | Path, pictures: list, prompt: str, path: str | Path, *, max_num: int,
           max_new_tokens: int = TOKENS, dtype: str = "float32", stages: list | None = None,
           trust_remote_code: bool = False, like: str | Path | None = None, image_token_id: int | None = None,
           python: str | None = None, resident: float = 4.0) -> Path:
    """Run the reference in a process of its own and return the trace's path.

    `like`: take ids and pixels from this trace instead of pictures and prompt. `resident`: models up to this many GB
    stay in memory.
    """
    folder = find(checkpoint)
    marks = prompt.count("<image>")
    if marks not in (0, len(pictures)):
        raise InputError(f"the prompt has {marks} <image> marks but {len(pictures)} pictures are given; write one for "
                         "each, or none")
    for picture in pictures:
        load_image(Path(picture))       # what minivl refuses need not be recorded
    check_folder(path)
    python = reference_python(python)
    if like:
        request = {"like": str(Path(like).resolve()), "image_token_id": image_token_id}
    else:
        messages = [{"role": "user", "content": "<image>\n" * (len(pictures) - marks) + prompt}]
        request = {"pictures": [str(Path(p).resolve()) for p in pictures], "messages": messages, "max_num": max_num}
    request |= {"max_new_tokens": max_new_tokens, "dtype": dtype, "stages": stages}
    options = ["--resident", str(resident), *(["--trust-remote-code"] if trust_remote_code else [])]
    path = Path(path)
    left = "no trace is left there"
    with unfinished(path.parent, left) as new:
        run_reference(python, folder, request, new / path.name, options)
        with told(path, left):
            os.replace(new / path.name, path)
    return path


def run_reference(python: Path, folder: Path, request: dict, path: str | Path, options: list):
    """Start reference.py on a request; InputError if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "request.json"
        file.write_text(json.dumps(request), encoding="utf-8")
        script = Path(__file__).with_name("reference.py")
        # Its own packages only, no access to accounts, and no downloads by the hub's client.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.endswith("TOKEN")}
        code = subprocess.run([str(python), str(script), str(folder), str(file), str(path), *options],
                              env={**environment, "HF_HUB_OFFLINE": "1"}).returncode
    if code < 0:
        raise InputError(f"the reference was killed by signal {-code}, if 9 perhaps for lack of memory; try fewer "
                         "pictures or --max-tiles")
    if code:
        raise InputError(f"the reference could not run (exit code {code}); its message stands above")


def check_folder(path: str | Path):
    """Refuse a file to write whose folder does not exist, before minutes of work."""
    if not Path(path).parent.is_dir():
        raise InputError(f"there is no folder {Path(path).parent}; make it first")


# ---- the shipped models ---------------------------------------------------------------------------------------------

def nano(args: argparse.Namespace) -> int:
    """Compare the shipped models with their committed traces; 0 or 1."""
    results = {}
    for name in ("nano", "nano-awq"):
        folder = find(name)
        recording = Recording.open(NANO / folder.name / "float32.safetensors")
        results[name] = compare.compare(folder, recording, pictures=[NANO_PICTURE], stages=part_of(args, folder),
                                        tolerance=args.tolerance)
        print(f"== {name}\n{report.text(results[name], words_of(folder))}\n")
    if args.json:
        write_json({name: result.json() for name, result in results.items()}, args.json)
    return 0 if all(result.agrees for result in results.values()) else 1


def record_nano(**how) -> Path:
    """Record those traces anew, after a training: kilobytes each. The folder.

    awq/ has also what weights_tools.verify.mistakes compares with. In bfloat16 every stage needs its whole input, so
    only the four that the planted mistakes need are kept.
    """
    from weights_tools.verify.mistakes import quiet
    half = ["vit.embeddings", "vit.layers.0", "inputs_embeds", "llm.layers.0"]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.safetensors"
        runs = (("nano", "float16/float32", "float32", None),
                ("nano-awq", "awq/float32", "float32", None),
                (quiet("nano-awq", Path(scratch) / "quiet"), "awq/quiet", "float32", None),
                ("nano-awq", "awq/bfloat16", "bfloat16", half))
        for checkpoint, to, dtype, only in runs:
            record(checkpoint, [NANO_PICTURE], NANO_PROMPT, path, max_num=6, max_new_tokens=0 if only else 12,
                   dtype=dtype, stages=only, **how)
            (NANO / to).parent.mkdir(parents=True, exist_ok=True)
            shrink(Recording.open(path), NANO / f"{to}.safetensors", only or ())
    return NANO


# ---- the command ----------------------------------------------------------------------------------------------------

def words_of(folder: Path) -> Callable[[int], str]:
    """Make the function that says how a token id reads."""
    try:
        tokenizer = Tokenizer.load(folder)
        return lambda id: tokenizer.decode([id], skip_special_tokens=False)
    except InputError:      # a trace of ids alone can be compared without
        return str


def first_layers(folder: Path, n: int) -> list:
    """Name the stages before the decoder's norm without the layers from number `n` on."""
    with torch.device("meta"):
        model = MiniVL(Config.load(folder))
    names = [name for name, _, which in stages(model) if which in ("in", "out")]
    numbers = {name: kind(name)[1] for name in names[:names.index("llm.norm")]}
    return [name for name, number in numbers.items() if number is None or number < n]


def part_of(args: argparse.Namespace, folder: Path) -> list | None:
    """List the patterns of the stages that are asked for; None: all."""
    return args.stages if args.layers is None else first_layers(folder, args.layers)


def write_json(result: dict, path: str):
    """Write the result for programs."""
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def check_tiles(args: argparse.Namespace, folder: Path):
    """Refuse a --max-tiles that the checkpoint cannot have."""
    least = Config.load(folder).min_dynamic_patch
    most = Limits.tiles_per_picture
    if args.max_tiles is not None and not least <= args.max_tiles <= most:
        raise InputError(f"--max-tiles is {args.max_tiles}, it must be in {least}..{most}")


def show_inputs(args: argparse.Namespace, folder: Path) -> int:
    """Print what four engines feed the model."""
    config = Config.load(folder)
    if args.max_tiles:
        config = replace(config, max_dynamic_patch=args.max_tiles)
    fed = inputs.engines(config, Tokenizer.load(folder), args.pictures, args.prompt or QUESTION)
    print(inputs.text(fed))
    return 0


def record_asked(args: argparse.Namespace, folder: Path, path: str | Path, only: list | None) -> Path:
    """Record what the options ask for."""
    tokens = TOKENS if args.max_new_tokens is None else args.max_new_tokens
    if only or args.local:
        tokens = 0          # the answer is not compared then
    return record(folder, args.pictures, QUESTION if args.prompt is None else args.prompt, path,
                  max_num=args.max_tiles or Config.load(folder).max_dynamic_patch, max_new_tokens=tokens,
                  dtype=args.dtype or "float32", stages=only, trust_remote_code=args.trust_remote_code,
                  python=args.python, resident=args.resident)


def record_and_compare(args: argparse.Namespace, folder: Path) -> int:
    """Record, compare, or both; print the report and write its files. The exit code."""
    only = part_of(args, folder)
    if args.record:
        print(record_asked(args, folder, args.record, only))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        path = args.trace or record_asked(args, folder, Path(scratch) / "trace.safetensors", only)
        result = compare.compare(folder, Recording.open(path), pictures=args.pictures or None, stages=only,
                                 dtype=args.dtype, tolerance=args.tolerance, local=args.local)
    words = words_of(folder)
    print(report.text(result, words))
    if args.json:
        write_json(result.json(), args.json)
    if args.html:
        write_text(args.html, report.html(result, words))
    return 0 if result.agrees else 1


def parser_of_options() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.verify", description=__doc__,
                                     formatter_class=options.Help)
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CHECKPOINT", help="folder, hub id, or a name: nano, nano-awq, 4b-mpo-awq")
    add("pictures", nargs="*", metavar="PICTURE", help="files")
    add("-p", "--prompt", help=f"the question (default: {QUESTION})")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--record", metavar="FILE", help="only run the reference and write its trace")
    what.add_argument("--trace", metavar="FILE", help="only compare, with a trace recorded before")
    what.add_argument("--shrink", nargs=2, metavar=("TRACE", "FILE"),
                      help="write a trace with a few hundred values of each stage")
    what.add_argument("--nano", action="store_true",
                      help="the shipped models against the traces that lie beside this tool")
    what.add_argument("--record-nano", action="store_true", help="record those traces anew")
    what.add_argument("--inputs", action="store_true",
                      help="what four engines feed the model for this question, side by side")
    add("--stages", nargs="+", metavar="PATTERN", help='only these, e.g. "vit.*" logits')
    add("--layers", type=int, metavar="N", help="only the first N layers of tower and decoder; no answer")
    add("--max-tiles", type=int, metavar="N", help="most tiles of a picture (default: the checkpoint's)")
    add("--max-new-tokens", type=int, metavar="N", help=f"of the greedy answer (default {TOKENS})")
    add("--dtype", choices=list(compare.TOLERANCE), help="of both (default float32, or that of the trace)")
    add("--local", action="store_true",
        help="every stage on the reference's own input to it: errors do not add up, as half precision needs")
    add("--tolerance", type=float, help="relative error of a stage that is still agreement")
    add("--trust-remote-code", action="store_true",
        help="the reference is the Python code inside CHECKPOINT, which can do anything on this machine")
    add("--python", metavar="PATH", help="of the reference environment (default: .reference/bin/python)")
    add("--resident", type=float, default=4.0, metavar="GB",
        help="the reference keeps models up to this size in memory, larger ones go layer by layer (default "
             "%(default)s; code inside a checkpoint runs whole)")
    add("--json", metavar="FILE", help="the result for programs")
    add("--html", metavar="FILE", help="the result as one page with pictures")
    return parser


def arguments(argv: list | None = None) -> argparse.Namespace:
    """Read the command line; refuse options that contradict each other, and those that would have no effect."""
    parser = parser_of_options()
    args = parser.parse_intermixed_args(argv)
    found = options.given(parser, argv, intermixed=True)
    for mode, used in USED.items():
        if mode in found:
            options.refuse(found, found.keys() - {mode, *used}, f"with {found[mode]}{WHY.get(mode, '')}")
    if args.layers is not None and args.stages:
        raise InputError("give --layers or --stages, not both")
    if args.layers is not None or args.stages or args.local:
        options.refuse(found, ("max_new_tokens",), "with --stages, --layers or --local: no answer is compared then")
    if args.trust_remote_code:
        options.refuse(found, ("resident",), "with --trust-remote-code: code inside a checkpoint runs whole")
    for name, least in (("layers", 0), ("max_new_tokens", 0), ("resident", 0), ("tolerance", 0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise InputError(f"{options.option(name)} is {value}, it must be {least} or more")
    if args.prompt is not None:
        check_text(args.prompt, "the question of -p")
    for file in (args.json, args.html):
        if file:
            check_folder(file)
    if not {"shrink", "nano", "record_nano"} & found.keys() and not args.checkpoint:
        raise InputError("give a checkpoint: a folder, or a hub id such as OpenGVLab/InternVL2_5-4B-MPO-AWQ")
    return args


def main(argv: list | None = None) -> int:
    """Run the command; its exit code."""
    args = arguments(argv)
    if args.shrink:
        trace, small = args.shrink
        print(shrink(Recording.open(trace), small))
        return 0
    if args.nano:
        return nano(args)
    if args.record_nano:
        print(record_nano(python=args.python, resident=args.resident))
        return 0
    folder = find(args.checkpoint)
    check_tiles(args, folder)
    if args.inputs:
        return show_inputs(args, folder)
    return record_and_compare(args, folder)


if __name__ == "__main__":
    sys.exit(run(main))
