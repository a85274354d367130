"""Which way of making nano int4 is best: python -m weights_tools.nano.int4 OUT

    float16 -> each method, calibrated on each kind of prompt -> held-out conversations -> right answers, KL

All twins read the same conversations, each answer after the right tokens before it. Right is an answer all of whose
tokens are the most probable ones: what greedy generation would write. KL is the mean over the answers' tokens of
KL(float16 || int4), in nats: how far the probabilities moved, also where the answer stays.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from minivl import load, options
from minivl.chat.requests import read_request
from minivl.config import Config
from minivl.fast.threads import at_most
from minivl.files.find import find
from minivl.limits import InputError
from minivl.model import MiniVL
from minivl.tiling import normalise
from minivl.tokenizer import Tokenizer
from weights_tools import run
from weights_tools.files import write_text
from weights_tools.nano import world
from weights_tools.nano.data import MICRO, collate, ids_of, tiles_of
from weights_tools.nano.evaluate import conversations
from weights_tools.nano.train import turns_right
from weights_tools.quantize import Recipe, quantize_folder
from weights_tools.quantize.prompts import from_nano
from weights_tools.train.objective import answer_logits, supervised

SHOWN = 64              # prompts to calibrate on, as the shipped int4
WAYS = (Recipe("rtn"), Recipe("lmdeploy"), Recipe("smooth"), Recipe("awq"), Recipe("awq", clip=True))


def texts(config: Config, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list]]:
    """Yield conversations of nano's world without their pictures: what LMDeploy's calibration would see."""
    for conversation in conversations(SHOWN):
        yield read_request([_only_text(message) for message in conversation], config, tokenizer)


def _only_text(message: dict) -> dict:
    if isinstance(message["content"], str):
        return message
    words = "".join(item["text"] for item in message["content"] if item["type"] == "text")
    words = re.sub(r"[^\n]*<image>\n?", "", words)
    return {**message, "content": words}


def pictures(config: Config, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list]]:
    """Yield the same conversations' pictures, with next to no text."""
    for conversation in conversations(SHOWN):
        shown = [item for message in conversation for item in message["content"]
                 if isinstance(item, dict) and item["type"] != "text"]
        for item in shown:
            yield read_request([{"role": "user", "content": [{"type": "text", "text": "Look!"}, item]}], config,
                               tokenizer)


def both(config: Config, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list]]:
    """Give the conversations as they are."""
    return from_nano(SHOWN, config, tokenizer)


KINDS = {"text only": texts, "pictures only": pictures, "both": both}


def twins(source: Path, out: Path) -> dict[str, Path]:
    """Make every int4 twin that is not there yet: name -> folder."""
    config = Config.load(source)
    tokenizer = Tokenizer.load(source)
    made = {}
    for recipe in WAYS:
        for kind, prompts in KINDS.items() if recipe.needs_inputs else (("", None),):
            name = f"{recipe.method}{', clipped' * recipe.clip}" + f", {kind}" * bool(kind)
            folder = out / name.replace(", ", "-").replace(" ", "-")
            if not (folder / "model.safetensors").exists():
                quantize_folder(source, folder, recipe, prompts=prompts and partial(prompts, config, tokenizer),
                                calibrated_on=kind)
            made[name] = folder
    return made


@torch.no_grad()
def compare(models: dict[str, MiniVL], tokenizer: Tokenizer, n: int, seed="held out") -> dict[str, dict]:
    """Try models on n conversations: name -> {"tasks": {task: share right}, "n": {task: questions}, "KL": nats}.

    The first model is the one that KL compares the others with.
    """
    right = {name: defaultdict(int) for name in models}
    asked = defaultdict(int)
    moved = dict.fromkeys(models, 0.0)
    tokens = 0
    for start in tqdm(range(0, n, MICRO), desc="asking", unit="batch", disable=None):
        examples = [world.example(seed, i) for i in range(start, min(n, start + MICRO))]
        tiles = [tiles_of(e) for e in examples]
        ids, labels, x = collate([ids_of(e, t, tokenizer) for e, t in zip(examples, tiles)], tiles, tokenizer)
        first = None
        for name, model in models.items():
            logits, wanted = answer_logits(model, ids, labels, normalise(x))
            log_p = logits.log_softmax(-1)
            first = log_p if first is None else first
            moved[name] += float((first.exp() * (first - log_p)).sum())
            for task, is_right in turns_right(examples, supervised(labels), logits.argmax(-1) == wanted):
                right[name][task] += is_right
                asked[task] += name == next(iter(models))
        tokens += len(wanted)
    return {name: {"tasks": {task: right[name][task] / asked[task] for task in sorted(asked)},
                   "n": dict(sorted(asked.items())), "KL": moved[name] / tokens} for name in models}


def measure(source: Path, out: Path, n: int) -> dict[str, dict]:
    """Make the twins of a float nano in the folder `out`, and try all on n conversations: see `compare`."""
    folders = {"float16": source, **twins(source, out)}
    with at_most(1):
        return compare({name: load(folder) for name, folder in folders.items()}, Tokenizer.load(source), n)


def table(found: dict[str, dict]) -> str:
    """Write one row for each way: the mean over tasks, KL, and the task that lost most."""
    first = next(iter(found.values()))["tasks"]
    lines = ["| int4 by, calibrated on | mean of the tasks | KL | loses most |", "|---|---|---|---|"]
    for name, one in found.items():
        mean = sum(one["tasks"].values()) / len(one["tasks"])
        loss = {task: first[task] - share for task, share in one["tasks"].items()}
        worst = max(loss, key=loss.get)
        lost = f"{worst} {100 * first[worst]:.1f} to {100 * one['tasks'][worst]:.1f}" if loss[worst] > 0 else ""
        lines.append(f"| {name} | {100 * mean:.2f} | {one['KL']:.5f} | {lost} |")
    return "\n".join(lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.nano.int4", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("out", metavar="OUT", help="folder for the twins; those that are there already are tried again")
    parser.add_argument("-n", type=int, default=2000, help="held-out conversations (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers")
    args = parser.parse_args(argv)
    if args.n < 1:
        raise InputError(f"-n {args.n} must be 1 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    found = measure(find("nano"), Path(args.out), args.n)
    print(table(found))
    print(f"{sum(found['float16']['n'].values())} questions of {len(found['float16']['n'])} tasks")
    if args.json is not None:
        write_text(args.json, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
