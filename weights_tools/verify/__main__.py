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
from dataclasses import replace
from pathlib import Path

from minivl import Tokenizer, load_image
from minivl.files.find import SHIPPED, find
from minivl.config import Config
from minivl.limits import InputError, Limits
from weights_tools import run
from weights_tools.verify import compare, inputs, report

ROOT = Path(__file__).resolve().parents[2]
# Traces of the shipped models, recorded from transformers and committed, and what they were asked.
NANO = Path(__file__).with_name("nano")
NANO_PICTURE, NANO_PROMPT = SHIPPED["nano"].parent / "samples" / "small-print.png", "What does the small print say?"


def reference_python(given=None) -> Path:
    """The interpreter of the environment with transformers."""
    python = Path(given or os.environ.get("MINIVL_REFERENCE") or ROOT / ".reference" / "bin" / "python")
    if not python.exists():
        raise InputError(f"there is no reference environment ({python} does not exist); build it with `make reference`, "
                         "name its python with --python, or compare with a recorded trace (--trace FILE)")
    return python


def record(checkpoint, pictures: list, prompt: str, path, *, max_num: int, max_new_tokens: int = 8, dtype: str = "float32",
           stages=None, trust_remote_code: bool = False, like=None, image_token_id=None, python=None, resident: float = 4.0) -> Path:
    """Run the reference in a process of its own; the trace's path. `like`: take ids and pixels from this trace instead."""
    folder = find(checkpoint)
    marks = prompt.count("<image>")
    if marks not in (0, len(pictures)):
        raise InputError(f"the prompt has {marks} <image> marks but {len(pictures)} pictures are given; write one for each, or none")
    for picture in pictures:
        load_image(picture)     # what minivl refuses need not be recorded
    if not Path(path).parent.is_dir():
        raise InputError(f"there is no folder {Path(path).parent}; make it first")
    python = reference_python(python)
    if like:
        request = {"like": str(Path(like).resolve()), "image_token_id": image_token_id}
    else:
        messages = [{"role": "user", "content": "<image>\n" * (len(pictures) - marks) + prompt}]
        request = {"pictures": [str(Path(p).resolve()) for p in pictures], "messages": messages, "max_num": max_num}
    request |= {"max_new_tokens": max_new_tokens, "dtype": dtype, "stages": stages}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "request.json"
        file.write_text(json.dumps(request), encoding="utf-8")
        command = [str(python), str(Path(__file__).with_name("reference.py")), str(folder), str(file), str(path),
                   "--resident", str(resident), *(["--trust-remote-code"] if trust_remote_code else [])]
        # Its own packages only, no access to accounts, and no downloads by the hub's client.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.endswith("TOKEN")}
        code = subprocess.run(command, env={**environment, "HF_HUB_OFFLINE": "1"}).returncode
    if code < 0:
        raise InputError(f"the reference was killed by signal {-code}, if 9 perhaps for lack of memory; try fewer pictures or --max-tiles")
    if code:
        raise InputError(f"the reference could not run (exit code {code}); its message stands above")
    return Path(path)


def nano() -> int:
    """The shipped models against their committed traces; 0 or 1."""
    agree = True
    for name in ("nano", "nano-awq"):
        folder = find(name)
        result = compare.compare(folder, compare.Trace.open(NANO / folder.name / "float32.safetensors"), pictures=[NANO_PICTURE])
        print(f"== {name}\n{report.text(result, words_of(folder))}\n")
        agree &= result.agrees
    return 0 if agree else 1


def record_nano(**how) -> Path:
    """Record those traces anew, after a training: kilobytes each. The folder.

    awq/ has also what weights_tools.verify.mistakes compares with. In bfloat16 every stage needs its whole input, so only the
    four that the planted mistakes need are kept.
    """
    from weights_tools.verify.mistakes import quiet
    with tempfile.TemporaryDirectory() as scratch:
        path, half = Path(scratch) / "trace.safetensors", ["vit.embeddings", "vit.layers.0", "inputs_embeds", "llm.layers.0"]
        for checkpoint, to, dtype, stages in (
                ("nano", "float16/float32", "float32", None), ("nano-awq", "awq/float32", "float32", None),
                (quiet("nano-awq", Path(scratch) / "quiet"), "awq/quiet", "float32", None), ("nano-awq", "awq/bfloat16", "bfloat16", half)):
            record(checkpoint, [NANO_PICTURE], NANO_PROMPT, path, max_num=6, max_new_tokens=0 if stages else 12, dtype=dtype,
                   stages=stages, **how)
            (NANO / to).parent.mkdir(parents=True, exist_ok=True)
            compare.shrink(compare.Trace.open(path), NANO / f"{to}.safetensors", stages or ())
    return NANO


def words_of(folder: Path):
    """Token id -> how it reads."""
    try:
        tokenizer = Tokenizer.load(folder)
        return lambda id: tokenizer.decode([id], skip_special_tokens=False)
    except InputError:      # a trace of ids alone can be compared without
        return str


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights_tools.verify", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="folder or hub id")
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="files")
    parser.add_argument("-p", "--prompt", help="the question (default: describe this image)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--record", metavar="FILE", help="only run the reference and write its trace")
    what.add_argument("--trace", metavar="FILE", help="only compare, with a trace recorded before")
    what.add_argument("--shrink", nargs=2, metavar=("TRACE", "FILE"), help="write a trace with a few hundred values of each stage")
    what.add_argument("--nano", action="store_true", help="the shipped models against the traces that lie beside this tool")
    what.add_argument("--record-nano", action="store_true", help="record those traces anew")
    what.add_argument("--inputs", action="store_true", help="what four engines feed the model for this question, side by side")
    parser.add_argument("--stages", nargs="+", metavar="PATTERN", help='only these, e.g. "vit.*" logits')
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers of tower and decoder; no answer")
    parser.add_argument("--max-tiles", type=int, metavar="N", help="most tiles of a picture (default: the checkpoint's)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of the greedy answer (default 8)")
    parser.add_argument("--dtype", choices=list(compare.TOLERANCE), help="of both (default float32, or that of the trace)")
    parser.add_argument("--local", action="store_true",
                        help="every stage on the reference's own input to it: errors do not add up, as half precision needs")
    parser.add_argument("--tolerance", type=float, help="relative error of a stage that is still agreement")
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="the reference is the Python code inside CHECKPOINT, which can do anything on this machine")
    parser.add_argument("--python", metavar="PATH", help="of the reference environment (default: .reference/bin/python)")
    parser.add_argument("--resident", type=float, default=4.0, metavar="GB",
                        help="the reference keeps models up to this size in memory, larger ones go layer by layer (default %(default)s; code inside a checkpoint runs whole)")
    parser.add_argument("--json", metavar="FILE", help="the result for programs")
    parser.add_argument("--html", metavar="FILE", help="the result as one page with pictures")
    args = parser.parse_intermixed_args(argv)
    if args.shrink:
        print(compare.shrink(compare.Trace.open(args.shrink[0]), args.shrink[1]))
        return 0
    if args.nano:
        return nano()
    if args.record_nano:
        print(record_nano(python=args.python))
        return 0
    if not args.checkpoint:
        raise InputError("give a checkpoint: a folder, or a hub id such as OpenGVLab/InternVL2_5-4B-MPO-AWQ")
    folder = find(args.checkpoint)
    if args.inputs:
        config = Config.load(folder)
        if args.max_tiles:
            config = replace(config, max_dynamic_patch=args.max_tiles)
        print(inputs.text(inputs.engines(config, Tokenizer.load(folder), args.pictures, args.prompt or "describe this image")))
        return 0
    for file in (args.json, args.html):
        if file and not Path(file).parent.is_dir():
            raise InputError(f"there is no folder {Path(file).parent}; make it first")
    given = [flag for flag, value in (("--prompt", args.prompt), ("--max-tiles", args.max_tiles), ("--max-new-tokens", args.max_new_tokens),
                                      ("--trust-remote-code", args.trust_remote_code or None)) if value is not None]
    if args.trace and given:
        raise InputError(f"{', '.join(given)} belong to recording; the trace {args.trace} has its own")
    least, most = Config.load(folder).min_dynamic_patch, Limits.tiles_per_picture
    if args.max_tiles is not None and not least <= args.max_tiles <= most:
        raise InputError(f"--max-tiles is {args.max_tiles}, it must be in {least}..{most}")
    if args.layers is not None and args.stages:
        raise InputError("give --layers or --stages, not both")
    stages, tokens = args.stages, 8 if args.max_new_tokens is None else args.max_new_tokens
    if args.stages or args.local:
        tokens = 0          # the answer is not compared then
    if args.layers is not None:
        stages = [f"{part}.layers.{i}" for part in ("vit", "llm") for i in range(args.layers)]
        stages += ["vit.embeddings", "pixel_unshuffle", "projector", "inputs_embeds"]
        tokens = 0
    with tempfile.TemporaryDirectory() as scratch:
        path = args.trace
        if not path:
            path = args.record or Path(scratch) / "trace.safetensors"
            record(folder, args.pictures, "describe this image" if args.prompt is None else args.prompt, path, max_num=args.max_tiles or Config.load(folder).max_dynamic_patch,
                   max_new_tokens=tokens, dtype=args.dtype or "float32", stages=stages, trust_remote_code=args.trust_remote_code,
                   python=args.python, resident=args.resident)
            if args.record:
                print(path)
                return 0
        result = compare.compare(folder, compare.Trace.open(path), pictures=args.pictures or None, stages=stages, dtype=args.dtype,
                                 tolerance=args.tolerance, local=args.local)
    words = words_of(folder)
    print(report.text(result, words))
    if args.json:
        Path(args.json).write_text(json.dumps(result.json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if args.html:
        Path(args.html).write_text(report.html(result, words), encoding="utf-8")
    return 0 if result.agrees else 1


if __name__ == "__main__":
    sys.exit(run(main))
